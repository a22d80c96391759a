"""Sessions of readers: shared, and ended for guests when their volume is wanted for a change."""

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from elemento_storage.errors import ImageChanged, LocationUnavailable, NoRoom, Unavailable, VolumeLocked
from elemento_storage.progress import Progress
from elemento_storage.server import Server
from elemento_storage.service.access import INFRASTRUCTURE, Actor
from elemento_storage.service.clone import NewClone
from elemento_storage.service.reading import reading
from elemento_storage.service.volumes import VolumeChanges
from tests.unit.support import ALICE, BOB, make_volume, parts, uid

VID = uid(7)
GRACE_S = 0.05


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    for name in ("disk", "other"):
        (tmp_path / "mnt" / name).mkdir(parents=True)
        (tmp_path / "mnt" / name / "settings.json").write_text("{}")
    make_volume(tmp_path / "mnt" / "disk", VID, data=b"x" * 4096)
    async with parts(tmp_path / "mnt", reader_grace=GRACE_S) as running:
        yield running


async def rename(server: Server, client: str | None = ALICE) -> None:
    await server.services.volumes.update(Actor(client), VID, VolumeChanges(name="another"))


async def begun(server: Server) -> None:
    """Until somebody's lock is in the volume."""
    path = server.catalog.locations.by_name["disk"].volume_path(VID)
    async with asyncio.timeout(30):
        while not any(name.endswith(".ignore") for name in os.listdir(path)):
            await asyncio.sleep(0.01)


async def test_guests_have_to_go_when_the_volume_is_wanted(server: Server) -> None:
    sessions = server.services.data.sessions
    async with sessions.open(Actor(ALICE), VID) as own:
        async with sessions.open(Actor(BOB), VID) as guest:
            with pytest.raises(VolumeLocked):
                await rename(server)
            guest.check()
            with pytest.raises(VolumeLocked, match="wants to change"):
                async with sessions.open(Actor(BOB), VID):
                    pass
            async with sessions.open(INFRASTRUCTURE, VID):
                pass
            await asyncio.wait_for(guest.unwanted.wait(), 5)
            with pytest.raises(VolumeLocked):
                guest.check()
            assert not own.unwanted.is_set()
        with pytest.raises(VolumeLocked):
            await rename(server)  # its own reader keeps the owner waiting: that is for the owner to end
    with pytest.raises(VolumeLocked, match="wants to change"):  # it is the turn of who wanted it
        async with sessions.open(Actor(BOB), VID):
            pass
    await rename(server)


async def test_who_may_not_change_it_sends_nobody_away(server: Server) -> None:
    sessions = server.services.data.sessions
    async with sessions.open(Actor(BOB), VID) as guest:
        with pytest.raises(Exception, match="owner"):
            await rename(server, BOB)
        await asyncio.sleep(2 * GRACE_S)
        assert not guest.unwanted.is_set()
        async with sessions.open(Actor(BOB), VID):
            pass


async def test_a_guests_checksum_ends_as_well(server: Server, tmp_path: Path) -> None:
    os.truncate(tmp_path / "mnt" / "disk" / f"vid.{VID}.elimg" / "data.img", 1 << 43)
    checksum = asyncio.ensure_future(
        server.services.data.checksum(Actor(BOB), VID, "sha256", "plain", Progress())  # type: ignore[arg-type]
    )
    await begun(server)
    with pytest.raises(VolumeLocked):
        await rename(server)
    with pytest.raises(VolumeLocked, match="wants to change"):
        await asyncio.wait_for(checksum, 30)
    await rename(server)


async def test_one_client_does_not_keep_all_others_out(server: Server) -> None:
    sessions = server.services.data.sessions

    async def read(done: asyncio.Event) -> None:
        async with sessions.open(Actor(BOB), VID):
            await done.wait()

    done = asyncio.Event()
    readers = [asyncio.ensure_future(read(done)) for _ in range(60)]
    await asyncio.wait(readers, timeout=30, return_when=asyncio.FIRST_COMPLETED)
    await asyncio.sleep(0.2)
    refused = [reader for reader in readers if reader.done()]
    assert 0 < len(refused) < 60
    assert all(isinstance(reader.exception(), Unavailable) for reader in refused)
    async with sessions.open(Actor(ALICE), VID):
        pass
    done.set()
    await asyncio.gather(*readers, return_exceptions=True)


# -- locations where nothing can be written ----------------------------------------------------------------


async def test_where_nothing_can_be_written_volumes_are_read_without_a_lock(server: Server) -> None:
    location = server.catalog.locations.by_name["disk"]
    location.read_only = "nothing can be written: by this test"
    async with server.services.data.image(Actor(BOB), VID) as image:
        assert list(image.parts(0, 4096))
        assert not [name for name in os.listdir(location.volume_path(VID)) if name.endswith(".ignore")]
    made = await server.services.cloning.clone(Actor(BOB), VID, NewClone(creator_id=BOB, location="other"), Progress())
    assert (made.location, made.size_bytes) == ("other", 4096)
    with pytest.raises(NoRoom, match="nothing can be written"):
        await server.services.cloning.clone(Actor(ALICE), VID, NewClone(creator_id=ALICE, linked=True), Progress())
    with pytest.raises(LocationUnavailable):
        await rename(server)


async def test_that_somebody_else_changed_it_is_found_out_at_the_end(server: Server) -> None:
    location = server.catalog.locations.by_name["disk"]
    location.read_only = "nothing can be written: by this test"
    path = f"{location.volume_path(VID)}/data.img"
    async with reading(server.services.core, VID, lambda _: None, "clone", uid(9)) as source:
        await source.confirm()
        os.utime(path, ns=(1, 1))
        with pytest.raises(ImageChanged):
            await source.confirm()
    async with server.services.data.image(Actor(BOB), VID) as image:
        os.utime(path, ns=(2, 2))
        with pytest.raises(ImageChanged):
            list(image.parts(0, 4096))


async def test_what_was_broken_off_there_is_not_read(server: Server) -> None:
    location = server.catalog.locations.by_name["disk"]
    left = f'{{"purpose":"convert","operation":"{uid(3)}","server":"{uid(4)}"}}'
    with open(f"{location.volume_path(VID)}/elemento.convert.{uid(3)}.ignore", "w", encoding="utf-8") as lock:
        lock.write(left)
    location.read_only = "nothing can be written: by this test"
    with pytest.raises(LocationUnavailable, match="broken off"):
        async with reading(server.services.core, VID, lambda _: None, "clone", uid(9)):
            pass
