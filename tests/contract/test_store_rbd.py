"""What every store has to do, of the store whose images are no files: see ``test_store.py`` for the others."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
import rbd

from elemento_storage.ceph.connection import PoolSettings
from elemento_storage.ceph.faults import CephFault, ImageGone
from elemento_storage.ceph.pool import Pool, Pools
from elemento_storage.disk import Disk, Place
from elemento_storage.model import Preallocation, VolumeFormat, new_uid
from elemento_storage.progress import Progress
from elemento_storage.stores.rbd import RbdStore
from tests.ceph import CephCluster

MB = 1 << 20
ODD_SIZE = 3 * MB + 512  # no whole number of objects


class Images:
    """Directories of volumes whose images are in one pool."""

    def __init__(self, pools: Pools, pool: Pool, root: Path, disk: Disk) -> None:
        self.pool = pool
        self.store = RbdStore(pools)
        self._root = root
        self._disk = disk

    def place(self) -> Place:
        """A new volume's directory, as its reservation makes it; its claim is ours."""
        volume_id = new_uid()
        directory = self._root / volume_id
        directory.mkdir()
        (directory / "data.rbd").write_bytes(self.pool.ref(volume_id).encode())
        self.pool.claims.acquire(volume_id)
        return Place(str(directory), self._disk, volume_id)

    async def allocate(self, place: Place, size: int) -> None:
        await self.store.allocate(place, VolumeFormat.RBD, size, Preallocation.OFF, Progress())


@pytest.fixture
def images(ceph: CephCluster, tmp_path: Path) -> Iterator[Images]:
    disk = Disk("test")
    pools = Pools("f" * 32, 30)
    yield Images(pools, pools.get(PoolSettings(**ceph.settings)), tmp_path, disk)
    pools.close()
    disk.close()


def test_capabilities_make_sense() -> None:
    capabilities = RbdStore.capabilities
    assert set(capabilities.preallocates) == capabilities.creates == {VolumeFormat.RBD}
    assert not capabilities.files


@pytest.mark.parametrize("size", [512, MB, ODD_SIZE, 8 << 40])
async def test_a_new_image_is_empty_and_of_the_size(images: Images, ceph: CephCluster, size: int) -> None:
    place = images.place()
    async with asyncio.timeout(5):
        await images.allocate(place, size)
    assert await images.store.size_bytes(place, VolumeFormat.RBD) == size
    with ceph.pool() as ioctx, rbd.Image(ioctx, place.volume_id, read_only=True) as image:
        assert not image.read(0, min(size, MB)).strip(b"\0")


async def test_images_made_side_by_side_do_not_mix(images: Images) -> None:
    sizes = [MB, 2 * MB, ODD_SIZE]
    places = [images.place() for _ in sizes]
    await asyncio.gather(*(images.allocate(place, size) for place, size in zip(places, sizes, strict=True)))
    assert [await images.store.size_bytes(place, VolumeFormat.RBD) for place in places] == sizes


async def test_an_image_that_is_there_is_not_overwritten(images: Images) -> None:
    place = images.place()
    await images.allocate(place, ODD_SIZE)
    with pytest.raises(FileExistsError):
        await images.allocate(place, MB)
    assert await images.store.size_bytes(place, VolumeFormat.RBD) == ODD_SIZE


async def test_growing_keeps_the_content_and_never_cuts_anything_off(images: Images, ceph: CephCluster) -> None:
    place = images.place()
    await images.allocate(place, ODD_SIZE)
    with ceph.pool() as ioctx, rbd.Image(ioctx, place.volume_id) as image:
        image.write(b"x" * 512, ODD_SIZE - 512)
    for size in (ODD_SIZE, MB, 64 * MB, 1 << 40):
        await images.store.grow(place, VolumeFormat.RBD, size)
        assert await images.store.size_bytes(place, VolumeFormat.RBD) == max(size, ODD_SIZE)
    with ceph.pool() as ioctx, rbd.Image(ioctx, place.volume_id, read_only=True) as image:
        assert image.read(ODD_SIZE - 512, 1024) == b"x" * 512 + b"\0" * 512


async def test_nobody_but_who_has_claimed_a_volume_grows_it(images: Images) -> None:
    place = images.place()
    await images.allocate(place, MB)
    images.pool.claims.release(place.volume_id)
    with pytest.raises(CephFault, match="shut this one out"):
        await images.store.grow(place, VolumeFormat.RBD, 2 * MB)
    assert await images.store.size_bytes(place, VolumeFormat.RBD) == MB


async def test_an_image_that_is_gone_is_said(images: Images, tmp_path: Path) -> None:
    place = images.place()
    with pytest.raises(ImageGone):
        await images.store.size_bytes(place, VolumeFormat.RBD)
    (Path(place.directory) / "data.rbd").write_text("no JSON")
    with pytest.raises(CephFault, match=r"data\.rbd"):
        await images.store.size_bytes(place, VolumeFormat.RBD)
    assert images.store.node(place, VolumeFormat.RBD, read_only=False).problem
