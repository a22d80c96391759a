import asyncio
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from elemento_storage.disk import Disk
from elemento_storage.errors import KeyReused, NoRoom
from elemento_storage.model import normalise_uid
from elemento_storage.service.idempotency import IdempotencyKeys, derive_uid
from tests.unit.support import age


class Creating:
    """Work that counts how often it was done, and with which seeds."""

    def __init__(self, *errors: BaseException) -> None:
        self.seeds: list[str] = []
        self._errors = list(errors)

    async def __call__(self, seed: str) -> bytes:
        self.seeds.append(seed)
        await asyncio.sleep(0)
        if self._errors:
            raise self._errors.pop(0)
        return b'{"vid": %d}' % len(self.seeds)


@pytest.fixture
def disk() -> Iterator[Disk]:
    one = Disk("state")
    yield one
    one.close()


async def started(tmp_path: Path, disk: Disk) -> IdempotencyKeys:
    keys = IdempotencyKeys(str(tmp_path / "state"), disk)
    await keys.start()
    return keys


def files(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "state" / "idempotency").iterdir())


async def test_the_same_key_and_body_are_done_once(tmp_path: Path, disk: Disk) -> None:
    keys, work = await started(tmp_path, disk), Creating()
    assert await keys.once("scope", "key", b"body", work) == (b'{"vid": 1}', False)
    for _ in range(2):
        assert await keys.once("scope", "key", b"body", work) == (b'{"vid": 1}', True)
    assert len(work.seeds) == 1


async def test_another_body_is_refused(tmp_path: Path, disk: Disk) -> None:
    keys, work = await started(tmp_path, disk), Creating()
    await keys.once("scope", "key", b"body", work)
    with pytest.raises(KeyReused):
        await keys.once("scope", "key", b"other", work)
    assert len(work.seeds) == 1


async def test_another_key_or_scope_is_another_call(tmp_path: Path, disk: Disk) -> None:
    keys, work = await started(tmp_path, disk), Creating()
    for scope, key in (("scope", "key"), ("scope", "key2"), ("scope2", "key"), ("scopek", "ey")):
        assert not (await keys.once(scope, key, b"body", work))[1]
    assert len(set(work.seeds)) == 4


async def test_two_at_once_wait_for_one_answer(tmp_path: Path, disk: Disk) -> None:
    keys, work = await started(tmp_path, disk), Creating()
    answers = await asyncio.gather(*(keys.once("scope", "key", b"body", work) for _ in range(5)))
    assert {answer for answer, _ in answers} == {b'{"vid": 1}'}
    assert sorted(replayed for _, replayed in answers) == [False, True, True, True, True]


async def test_a_restart_forgets_nothing(tmp_path: Path, disk: Disk) -> None:
    work = Creating()
    await (await started(tmp_path, disk)).once("scope", "key", b"body", work)
    again = await started(tmp_path, disk)
    assert await again.once("scope", "key", b"body", work) == (b'{"vid": 1}', True)
    with pytest.raises(KeyReused):
        await again.once("scope", "key", b"other", work)


async def test_an_error_is_not_kept(tmp_path: Path, disk: Disk) -> None:
    keys, work = await started(tmp_path, disk), Creating(NoRoom("full"))
    with pytest.raises(NoRoom):
        await keys.once("scope", "key", b"body", work)
    assert files(tmp_path) == []
    assert await keys.once("scope", "key", b"another body", work) == (b'{"vid": 2}', False)


@pytest.mark.parametrize("end", [KeyboardInterrupt(), asyncio.CancelledError(), RuntimeError("bug")])
async def test_work_of_unknown_outcome_is_repeated_with_the_same_seed(
    tmp_path: Path, disk: Disk, end: BaseException
) -> None:
    """The seed names the volumes: one that the first try made is found again instead of made twice."""
    work = Creating(end)
    with pytest.raises(type(end)):
        await (await started(tmp_path, disk)).once("scope", "key", b"body", work)
    assert await (await started(tmp_path, disk)).once("scope", "key", b"body", work) == (b'{"vid": 2}', False)
    assert work.seeds[0] == work.seeds[1]


async def test_keys_are_forgotten_after_a_day(tmp_path: Path, disk: Disk) -> None:
    keys, work = await started(tmp_path, disk), Creating()
    await keys.once("scope", "key", b"body", work)
    (path,) = files(tmp_path)
    age(path)
    assert await keys.once("scope", "key", b"other", work) == (b'{"vid": 2}', False)
    (path,) = files(tmp_path)
    age(path)
    await started(tmp_path, disk)
    assert files(tmp_path) == []


async def test_young_keys_survive_a_start(tmp_path: Path, disk: Disk) -> None:
    keys = await started(tmp_path, disk)
    await keys.once("scope", "key", b"body", Creating())
    await started(tmp_path, disk)
    assert len(files(tmp_path)) == 1


async def test_what_is_kept_is_nobody_elses_business(tmp_path: Path, disk: Disk) -> None:
    keys = await started(tmp_path, disk)
    await keys.once("scope", "../../key/\0", b"body", Creating())
    (path,) = files(tmp_path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert b"key" not in path.read_bytes()
    assert os.listdir(tmp_path) == ["state"]


async def test_any_json_answer_comes_back_byte_for_byte(tmp_path: Path, disk: Disk) -> None:
    keys = await started(tmp_path, disk)
    answer = '[{"name": "é\u2028\\u0000\\"", "size": 0.10}, null]'.encode()

    async def work(_seed: str) -> bytes:
        return answer

    await keys.once("scope", "key", b"body", work)
    assert await keys.once("scope", "key", b"body", work) == (answer, True)


def test_derived_uids_are_uids_and_depend_on_seed_and_position() -> None:
    derived = [derive_uid(seed, index) for seed in ("a", "b") for index in range(3)]
    assert len(set(derived)) == 6
    assert all(normalise_uid(one) == one for one in derived)
    assert derive_uid("a", 0) == derived[0]
