"""One transfer of bytes into an upload: a PATCH, or the whole of it at once. Everything here blocks."""

import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from elemento_storage.uploads.content import Content, Hash
from elemento_storage.uploads.sparse import PlainBody, SparseBody, TooLong
from elemento_storage.uploads.turn import Turn

_BUFFER_BYTES: Final = 1 << 20
_KEEP_BYTES: Final = 512 << 20  # a transfer that goes on for long is made safe in between, this often
_KEEP_S: Final = 10.0

__all__ = ["BrokenOff", "Checksum", "ChecksumMismatch", "TooLong", "Transfer"]


class BrokenOff(Exception):
    """The client went away, or sent nothing for too long, before the end of its body."""


class ChecksumMismatch(Exception):
    """What arrived is not what was sent; none of it is kept."""


@dataclass(frozen=True)
class Checksum:
    """What the body's hash has to be."""

    hash: Hash
    expected: bytes


class Body(Protocol):
    """What takes the bytes of a request's body."""

    @property
    def is_whole(self) -> bool:
        """Whether it may end here."""

    def write(self, piece: memoryview) -> None:
        """The next bytes. Raises TooLong, OSError."""


class Transfer:
    """From the first byte of a body to the last.

    ``turn`` is None where nobody can carry on (the client that breaks off begins anew), so that nothing has to be
    recorded on the way. ``end`` is where the upload ends, or what there is room for.
    """

    def __init__(
        self,
        content: Content,
        end: int,
        *,
        turn: Turn | None = None,
        sparse: bool = False,
        checksum: Checksum | None = None,
    ) -> None:
        self._content = content
        self._turn = turn
        self._checksum = checksum
        self._begun_at = content.position
        self._kept = content.position
        self._kept_at = time.monotonic()
        self.unread = 0  #: bytes of the body that are still in the socket
        self._body: Body = SparseBody(content, end) if sparse else PlainBody(content, end)

    @property
    def position(self) -> int:
        """How far the bytes go that have arrived."""
        return self._content.position

    def feed(self, pieces: Sequence[bytes]) -> None:
        """The next bytes, as they come from an application server. Raises TooLong, OSError."""
        self._take(memoryview(bytearray().join(pieces)))

    def receive(self, source: socket.socket, count: int, first: bytes) -> None:
        """``first`` and what follows in ``source``, ``count`` bytes in all; the socket's time-out bounds each wait.

        Raises BrokenOff after what arrived was taken; TooLong, OSError.
        """
        buffer = memoryview(bytearray(max(_BUFFER_BYTES, len(first))))
        buffer[: len(first)] = first
        filled, self.unread = len(first), count - len(first)
        while filled or self.unread:
            try:
                while self.unread and filled < len(buffer):
                    received = _receive_into(source, buffer[filled : filled + min(self.unread, len(buffer) - filled)])
                    filled, self.unread = filled + received, self.unread - received
            finally:
                taken, filled = filled, 0
                self._take(buffer[:taken])

    def _take(self, piece: memoryview) -> None:
        if self._checksum is not None:
            self._checksum.hash.update(piece)
        self._body.write(piece)
        if self._turn is None or self._checksum is not None:
            return
        since = self._content.position - self._kept
        if since >= _KEEP_BYTES or (since and time.monotonic() - self._kept_at >= _KEEP_S):
            self.keep()

    def head(self, count: int) -> bytes:
        """The first bytes of the upload, as many as there are of ``count``. Raises OSError."""
        return self._content.head(count)

    def keep(self) -> int:
        """What arrived is durable, and recorded, when this returns; where it ends. Raises OSError."""
        self._kept = self._content.keep(self._turn)
        self._kept_at = time.monotonic()
        return self._kept

    def finish(self) -> int:
        """After the body's last byte: as ``keep``. Raises BrokenOff, ChecksumMismatch, OSError."""
        if self._checksum is not None and self._checksum.hash.digest() != self._checksum.expected:
            self._content.rewind(self._begun_at)
            raise ChecksumMismatch
        kept = self.keep()
        if not self._body.is_whole:
            raise BrokenOff("the body ends within a frame")
        return kept

    def break_off(self) -> int:
        """After the connection broke: what arrived is kept, unless it cannot be verified; where that ends."""
        if self._checksum is not None:
            self._content.rewind(self._begun_at)
            return self._begun_at
        return self.keep()

    def close(self) -> None:
        """Let go of the file."""
        self._content.close()


def _receive_into(source: socket.socket, buffer: memoryview) -> int:
    try:
        received = source.recv_into(buffer)
    except TimeoutError as error:
        raise BrokenOff("nothing came for too long") from error
    except OSError as error:
        raise BrokenOff(error.strerror or str(error)) from error
    if received == 0:
        raise BrokenOff("the connection was closed")
    return received
