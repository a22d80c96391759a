"""The body of a request on its way into an upload: out of the socket by a thread, or through the application server."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Final

from starlette.requests import Request

from elemento_storage.api.connection import take_body
from elemento_storage.errors import UploadStalled
from elemento_storage.service.receiving import Receiving

_BATCH_BYTES: Final = 1 << 20  # handed over to a thread at once; a server's piece is 64 KiB


async def pour(request: Request, receiving: Receiving, *, stall_s: float, by_thread: bool) -> None:
    """All of the body. Raises UploadStalled, ClientDisconnect, BodyTooLarge, NoRoom, LocationUnavailable."""
    taken = take_body(request.scope) if by_thread else None
    if taken is None:
        await feed(pieces(request, receiving.stop, stall_s), receiving)
        return
    taken.source.settimeout(stall_s)
    receiving.abort = taken.abort
    try:
        if receiving.stop.is_set():
            taken.abort()
        await receiving.receive(taken.source, taken.first, taken.length)
    finally:
        taken.give_back(receiving.unread)


async def feed(source: AsyncIterator[bytes], receiving: Receiving) -> None:
    """What comes out of ``source``, in batches."""
    batch: list[bytes] = []
    size = 0
    try:
        async for piece in source:
            batch.append(piece)
            size += len(piece)
            if size >= _BATCH_BYTES:
                full, batch, size = batch, [], 0
                await receiving.feed(full)
    finally:
        if batch:
            await receiving.feed(batch)


async def pieces(request: Request, stop: asyncio.Event, stall_s: float) -> AsyncIterator[bytes]:
    """The body as it comes. Raises UploadStalled when nothing does, or ``stop`` is set; ClientDisconnect."""
    stream = request.stream()
    stopped = asyncio.ensure_future(stop.wait())
    try:
        while True:
            coming = asyncio.ensure_future(anext(stream, None))
            await asyncio.wait({coming, stopped}, timeout=stall_s, return_when=asyncio.FIRST_COMPLETED)
            if not coming.done() or stopped.done():
                coming.cancel()
                with contextlib.suppress(asyncio.CancelledError, Exception):
                    await coming
                raise UploadStalled("the body broke off: nothing came for too long, or the server stops")
            piece = coming.result()
            if piece is None:
                return
            if piece:
                yield piece
    finally:
        stopped.cancel()
