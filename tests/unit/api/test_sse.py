"""Streams of events that have an end."""

import asyncio
from collections.abc import AsyncIterator

from starlette.responses import StreamingResponse

from elemento_storage.api.sse import event_stream
from elemento_storage.feed import Audience, Feed

EVERYBODY = Audience(owner="", private=False)


def publish(feed: Feed, state: str) -> None:
    feed.publish("job", "one", before=None, after=EVERYBODY, state=state)


async def pieces(response: StreamingResponse) -> AsyncIterator[str]:
    async for piece in response.body_iterator:
        assert isinstance(piece, bytes)
        yield piece.decode()


async def test_the_end_is_told_when_it_comes_while_the_client_reads() -> None:
    feed, over = Feed(), asyncio.Event()
    start = feed.revision
    response = event_stream(feed, start, lambda event: event.kind, asyncio.Event(), until=over.is_set)
    told = pieces(response)
    assert "hello" in await anext(told)
    publish(feed, "running")
    assert "running" in await anext(told)
    publish(feed, "done")
    over.set()
    feed.publish("volume.changed", "another", before=None, after=EVERYBODY)
    async with asyncio.timeout(5):
        rest = [piece async for piece in told]
    assert "done" in rest[0]


async def test_a_stream_whose_end_has_come_does_not_wait_for_more() -> None:
    feed, over = Feed(), asyncio.Event()
    publish(feed, "done")
    over.set()
    response = event_stream(feed, feed.revision - 1, lambda event: event.kind, asyncio.Event(), until=over.is_set)
    async with asyncio.timeout(5):
        all_of_it = [piece async for piece in pieces(response)]
    assert ["hello" in all_of_it[0], "done" in all_of_it[1], len(all_of_it)] == [True, True, 2]
