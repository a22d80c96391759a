"""What every store that keeps snapshots has to do, whatever holds the bytes (see ``test_store``)."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from elemento_storage.disk import Place
from elemento_storage.errors import ImageInUse, JobCancelled, NoRoom
from elemento_storage.model import CloneAlgorithm, Preallocation, VolumeFormat, new_uid
from elemento_storage.progress import Progress
from elemento_storage.stores.base import StoredSnapshot
from tests.contract.test_store import (  # noqa: F401  fixtures
    MB,
    ODD_SIZE,
    Volumes,
    digest,
    disk,
    image,
    over_formats,
    random_raw,
    reads,
    tight,
    volumes,
    write,
)
from tests.unit.support import assert_sound

each_kept = over_formats(lambda capabilities: capabilities.snapshots)


@pytest.fixture
def sharing(volumes: Volumes, tmp_path: Path) -> Iterator[Volumes]:  # noqa: F811
    """The same store on a file system that shares extents."""
    container, root = tmp_path / "container", tmp_path / "sharing"
    with container.open("wb") as file:
        file.truncate(400 * MB)
    root.mkdir()
    subprocess.run(["mkfs.xfs", "-q", str(container)], check=True)
    subprocess.run(["mount", "-o", "loop", str(container), str(root)], check=True)
    try:
        yield Volumes(volumes.store, root, volumes.disk)
    finally:
        subprocess.run(["umount", "-l", str(root)], check=True)


async def take(of: Volumes, place: Place, image_format: VolumeFormat) -> StoredSnapshot:
    uid, progress = new_uid(), Progress()
    await of.store.take_snapshot(place, image_format, uid, progress)
    assert not progress.request_cancel(), "a snapshot that is there can be cancelled no more"
    [found] = [one for one in await of.store.snapshots(place, image_format) if one.snapshot_id == uid]
    return found


async def restore(of: Volumes, place: Place, image_format: VolumeFormat, snapshot: StoredSnapshot) -> None:
    if image_format in of.store.capabilities.snapshots_inside:
        await of.store.restore_in_place(place, image_format, snapshot)
    else:
        copy = f"{place.directory}/copy"
        await of.store.restore_beside(place, image_format, snapshot, copy, Progress())
        os.rename(copy, image(place, image_format))


def test_capabilities_make_sense(volumes: Volumes) -> None:  # noqa: F811
    capabilities = volumes.store.capabilities
    assert capabilities.snapshots_inside <= capabilities.snapshots <= capabilities.creates


@each_kept
async def test_it_holds_what_was_there_and_its_size(volumes: Volumes, image_format: VolumeFormat) -> None:  # noqa: F811
    place = await volumes.filled(image_format)
    assert await volumes.store.snapshots(place, image_format) == []
    first = await take(volumes, place, image_format)
    write(image(place, image_format), image_format, 0, 65536, 0x11)
    await volumes.store.grow(place, image_format, 2 * ODD_SIZE)
    second = await take(volumes, place, image_format)
    write(image(place, image_format), image_format, 0, 65536, 0x22)
    assert [one.snapshot_id for one in await volumes.store.snapshots(place, image_format)] == [
        first.snapshot_id,
        second.snapshot_id,
    ]
    for snapshot, size, pattern in ((first, ODD_SIZE, 0xAB), (second, 2 * ODD_SIZE, 0x11), (first, ODD_SIZE, 0xAB)):
        assert snapshot.size_bytes == size
        await restore(volumes, place, image_format, snapshot)
        assert_sound(image(place, image_format), image_format, size)
        assert reads(image(place, image_format), image_format, 0, 65536, pattern)
        assert reads(image(place, image_format), image_format, ODD_SIZE - 512, 512, 0xAB)


@each_kept
async def test_deleting_in_any_order_touches_nothing_else(volumes: Volumes, image_format: VolumeFormat) -> None:  # noqa: F811
    place = await volumes.filled(image_format)
    made = []
    for number in range(1, 5):
        write(image(place, image_format), image_format, 0, 65536, number)
        made.append(await take(volumes, place, image_format))
    write(image(place, image_format), image_format, 0, 65536, 9)
    for position in (1, 3, 0):
        await volumes.store.delete_snapshot(place, image_format, made[position])
    assert [one.snapshot_id for one in await volumes.store.snapshots(place, image_format)] == [made[2].snapshot_id]
    assert reads(image(place, image_format), image_format, 0, 65536, 9)
    await restore(volumes, place, image_format, made[2])
    assert reads(image(place, image_format), image_format, 0, 65536, 3)
    assert_sound(image(place, image_format), image_format, ODD_SIZE)


@each_kept
async def test_what_is_set_aside_is_a_snapshot(volumes: Volumes, image_format: VolumeFormat) -> None:  # noqa: F811
    place = await volumes.filled(image_format)
    old = await take(volumes, place, image_format)
    write(image(place, image_format), image_format, 0, 65536, 0x11)
    await volumes.store.set_aside(place, image_format, "a" * 32, Progress())
    await restore(volumes, place, image_format, old)
    write(image(place, image_format), image_format, 0, 65536, 0x22)
    [kept] = [one for one in await volumes.store.snapshots(place, image_format) if one.snapshot_id == "a" * 32]
    await restore(volumes, place, image_format, kept)
    assert reads(image(place, image_format), image_format, 0, 65536, 0x11)


@each_kept
async def test_it_can_be_read(volumes: Volumes, image_format: VolumeFormat) -> None:  # noqa: F811
    place = await volumes.filled(image_format)
    snapshot = await take(volumes, place, image_format)
    write(image(place, image_format), image_format, 0, 65536, 0x11)
    source = volumes.store.snapshot_image(place, image_format, snapshot)
    inside = ["-l", f"snapshot.id={source.key}"] if source.key else []
    out = Path(place.directory) / "out"
    argv = ["qemu-img", "convert", "-f", source.format.value, *inside, "-O", "raw", source.path, str(out)]
    subprocess.run(argv, check=True)
    assert reads(out, VolumeFormat.RAW, 0, 65536, 0xAB)
    assert source.size_bytes == ODD_SIZE


@each_kept
@pytest.mark.parametrize("target", [VolumeFormat.RAW, VolumeFormat.QCOW2])
async def test_a_copy_of_one_is_as_large_as_it(
    volumes: Volumes,  # noqa: F811
    image_format: VolumeFormat,
    target: VolumeFormat,
) -> None:
    place, copy = await volumes.filled(image_format), volumes.place()
    snapshot = await take(volumes, place, image_format)
    await volumes.store.grow(place, image_format, 2 * ODD_SIZE)
    write(image(place, image_format), image_format, 0, 65536, 0x11)
    source = volumes.store.snapshot_image(place, image_format, snapshot)
    await volumes.store.copy_snapshot(copy, target, source, CloneAlgorithm.CP, Progress())
    assert_sound(image(copy, target), target, ODD_SIZE)
    assert reads(image(copy, target), target, 0, 65536, 0xAB)
    assert reads(image(copy, target), target, ODD_SIZE - 512, 512, 0xAB)
    assert await volumes.store.snapshots(copy, target) == []


@each_kept
async def test_one_that_is_a_file_becomes_an_image(volumes: Volumes, image_format: VolumeFormat) -> None:  # noqa: F811
    place, other = await volumes.filled(image_format), volumes.place()
    snapshot = await take(volumes, place, image_format)
    given = await volumes.store.give_snapshot(place, image_format, snapshot, other)
    assert given == (image_format not in volumes.store.capabilities.snapshots_inside)
    assert len(await volumes.store.snapshots(place, image_format)) == (0 if given else 1)
    if given:
        assert reads(image(other, image_format), image_format, 0, 65536, 0xAB)


@each_kept
async def test_dirty_bitmaps_do_not_outlive_a_restore(volumes: Volumes, image_format: VolumeFormat) -> None:  # noqa: F811
    """They would say that blocks are as they were at the last backup, and the restore has changed them."""
    if image_format is not VolumeFormat.QCOW2:
        return
    place = await volumes.filled(image_format)
    snapshot = await take(volumes, place, image_format)
    path = str(image(place, image_format))
    subprocess.run(["qemu-img", "bitmap", "--add", "-f", "qcow2", path, "backup"], check=True)
    await restore(volumes, place, image_format, snapshot)
    told = subprocess.run(["qemu-img", "info", "-f", "qcow2", path], check=True, capture_output=True, text=True)
    assert "backup" not in told.stdout


@each_kept
async def test_an_image_that_somebody_writes_to_is_not_copied(volumes: Volumes, image_format: VolumeFormat) -> None:  # noqa: F811
    place = await volumes.filled(image_format)
    argv = ["qemu-io", "-f", image_format.value, str(image(place, image_format))]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as guest:
        assert guest.stdout is not None
        guest.stdout.read(1)
        with pytest.raises(ImageInUse):
            await volumes.store.take_snapshot(place, image_format, new_uid(), Progress())
        guest.kill()
    assert await volumes.store.snapshots(place, image_format) == []


async def test_no_room_for_a_copy(tight: Volumes) -> None:  # noqa: F811
    place = tight.place()
    await tight.store.allocate(place, VolumeFormat.RAW, 6 * MB, Preallocation.OFF, Progress())
    write(image(place, VolumeFormat.RAW), VolumeFormat.RAW, 0, 5 * MB)
    before, uid = digest(image(place, VolumeFormat.RAW)), new_uid()
    with pytest.raises(NoRoom):
        await tight.store.take_snapshot(place, VolumeFormat.RAW, uid, Progress())
    assert await tight.store.snapshots(place, VolumeFormat.RAW) == []
    await tight.store.mend_snapshots(place, VolumeFormat.RAW, uid)
    assert os.listdir(f"{place.directory}/snapshots") == []
    assert digest(image(place, VolumeFormat.RAW)) == before


async def test_a_copy_can_be_cancelled(volumes: Volumes) -> None:  # noqa: F811
    place = random_raw(volumes, 96)

    def changed() -> None:
        progress.request_cancel()

    progress = Progress(changed=changed)
    uid = new_uid()
    with pytest.raises(JobCancelled):
        await volumes.store.take_snapshot(place, VolumeFormat.RAW, uid, progress)
    await volumes.store.mend_snapshots(place, VolumeFormat.RAW, uid)
    assert os.listdir(f"{place.directory}/snapshots") == []


async def test_where_extents_are_shared_nothing_is_copied(sharing: Volumes) -> None:
    place = random_raw(sharing, 64)
    before = os.statvfs(sharing.root).f_bfree
    assert await sharing.store.take_snapshot_at_once(place, VolumeFormat.RAW, new_uid(), Progress())
    status = os.statvfs(sharing.root)
    assert (before - status.f_bfree) * status.f_frsize < 2 * MB


async def test_where_they_are_not_shared_nothing_is_left(volumes: Volumes) -> None:  # noqa: F811
    place = await volumes.filled(VolumeFormat.RAW)
    if not await volumes.store.shares_blocks(place):
        assert not await volumes.store.take_snapshot_at_once(place, VolumeFormat.RAW, new_uid(), Progress())
        assert os.listdir(f"{place.directory}/snapshots") == []
