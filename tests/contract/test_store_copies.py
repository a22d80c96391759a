"""What every store has to do about copies of its images and images that stand on others."""

import asyncio
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from elemento_storage.disk import Disk, Place
from elemento_storage.errors import JobCancelled, NoRoom
from elemento_storage.model import CloneAlgorithm, VolumeFormat, volume_directory_name
from elemento_storage.progress import Progress
from elemento_storage.stores.base import Image
from tests.contract.test_store import MB, ODD_SIZE, STORES, StoreKind, Volumes, digest, image, reads, write
from tests.unit.support import assert_same_content, assert_sound, qemu_img, small_file_system, uid

ALGORITHMS = [CloneAlgorithm.CP, CloneAlgorithm.RSYNC, CloneAlgorithm.RCLONE]
ANCESTORS = (uid(1), uid(2))


@pytest.fixture
def disk() -> Iterator[Disk]:
    one = Disk("test")
    yield one
    one.close()


@pytest.fixture(params=STORES, ids=lambda kind: kind.name)
def volumes(request: pytest.FixtureRequest, tmp_path: Path, disk: Disk) -> Volumes:
    return Volumes(request.param.make(60.0), tmp_path, disk)


def each(pairs: Callable[[StoreKind], list[tuple[VolumeFormat, VolumeFormat]]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        ("volumes", "source", "target"),
        [
            pytest.param(kind, source, target, id=f"{kind.name}-{source}-{target}")
            for kind in STORES
            for source, target in pairs(kind)
        ],
        indirect=["volumes"],
    )


each_pair = each(
    lambda kind: sorted(
        {(one, one) for one in kind.capabilities.copies} | set(itertools.permutations(kind.capabilities.converts, 2))
    )
)
each_link = each(
    lambda kind: (
        [(one, kind.capabilities.link_format) for one in sorted(kind.capabilities.parents)]
        if kind.capabilities.link_format
        else []
    )
)


async def filled(volumes: Volumes, image_format: VolumeFormat) -> Place:
    if image_format in volumes.store.capabilities.creates:
        return await volumes.filled(image_format)
    place = volumes.place()
    image(place, image_format).write_bytes(b"\xab" * 65536 + bytes(ODD_SIZE - 65536))
    return place


def as_raw(image_format: VolumeFormat) -> VolumeFormat:
    return VolumeFormat.RAW if image_format is VolumeFormat.ISO else image_format


@pytest.mark.parametrize("kind", STORES, ids=lambda kind: kind.name)
def test_capabilities_make_sense(kind: StoreKind) -> None:
    capabilities = kind.capabilities
    assert capabilities.copies >= capabilities.converts
    assert bool(capabilities.parents) == (capabilities.link_format is not None)
    assert capabilities.parents <= capabilities.copies


@pytest.mark.parametrize("alg", ALGORITHMS)
@each_pair
async def test_a_copy_holds_what_its_source_does(
    volumes: Volumes, source: VolumeFormat, target: VolumeFormat, alg: CloneAlgorithm
) -> None:
    origin, copy = await filled(volumes, source), volumes.place()
    before = digest(image(origin, source))
    progress = Progress()
    await volumes.store.copy_from(copy, target, Image(origin, source), alg, progress)
    assert [one.name for one in Path(copy.directory).iterdir()] == [target.data_file]
    assert_same_content(image(origin, source), as_raw(source), image(copy, target), as_raw(target))
    assert digest(image(origin, source)) == before
    assert 0.9 < progress.fraction < 1


@pytest.mark.parametrize("alg", ALGORITHMS)
async def test_a_copy_of_holes_is_holes(volumes: Volumes, alg: CloneAlgorithm) -> None:
    origin, copy = volumes.place(), volumes.place()
    with image(origin, VolumeFormat.RAW).open("wb") as file:
        file.truncate(128 * MB)
        for offset in (0, 50 * MB, 128 * MB - 4096):
            file.seek(offset)
            file.write(b"x" * 4096)
    await volumes.store.copy_from(copy, VolumeFormat.RAW, Image(origin, VolumeFormat.RAW), alg, Progress())
    assert image(copy, VolumeFormat.RAW).stat().st_size == 128 * MB
    assert image(copy, VolumeFormat.RAW).stat().st_blocks * 512 < MB
    assert_same_content(
        image(origin, VolumeFormat.RAW), VolumeFormat.RAW, image(copy, VolumeFormat.RAW), VolumeFormat.RAW
    )


async def test_a_copy_that_is_written_to_leaves_its_source(volumes: Volumes) -> None:
    for image_format in volumes.store.capabilities.creates:
        origin, copy = await volumes.filled(image_format), volumes.place()
        before = digest(image(origin, image_format))
        await volumes.store.copy_from(copy, image_format, Image(origin, image_format), CloneAlgorithm.CP, Progress())
        write(image(copy, image_format), image_format, 0, 512, 0x11)
        assert digest(image(origin, image_format)) == before


@pytest.mark.parametrize("alg", ALGORITHMS)
async def test_what_is_past_does_not_go_into_a_copy(volumes: Volumes, alg: CloneAlgorithm) -> None:
    """Snapshots hold what its owner has deleted, and bitmaps say of another volume what changed."""
    for command in (("snapshot", "-c", "before"), ("bitmap", "--add")):
        origin, copy = await volumes.filled(VolumeFormat.QCOW2), volumes.place()
        path = image(origin, VolumeFormat.QCOW2)
        if command[0] == "snapshot":
            qemu_img(*command, str(path))
        else:
            qemu_img(*command, "-f", "qcow2", str(path), "b0")
        await volumes.store.copy_from(copy, VolumeFormat.QCOW2, Image(origin, VolumeFormat.QCOW2), alg, Progress())
        told = qemu_img("info", "-f", "qcow2", str(image(copy, VolumeFormat.QCOW2))).stdout
        assert "Snapshot list" not in told
        assert "bitmaps" not in told
        assert_same_content(path, VolumeFormat.QCOW2, image(copy, VolumeFormat.QCOW2), VolumeFormat.QCOW2)


@pytest.mark.parametrize("alg", ALGORITHMS)
async def test_a_copy_that_does_not_fit_has_no_room(volumes: Volumes, tmp_path: Path, alg: CloneAlgorithm) -> None:
    origin = volumes.place()
    image(origin, VolumeFormat.RAW).write_bytes(b"x" * 16 * MB)
    with small_file_system(tmp_path / "tight", 8) as root:
        place = Volumes(volumes.store, root, volumes.disk).place()
        with pytest.raises(NoRoom):
            await volumes.store.copy_from(place, VolumeFormat.RAW, Image(origin, VolumeFormat.RAW), alg, Progress())


@pytest.mark.parametrize("alg", ALGORITHMS)
async def test_a_copy_can_be_cancelled(volumes: Volumes, alg: CloneAlgorithm) -> None:
    origin, copy = volumes.place(), volumes.place()
    image(origin, VolumeFormat.RAW).write_bytes(b"x" * 150 * MB)

    def cancel() -> None:
        progress.request_cancel()

    progress = Progress(changed=cancel)
    with pytest.raises(JobCancelled):
        await asyncio.wait_for(
            volumes.store.copy_from(copy, VolumeFormat.RAW, Image(origin, VolumeFormat.RAW), alg, progress), 10
        )


async def test_a_store_says_whether_copies_cost_nothing(volumes: Volumes, tmp_path: Path) -> None:
    with small_file_system(tmp_path / "small", 8) as root:
        assert await volumes.store.shares_blocks(Place(str(root), volumes.disk)) is False
        assert list(root.iterdir()) == []


# -- images that stand on others ---------------------------------------------------------------------------


def beside(volumes: Volumes, number: int) -> Place:
    directory = volumes.root / volume_directory_name(uid(number))
    directory.mkdir()
    return Place(str(directory), volumes.disk)


async def chain(volumes: Volumes, source: VolumeFormat, target: VolumeFormat) -> tuple[Place, Place, Place]:
    """A parent, a linked clone of it, and a linked clone of that, each with something of its own."""
    parent, child, grandchild = (beside(volumes, number) for number in (1, 2, 3))
    origin = await volumes.filled(source)
    await volumes.store.copy_from(parent, source, Image(origin, source), CloneAlgorithm.CP, Progress())
    await volumes.store.link_to(child, ANCESTORS[0], source, ODD_SIZE)
    write(image(child, target), target, 512, 512, 0x22)
    await volumes.store.link_to(grandchild, ANCESTORS[1], target, ODD_SIZE)
    write(image(grandchild, target), target, 1024, 512, 0x33)
    return parent, child, grandchild


@each_link
async def test_a_linked_clone_holds_what_its_parent_does_and_its_own(
    volumes: Volumes, source: VolumeFormat, target: VolumeFormat
) -> None:
    parent, _, grandchild = await chain(volumes, source, target)
    path = image(grandchild, target)
    assert_sound(path, target, ODD_SIZE)
    for offset, pattern in ((0, 0xAB), (512, 0x22), (1024, 0x33), (1536, 0xAB), (ODD_SIZE - 512, 0xAB)):
        assert reads(path, target, offset, 512, pattern)
    assert reads(image(parent, source), source, 0, 65536, 0xAB)
    assert path.stat().st_blocks * 512 < MB


@each_link
async def test_a_copy_of_a_linked_clone_stands_on_nothing(
    volumes: Volumes, source: VolumeFormat, target: VolumeFormat
) -> None:
    parent, child, grandchild = await chain(volumes, source, target)
    copy = volumes.place()
    whole = Image(grandchild, target, (Image(child, target), Image(parent, source)))
    await volumes.store.copy_from(copy, target, whole, CloneAlgorithm.CP, Progress())
    assert_same_content(image(grandchild, target), target, image(copy, target), target)
    image(parent, source).unlink()
    image(child, target).unlink()
    assert reads(image(copy, target), target, 512, 512, 0x22)


@each_link
async def test_the_tree_can_be_moved(
    volumes: Volumes, source: VolumeFormat, target: VolumeFormat, tmp_path: Path
) -> None:
    _, _, grandchild = await chain(volumes, source, target)
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for one in volumes.root.glob("vid.*"):
        one.rename(moved / one.name)
    path = moved / Path(grandchild.directory).name / target.data_file
    assert reads(path, target, 512, 512, 0x22)


@each_link
async def test_the_node_names_every_image_with_its_format(
    volumes: Volumes, source: VolumeFormat, target: VolumeFormat
) -> None:
    """What a storage daemon is told is all it opens: nothing is looked up in a header, nothing is guessed."""
    parent, child, grandchild = await chain(volumes, source, target)
    node = volumes.store.node(grandchild, target, read_only=False, below=(Image(child, target), Image(parent, source)))
    assert node.below_paths == (str(image(child, target)), str(image(parent, source)))
    assert [layer["read-only"] for layer in node.layers] == [True] * 4 + [False] * 2
    assert [layer["driver"] for layer in node.layers[1::2]] == [source.value, target.value, target.value]
    assert [layer.get("backing") for layer in node.layers[3::2]] == ["below-2", "below-1"]


async def test_an_image_that_stands_alone_says_so(volumes: Volumes) -> None:
    place = await volumes.filled(VolumeFormat.QCOW2)
    assert volumes.store.node(place, VolumeFormat.QCOW2, read_only=False).layers[-1]["backing"] is None
