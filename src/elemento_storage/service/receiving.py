"""A transfer of bytes from a client into the place where an image arrives, as a request sees it."""

import asyncio
import socket
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, TypeVar

from elemento_storage.catalog.locations import os_errors
from elemento_storage.disk import Disk
from elemento_storage.errors import BodyTooLarge, UploadChecksumMismatch, UploadStalled
from elemento_storage.images.recognise import HEAD_BYTES
from elemento_storage.service.intake import Arrival
from elemento_storage.uploads.sparse import FRAME
from elemento_storage.uploads.transfer import BrokenOff, ChecksumMismatch, TooLong, Transfer

_LOOKED_AT_BYTES: Final = HEAD_BYTES + FRAME.size  #: of a body, with the first frame's head where it has frames

T = TypeVar("T")

Foresee = Callable[[bytes], Awaitable[None]]


class Receiving:
    """A transfer under way. ``finish`` or ``break_off`` make durable what arrived; ``close`` comes last.

    ``foresee`` is given the beginning of the image as soon as it is there, once; it refuses what can be no volume, and
    sees to room for what it will become. What it raises, ``feed`` and ``receive`` raise.
    """

    def __init__(self, arrival: Arrival, transfer: Transfer, threads: Disk, foresee: Foresee | None = None) -> None:
        self.arrival = arrival
        self._foresee = foresee
        self.stop = asyncio.Event()  #: somebody wants it to end
        self.abort: Callable[[], None] = lambda: None  #: wakes the thread that waits for the client
        self._transfer = transfer
        self._threads = threads
        self._closed = False

    def end_soon(self) -> None:
        """Whoever feeds it is to break off."""
        self.stop.set()
        self.abort()

    @property
    def position(self) -> int:
        """How far the bytes go that have arrived."""
        return self._transfer.position

    @property
    def unread(self) -> int:
        """Bytes of a body that were promised to ``receive`` and are still in the socket."""
        return self._transfer.unread

    async def feed(self, pieces: Sequence[bytes]) -> None:
        """The next bytes. Raises BodyTooLarge, NoRoom, LocationUnavailable."""
        await self._make_room(self._transfer.position + sum(map(len, pieces)))
        await self._on_disk(self.arrival.location.disk, lambda: self._transfer.feed(pieces))
        await self.look()

    async def receive(self, source: socket.socket, first: bytes, count: int) -> None:
        """``count`` bytes: ``first`` and what comes out of the socket. Raises UploadStalled, and what ``feed`` does."""
        self._transfer.unread = count - len(first)
        await self._make_room(self._transfer.position + count)
        if self._foresee is not None and count > _LOOKED_AT_BYTES:
            # No more than it takes to know what comes: the rest of what is refused need not be written.
            begin, first = first[:_LOOKED_AT_BYTES], first[_LOOKED_AT_BYTES:]
            count -= _LOOKED_AT_BYTES
            try:
                await self._on_disk(self._threads, lambda: self._transfer.receive(source, _LOOKED_AT_BYTES, begin))
            finally:
                self._transfer.unread += count - len(first)
            await self.look()
        await self._on_disk(self._threads, lambda: self._transfer.receive(source, count, first))

    async def look(self) -> None:
        """Foresee, if that has not been done and the beginning of the image is there."""
        if self._foresee is None or self.position < HEAD_BYTES:
            return
        foresee, self._foresee = self._foresee, None
        await foresee(await self._on_disk(self.arrival.location.disk, lambda: self._transfer.head(HEAD_BYTES)))

    async def _make_room(self, size_bytes: int) -> None:
        if size_bytes > self.arrival.reservation.size_bytes:
            await self.arrival.make_room(size_bytes)

    async def _on_disk(self, disk: Disk, work: Callable[[], T]) -> T:
        with os_errors(self.arrival.location):
            try:
                return await disk.run(work)
            except TooLong:
                raise BodyTooLarge("the body goes beyond the end of the upload") from None
            except BrokenOff as error:
                raise UploadStalled(f"the body broke off: {error}; what arrived is kept") from None
            except ChecksumMismatch:
                raise UploadChecksumMismatch(
                    "what arrived does not have the Upload-Checksum: none of it was kept, send it again"
                ) from None

    async def finish(self) -> int:
        """After the last byte: all is durable, and where it ends. Raises UploadChecksumMismatch."""
        return await self._on_disk(self.arrival.location.disk, self._transfer.finish)

    async def break_off(self) -> int:
        """The body will not come to its end: what arrived is durable, and where it ends."""
        return await self._on_disk(self.arrival.location.disk, self._transfer.break_off)

    async def close(self) -> None:
        """Let go of the file. Idempotent."""
        if not self._closed:
            self._closed = True
            await self.arrival.location.disk.run(self._transfer.close)
