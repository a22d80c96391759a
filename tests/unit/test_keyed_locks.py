import asyncio
import random

import pytest

from elemento_storage.keyed_locks import KeyedLocks


async def test_one_at_a_time_on_the_same_key() -> None:
    locks = KeyedLocks()
    inside = 0
    most = 0

    async def work() -> None:
        nonlocal inside, most
        async with locks.hold("key"):
            inside += 1
            most = max(most, inside)
            await asyncio.sleep(0.001)
            inside -= 1

    await asyncio.gather(*(work() for _ in range(20)))
    assert most == 1


async def test_first_come_first_served() -> None:
    locks = KeyedLocks()
    order: list[int] = []

    async def work(number: int) -> None:
        async with locks.hold("key"):
            order.append(number)
            await asyncio.sleep(0)

    await asyncio.gather(*(work(number) for number in range(10)))
    assert order == list(range(10))


async def test_different_keys_never_wait_for_each_other() -> None:
    locks = KeyedLocks()
    both = asyncio.Barrier(2)

    async def work(key: str) -> None:
        async with locks.hold(key):
            await both.wait()

    await asyncio.wait_for(asyncio.gather(work("one"), work("two")), 5)


async def test_an_error_lets_the_next_one_in() -> None:
    locks = KeyedLocks()
    with pytest.raises(ValueError, match="inside"):
        async with locks.hold("key"):
            raise ValueError("inside")
    async with asyncio.timeout(5), locks.hold("key"):
        pass


async def test_one_who_gives_up_waiting_does_not_open_the_door() -> None:
    locks = KeyedLocks()
    async with locks.hold("key"):
        impatient = asyncio.create_task(_hold(locks))
        patient = asyncio.create_task(_hold(locks))
        await asyncio.sleep(0)
        impatient.cancel()
        with pytest.raises(asyncio.CancelledError):
            await impatient
        await asyncio.sleep(0.01)
        assert not patient.done()
        late = asyncio.create_task(_hold(locks))
        await asyncio.sleep(0.01)
        assert not late.done()
    await asyncio.wait_for(asyncio.gather(patient, late), 5)


async def test_many_tasks_on_few_keys_with_cancels() -> None:
    locks = KeyedLocks()
    generator = random.Random(1)
    holders: dict[str, int] = {}

    async def work(key: str) -> None:
        async with locks.hold(key):
            holders[key] = holders.get(key, 0) + 1
            try:
                assert holders[key] == 1
                await asyncio.sleep(generator.random() / 1000)
            finally:
                holders[key] -= 1

    tasks = [asyncio.create_task(work(generator.choice("abc"))) for _ in range(200)]
    for task in generator.sample(tasks, 60):
        await asyncio.sleep(0)
        task.cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert {type(result) for result in results} <= {type(None), asyncio.CancelledError}


async def _hold(locks: KeyedLocks) -> None:
    async with locks.hold("key"):
        pass
