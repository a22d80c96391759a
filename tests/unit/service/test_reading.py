"""Volumes that are read by several at a time, while nobody changes them."""

import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from elemento_storage.catalog import locks
from elemento_storage.catalog.catalog import Held
from elemento_storage.engine.image_lock import lock_image
from elemento_storage.errors import ImageInUse, NotOwner, VolumeExported, VolumeLocked, VolumeNotFound
from elemento_storage.model import Volume, VolumeFormat, marker_name, new_uid
from elemento_storage.server import Server
from elemento_storage.service.access import INFRASTRUCTURE, Actor
from elemento_storage.service.listing import Query, list_volumes
from elemento_storage.service.reading import reading
from elemento_storage.service.volumes import VolumeChanges
from tests.unit.support import ALICE, BOB, make_volume, parts, uid

VID = uid(7)


def anybody(volume: Volume) -> None:
    """No objection."""


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    location = tmp_path / "mnt" / "disk"
    location.mkdir(parents=True)
    (location / "settings.json").write_text("{}")
    make_volume(location, VID, data=b"x" * 4096)
    async with parts(tmp_path / "mnt") as running:
        yield running


def lock_names(server: Server) -> list[str]:
    return list(server.catalog.locations.by_name["disk"].entries[VID].volume.locks)


async def rename(server: Server) -> Volume:
    return await server.services.volumes.update(Actor(ALICE), VID, VolumeChanges(name="another"))


async def test_what_is_only_read_stays_in_lists(server: Server) -> None:
    core = server.services.core

    async def listed() -> list[str]:
        return [volume.volume_id for volume in (await list_volumes(core, Actor(BOB), Query())).volumes]

    async with reading(core, VID, anybody, "clone", new_uid()) as source:
        assert await listed() == [VID]
        other = locks.new_lock("convert", new_uid(), core.catalog.server_id, None, {})
        locks.write_lock(source.place.directory, other)
        await source.location.reload(VID)
        assert await listed() == []
        locks.remove_lock(source.place.directory, other)
    assert await listed() == [VID]


async def test_any_number_read_and_nobody_changes(server: Server) -> None:
    core = server.services.core
    async with (
        reading(core, VID, anybody, "clone", new_uid(), client=ALICE) as first,
        reading(core, VID, anybody, "download", new_uid()) as second,
    ):
        assert first.volume.volume_id == second.volume.volume_id == VID
        assert len(lock_names(server)) == 2
        with pytest.raises(VolumeLocked) as refused:
            await rename(server)
        told = refused.value.details["locked"]
        assert isinstance(told, dict)
        assert told["shared"] is True
        with pytest.raises(VolumeLocked):
            await server.services.volumes.destroy(INFRASTRUCTURE, VID)
        await first.confirm()
        await second.confirm()
    assert lock_names(server) == []
    assert (await rename(server)).meta.name == "another"


async def test_who_changes_keeps_readers_out(server: Server) -> None:
    catalog = server.catalog
    async with catalog.operation(VID, new_uid()) as operation:
        async with catalog.hold(VID, anybody) as held:
            lock = await operation.lock_volume(held, "convert", ALICE, {})
        with pytest.raises(VolumeLocked):
            async with reading(server.services.core, VID, anybody, "clone", new_uid()):
                pass
        async with catalog.hold(VID, anybody, own_lock=lock) as held:
            await held.place.disk.run(locks.remove_lock, held.place.directory, lock)


async def test_one_reader_that_fails_leaves_the_others(server: Server) -> None:
    core = server.services.core
    async with reading(core, VID, anybody, "clone", new_uid()) as other:
        with pytest.raises(ZeroDivisionError):
            async with reading(core, VID, anybody, "clone", new_uid()):
                raise ZeroDivisionError
        assert other.lock is not None
        assert lock_names(server) == [other.lock.file_name]
        await other.confirm()
    assert lock_names(server) == []


async def test_the_lock_of_a_dead_reader_is_removed_by_whoever_comes_next(server: Server) -> None:
    directory = server.catalog.locations.by_name["disk"].volume_path(VID)
    dead = locks.new_lock("of-a-later-version", new_uid(), uid(99), None, {}, shared=True)
    locks.write_lock(directory, dead)
    core = server.services.core
    async with reading(core, VID, anybody, "clone", new_uid()) as source:
        assert source.lock is not None
        assert lock_names(server) == [source.lock.file_name]
    locks.write_lock(directory, dead)
    assert (await rename(server)).meta.name == "another"
    assert os.listdir(directory).count(dead.file_name) == 0


async def test_a_reader_is_told_that_its_lock_was_taken_away(server: Server) -> None:
    async with reading(server.services.core, VID, anybody, "clone", new_uid()) as source:
        assert source.lock is not None
        locks.remove_lock(source.place.directory, source.lock)
        with pytest.raises(VolumeLocked, match="taken away"):
            await source.confirm()


async def test_another_products_lock_keeps_readers_out(server: Server) -> None:
    directory = Path(server.catalog.locations.by_name["disk"].volume_path(VID))
    (directory / f"elemento.clone.{uid(5)}.ignore").write_text('{"shared": true}')
    with pytest.raises(VolumeLocked):
        async with reading(server.services.core, VID, anybody, "clone", new_uid()):
            pass


async def test_the_check_is_asked_before_anything_is_told(server: Server) -> None:
    core = server.services.core
    await server.services.volumes.update(Actor(ALICE), VID, VolumeChanges(private=True))
    async with reading(core, VID, Actor(ALICE).require_see, "clone", new_uid()):
        with pytest.raises(VolumeNotFound):
            async with reading(core, VID, Actor(BOB).require_see, "clone", new_uid()):
                pass
        with pytest.raises(VolumeNotFound):
            await server.services.volumes.update(Actor(BOB), VID, VolumeChanges(name="mine"))
    await server.services.volumes.update(Actor(ALICE), VID, VolumeChanges(private=False))
    with pytest.raises(NotOwner):
        async with reading(core, VID, Actor(BOB).require_change, "clone", new_uid()):
            pass


async def test_an_exported_volume_is_read_only_if_nobody_can_write_to_it(server: Server) -> None:
    core = server.services.core
    directory = Path(server.catalog.locations.by_name["disk"].volume_path(VID))
    (directory / marker_name(BOB, VID)).touch()
    with pytest.raises(VolumeExported):
        async with reading(core, VID, anybody, "clone", new_uid()):
            pass
    assert lock_names(server) == []
    (directory / marker_name(BOB, VID)).unlink()
    await server.services.volumes.update(Actor(ALICE), VID, VolumeChanges(readonly=True))
    (directory / marker_name(BOB, VID)).touch()
    async with reading(core, VID, anybody, "clone", new_uid()) as source:
        assert source.volume.exported


async def test_no_program_that_respects_qemus_locks_writes_meanwhile(server: Server) -> None:
    core = server.services.core
    image = server.catalog.locations.by_name["disk"].volume_path(VID) + "/" + VolumeFormat.RAW.data_file
    async with reading(core, VID, anybody, "clone", new_uid()):
        with pytest.raises(ImageInUse):
            lock_image(image, read_only=False)
        os.close(lock_image(image, read_only=True))
    held = lock_image(image, read_only=False)
    try:
        with pytest.raises(ImageInUse):
            async with reading(core, VID, anybody, "clone", new_uid()):
                pass
    finally:
        os.close(held)
    assert lock_names(server) == []


async def test_what_forbids_reading_is_looked_at_under_the_guard(server: Server) -> None:
    seen: list[Held] = []

    async def require(held: Held) -> None:
        seen.append(held)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        async with server.catalog.reading(VID, anybody, "clone", new_uid(), require=require):
            pass
    assert [one.volume.volume_id for one in seen] == [VID]
    assert lock_names(server) == []
