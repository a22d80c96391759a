import asyncio
from collections.abc import Awaitable, Callable

import pytest

from elemento_storage.undo import Reverter


def step(done: list[int], number: int) -> Callable[[], Awaitable[None]]:
    async def undo() -> None:
        await asyncio.sleep(0)
        done.append(number)

    return undo


async def fail() -> None:
    raise OSError("cannot be undone")


async def test_an_error_undoes_every_step_last_first() -> None:
    done: list[int] = []
    with pytest.raises(ValueError, match="the reason"):
        async with Reverter() as revert:
            for number in range(3):
                revert.add(step(done, number))
            raise ValueError("the reason")
    assert done == [2, 1, 0]


async def test_leaving_without_commit_undoes() -> None:
    done: list[int] = []
    async with Reverter() as revert:
        revert.add(step(done, 1))
    assert done == [1]


async def test_commit_keeps_the_change() -> None:
    done: list[int] = []
    async with Reverter() as revert:
        revert.add(step(done, 1))
        revert.commit()
    assert done == []


async def test_an_error_after_commit_undoes_only_what_came_later() -> None:
    done: list[int] = []
    with pytest.raises(ValueError, match="later"):
        async with Reverter() as revert:
            revert.add(step(done, 1))
            revert.commit()
            revert.add(step(done, 2))
            raise ValueError("later")
    assert done == [2]


async def test_a_step_that_fails_does_not_stop_the_others_nor_hide_the_reason(caplog: pytest.LogCaptureFixture) -> None:
    done: list[int] = []
    with pytest.raises(ValueError, match="the reason"):
        async with Reverter() as revert:
            revert.add(step(done, 1))
            revert.add(fail)
            revert.add(step(done, 2))
            raise ValueError("the reason")
    assert done == [2, 1]
    assert "cannot be undone" in caplog.text


async def test_a_cancelled_task_undoes_too() -> None:
    done: list[int] = []

    async def work() -> None:
        async with Reverter() as revert:
            revert.add(step(done, 1))
            await asyncio.sleep(60)

    task = asyncio.create_task(work())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert done == [1]
