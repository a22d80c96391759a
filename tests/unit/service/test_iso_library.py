import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from elemento_storage.errors import InvalidValue, NoRoom, VolumeWaiting
from elemento_storage.model import GIGABYTE, Bus, CloneAlgorithm, IsoInfo, IsoType
from elemento_storage.progress import Progress
from elemento_storage.server import Server
from elemento_storage.service.iso_library import NewIso, require_content
from elemento_storage.service.reading import reading
from tests.live import make_location
from tests.unit.support import ALICE, make_volume, parts, uid

DEBIAN = IsoInfo(iso_type="os_generic", os_family="linux", os_flavour="debian", os_version="12.9")
DRIVERS = IsoInfo(iso_type="tool", os_family="windows", tool_scope="drivers", tool_version="2021")


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    make_location(tmp_path, max_total_size="50G", max_volumes=2)
    async with parts(tmp_path) as running:
        yield running


def new(**changes: Any) -> NewIso:
    return NewIso(**{"creator_id": ALICE, "name": "one", "iso_type": IsoType.OS_GENERIC, "info": DEBIAN, **changes})


async def test_an_installer(server: Server) -> None:
    volume = await server.services.isos.create(new(size_bytes=GIGABYTE), Progress())
    assert (volume.size_bytes, volume.allocated_bytes, volume.waiting) == (GIGABYTE, 0, True)
    assert volume.meta.bootable
    assert volume.meta.readonly
    assert volume.meta.bus is Bus.SATA
    assert not volume.meta.cloudinit
    assert volume.iso == DEBIAN
    directory = Path(server.settings.root) / "disk" / volume.directory_name
    assert json.loads((directory / "isoinfo.json").read_text()) == {
        "isotype": "os_generic",
        "os_family": "linux",
        "os_flavour": "debian",
        "os_version": "12.9",
    }
    again = await server.catalog.locations.by_name["disk"].reload(volume.volume_id)
    assert again is not None
    assert (again.iso, again.waiting, again.size_bytes) == (DEBIAN, True, GIGABYTE)


async def test_a_tool(server: Server) -> None:
    volume = await server.services.isos.create(new(iso_type=IsoType.TOOL, info=DRIVERS, clonable=False), Progress())
    assert not volume.meta.bootable
    assert volume.size_bytes == 2 * GIGABYTE
    assert volume.meta.alg is CloneAlgorithm.NO
    directory = Path(server.settings.root) / "disk" / volume.directory_name
    said = json.loads((directory / "isoinfo.json").read_text())
    assert said == {"isotype": "tool", "os_family": "windows", "scope": "drivers", "version": "2021"}


async def test_the_room_counts(server: Server) -> None:
    location = server.catalog.locations.by_name["disk"]
    await server.services.isos.create(new(), Progress())
    assert location.virtual_bytes == 15 * GIGABYTE
    with pytest.raises(NoRoom):
        await server.services.isos.create(new(size_bytes=36 * GIGABYTE), Progress())
    await server.services.isos.create(new(size_bytes=35 * GIGABYTE), Progress())
    with pytest.raises(NoRoom):
        await server.services.isos.create(new(size_bytes=512), Progress())
    assert location.virtual_bytes == 50 * GIGABYTE


async def test_an_earlier_try_is_found(server: Server) -> None:
    first = await server.services.isos.create(new(volume_id=uid(5)), Progress())
    assert await server.services.isos.create(new(volume_id=uid(5)), Progress()) == first


async def test_clonable_and_alg_have_to_agree(server: Server) -> None:
    with pytest.raises(InvalidValue):
        await server.services.isos.create(new(clonable=True, alg=CloneAlgorithm.NO), Progress())


async def test_what_waits_has_no_content_to_read(server: Server) -> None:
    volume = await server.services.isos.create(new(), Progress())
    with pytest.raises(VolumeWaiting, match="iso/create/upload"):
        require_content(volume)
    with pytest.raises(VolumeWaiting):
        async with reading(server.services.core, volume.volume_id, lambda _: None, "clone", uid(2)):
            pass
    make_volume(Path(server.settings.root) / "disk", uid(1))
    require_content((await server.catalog.find(uid(1), lambda _: None))[1])
