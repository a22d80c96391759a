"""A transfer of bytes from a client into the place where an image arrives, as a request sees it."""

import asyncio
import socket
from collections.abc import Callable, Sequence
from typing import TypeVar

from elemento_storage.catalog.locations import os_errors
from elemento_storage.disk import Disk
from elemento_storage.errors import BodyTooLarge, UploadChecksumMismatch, UploadStalled
from elemento_storage.service.intake import Arrival
from elemento_storage.uploads.transfer import BrokenOff, ChecksumMismatch, TooLong, Transfer

T = TypeVar("T")


class Receiving:
    """A transfer under way. ``finish`` or ``break_off`` make durable what arrived; ``close`` comes last."""

    def __init__(self, arrival: Arrival, transfer: Transfer, threads: Disk) -> None:
        self.arrival = arrival
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

    async def receive(self, source: socket.socket, first: bytes, count: int) -> None:
        """``count`` bytes: ``first`` and what comes out of the socket. Raises UploadStalled, and what ``feed`` does."""
        self._transfer.unread = count - len(first)
        await self._make_room(self._transfer.position + count)
        await self._on_disk(self._threads, lambda: self._transfer.receive(source, count, first))

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
