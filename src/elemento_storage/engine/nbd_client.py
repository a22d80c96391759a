"""A client that reads an NBD export and asks what of it is data. Blocking: for threads.

NBD protocol (github.com/NetworkBlockDevice/nbd, doc/proto.md): fixed newstyle negotiation, structured replies, and the
metadata context ``base:allocation``. Requests are answered one after the other; one may be sent ahead of the answer to
the one before.
"""

import errno
import socket
import struct
from collections.abc import Iterator
from typing import Final

from elemento_storage.engine.content import Extent

_MAGIC: Final = b"NBDMAGICIHAVEOPT"
_OPTION: Final = struct.Struct(">8sII")
_OPTION_REPLY: Final = struct.Struct(">QIII")
_OPTION_REPLY_MAGIC: Final = 0x0003E889045565A9
_REQUEST: Final = struct.Struct(">IHHQQI")
_REQUEST_MAGIC: Final = 0x25609513
_CHUNK: Final = struct.Struct(">IHHQI")
_CHUNK_MAGIC: Final = 0x668E33EF
_OFFSET: Final = struct.Struct(">Q")
_OPT_GO, _OPT_STRUCTURED_REPLY, _OPT_SET_META_CONTEXT = 7, 8, 10
_REP_ACK, _REP_INFO, _REP_META_CONTEXT = 1, 3, 4
_IS_ERROR_REPLY: Final = 1 << 31
_INFO_EXPORT: Final = 0
_FIXED_NEWSTYLE_NO_ZEROES: Final = 3
_CMD_READ, _CMD_DISCONNECT, _CMD_BLOCK_STATUS = 0, 2, 7
_DONE: Final = 1
_NONE, _OFFSET_DATA, _OFFSET_HOLE, _BLOCK_STATUS = 0, 1, 2, 5
_IS_ERROR_CHUNK: Final = 1 << 15
_HOLE, _ZERO = 1, 2
_CONTEXT: Final = b"base:allocation"
_LARGEST_REPLY: Final = 16 * 2**20  #: of anything but data; QEMU describes 128 Ki extents at a time, in 1 MiB
_MOST_ASKED_BYTES: Final = 2**31


class NbdClient:
    """One connection to one export."""

    def __init__(self, path: str, export: str, *, timeout_s: float) -> None:
        """Connect to a Unix socket. Raises OSError."""
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self._socket.settimeout(timeout_s)
        self._asked = 0
        self.size_bytes = 0
        try:
            self._socket.connect(path)
            self._negotiate(export.encode())
        except BaseException:
            self._socket.close()
            raise

    def close(self) -> None:
        """Hang up, whatever is under way."""
        try:
            if not self._asked:
                self._socket.sendall(_REQUEST.pack(_REQUEST_MAGIC, 0, _CMD_DISCONNECT, 0, 0, 0))
        except OSError:
            pass  # it hung up first
        finally:
            self._socket.close()

    @property
    def is_idle(self) -> bool:
        """Whether nothing was asked that is not answered."""
        return not self._asked

    # -- reading -------------------------------------------------------------------------------------------

    def ask(self, offset: int, length: int) -> None:
        """Ask for bytes, to be taken by ``read_into`` later. Raises OSError."""
        self._request(_CMD_READ, offset, length)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Take the bytes that were asked for first: all of ``buffer``. Raises OSError."""
        missing = len(buffer)
        while True:
            is_last, kind, length = self._chunk()
            if kind == _OFFSET_DATA:
                position = self._offset() - offset
                self._fill(self._within(buffer, position, length - _OFFSET.size))
                missing -= length - _OFFSET.size
            elif kind == _OFFSET_HOLE:
                position = self._offset() - offset
                (hole_bytes,) = struct.unpack(">I", self._take(4))
                view = self._within(buffer, position, hole_bytes)
                view[:] = bytes(len(view))
                missing -= hole_bytes
            else:
                self._skip(kind, length)
            if is_last:
                break
        if missing:
            raise OSError(errno.EPROTO, "the NBD server answered with fewer or more bytes than were asked for")

    def extents(self, start: int, stop: int) -> Iterator[Extent]:
        """What is in a stretch; neighbours may be alike. Raises OSError."""
        while start < stop:
            self._request(_CMD_BLOCK_STATUS, start, min(stop - start, _MOST_ASKED_BYTES))
            described = b""
            while True:
                is_last, kind, length = self._chunk()
                if kind == _BLOCK_STATUS:
                    described = self._take(length)[4:]
                else:
                    self._skip(kind, length)
                if is_last:
                    break
            if not described:
                raise OSError(errno.EPROTO, "the NBD server does not say what is data")
            for described_bytes, flags in struct.iter_unpack(">II", described):
                length = min(described_bytes, stop - start)
                if length:
                    yield Extent(start, length, zero=bool(flags & _ZERO), hole=bool(flags & _HOLE))
                start += length

    # -- the protocol --------------------------------------------------------------------------------------

    def _negotiate(self, export: bytes) -> None:
        greeting = self._take(18)
        if greeting[:16] != _MAGIC:
            raise OSError(errno.EPROTO, "what listens there is no NBD server")
        self._socket.sendall(struct.pack(">I", _FIXED_NEWSTYLE_NO_ZEROES))
        self._option(_OPT_STRUCTURED_REPLY, b"")
        named = struct.pack(">I", len(export)) + export
        contexts = self._option(_OPT_SET_META_CONTEXT, named + struct.pack(">II", 1, len(_CONTEXT)) + _CONTEXT)
        if not any(kind == _REP_META_CONTEXT for kind, _ in contexts):
            raise OSError(errno.EPROTO, "the NBD server cannot say what is data")
        for kind, content in self._option(_OPT_GO, named + struct.pack(">H", 0)):
            if kind == _REP_INFO and struct.unpack(">H", content[:2])[0] == _INFO_EXPORT:
                (self.size_bytes,) = struct.unpack(">Q", content[2:10])

    def _option(self, option: int, payload: bytes) -> list[tuple[int, bytes]]:
        self._socket.sendall(_OPTION.pack(b"IHAVEOPT", option, len(payload)) + payload)
        replies: list[tuple[int, bytes]] = []
        while True:
            magic, _, kind, length = _OPTION_REPLY.unpack(self._take(_OPTION_REPLY.size))
            if magic != _OPTION_REPLY_MAGIC:
                raise OSError(errno.EPROTO, "the NBD server answers in a way that is not understood")
            content = self._take(length)
            if kind & _IS_ERROR_REPLY:
                raise OSError(errno.EPROTO, f"the NBD server refuses option {option}")
            if kind == _REP_ACK:
                return replies
            replies.append((kind, content))

    def _request(self, command: int, offset: int, length: int) -> None:
        self._socket.sendall(_REQUEST.pack(_REQUEST_MAGIC, 0, command, 0, offset, length))
        self._asked += 1

    def _chunk(self) -> tuple[bool, int, int]:
        magic, flags, kind, _, length = _CHUNK.unpack(self._take(_CHUNK.size))
        if magic != _CHUNK_MAGIC:
            raise OSError(errno.EPROTO, "the NBD server answers in a way that is not understood")
        is_last = bool(flags & _DONE)
        if is_last:
            self._asked -= 1
        return is_last, kind, length

    def _skip(self, kind: int, length: int) -> None:
        content = self._take(length)
        if kind & _IS_ERROR_CHUNK:
            # NBD's error numbers are those of Linux.
            (number,) = struct.unpack(">I", content[:4])
            raise OSError(number, "the image cannot be read there")
        if kind != _NONE:
            raise OSError(errno.EPROTO, f"the NBD server sent a chunk of type {kind}, which nobody asked for")

    def _offset(self) -> int:
        (offset,) = _OFFSET.unpack(self._take(_OFFSET.size))
        return int(offset)

    @staticmethod
    def _within(buffer: memoryview, position: int, length: int) -> memoryview:
        if not 0 <= position <= position + length <= len(buffer):
            raise OSError(errno.EPROTO, "the NBD server sent bytes that nobody asked for")
        return buffer[position : position + length]

    def _take(self, length: int) -> bytes:
        if length > _LARGEST_REPLY:
            raise OSError(errno.EPROTO, f"the NBD server announces {length} bytes")
        content = bytearray(length)
        self._fill(memoryview(content))
        return bytes(content)

    def _fill(self, view: memoryview) -> None:
        while view:
            count = self._socket.recv_into(view, 0, socket.MSG_WAITALL)
            if not count:
                raise ConnectionResetError(errno.ECONNRESET, "the NBD server hung up")
            view = view[count:]
