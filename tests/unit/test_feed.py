import asyncio
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elemento_storage.feed import Audience, Event, Feed
from tests.unit.support import ALICE, BOB

PUBLIC = Audience(ALICE, private=False)
PRIVATE = Audience(ALICE, private=True)


def changed(before: Audience | None, after: Audience | None) -> Event:
    kind = "volume.created" if before is None else "volume.removed" if after is None else "volume.changed"
    return Event(1, kind, "v", before, after)


def publish(feed: Feed, count: int = 1) -> None:
    for _ in range(count):
        feed.publish("volume.changed", "v", before=PUBLIC, after=PUBLIC)


def revisions(events: list[Event] | None) -> list[int]:
    assert events is not None
    return [event.revision for event in events]


# -- who sees what -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after", "owner_sees", "stranger_sees"),
    [
        (None, PUBLIC, "volume.created", "volume.created"),
        (None, PRIVATE, "volume.created", None),
        (PUBLIC, PUBLIC, "volume.changed", "volume.changed"),
        (PRIVATE, PRIVATE, "volume.changed", None),
        (PUBLIC, PRIVATE, "volume.changed", "volume.removed"),
        (PRIVATE, PUBLIC, "volume.changed", "volume.created"),
        (PUBLIC, None, "volume.removed", "volume.removed"),
        (PRIVATE, None, "volume.removed", None),
        (PRIVATE, Audience(BOB, private=True), "volume.removed", "volume.created"),
    ],
)
def test_what_a_client_hears_of_a_volume(
    before: Audience | None, after: Audience | None, owner_sees: str, stranger_sees: str | None
) -> None:
    event = changed(before, after)
    assert event.seen_by(ALICE) == owner_sees
    assert event.seen_by(BOB) == stranger_sees
    assert event.seen_by(None) == event.kind


audiences = st.none() | st.builds(Audience, st.sampled_from([ALICE, BOB]), st.booleans())


@given(st.lists(audiences, max_size=8), st.sampled_from([ALICE, BOB, "c" * 32]))
def test_a_client_that_follows_the_feed_knows_exactly_what_it_may_see(
    states: list[Audience | None], client: str
) -> None:
    known = False
    before: Audience | None = None
    for after in states:
        if before is None and after is None:
            continue
        kind = changed(before, after).seen_by(client)
        if kind is not None:
            assert known is (kind != "volume.created")
            known = kind != "volume.removed"
        assert known is (after is not None and after.includes(client))
        before = after


def test_a_job_is_heard_of_by_its_client_only() -> None:
    event = Event(1, "job", "j", None, PRIVATE)
    assert (event.seen_by(ALICE), event.seen_by(BOB), event.seen_by(None)) == ("job", None, "job")


# -- revisions ---------------------------------------------------------------------------------------------


async def test_since_gives_what_came_later_in_order() -> None:
    feed = Feed(start_s=1000)
    start = feed.revision
    assert feed.since(start) == []
    publish(feed, 3)
    assert revisions(feed.since(start)) == [start + 1, start + 2, start + 3]
    assert revisions(feed.since(start + 2)) == [start + 3]
    assert feed.since(start + 3) == []
    assert feed.revision == start + 3


async def test_revisions_it_cannot_know_are_incomplete_never_a_gap() -> None:
    feed = Feed(start_s=1000)
    for unknown in (0, feed.revision - 1, feed.revision + 1):
        assert feed.since(unknown) is None
    publish(feed)
    for unknown in (0, feed.revision - 2, feed.revision + 1):
        assert feed.since(unknown) is None


async def test_revisions_grow_over_a_restart_and_fit_a_json_number() -> None:
    first = Feed(start_s=1000)
    publish(first, 50)
    assert Feed(start_s=1001).revision > first.revision
    assert Feed().revision < 2**53
    assert Feed().revision >= (int(time.time()) - 1) << 20


async def test_events_dropped_for_good_are_told_as_incomplete() -> None:
    feed = Feed(start_s=1000)
    start = feed.revision
    publish(feed, 100_001)
    assert feed.since(start) is None
    assert len(revisions(feed.since(start + 1))) == 100_000


# -- following ---------------------------------------------------------------------------------------------


async def test_a_follower_gets_the_past_and_then_the_news() -> None:
    feed = Feed(start_s=1000)
    start = feed.revision
    publish(feed, 2)
    follow = feed.follow(start, idle_s=5)
    assert revisions(await anext(follow)) == [start + 1, start + 2]
    waiting = asyncio.ensure_future(anext(follow))
    await asyncio.sleep(0)
    assert not waiting.done()
    publish(feed)
    assert revisions(await waiting) == [start + 3]


async def test_several_followers_miss_nothing() -> None:
    feed = Feed(start_s=1000)
    start = feed.revision

    async def read(count: int) -> list[int]:
        got: list[int] = []
        async for batch in feed.follow(start, idle_s=5):
            got += revisions(batch)
            if len(got) >= count:
                break
        return got

    readers = [asyncio.create_task(read(20)) for _ in range(3)]
    for _ in range(20):
        publish(feed)
        await asyncio.sleep(0)
    assert await asyncio.gather(*readers) == [list(range(start + 1, start + 21))] * 3


async def test_a_follower_without_news_gets_an_empty_batch() -> None:
    feed = Feed(start_s=1000)
    follow = feed.follow(feed.revision, idle_s=0.01)
    assert await anext(follow) == []
    publish(feed)
    assert len(await anext(follow)) == 1


async def test_a_follower_of_what_is_not_known_ends_at_once() -> None:
    feed = Feed(start_s=1000)
    assert [batch async for batch in feed.follow(0, idle_s=5)] == []
