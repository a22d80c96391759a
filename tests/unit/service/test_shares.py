"""So much in all, so much for one client, in the order of asking."""

import asyncio

import pytest

from elemento_storage.errors import JobCancelled, Unavailable
from elemento_storage.progress import Progress
from elemento_storage.service.shares import Shares
from tests.unit.support import ALICE, BOB


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


class Worker:
    """Takes a turn and keeps it until it is let go."""

    def __init__(self, shares: Shares, client: str | None) -> None:
        self.progress = Progress()
        self.began = asyncio.Event()
        self.done = asyncio.Event()
        self.task = asyncio.ensure_future(self._run(shares, client))

    @property
    def works(self) -> bool:
        return self.began.is_set()

    async def _run(self, shares: Shares, client: str | None) -> None:
        async with shares.turn(client, self.progress):
            self.began.set()
            await self.done.wait()


async def test_one_client_cannot_have_everything() -> None:
    shares = Shares(4, 3)
    greedy = [Worker(shares, ALICE) for _ in range(6)]
    await settle()
    assert [one.works for one in greedy] == [True] * 3 + [False] * 3
    assert greedy[3].progress.phase == "queued"
    other = Worker(shares, BOB)
    await settle()
    assert other.works
    late = Worker(shares, BOB)
    await settle()
    assert [late.works] == [False]
    greedy[0].done.set()
    await settle()
    assert (greedy[3].works, late.works) == (True, False), "in the order of asking"
    other.done.set()
    await settle()
    assert late.works
    for one in (*greedy, late):
        one.done.set()
    await asyncio.gather(*(one.task for one in (*greedy, other, late)))
    with shares.taken(ALICE), shares.taken(ALICE), shares.taken(ALICE):
        pass


async def test_who_waits_can_be_cancelled() -> None:
    shares = Shares(1, 1)
    first, second, third = (Worker(shares, None) for _ in range(3))
    await settle()
    second.progress.request_cancel()
    with pytest.raises(JobCancelled):
        await second.task
    first.done.set()
    await settle()
    assert third.works
    third.task.cancel()
    await asyncio.wait({third.task})
    async with shares.turn(BOB, Progress()):
        pass


async def test_who_was_cancelled_before_takes_nothing() -> None:
    shares = Shares(1, 1)
    progress = Progress()
    progress.request_cancel()
    with pytest.raises(JobCancelled):
        async with shares.turn(ALICE, progress):
            raise AssertionError
    with shares.taken(ALICE):
        pass


def test_now_or_not_at_all() -> None:
    shares = Shares(3, 2)
    with shares.taken(ALICE), shares.taken(ALICE):
        with pytest.raises(Unavailable, match="this client"), shares.taken(ALICE):
            raise AssertionError
        with shares.taken(BOB), pytest.raises(Unavailable, match="all clients"), shares.taken(None):
            raise AssertionError
    with shares.taken(ALICE):
        pass
