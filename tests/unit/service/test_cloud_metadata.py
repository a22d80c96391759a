import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from elemento_storage.catalog.metadata_directory import METADATA_DIRECTORY
from elemento_storage.engine.seed_iso import build_seed
from elemento_storage.errors import (
    BodyTooLarge,
    Conflict,
    InvalidValue,
    NoRoom,
    NotOwner,
    TooManyFiles,
    VolumeExported,
    VolumeNotFound,
    VolumeWaiting,
)
from elemento_storage.model import VolumeFormat, marker_name
from elemento_storage.progress import Progress
from elemento_storage.server import Server
from elemento_storage.service.access import INFRASTRUCTURE, Actor
from elemento_storage.service.cloud_metadata import LARGEST_FILE_BYTES, MetadataState, NewMetadata
from elemento_storage.service.iso_library import require_content
from tests.live import make_location
from tests.unit.support import ALICE, BOB, make_volume, parts, uid

USER = b"#cloud-config\nhostname: one\n"
META = b"instance-id: i-1\n"


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    make_location(tmp_path, max_total_size="100M")
    async with parts(tmp_path) as running:
        yield running


async def create(
    server: Server, expected: int = 2, files: dict[str, bytes] | None = None, **more: Any
) -> MetadataState:
    new = NewMetadata(creator_id=ALICE, name="seed", expected=expected, **more)
    return await server.services.metadata.create(new, files or {}, Progress())


async def add(server: Server, volume_id: str, actor: Actor = INFRASTRUCTURE, **files: bytes) -> MetadataState:
    return await add_files(server, volume_id, {name.replace("_", "-"): files[name] for name in files}, actor)


async def add_files(
    server: Server, volume_id: str, files: dict[str, bytes], actor: Actor = INFRASTRUCTURE
) -> MetadataState:
    return await server.services.metadata.add(actor, volume_id, files)


def directory_of(server: Server, volume_id: str) -> Path:
    return Path(server.settings.root) / "disk" / f"vid.{volume_id}.elimg"


async def test_files_come_one_by_one(server: Server) -> None:
    state = await create(server)
    volume_id = state.volume.volume_id
    directory = directory_of(server, volume_id)
    assert (state.names, state.expected, state.complete, state.volume.waiting) == ((), 2, False, True)
    assert [path.name for path in (directory / METADATA_DIRECTORY).iterdir()] == ["elemento.2.expected"]
    with pytest.raises(VolumeWaiting, match="cloudinit/metadata"):
        require_content(state.volume)

    state = await add(server, volume_id, user_data=USER)
    assert (state.names, state.complete, state.volume.waiting) == (("user-data",), False, True)
    state = await add(server, volume_id, user_data=USER + b"# again\n")
    assert (state.names, state.complete) == (("user-data",), False)

    state = await add(server, volume_id, network_data=b"version: 2\n")
    assert (state.names, state.complete, state.volume.waiting) == (("network-data", "user-data"), True, False)
    made = {
        "user-data": USER + b"# again\n",
        "network-config": b"version: 2\n",
        "meta-data": f"instance-id: {volume_id}\n".encode(),
    }
    assert (directory / "data.iso").read_bytes() == build_seed(made)
    meta = json.loads((directory / "meta.json").read_text())
    assert (meta["format"], meta["cloudinit"], meta["readonly"], meta["bus"]) == ("iso", True, True, "virtio")
    assert meta["size"] == state.volume.size_bytes == len(build_seed(made))
    assert server.catalog.locations.by_name["disk"].virtual_bytes == meta["size"]
    assert sorted(path.name for path in directory.iterdir()) == [METADATA_DIRECTORY, "data.iso", "meta.json"]
    assert sorted(path.name for path in (directory / METADATA_DIRECTORY).iterdir()) == [
        "elemento.2.expected",
        "network-data",
        "user-data",
    ]


async def test_all_files_in_the_first_call(server: Server) -> None:
    state = await create(server, 2, {"user-data": USER, "meta-data": META})
    assert state.complete
    assert not state.volume.waiting
    image = directory_of(server, state.volume.volume_id) / "data.iso"
    assert image.read_bytes() == build_seed({"user-data": USER, "meta-data": META})


async def test_a_first_call_that_died_is_found_again(server: Server) -> None:
    first = await create(server, 1, {"user-data": USER}, volume_id=uid(3))
    again = await create(server, 1, {"user-data": USER}, volume_id=uid(3))
    assert again.volume == first.volume


async def test_a_file_sent_again_replaces_it(server: Server) -> None:
    state = await create(server, 1, {"user-data": USER})
    volume_id = state.volume.volume_id
    state = await add(server, volume_id, user_data=b"#cloud-config\n" + b"# " + b"x" * 100_000)
    assert state.complete
    assert state.volume.size_bytes > 100_000
    state = await add(server, volume_id, user_data=USER)
    assert state.volume.size_bytes < 100_000
    assert b"hostname: one" in (directory_of(server, volume_id) / "data.iso").read_bytes()


async def test_what_was_changed_by_hand_goes_into_the_next_seed(server: Server) -> None:
    state = await create(server, 2, {"user-data": USER, "meta-data": META})
    volume_id = state.volume.volume_id
    inside = directory_of(server, volume_id) / METADATA_DIRECTORY
    (inside / "user-data").write_text("#cloud-config\nhostname: by-hand\n")
    (inside / "script.sh").write_text("#!/bin/sh\n")
    (inside / "user-data~").write_text("an editor's")
    state = await add(server, volume_id, meta_data=META)
    assert state.names == ("meta-data", "script.sh", "user-data")
    assert state.warnings == ("user-data~ is no file of a seed and is left out",)
    assert b"by-hand" in (directory_of(server, volume_id) / "data.iso").read_bytes()


async def test_a_directory_that_does_not_say_how_many(server: Server) -> None:
    directory = make_volume(
        Path(server.settings.root) / "disk", uid(4), image_format=VolumeFormat.ISO, cloudinit=True, size=4096
    )
    (directory / METADATA_DIRECTORY).mkdir()
    state = await add(server, uid(4), user_data=USER)
    assert (state.expected, state.complete) == (1, True)
    state = await add(server, uid(4), meta_data=META)
    assert (state.expected, state.complete) == (2, True)


async def test_more_files_than_announced(server: Server) -> None:
    with pytest.raises(TooManyFiles):
        await create(server, 1, {"user-data": USER, "meta-data": META})
    state = await create(server, 1, {"user-data": USER})
    before = (directory_of(server, state.volume.volume_id) / "data.iso").read_bytes()
    with pytest.raises(TooManyFiles, match="user-data") as refused:
        await add(server, state.volume.volume_id, meta_data=META)
    assert refused.value.details == {"expected": 1, "received": 1}
    assert (directory_of(server, state.volume.volume_id) / "data.iso").read_bytes() == before


@pytest.mark.parametrize("name", ["../user-data", ".hidden", "a" * 65, "", "elemento.9.expected", "a\0b"])
async def test_names_that_are_refused(server: Server, name: str) -> None:
    with pytest.raises(InvalidValue, match="'file' has the name"):
        await create(server, 2, {name: USER})
    state = await create(server)
    with pytest.raises(InvalidValue, match="'file' has the name"):
        await server.services.metadata.add(INFRASTRUCTURE, state.volume.volume_id, {"user-data": USER, name: b""})
    assert len(list((directory_of(server, state.volume.volume_id) / METADATA_DIRECTORY).iterdir())) == 1


async def test_limits_on_bytes(server: Server) -> None:
    state = await create(server, 8)
    volume_id = state.volume.volume_id
    with pytest.raises(BodyTooLarge, match="a file may have 4194304"):
        await add(server, volume_id, user_data=b"x" * (LARGEST_FILE_BYTES + 1))
    for name in "abcd":
        await add_files(server, volume_id, {name: bytes(LARGEST_FILE_BYTES)})
    with pytest.raises(BodyTooLarge, match="together"):
        await add(server, volume_id, e=b"1")
    await add(server, volume_id, a=b"1")
    assert (await add(server, volume_id, e=b"1")).names == tuple("abcde")


async def test_no_room_for_a_larger_seed_changes_nothing(server: Server) -> None:
    state = await create(server, 1, {"user-data": USER})
    volume_id = state.volume.volume_id
    make_volume(Path(server.settings.root) / "disk", uid(9), size=99_900_000 // 512 * 512)
    await server.catalog.look_around(max_age_s=0.0)
    before = (directory_of(server, volume_id) / "data.iso").read_bytes()
    with pytest.raises(NoRoom):
        await add(server, volume_id, user_data=USER + b"#" * 200_000)
    assert (directory_of(server, volume_id) / "data.iso").read_bytes() == before
    assert (directory_of(server, volume_id) / METADATA_DIRECTORY / "user-data").read_bytes() == USER
    assert (await add(server, volume_id, user_data=USER + b"# 2\n")).complete


async def test_only_the_owner_adds_files(server: Server) -> None:
    private = (await create(server, private=True)).volume.volume_id
    with pytest.raises(VolumeNotFound):
        await add(server, private, Actor(BOB), user_data=USER)
    public = (await create(server)).volume.volume_id
    with pytest.raises(NotOwner):
        await add(server, public, Actor(BOB), user_data=USER)
    await add(server, private, Actor(ALICE), user_data=USER)
    with pytest.raises(VolumeNotFound):
        await add(server, uid(77), Actor(ALICE), user_data=USER)


async def test_other_volumes_take_no_files(server: Server) -> None:
    disk = Path(server.settings.root) / "disk"
    make_volume(disk, uid(1), cloudinit=True)
    make_volume(disk, uid(2), image_format=VolumeFormat.ISO, data=b"x" * 40_000, cloudinit=True)
    (make_volume(disk, uid(3), image_format=VolumeFormat.ISO) / METADATA_DIRECTORY).mkdir()
    for number in (1, 2, 3):
        with pytest.raises(Conflict, match="takes no metadata files"):
            await add(server, uid(number), user_data=USER)
    assert (disk / f"vid.{uid(2)}.elimg" / "data.iso").read_bytes() == b"x" * 40_000


async def test_not_while_it_is_exported(server: Server) -> None:
    state = await create(server, 1, {"user-data": USER})
    directory = directory_of(server, state.volume.volume_id)
    (directory / marker_name(BOB, state.volume.volume_id)).touch()
    with pytest.raises(VolumeExported):
        await add(server, state.volume.volume_id, user_data=USER)


async def test_warnings_of_the_files_and_of_the_seed(server: Server) -> None:
    state = await create(server, 2, {"meta-data": b"a: 1\n"})
    assert "no instance-id" in state.warnings[0]
    state = await add_files(server, state.volume.volume_id, {"setup.sh": b"#!/bin/sh\n"})
    assert state.complete
    assert "no user-data was sent" in state.warnings[0]
    assert len(state.warnings) == 1
