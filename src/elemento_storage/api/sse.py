"""Server-sent events (WHATWG HTML, section 9.2) with replay from ``Last-Event-ID``."""

import asyncio
from collections.abc import AsyncIterator, Callable

import msgspec
from starlette.responses import StreamingResponse

from elemento_storage.feed import Event, Feed

_KEEP_ALIVE_S = 15.0

Filter = Callable[[Event], str | None]


def event_stream(
    feed: Feed,
    since: int,
    seen_as: Filter,
    stopping: asyncio.Event,
    *,
    first: Callable[[], tuple[str, dict[str, object]]] | None = None,
    until: Callable[[], bool] = lambda: False,
) -> StreamingResponse:
    """Events after ``since`` for which ``seen_as`` gives a kind; ends when ``until`` says so, with what tells of it.

    It begins with ``hello``, which has the present revision, and ``complete`` false when events before it are lost;
    after the events that were missed comes ``first``, the state of the one thing the stream is about.
    """
    return StreamingResponse(
        _stream(feed, since, seen_as, stopping, first, until),
        media_type="text/event-stream",
        headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
    )


async def _stream(
    feed: Feed,
    since: int,
    seen_as: Filter,
    stopping: asyncio.Event,
    first: Callable[[], tuple[str, dict[str, object]]] | None,
    until: Callable[[], bool],
) -> AsyncIterator[bytes]:
    missed = feed.since(since)
    start = feed.revision
    yield _format("hello", start, {"revision": start, "complete": missed is not None}, with_id=False)
    for event in missed or ():
        if (kind := seen_as(event)) is not None:
            yield _format_event(kind, event)
    over = until()
    if first is not None:
        what, state = first()
        yield _format(what, start, state, with_id=False)
    follow = feed.follow(start, idle_s=_KEEP_ALIVE_S)
    ended = asyncio.create_task(stopping.wait())
    try:
        if over:
            return
        told = start
        last: int | None = None  #: revision of the last event there is to tell
        while True:
            batch_task = asyncio.ensure_future(anext(follow, None))
            await asyncio.wait({batch_task, ended}, return_when=asyncio.FIRST_COMPLETED)
            if not batch_task.done():
                batch_task.cancel()
                return
            batch = batch_task.result()
            if batch is None:
                return  # too slow: events were dropped; the client connects again and learns of it from hello
            if not batch:
                yield b": still here\n\n"
            for event in batch:
                if (kind := seen_as(event)) is not None:
                    yield _format_event(kind, event)
                told = event.revision
            # While this batch was sent the end may have come, and its event is in the next one.
            if last is None and until():
                last = feed.revision
            if last is not None and told >= last:
                return
    finally:
        ended.cancel()


def _format_event(kind: str, event: Event) -> bytes:
    body = {"revision": event.revision, "time": event.time, "subject": event.subject, **event.data}
    return _format(kind, event.revision, body)


def _format(kind: str, revision: int, body: dict[str, object], *, with_id: bool = True) -> bytes:
    head = f"id: {revision}\n" if with_id else ""
    return f"{head}event: {kind}\ndata: ".encode() + msgspec.json.encode(body) + b"\n\n"
