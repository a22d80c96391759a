"""The feed: one ever-growing number per change, so that a client can ask "what changed since N".

Revisions go on growing over a restart: a start begins at its time in seconds × 2^20 (a JSON number still holds it, and
nothing here makes a million changes a second). The history itself lives in memory; a client that asks for a revision
from before the start, or from so long ago that it was dropped, is told to read everything again (``complete`` false),
never given a gap.
"""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from itertools import islice

from elemento_storage.model import utc_now

_BLOCK = 1 << 20
_KEPT = 100_000


@dataclass(frozen=True, slots=True)
class Audience:
    """Who may know of a volume: everybody, or one owner."""

    owner: str
    private: bool

    def includes(self, client: str | None) -> bool:
        """Whether this client may see it; None is the infrastructure itself."""
        return client is None or not self.private or client == self.owner


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened. ``before`` and ``after`` say who could see its subject then and now."""

    revision: int
    kind: str
    subject: str
    before: Audience | None
    after: Audience | None
    data: Mapping[str, object] = field(default_factory=dict)
    time: str = field(default_factory=utc_now)

    def seen_by(self, client: str | None) -> str | None:
        """The kind as this client may see it; None when it may not know of the event at all.

        A volume that turns private is ``volume.removed`` for those who could see it before.
        """
        if self.after is not None and self.after.includes(client):
            if self.before is not None and not self.before.includes(client) and self.kind == "volume.changed":
                return "volume.created"
            return self.kind
        if self.before is not None and self.before.includes(client):
            return "volume.removed" if self.kind.startswith("volume.") else None
        return None


class Feed:
    """Numbers events, keeps the latest and wakes those who wait."""

    def __init__(self, *, start_s: float | None = None) -> None:
        self._first = (int(time.time() if start_s is None else start_s)) * _BLOCK
        self._revision = self._first
        self._events: deque[Event] = deque(maxlen=_KEPT)
        self._news = asyncio.Event()

    @property
    def revision(self) -> int:
        """The newest event's number."""
        return self._revision

    def publish(
        self, kind: str, subject: str, *, before: Audience | None, after: Audience | None, **data: object
    ) -> None:
        """Record an event. Called from the event loop only."""
        self._revision += 1
        self._events.append(Event(self._revision, kind, subject, before, after, data))
        self._news.set()
        self._news = asyncio.Event()

    def since(self, revision: int) -> list[Event] | None:
        """Events after ``revision``; None when they are not all known any more."""
        oldest_known = self._events[0].revision if self._events else self._revision + 1
        if revision > self._revision or revision < oldest_known - 1:
            return None
        return list(islice(self._events, revision - oldest_known + 1, None))

    async def follow(self, revision: int, *, idle_s: float) -> AsyncIterator[list[Event]]:
        """Batches of events after ``revision``, for ever; an empty batch after ``idle_s`` without news.

        Ends when the follower is so slow that events were dropped: it has to start again.
        """
        while True:
            news = self._news
            batch = self.since(revision)
            if batch is None:
                return
            if batch:
                revision = batch[-1].revision
                yield batch
                continue
            try:
                await asyncio.wait_for(news.wait(), idle_s)
            except TimeoutError:
                yield []
