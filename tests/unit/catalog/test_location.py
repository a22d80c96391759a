import asyncio
import os
import shutil
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from elemento_storage.catalog.discovery import find_locations
from elemento_storage.catalog.location import Location, differs
from elemento_storage.catalog.volume_directory import read_entry, rewrite_meta
from elemento_storage.ceph.pool import Pools
from elemento_storage.model import Volume, marker_name, volume_directory_name
from tests.unit.support import ALICE, LONG_AGO_S, age, make_volume, uid

Changes = list[tuple[str, str]]


class Watched:
    """A location, and what it told of its volumes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        (found,) = find_locations(str(path), 0)
        self.told: Changes = []
        self.location = Location(found, lease_s=30, on_change=self._changed, pools=Pools("f" * 32, 30))

    def _changed(self, before: Volume | None, after: Volume | None) -> None:
        if differs(before, after):
            kind = "created" if before is None else "removed" if after is None else "changed"
            subject = after or before
            assert subject is not None
            self.told.append((kind, subject.volume_id))

    def heard(self) -> Changes:
        """What was told since the last time."""
        told, self.told = self.told, []
        return told


@pytest.fixture
async def watched(tmp_path: Path) -> AsyncIterator[Watched]:
    (tmp_path / "settings.json").write_text("{}")
    one = Watched(tmp_path)
    yield one
    await one.location.close()


async def test_a_sweep_finds_what_is_there(watched: Watched) -> None:
    make_volume(watched.path, uid(1), size=1024)
    make_volume(watched.path, uid(2), size=2048)
    report = await watched.location.sweep(max_age_s=0)
    assert sorted(report.added) == [uid(1), uid(2)]
    assert (report.changed, report.removed) == ([], [])
    assert (watched.location.volume_count, watched.location.virtual_bytes) == (2, 3072)
    assert sorted(watched.heard()) == [("created", uid(1)), ("created", uid(2))]


async def test_a_sweep_finds_what_was_changed_behind_its_back(watched: Watched) -> None:
    for number in range(1, 5):
        age(make_volume(watched.path, uid(number), size=1024))
    age(watched.path, LONG_AGO_S)
    await watched.location.sweep(max_age_s=0)
    watched.heard()
    rewrite_meta(str(watched.path / volume_directory_name(uid(1))), {"name": "new"})
    os.truncate(watched.path / volume_directory_name(uid(2)) / "data.img", 4096)
    shutil.rmtree(watched.path / volume_directory_name(uid(3)))
    make_volume(watched.path, uid(5), size=512)
    report = await watched.location.sweep(max_age_s=0)
    assert (report.added, sorted(report.changed), report.removed) == ([uid(5)], [uid(1), uid(2)], [uid(3)])
    assert (watched.location.volume_count, watched.location.virtual_bytes) == (4, 1024 + 4096 + 1024 + 512)
    assert sorted(watched.heard()) == [
        ("changed", uid(1)),
        ("changed", uid(2)),
        ("created", uid(5)),
        ("removed", uid(3)),
    ]


async def test_a_sweep_of_an_unchanged_location_tells_nothing(watched: Watched) -> None:
    for number in range(1, 4):
        age(make_volume(watched.path, uid(number)))
    age(watched.path)
    await watched.location.sweep(max_age_s=0)
    watched.heard()
    for _ in range(2):
        report = await watched.location.sweep(max_age_s=0)
        assert (report.added, report.changed, report.removed) == ([], [], [])
    assert watched.heard() == []


async def test_writes_by_a_guest_are_no_change(watched: Watched) -> None:
    directory = make_volume(watched.path, uid(1), size=1 << 20)
    await watched.location.sweep(max_age_s=0)
    watched.heard()
    with (directory / "data.img").open("r+b") as file:
        file.write(b"x" * 8192)
        file.flush()
        os.fsync(file.fileno())
    await watched.location.sweep(max_age_s=0)
    assert watched.heard() == []
    assert watched.location.entries[uid(1)].volume.allocated_bytes == 8192


async def test_locks_and_exports_are_a_change(watched: Watched) -> None:
    directory = make_volume(watched.path, uid(1))
    await watched.location.sweep(max_age_s=0)
    for name in (f"elemento.convert.{uid(9)}.ignore", marker_name(ALICE, uid(1))):
        watched.heard()
        (directory / name).write_text("")
        await watched.location.sweep(max_age_s=0)
        assert watched.heard() == [("changed", uid(1))]
    assert watched.location.virtual_bytes == 512, "a locked volume counts"


async def test_what_is_not_a_volume_is_named_with_its_reason_and_left_alone(
    watched: Watched, caplog: pytest.LogCaptureFixture
) -> None:
    make_volume(watched.path, uid(1))
    (watched.path / "vid.short.elimg").mkdir()
    (watched.path / volume_directory_name(uid(2))).mkdir()
    (watched.path / "other").mkdir()
    for _ in range(2):
        await watched.location.sweep(max_age_s=0)
    assert set(watched.location.odd) == {"vid.short.elimg", volume_directory_name(uid(2))}
    assert "32 lower-case hex digits" in watched.location.odd["vid.short.elimg"]
    assert "meta.json is missing" in watched.location.odd[volume_directory_name(uid(2))]
    assert caplog.text.count("vid.short.elimg") == 1, "said once, not with every sweep"
    assert (watched.path / "vid.short.elimg").is_dir()


async def test_a_volume_that_turns_odd_goes_and_comes_back_when_mended(watched: Watched) -> None:
    directory = make_volume(watched.path, uid(1), size=1024)
    await watched.location.sweep(max_age_s=0)
    (directory / "data.img").rename(directory / "elsewhere")
    await watched.location.sweep(max_age_s=0)
    assert list(watched.location.odd) == [directory.name]
    assert (watched.location.volume_count, watched.location.virtual_bytes) == (0, 0)
    (directory / "elsewhere").rename(directory / "data.img")
    await watched.location.sweep(max_age_s=0)
    assert watched.location.odd == {}
    assert watched.heard() == [("created", uid(1)), ("removed", uid(1)), ("created", uid(1))]


async def test_a_recent_sweep_is_not_repeated_unless_asked_for(watched: Watched) -> None:
    await watched.location.sweep(max_age_s=0)
    make_volume(watched.path, uid(1))
    assert (await watched.location.sweep(max_age_s=60)).added == []
    assert (await watched.location.sweep(max_age_s=0)).added == [uid(1)]


async def test_a_shared_location_is_always_read_afresh(watched: Watched) -> None:
    (watched.path / "settings.json").write_text('{"file-system": "unique"}')
    await watched.location.load_settings()
    await watched.location.sweep()
    make_volume(watched.path, uid(1))
    assert (await watched.location.sweep()).added == [uid(1)]


async def test_whoever_asks_for_a_new_sweep_sees_what_was_there_when_it_asked(watched: Watched) -> None:
    """A sweep under way may already have passed the place."""
    for number in range(1, 40):
        make_volume(watched.path, uid(number))
    running = asyncio.create_task(watched.location.sweep(max_age_s=0))
    await asyncio.sleep(0.001)
    make_volume(watched.path, uid(100))
    await watched.location.sweep(max_age_s=0)
    assert uid(100) in watched.location.entries
    await running


async def test_callers_who_hang_up_do_not_stop_a_sweep_that_others_wait_for(watched: Watched) -> None:
    make_volume(watched.path, uid(1))
    first = asyncio.create_task(watched.location.sweep(max_age_s=0.1))
    second = asyncio.create_task(watched.location.sweep(max_age_s=0.1))
    await asyncio.sleep(0)
    first.cancel()
    await second
    assert uid(1) in watched.location.entries


async def test_a_sweep_under_way_does_not_undo_what_an_operation_did_meanwhile(watched: Watched) -> None:
    """The sweep read the disk before the operation, and its result arrives after it."""
    location = watched.location
    for number in (*range(1, 3), *range(100, 160)):
        make_volume(watched.path, uid(number))
    await location.sweep(max_age_s=0)
    shutil.rmtree(watched.path / volume_directory_name(uid(2)))
    sweeping = asyncio.create_task(location.sweep(max_age_s=0))
    for _ in range(10):
        await asyncio.sleep(0)
    time.sleep(0.1)  # its thread reads the disk, and what it found cannot arrive before this task waits
    shutil.rmtree(watched.path / volume_directory_name(uid(1)))
    location.forget(uid(1))
    for number in (2, 3):
        make_volume(watched.path, uid(number))
        location.record(read_entry(str(watched.path), location.name, uid(number), lease_s=30))
    await sweeping
    assert uid(1) not in location.entries
    assert {uid(2), uid(3)} <= location.entries.keys()
    assert location.volume_count == 62
    assert location.virtual_bytes == 62 * 512


async def test_record_and_forget_keep_the_totals(watched: Watched) -> None:
    location = watched.location
    directory = make_volume(watched.path, uid(1), size=1024)
    for size in (1024, 8192, 4096):
        os.truncate(directory / "data.img", size)
        location.record(read_entry(str(watched.path), location.name, uid(1), lease_s=30))
        assert (location.volume_count, location.virtual_bytes) == (1, size)
    for _ in range(2):
        location.forget(uid(1))
        assert (location.volume_count, location.virtual_bytes) == (0, 0)


async def test_reservations_count_until_the_volume_itself_does(watched: Watched) -> None:
    location = watched.location
    make_volume(watched.path, uid(1), size=1024)
    await location.sweep(max_age_s=0)
    location.own_reservations[uid(2)] = 5000
    assert (location.volume_count, location.virtual_bytes) == (2, 6024)
    location.own_reservations[uid(1)] = 4096  # it grows
    assert (location.volume_count, location.virtual_bytes) == (2, 9096)
    location.foreign_reservations[uid(3)] = 100
    assert (location.volume_count, location.virtual_bytes) == (3, 9196)
    make_volume(watched.path, uid(2), size=5120)
    await location.sweep(max_age_s=0)
    assert (location.volume_count, location.virtual_bytes) == (3, 4096 + 5120 + 100)


async def test_reload_says_what_is_on_disk_now(watched: Watched) -> None:
    directory = make_volume(watched.path, uid(1), name="one")
    first = await watched.location.reload(uid(1))
    assert first is not None
    assert first.meta.name == "one"
    rewrite_meta(str(directory), {"name": "two"})
    second = await watched.location.reload(uid(1))
    assert second is not None
    assert second.meta.name == "two"
    (directory / "meta.json").write_text("{")
    assert await watched.location.reload(uid(1)) is None
    assert directory.name in watched.location.odd
    shutil.rmtree(directory)
    assert await watched.location.reload(uid(1)) is None
    assert watched.location.volume_count == 0
    assert watched.heard() == [("created", uid(1)), ("changed", uid(1)), ("removed", uid(1))]


async def test_fresh_of_a_volume_nobody_knew(watched: Watched) -> None:
    assert await watched.location.fresh(uid(1)) is None
    make_volume(watched.path, uid(1))
    assert await watched.location.fresh(uid(1)) is not None


async def test_broken_settings_are_told_once_and_keep_the_volumes(
    watched: Watched, caplog: pytest.LogCaptureFixture
) -> None:
    make_volume(watched.path, uid(1))
    (watched.path / "settings.json").write_text('{"max-volumes": "many"}')
    for _ in range(2):
        await watched.location.load_settings()
    await watched.location.sweep(max_age_s=0)
    assert "max-volumes" in str(watched.location.settings_problem)
    assert watched.location.volume_count == 1
    assert caplog.text.count("max-volumes") == 1
    (watched.path / "settings.json").write_text('{"max-volumes": 5}')
    await watched.location.load_settings()
    assert watched.location.settings_problem is None
    assert watched.location.settings.max_volumes == 5


async def test_a_location_that_is_gone_is_an_os_error_and_not_an_empty_one(watched: Watched) -> None:
    make_volume(watched.path, uid(1))
    await watched.location.sweep(max_age_s=0)
    watched.path.rename(watched.path.parent / "gone")
    with pytest.raises(FileNotFoundError):
        await watched.location.sweep(max_age_s=0)
    assert watched.location.volume_count == 1, "its volumes are kept"
    (watched.path.parent / "gone").rename(watched.path)
    assert (await watched.location.sweep(max_age_s=0)).removed == []
