"""A body that says where zeros are instead of sending them: our extension of tus, ``elemento-sparse``.

A body of ``CONTENT_TYPE`` is a sequence of frames: two unsigned numbers of 8 bytes, big-endian, *data* and *zeros*,
then *data* bytes. It stands for those bytes and *zeros* zeros behind them. Everything else is as in tus:
``Upload-Offset`` counts what the body stands for, and what arrived of a body that broke off is kept.
"""

import struct
from typing import Final

from elemento_storage.uploads.content import Content

CONTENT_TYPE: Final = "application/vnd.elemento.sparse+octet-stream"
FRAME: Final = struct.Struct(">QQ")


class TooLong(Exception):
    """More bytes than the upload has."""


class SparseBody:
    """Takes a body piece by piece and writes what it stands for. Raises TooLong at what is beyond ``end``."""

    def __init__(self, content: Content, end: int) -> None:
        self._content = content
        self._end = end
        self._head = bytearray()
        self._data = 0  # bytes of the frame's data that are still to come
        self._zeros = 0

    @property
    def is_whole(self) -> bool:
        """Whether the body may end here: between two frames."""
        return not self._head and not self._data

    def write(self, piece: memoryview) -> None:
        """The next bytes of the body. Blocks. Raises TooLong, OSError."""
        while piece:
            if self._data:
                take = min(self._data, len(piece))
                self._content.write(piece[:take])
                self._data -= take
                piece = piece[take:]
                self._end_of_data()
            else:
                take = min(FRAME.size - len(self._head), len(piece))
                self._head += piece[:take]
                piece = piece[take:]
                if len(self._head) == FRAME.size:
                    self._data, self._zeros = FRAME.unpack(self._head)
                    self._head.clear()
                    if self._data + self._zeros > self._end - self._content.position:
                        raise TooLong
                    self._end_of_data()

    def _end_of_data(self) -> None:
        if not self._data:
            self._content.skip(self._zeros)
            self._zeros = 0


class PlainBody:
    """A body that is the bytes themselves. Raises TooLong at what is beyond ``end``."""

    is_whole = True

    def __init__(self, content: Content, end: int) -> None:
        self._content = content
        self._end = end

    def write(self, piece: memoryview) -> None:
        """The next bytes. Blocks. Raises TooLong, OSError."""
        if self._content.position + len(piece) > self._end:
            raise TooLong
        self._content.write(piece)
