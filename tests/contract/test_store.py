"""What every store has to do, whatever holds the bytes. A new store joins by a line in ``STORES``."""

import asyncio
import contextlib
import hashlib
import itertools
import os
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from elemento_storage.disk import Disk, Place
from elemento_storage.errors import JobCancelled, NoRoom, ToolFailed, ToolTimeout
from elemento_storage.model import Preallocation, VolumeFormat
from elemento_storage.progress import Progress
from elemento_storage.stores.base import SnapshotStore, StoreCapabilities
from elemento_storage.stores.directory import DirectoryStore
from tests.unit.support import assert_same_content, assert_sound, qemu_img, small_file_system

MB = 1 << 20
ODD_SIZE = 3 * MB + 512  # no whole number of clusters


@dataclass(frozen=True)
class StoreKind:
    """A store to test: how it is made, and what it says of itself before that."""

    name: str
    make: Callable[[float], SnapshotStore]  #: with the time-out of a job
    capabilities: StoreCapabilities


STORES = [
    StoreKind(
        "directory",
        lambda job_timeout_s: DirectoryStore(job_timeout_s=job_timeout_s),
        DirectoryStore.capabilities,
    )
]


class Volumes:
    """Directories of volumes that one store fills."""

    def __init__(self, store: SnapshotStore, root: Path, disk: Disk) -> None:
        self.store = store
        self.root = root
        self.disk = disk
        self._numbers = itertools.count()

    def place(self) -> Place:
        """A new volume's empty directory."""
        directory = self.root / f"{next(self._numbers)}"
        directory.mkdir()
        return Place(str(directory), self.disk)

    async def filled(self, image_format: VolumeFormat, size: int = ODD_SIZE) -> Place:
        """A volume that a guest has written to: at its start, in the middle and in its last sector."""
        place = self.place()
        await self.store.allocate(place, image_format, size, Preallocation.OFF, Progress())
        for offset, length in ((0, 65536), (size // 2 // 512 * 512, 512), (size - 512, 512)):
            write(image(place, image_format), image_format, offset, length)
        return place


def image(place: Place, image_format: VolumeFormat) -> Path:
    return Path(place.directory) / image_format.data_file


def write(path: Path, image_format: VolumeFormat, offset: int, length: int, pattern: int = 0xAB) -> None:
    """Write as a guest would."""
    command = f"write -P {pattern} {offset} {length}"
    subprocess.run(
        ["qemu-io", "-f", image_format.value, "-c", command, "-c", "flush", str(path)], check=True, capture_output=True
    )


def reads(path: Path, image_format: VolumeFormat, offset: int, length: int, pattern: int) -> bool:
    """Whether a guest reads this byte all over the range."""
    command = f"read -P {pattern} {offset} {length}"
    told = subprocess.run(
        ["qemu-io", "-f", image_format.value, "-c", command, str(path)], check=False, capture_output=True, text=True
    )
    assert told.returncode == 0 or "Pattern verification failed" in told.stdout, told
    return told.returncode == 0


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def recording() -> tuple[Progress, list[tuple[float, str]]]:
    """A progress, and everything that it was told."""
    seen: list[tuple[float, str]] = []
    progress = Progress(changed=lambda: seen.append((progress.fraction, progress.phase)))
    return progress, seen


def random_raw(volumes: Volumes, megabytes: int) -> Place:
    place = volumes.place()
    image(place, VolumeFormat.RAW).write_bytes(os.urandom(MB) * megabytes)
    return place


@pytest.fixture
def disk() -> Iterator[Disk]:
    one = Disk("test")
    yield one
    one.close()


@pytest.fixture(params=STORES, ids=lambda kind: kind.name)
def volumes(request: pytest.FixtureRequest, tmp_path: Path, disk: Disk) -> Volumes:
    return Volumes(request.param.make(60.0), tmp_path, disk)


@pytest.fixture
def tight(volumes: Volumes, tmp_path: Path) -> Iterator[Volumes]:
    """The same store on a file system of 8 MiB."""
    with small_file_system(tmp_path / "tight", 8) as root:
        yield Volumes(volumes.store, root, volumes.disk)


def over_formats(choose: Callable[[StoreCapabilities], frozenset[VolumeFormat]]) -> pytest.MarkDecorator:
    """The test for each store and each format that it says it can do."""
    return pytest.mark.parametrize(
        ("volumes", "image_format"),
        [
            pytest.param(kind, one, id=f"{kind.name}-{one}")
            for kind in STORES
            for one in sorted(choose(kind.capabilities))
        ],
        indirect=["volumes"],
    )


each_created = over_formats(lambda capabilities: capabilities.creates)
each_grown = over_formats(lambda capabilities: capabilities.grows)
each_preallocated = pytest.mark.parametrize(
    ("volumes", "image_format", "preallocation"),
    [
        pytest.param(kind, one, preallocation, id=f"{kind.name}-{one}-{preallocation}")
        for kind in STORES
        for one in sorted(kind.capabilities.creates)
        for preallocation in sorted(kind.capabilities.preallocates[one])
    ],
    indirect=["volumes"],
)
each_conversion = pytest.mark.parametrize(
    ("volumes", "source", "target"),
    [
        pytest.param(kind, source, target, id=f"{kind.name}-{source}-{target}")
        for kind in STORES
        for source, target in itertools.permutations(sorted(kind.capabilities.converts), 2)
    ],
    indirect=["volumes"],
)


# -- capabilities ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", STORES, ids=lambda kind: kind.name)
def test_capabilities_make_sense(kind: StoreKind) -> None:
    capabilities = kind.capabilities
    assert capabilities.creates
    assert set(capabilities.preallocates) == capabilities.creates
    for allowed in capabilities.preallocates.values():
        assert Preallocation.OFF in allowed, "the default has to work"
    assert len(capabilities.converts) != 1
    assert kind.make(1.0).capabilities == capabilities


# -- allocate ----------------------------------------------------------------------------------------------


@each_preallocated
@pytest.mark.parametrize("size", [512, MB, ODD_SIZE])
async def test_a_new_image_is_sound_empty_and_of_the_size(
    volumes: Volumes, image_format: VolumeFormat, preallocation: Preallocation, size: int
) -> None:
    place = volumes.place()
    await volumes.store.allocate(place, image_format, size, preallocation, Progress())
    path = image(place, image_format)
    assert os.listdir(place.directory) == [image_format.data_file]
    assert_sound(path, image_format, size)
    assert reads(path, image_format, 0, size, 0)


@each_preallocated
async def test_preallocation_takes_the_room_that_it_says(
    volumes: Volumes, image_format: VolumeFormat, preallocation: Preallocation
) -> None:
    place = volumes.place()
    await volumes.store.allocate(place, image_format, 16 * MB, preallocation, Progress())
    allocated = image(place, image_format).stat().st_blocks * 512
    if preallocation in (Preallocation.FALLOC, Preallocation.FULL):
        assert allocated >= 16 * MB
    else:
        assert allocated < MB


@each_created
async def test_a_huge_sparse_image_is_there_in_a_blink(volumes: Volumes, image_format: VolumeFormat) -> None:
    place = volumes.place()
    async with asyncio.timeout(5):
        await volumes.store.allocate(place, image_format, 8 << 40, Preallocation.OFF, Progress())
    path = image(place, image_format)
    assert_sound(path, image_format, 8 << 40)
    assert path.stat().st_blocks * 512 < MB
    write(path, image_format, (8 << 40) - 512, 512)


@each_created
async def test_images_made_side_by_side_do_not_mix(volumes: Volumes, image_format: VolumeFormat) -> None:
    sizes = [MB, 2 * MB, MB, ODD_SIZE, 2 * MB]
    places = [volumes.place() for _ in sizes]
    await asyncio.gather(
        *(
            volumes.store.allocate(place, image_format, size, Preallocation.OFF, Progress())
            for place, size in zip(places, sizes, strict=True)
        )
    )
    for place, size in zip(places, sizes, strict=True):
        assert_sound(image(place, image_format), image_format, size)
    write(image(places[0], image_format), image_format, 0, 512)
    assert reads(image(places[2], image_format), image_format, 0, 512, 0)


@each_created
async def test_an_image_that_is_there_is_not_overwritten(volumes: Volumes, image_format: VolumeFormat) -> None:
    place = await volumes.filled(image_format)
    before = digest(image(place, image_format))
    with pytest.raises(FileExistsError):
        await volumes.store.allocate(place, image_format, ODD_SIZE, Preallocation.OFF, Progress())
    assert digest(image(place, image_format)) == before


@each_created
async def test_odd_names_of_locations_are_only_names(
    volumes: Volumes, image_format: VolumeFormat, tmp_path: Path
) -> None:
    odd = Volumes(volumes.store, tmp_path / "a b,c=d:e %s ü", volumes.disk)
    odd.root.mkdir()
    place = await odd.filled(image_format)
    await odd.store.grow(place, image_format, 2 * ODD_SIZE)
    assert reads(image(place, image_format), image_format, 0, 65536, 0xAB)


@each_preallocated
@pytest.mark.usefixtures("tight")
async def test_an_allocation_that_does_not_fit_has_no_room(
    tight: Volumes, image_format: VolumeFormat, preallocation: Preallocation
) -> None:
    place = tight.place()
    if preallocation in (Preallocation.FALLOC, Preallocation.FULL):
        with pytest.raises(NoRoom):
            await tight.store.allocate(place, image_format, 32 * MB, preallocation, Progress())
    else:
        await tight.store.allocate(place, image_format, 32 * MB, preallocation, Progress())
        assert_sound(image(place, image_format), image_format, 32 * MB)


async def test_not_even_an_empty_qcow2_fits_on_a_full_file_system(tight: Volumes) -> None:
    place = tight.place()
    fill(tight.root)
    with pytest.raises(NoRoom):
        await tight.store.allocate(place, VolumeFormat.QCOW2, MB, Preallocation.OFF, Progress())


async def test_a_file_system_without_inodes_has_no_room(volumes: Volumes, tmp_path: Path) -> None:
    mounted = tmp_path / "inodes"
    mounted.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m,nr_inodes=2", "tmpfs", str(mounted)], check=True)
    try:
        place = Volumes(volumes.store, mounted, volumes.disk).place()
        with pytest.raises(NoRoom):
            await volumes.store.allocate(place, VolumeFormat.RAW, MB, Preallocation.OFF, Progress())
    finally:
        subprocess.run(["umount", "-l", str(mounted)], check=True)


@each_created
async def test_an_allocation_can_be_cancelled(volumes: Volumes, image_format: VolumeFormat) -> None:
    place, progress = volumes.place(), Progress()
    work = asyncio.ensure_future(volumes.store.allocate(place, image_format, 2 << 30, Preallocation.FULL, progress))
    await asyncio.sleep(0.05)
    assert progress.request_cancel()
    with pytest.raises(JobCancelled):
        await asyncio.wait_for(work, 10)
    assert nobody_has_open(image(place, image_format))


@each_created
async def test_an_allocation_tells_how_far_it_is(volumes: Volumes, image_format: VolumeFormat) -> None:
    progress, seen = recording()
    await volumes.store.allocate(volumes.place(), image_format, 256 * MB, Preallocation.FULL, progress)
    assert seen[0] == (0.0, "allocating")
    assert_climbs(seen)


@pytest.mark.parametrize("kind", STORES, ids=lambda kind: kind.name)
async def test_an_allocation_has_its_time_out(kind: StoreKind, tmp_path: Path, disk: Disk) -> None:
    place = Volumes(kind.make(0.05), tmp_path, disk).place()
    store = kind.make(0.05)
    for image_format in kind.capabilities.creates:
        with pytest.raises(ToolTimeout):
            await store.allocate(place, image_format, 2 << 30, Preallocation.FULL, Progress())


# -- grow --------------------------------------------------------------------------------------------------


@each_grown
async def test_growing_keeps_the_content_and_adds_zeros(volumes: Volumes, image_format: VolumeFormat) -> None:
    place = await volumes.filled(image_format)
    path = image(place, image_format)
    for size in (ODD_SIZE + 512, 64 * MB, 1 << 40):
        await volumes.store.grow(place, image_format, size)
        assert_sound(path, image_format, size)
    assert reads(path, image_format, 0, 65536, 0xAB)
    assert reads(path, image_format, ODD_SIZE - 512, 512, 0xAB)
    assert reads(path, image_format, ODD_SIZE, 63 * MB, 0)
    assert reads(path, image_format, (1 << 40) - MB, MB, 0)
    write(path, image_format, (1 << 40) - 512, 512)
    assert_sound(path, image_format, 1 << 40)


@each_grown
async def test_growing_again_to_the_same_size_changes_nothing(volumes: Volumes, image_format: VolumeFormat) -> None:
    place = await volumes.filled(image_format)
    await volumes.store.grow(place, image_format, 8 * MB)
    copy = Path(place.directory) / "copy"
    copy.write_bytes(image(place, image_format).read_bytes())
    await volumes.store.grow(place, image_format, 8 * MB)
    assert_sound(image(place, image_format), image_format, 8 * MB)
    assert_same_content(copy, image_format, image(place, image_format), image_format)


@each_grown
async def test_growing_never_cuts_anything_off(volumes: Volumes, image_format: VolumeFormat) -> None:
    place = await volumes.filled(image_format)
    with contextlib.suppress(ToolFailed):
        await volumes.store.grow(place, image_format, MB)
    assert_sound(image(place, image_format), image_format, ODD_SIZE)
    assert reads(image(place, image_format), image_format, ODD_SIZE - 512, 512, 0xAB)


@each_grown
async def test_growing_takes_hardly_any_room(volumes: Volumes, image_format: VolumeFormat) -> None:
    place = await volumes.filled(image_format)
    await volumes.store.grow(place, image_format, 1 << 40)
    assert image(place, image_format).stat().st_blocks * 512 < 2 * MB


async def test_growing_a_qcow2_on_a_full_file_system_has_no_room(tight: Volumes) -> None:
    place = await tight.filled(VolumeFormat.QCOW2)
    path = image(place, VolumeFormat.QCOW2)
    fill(tight.root)
    with pytest.raises(NoRoom):
        await tight.store.grow(place, VolumeFormat.QCOW2, 64 << 40)
    (tight.root / "filler").unlink()
    assert_sound(path, VolumeFormat.QCOW2, ODD_SIZE)
    assert reads(path, VolumeFormat.QCOW2, 0, 65536, 0xAB)
    await tight.store.grow(place, VolumeFormat.QCOW2, 64 << 40)
    assert_sound(path, VolumeFormat.QCOW2, 64 << 40)


async def test_growing_past_what_the_file_system_can_hold_has_no_room(volumes: Volumes, tmp_path: Path) -> None:
    """ext4 with blocks of 1 KiB ends at 4 TiB a file."""
    container, mounted = tmp_path / "ext4.img", tmp_path / "ext4"
    with container.open("wb") as file:
        file.truncate(16 * MB)
    mounted.mkdir()
    subprocess.run(["mkfs.ext4", "-q", "-b", "1024", str(container)], check=True)
    subprocess.run(["mount", "-o", "loop", str(container), str(mounted)], check=True)
    try:
        place = await Volumes(volumes.store, mounted, volumes.disk).filled(VolumeFormat.RAW)
        with pytest.raises(NoRoom):
            await volumes.store.grow(place, VolumeFormat.RAW, 1 << 50)
        assert_sound(image(place, VolumeFormat.RAW), VolumeFormat.RAW, ODD_SIZE)
    finally:
        subprocess.run(["umount", "-l", str(mounted)], check=True)


async def test_growing_what_is_no_image_is_a_failure(volumes: Volumes) -> None:
    place = volumes.place()
    image(place, VolumeFormat.QCOW2).write_bytes(b"garbage" * 1000)
    with pytest.raises(ToolFailed):
        await volumes.store.grow(place, VolumeFormat.QCOW2, MB)
    with pytest.raises(FileNotFoundError):
        await volumes.store.grow(place, VolumeFormat.RAW, MB)


# -- convert -----------------------------------------------------------------------------------------------


@each_conversion
@pytest.mark.parametrize("size", [512, ODD_SIZE, 64 * MB])
async def test_a_conversion_is_sound_and_reads_the_same(
    volumes: Volumes, source: VolumeFormat, target: VolumeFormat, size: int
) -> None:
    place = volumes.place()
    await volumes.store.allocate(place, source, size, Preallocation.OFF, Progress())
    write(image(place, source), source, 0, 512)
    write(image(place, source), source, size - 512, 512, 0xCD)
    before = digest(image(place, source))
    copy = Path(place.directory) / "copy"
    await volumes.store.convert_beside(place, source, target, str(copy), Progress())
    assert_sound(copy, target, size)
    assert_same_content(image(place, source), source, copy, target)
    assert reads(copy, target, size - 512, 512, 0xCD)
    assert digest(image(place, source)) == before, "the source stays as it is"
    assert sorted(os.listdir(place.directory)) == sorted([source.data_file, "copy"])


@each_conversion
async def test_a_conversion_there_and_back_is_the_same(
    volumes: Volumes, source: VolumeFormat, target: VolumeFormat
) -> None:
    place = await volumes.filled(source)
    there, back = Path(place.directory) / target.data_file, Path(place.directory) / "back"
    await volumes.store.convert_beside(place, source, target, str(there), Progress())
    await volumes.store.convert_beside(place, target, source, str(back), Progress())
    assert_same_content(image(place, source), source, back, source)
    assert_sound(back, source, ODD_SIZE)


@each_conversion
async def test_holes_stay_holes(volumes: Volumes, source: VolumeFormat, target: VolumeFormat) -> None:
    place = await volumes.filled(source, 1 << 30)
    copy = Path(place.directory) / "copy"
    await volumes.store.convert_beside(place, source, target, str(copy), Progress())
    assert copy.stat().st_blocks * 512 < 2 * MB


async def test_a_raw_image_with_a_header_written_by_a_guest_stays_raw(volumes: Volumes, tmp_path: Path) -> None:
    """Believing it would let the guest name any file of the host as its backing file."""
    secret = tmp_path / "secret"
    secret.write_bytes(b"s" * MB)
    place = volumes.place()
    path = image(place, VolumeFormat.RAW)
    qemu_img("create", "-q", "-f", "qcow2", "-F", "raw", "-b", str(secret), str(path))
    copy = Path(place.directory) / "copy"
    await volumes.store.convert_beside(place, VolumeFormat.RAW, VolumeFormat.QCOW2, str(copy), Progress())
    assert reads(copy, VolumeFormat.QCOW2, 0, 1, ord("Q"))
    assert_same_content(path, VolumeFormat.RAW, copy, VolumeFormat.QCOW2)


@each_conversion
async def test_a_conversion_that_does_not_fit_has_no_room_and_keeps_the_source(
    tight: Volumes, source: VolumeFormat, target: VolumeFormat
) -> None:
    place = tight.place()
    await tight.store.allocate(place, source, 6 * MB, Preallocation.OFF, Progress())
    write(image(place, source), source, 0, 5 * MB)
    before = digest(image(place, source))
    with pytest.raises(NoRoom):
        await tight.store.convert_beside(place, source, target, f"{place.directory}/copy", Progress())
    assert digest(image(place, source)) == before


@each_conversion
async def test_a_conversion_tells_how_far_it_is(volumes: Volumes, source: VolumeFormat, target: VolumeFormat) -> None:
    place = volumes.place()
    await volumes.store.allocate(place, source, 64 * MB, Preallocation.OFF, Progress())
    write(image(place, source), source, 0, 64 * MB)
    progress, seen = recording()
    await volumes.store.convert_beside(place, source, target, f"{place.directory}/copy", progress)
    assert seen[0] == (0.0, "converting")
    assert_climbs(seen)
    assert len({fraction for fraction, _ in seen}) > 5
    assert 0.9 < seen[-1][0] < 1.0, "done is what the commit says, not the copy"


async def test_a_conversion_can_be_cancelled_at_once_and_in_the_middle(volumes: Volumes) -> None:
    place = random_raw(volumes, 128)
    before = digest(image(place, VolumeFormat.RAW))
    copy = Path(place.directory) / "copy"
    early = Progress()
    early.request_cancel()

    def changed() -> None:
        if middle.fraction > 0:
            middle.request_cancel()

    middle = Progress(changed=changed)
    for progress in (early, middle):
        with pytest.raises(JobCancelled):
            await volumes.store.convert_beside(place, VolumeFormat.RAW, VolumeFormat.QCOW2, str(copy), progress)
        assert digest(image(place, VolumeFormat.RAW)) == before
        assert nobody_has_open(copy)
    assert 0 < middle.fraction < 1


async def test_a_damaged_source_is_a_failure(volumes: Volumes) -> None:
    place = await volumes.filled(VolumeFormat.QCOW2)
    with image(place, VolumeFormat.QCOW2).open("r+b") as file:
        file.seek(40)
        file.write(b"\xff" * 8)  # the L1 table's offset
    with pytest.raises(ToolFailed):
        await volumes.store.convert_beside(
            place, VolumeFormat.QCOW2, VolumeFormat.RAW, f"{place.directory}/copy", Progress()
        )


# -- helpers -----------------------------------------------------------------------------------------------


def fill(root: Path) -> None:
    """Take every byte that is left."""
    with (root / "filler").open("wb", buffering=0) as file:
        for size in (MB, 4096):
            try:
                while file.write(b"x" * size) == size:
                    pass
            except OSError:
                continue


def assert_climbs(seen: list[tuple[float, str]]) -> None:
    fractions = [fraction for fraction, _ in seen]
    assert fractions == sorted(fractions)
    assert all(0 <= fraction <= 1 for fraction in fractions)


def nobody_has_open(path: Path) -> bool:
    """Whether no process writes to the file any more."""
    if not path.exists():
        return True
    wanted = path.stat()
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            status = descriptor.stat()
        except OSError:
            continue
        if (status.st_dev, status.st_ino) == (wanted.st_dev, wanted.st_ino):
            return False
    return True
