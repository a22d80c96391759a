"""Answers whose body is a volume's bytes: all of them, a range, or several as ``multipart/byteranges``."""

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Final

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from elemento_storage.api.byte_ranges import ByteRange
from elemento_storage.api.wire import EXTENSION, ClientGone, Pump, Turn, Wire
from elemento_storage.engine.content import FileRange, Part, Zeros, read_file
from elemento_storage.errors import StorageError
from elemento_storage.service.volume_data import Image

log = logging.getLogger(__name__)

BINARY: Final = "application/octet-stream"
LEAST_TAKEN_BYTES: Final = 2**20  #: what a client has to take within the time-out
_PIECE_BYTES: Final = 256 * 1024


class Body:
    """What is sent of an image."""

    def __init__(self, image: Image, ranges: Sequence[ByteRange]) -> None:
        self.image = image
        self._ranges = ranges
        self._boundary = secrets.token_hex(16)
        self._heads = [self._head(one) for one in ranges] if len(ranges) > 1 else []
        self._end = f"\r\n--{self._boundary}--\r\n".encode() if self._heads else b""

    @property
    def content_type(self) -> str:
        """Of all of it."""
        return f"multipart/byteranges; boundary={self._boundary}" if self._heads else BINARY

    @property
    def length(self) -> int:
        """Bytes, what is between the ranges included."""
        return sum(one.stop - one.start for one in self._ranges) + sum(map(len, self._heads)) + len(self._end)

    def _head(self, one: ByteRange) -> bytes:
        told = one.content_range(self.image.size_bytes)
        return f"\r\n--{self._boundary}\r\nContent-Type: {BINARY}\r\nContent-Range: {told}\r\n\r\n".encode()

    def parts(self) -> Generator[Part]:
        """The bytes. Blocks. Raises OSError, ImageChanged."""
        for number, one in enumerate(self._ranges):
            if self._heads:
                yield self._heads[number]
            yield from self.image.parts(one.start, one.stop)
        yield self._end


class DataResponse(Response):
    """Sends a body, and gives back what was opened for it."""

    def __init__(
        self,
        body: Body,
        status: int,
        headers: Mapping[str, str],
        *,
        opened: contextlib.AsyncExitStack,
        stall_s: float,
        stopping: asyncio.Event,
    ) -> None:
        self.status_code = status
        self.background = None
        self._body = body
        self._opened = opened
        self._stall_s = stall_s
        self._stopping = stopping
        self.init_headers({**headers, "Content-Length": str(body.length), "Content-Type": body.content_type})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        async with self._opened:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            if scope["method"] == "HEAD":
                await send({"type": "http.response.body", "body": b""})
                return
            wire: Wire | None = scope.get("extensions", {}).get(EXTENSION)
            parts = self._body.parts()
            try:
                if wire is not None and wire.is_plain:
                    await self._send_from_files(wire, parts)
                else:
                    await self._send_pieces(parts, send)
            except (ClientGone, StorageError, OSError, TimeoutError) as error:
                volume_id = self._body.image.volume.volume_id
                level = logging.INFO if isinstance(error, ClientGone | TimeoutError) else logging.ERROR
                log.log(level, "a download of volume %s was broken off: %s", volume_id, error)
                if wire is None:
                    raise
                wire.hang_up()
                return
            finally:
                parts.close()
            await send({"type": "http.response.body", "body": b""})

    async def _send_from_files(self, wire: Wire, parts: Iterator[Part]) -> None:
        streams = self._body.image.streams
        with await wire.take(self._stall_s) as connection:
            pump = Pump(connection, parts)
            waited_s, waited_at_bytes = 0.0, 0
            while (turn := await streams.run(pump.turn)) is not Turn.DONE:
                self._require_wanted()
                if pump.sent_bytes - waited_at_bytes >= LEAST_TAKEN_BYTES:
                    waited_s, waited_at_bytes = 0.0, pump.sent_bytes
                if turn is Turn.FULL:
                    # Only the time that the client takes counts: a slow disk is not its fault.
                    began = time.monotonic()
                    await self._until_writable(connection.fileno(), self._stall_s - waited_s)
                    waited_s += time.monotonic() - began
        wire.account(pump.sent_bytes)

    def _require_wanted(self) -> None:
        """Raises ClientGone when it is to end here."""
        if self._stopping.is_set():
            raise ClientGone("the server stops")
        if self._body.image.unwanted.is_set():
            raise ClientGone("somebody wants to change the volume, and this client has had its time")

    async def _until_writable(self, descriptor: int, patience_s: float) -> None:
        loop = asyncio.get_running_loop()
        writable = asyncio.Event()
        loop.add_writer(descriptor, writable.set)
        events = (writable, self._stopping, self._body.image.unwanted)
        waits = [asyncio.create_task(event.wait()) for event in events]
        try:
            done, _ = await asyncio.wait(waits, timeout=patience_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            loop.remove_writer(descriptor)
            for wait in waits:
                wait.cancel()
        if not done:
            raise ClientGone(f"the client took less than {LEAST_TAKEN_BYTES} bytes in {self._stall_s:g} s")

    async def _send_pieces(self, parts: Iterator[Part], send: Send) -> None:
        pieces = _pieces(parts)
        while (piece := await self._body.image.streams.run(next, pieces, None)) is not None:
            self._require_wanted()
            async with asyncio.timeout(self._stall_s):
                await send({"type": "http.response.body", "body": piece, "more_body": True})


def _pieces(parts: Iterator[Part]) -> Iterator[bytes]:
    """The same as bytes in memory, a little at a time. Blocks. Raises OSError."""
    for part in parts:
        if not isinstance(part, FileRange | Zeros):
            for start in range(0, len(part), _PIECE_BYTES):
                yield bytes(part[start : start + _PIECE_BYTES])
            continue
        for start in range(0, part.length, _PIECE_BYTES):
            length = min(_PIECE_BYTES, part.length - start)
            piece = bytearray(length)
            if isinstance(part, FileRange):
                read_file(FileRange(part.descriptor, part.offset + start, length), memoryview(piece))
            yield bytes(piece)
