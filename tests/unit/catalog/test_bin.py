import asyncio
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from elemento_storage.catalog import bin as recycle_bin
from elemento_storage.catalog.bin import BinEntry, entries, move_in, move_out, move_to_trash
from elemento_storage.catalog.volume_directory import rewrite_meta
from tests.live import make_location
from tests.unit.support import make_volume, parts, small_file_system, uid


def names(path: Path) -> list[str]:
    return sorted(os.listdir(path)) if path.exists() else []


def destroyed_at(location: Path, volume_id: str, moment: datetime) -> Path:
    """A volume in the bin since ``moment``."""
    directory = make_volume(location, volume_id)
    (location / "elemento-bin").mkdir(exist_ok=True)
    return directory.rename(location / "elemento-bin" / f"{directory.name}.{moment:%Y%m%dT%H%M%S.%fZ}")


# -- one location ------------------------------------------------------------------------------------------


def test_in_and_out_again(tmp_path: Path) -> None:
    directory = make_volume(tmp_path, uid(1), data=b"precious" * 64)
    before = datetime.now(UTC)
    move_in(str(tmp_path), uid(1))
    assert not directory.exists()
    (entry,) = entries(str(tmp_path))
    assert entry.volume_id == uid(1)
    assert before <= entry.destroyed <= datetime.now(UTC)
    move_out(str(tmp_path), entry)
    assert entries(str(tmp_path)) == []
    assert (directory / "data.img").read_bytes() == b"precious" * 64


def test_an_absent_bin_is_empty(tmp_path: Path) -> None:
    assert entries(str(tmp_path)) == []


def test_the_same_volume_may_be_destroyed_again(tmp_path: Path) -> None:
    for content in (b"first", b"second"):
        make_volume(tmp_path, uid(1), data=content)
        move_in(str(tmp_path), uid(1))
    first, second = entries(str(tmp_path))
    assert first.destroyed < second.destroyed
    move_out(str(tmp_path), second)
    assert (tmp_path / f"vid.{uid(1)}.elimg" / "data.img").read_bytes() == b"second"


def test_restoring_never_replaces_a_volume(tmp_path: Path) -> None:
    make_volume(tmp_path, uid(1), name="old")
    move_in(str(tmp_path), uid(1))
    (entry,) = entries(str(tmp_path))
    (tmp_path / f"vid.{uid(1)}.elimg").mkdir()
    with pytest.raises(FileExistsError):
        move_out(str(tmp_path), entry)
    assert entries(str(tmp_path)) == [entry]


def test_oldest_first_and_other_things_are_left_alone(tmp_path: Path) -> None:
    moment = datetime(2026, 1, 2, 3, 4, 5, 678_000, UTC)
    for number, days in ((1, 2), (2, 1), (3, 3)):
        destroyed_at(tmp_path, uid(number), moment + timedelta(days=days))
    for other in ("README", f"vid.{uid(9)}.elimg", f"vid.{uid(9)}.elimg.yesterday", f"vid.x.elimg.{moment:%Y}"):
        (tmp_path / "elemento-bin" / other).mkdir()
    found = entries(str(tmp_path))
    assert [entry.volume_id for entry in found] == [uid(2), uid(1), uid(3)]
    assert found[0].destroyed == moment + timedelta(days=1)
    assert found[0].purge_at(3600) == moment + timedelta(days=1, hours=1)
    assert found[0].purge_at(1e15) > moment + timedelta(days=36_000)


def test_destroying_what_is_gone_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        move_in(str(tmp_path), uid(1))
    with pytest.raises(FileNotFoundError):
        move_out(str(tmp_path), BinEntry(uid(1), "absent", datetime.now(UTC)))


def test_a_purge_in_two_halves(tmp_path: Path) -> None:
    """Once the first half is done nothing can be restored, however far the second got."""
    (tmp_path / ".elemento" / "trash").mkdir(parents=True)
    make_volume(tmp_path, uid(1))
    move_in(str(tmp_path), uid(1))
    (entry,) = entries(str(tmp_path))
    path = move_to_trash(str(tmp_path), entry)
    assert entries(str(tmp_path)) == []
    assert recycle_bin.trash(str(tmp_path)) == [path]
    for _ in range(2):
        recycle_bin.empty_trash(path)
        assert recycle_bin.trash(str(tmp_path)) == []


# -- all locations -----------------------------------------------------------------------------------------


async def test_all_bins_oldest_first(tmp_path: Path) -> None:
    one, two = make_location(tmp_path, "one"), make_location(tmp_path, "two")
    now = datetime.now(UTC)
    destroyed_at(one, uid(1), now - timedelta(minutes=1))
    destroyed_at(two, uid(2), now - timedelta(minutes=3))
    destroyed_at(one, uid(3), now - timedelta(minutes=2))
    async with parts(tmp_path) as server:
        found = await server.catalog.bin.all()
        assert [(location.name, entry.volume_id) for location, entry in found] == [
            ("two", uid(2)),
            ("one", uid(3)),
            ("one", uid(1)),
        ]


async def test_only_what_is_past_its_time_is_purged(tmp_path: Path) -> None:
    location = make_location(tmp_path)
    now = datetime.now(UTC)
    old = destroyed_at(location, uid(1), now - timedelta(hours=2))
    young = destroyed_at(location, uid(2), now - timedelta(minutes=58))
    async with parts(tmp_path, bin_retention=3600.0) as server:
        await server.catalog.bin.purge_expired()
        assert names(location / "elemento-bin") == [young.name]
        assert names(location / ".elemento" / "trash") == []
        assert not old.exists()


async def test_a_start_purges_nothing_that_can_still_be_restored_and_finishes_an_interrupted_purge(
    tmp_path: Path,
) -> None:
    location = make_location(tmp_path)
    binned = destroyed_at(location, uid(1), datetime.now(UTC))
    rest = location / ".elemento" / "trash" / uid(5)
    rest.mkdir(parents=True)
    (rest / "data.img").write_bytes(b"x")
    async with parts(tmp_path):
        for _ in range(500):
            if not rest.exists():
                break
            await asyncio.sleep(0.01)
        assert names(location / ".elemento" / "trash") == []
        assert names(location / "elemento-bin") == [binned.name]


async def test_purging_what_somebody_else_purged_is_no_error(tmp_path: Path) -> None:
    location = make_location(tmp_path)
    destroyed_at(location, uid(1), datetime.now(UTC))
    async with parts(tmp_path) as server:
        ((where, entry),) = await server.catalog.bin.all()
        await asyncio.gather(*(server.catalog.bin.purge(where, entry) for _ in range(3)))
        assert names(location / "elemento-bin") == []


async def test_binned_volumes_are_no_volumes(tmp_path: Path) -> None:
    location = make_location(tmp_path)
    binned = destroyed_at(location, uid(1), datetime.now(UTC))
    rewrite_meta(str(binned), {"name": "binned"})
    async with parts(tmp_path) as server:
        (disk,) = server.catalog.locations.answering()
        assert (disk.volume_count, disk.virtual_bytes, disk.odd) == (0, 0, {})


async def test_room_is_made_oldest_first_and_no_more_than_needed(tmp_path: Path) -> None:
    with small_file_system(tmp_path / "mnt" / "disk", 8) as location:
        make_location(tmp_path / "mnt")
        now = datetime.now(UTC)
        for number in range(3):
            binned = destroyed_at(location, uid(number), now - timedelta(minutes=10 - number))
            (binned / "data.img").write_bytes(b"x" * (2 << 20))
        async with parts(tmp_path / "mnt") as server:
            (disk,) = server.catalog.locations.answering()
            assert not await server.catalog.bin.make_room(disk, 7 << 20)
            assert len(await server.catalog.bin.all()) == 3, "all of it would not have been enough"
            assert await server.catalog.bin.make_room(disk, 1 << 20)
            assert [entry.volume_id for _, entry in await server.catalog.bin.all()] == [uid(1), uid(2)]
