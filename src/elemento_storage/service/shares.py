"""What there is so much of in all, and so much of for one client: nobody can have everything to himself."""

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Iterator

from elemento_storage.errors import Unavailable
from elemento_storage.progress import Progress


class Shares:
    """So many at a time, and of one client no more than so many. The infrastructure (None) is one like the others."""

    def __init__(self, most: int, most_of_one: int) -> None:
        self._most = most
        self._most_of_one = most_of_one
        self._taken: Counter[str | None] = Counter()
        self._queue: list[tuple[str | None, asyncio.Event]] = []

    @contextlib.contextmanager
    def taken(self, client: str | None) -> Iterator[None]:
        """One of them, now or not at all. Raises Unavailable."""
        if not self._is_free(client):
            whose = "this client has" if self._taken[client] >= self._most_of_one else "all clients together have"
            raise Unavailable(f"{whose} as many of these under way as there may be at a time: try again later")
        self._taken[client] += 1
        try:
            yield
        finally:
            self._give_back(client)

    @contextlib.asynccontextmanager
    async def turn(self, client: str | None, progress: Progress) -> AsyncIterator[None]:
        """One of them as soon as there is one, in the order of asking; nobody waits for another's share.

        Raises JobCancelled.
        """
        entry = client, asyncio.Event()
        self._queue.append(entry)
        self._let_in()
        try:
            if not entry[1].is_set():
                progress.advance(progress.fraction, "queued")
                await _first(entry[1], progress.cancelled)
            progress.check()
            yield
        finally:
            if entry[1].is_set():
                self._give_back(client)
            else:
                self._queue.remove(entry)

    def _is_free(self, client: str | None) -> bool:
        return self._taken.total() < self._most and self._taken[client] < self._most_of_one

    def _let_in(self) -> None:
        for entry in list(self._queue):
            client, turn = entry
            if self._is_free(client):
                self._queue.remove(entry)
                self._taken[client] += 1
                turn.set()

    def _give_back(self, client: str | None) -> None:
        self._taken[client] -= 1
        if not self._taken[client]:
            del self._taken[client]
        self._let_in()


async def _first(*events: asyncio.Event) -> None:
    """Until one of them is set."""
    waits = [asyncio.ensure_future(event.wait()) for event in events]
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()
