"""Writing bytes that arrive one after the other so that long runs of zeros become holes, and taking their digest."""

import os
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from hashlib import _Hash

_GRANULE: Final = 4096  #: what file systems allocate
_HOLE: Final = 65536  #: within a piece no hole is shorter: those cost more in the file system's tables than they save
_ZEROS: Final = bytes(_GRANULE)


class SparseWriter:
    """Fills a file from front to back. Blocks.

    What was in the file before has to be cut off: a hole is made by not writing.
    """

    def __init__(self, descriptor: int, hasher: "_Hash | None" = None, position: int = 0) -> None:
        self._descriptor = descriptor
        self._hasher = hasher
        self.position = position  #: how many bytes there are by now

    def write(self, piece: bytes | memoryview) -> None:
        """Take the next bytes. Raises OSError."""
        view = memoryview(piece)
        if self._hasher is not None:
            self._hasher.update(view)
        data_start = 0  #: from here to where a hole begins is data that is not written yet
        zeros_start = start = 0  #: from ``zeros_start`` to ``start`` there are zeros
        while start < len(view):
            # Up to the next multiple in the file, so that a hole is a whole number of what can be left out.
            end = min(len(view), start + _GRANULE - (self.position + start) % _GRANULE)
            if view[start:end] != _ZEROS[: end - start]:
                # Zeros at the edges of a piece may be part of a longer run.
                if start - zeros_start >= _HOLE or (zeros_start == 0 and start):
                    self._put(view[data_start:zeros_start], self.position + data_start)
                    data_start = start
                zeros_start = end
            start = end
        self._put(view[data_start:zeros_start], self.position + data_start)
        self.position += len(view)

    def _put(self, view: memoryview, position: int) -> None:
        while view:
            written = os.pwrite(self._descriptor, view, position)
            view, position = view[written:], position + written

    def finish(self) -> None:
        """Give the file its length, holes at its end included. Raises OSError."""
        os.ftruncate(self._descriptor, self.position)


def hash_piece(descriptor: int, hasher: "_Hash", position: int, length: int) -> int:
    """Feed up to ``length`` bytes of a file to a hash; how many there were. Blocks. Raises OSError."""
    buffer = memoryview(bytearray(1 << 20))
    done = 0
    while done < length:
        count = os.preadv(descriptor, [buffer[: min(len(buffer), length - done)]], position + done)
        if not count:
            break
        hasher.update(buffer[:count])
        done += count
    return done
