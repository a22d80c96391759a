"""The test guests themselves, on plain images and on QEMU's own storage daemon: a tool that finds faults must be shown
to find them, and to find none where there are none."""

import contextlib
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.guest.build import BOOT_DISK_AREA, Images, images
from tests.guest.chain import BLOCK, ChainReport, read_volume, verify_chain, verify_pattern
from tests.guest.vm import Guest, MigrationFailed, Orders

VOLUME_BYTES = 16 << 20


@pytest.fixture(scope="module")
def system() -> Images:
    """What the guests boot; the first run builds it."""
    return images()


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    """An empty raw volume."""
    path = tmp_path / "volume.raw"
    with path.open("wb") as file:
        file.truncate(VOLUME_BYTES)
    return path


def file_disk(path: Path, image_format: str = "raw") -> list[str]:
    """QEMU's words for a disk on a plain image."""
    return [
        *("-blockdev", f"driver=file,node-name=file,filename={path},cache.direct=on"),
        *("-blockdev", f"driver={image_format},node-name=disk,file=file,cache.direct=on"),
        *("-device", "virtio-blk-pci,drive=disk"),
    ]


def nbd_disk(socket: Path, export: str) -> list[str]:
    """QEMU's words for a disk that a storage daemon serves."""
    return [
        *("-blockdev", f"driver=nbd,node-name=disk,server.type=unix,server.path={socket},export={export}"),
        *("-device", "virtio-blk-pci,drive=disk"),
    ]


@contextlib.contextmanager
def storage_daemon(image: Path, socket: Path, exports: tuple[str, ...]) -> Iterator[None]:
    """A qemu-storage-daemon with one qcow2 image under several names at once."""
    words = [
        *("setpriv", "--pdeathsig", "KILL", "--", "qemu-storage-daemon"),
        *("--blockdev", f"driver=file,node-name=file,filename={image},cache.direct=on"),
        *("--blockdev", "driver=qcow2,node-name=volume,file=file,cache.direct=on"),
        *("--nbd-server", f"addr.type=unix,addr.path={socket},max-connections=0"),
    ]
    for name in exports:
        words += ["--export", f"type=nbd,id={name},node-name=volume,name={name},writable=on"]
    process = subprocess.Popen(words)
    try:
        deadline = time.monotonic() + 20
        while not socket.exists():
            assert process.poll() is None, "the storage daemon ended"
            assert time.monotonic() < deadline
            time.sleep(0.01)
        yield
    finally:
        process.terminate()
        process.wait(20)


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
async def test_boots_from_the_volume_itself(system: Images, tmp_path: Path, image_format: str) -> None:
    raw = system.new_boot_disk(tmp_path / "boot.raw", "this very volume")
    disk = tmp_path / f"boot.{image_format}"
    if image_format != "raw":
        subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", image_format, raw, disk], check=True)
    async with Guest(tmp_path, file_disk(disk, image_format), boots_itself=True) as guest:
        assert (await guest.wait_for(r"^BOOT-MARKER (.*)$"))[1] == "this very volume"
        await guest.wait_for(r"^GUEST-DONE ioerr=0 badread=0$")
        await guest.wait_off()


async def test_writes_beside_its_own_system(system: Images, tmp_path: Path) -> None:
    disk = system.new_boot_disk(tmp_path / "boot.raw")
    orders: Orders = {"mode": "rw", "seed": "beside"}
    async with Guest(tmp_path, file_disk(disk), orders, boots_itself=True) as guest:
        await guest.wait_for(r"^RW-OK extents=32$")
        await guest.wait_off()
        assert guest.complaints() == []
    assert verify_pattern(disk, base=BOOT_DISK_AREA, seed="beside") == []
    assert verify_pattern(disk, base=BOOT_DISK_AREA, seed="other") != []
    assert read_volume(disk, 0, BOOT_DISK_AREA) == read_volume(system.boot_disk, 0, BOOT_DISK_AREA)


async def test_reads_back_what_it_wrote(tmp_path: Path) -> None:
    disk = tmp_path / "volume.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", disk, str(VOLUME_BYTES)], check=True)
    # Over clusters and across their edges.
    base, extents, stride = BLOCK, 40, 99 * BLOCK
    orders: Orders = {"mode": "rw", "base": base, "extents": extents, "stride": stride}
    async with Guest(tmp_path, file_disk(disk, "qcow2"), orders) as guest:
        await guest.wait_for(r"^GUEST-DONE ioerr=0 badread=0$")
        await guest.wait_off()
    assert verify_pattern(disk, base=base, extents=extents, stride=stride, image_format="qcow2") == []
    subprocess.run(["qemu-img", "check", "-q", disk], check=True)


async def test_every_record_of_the_chain_is_on_the_volume(volume: Path, tmp_path: Path) -> None:
    async with Guest(tmp_path, file_disk(volume), {"mode": "count", "max": 1000, "seed": "mine"}) as guest:
        await guest.wait_for(r"^COUNT-DONE 1000 ")
        await guest.wait_off()
        assert guest.complaints() == []
        assert guest.counted() == 1000
    assert verify_chain(volume, 1000, seed="mine") == ChainReport(1000, ())
    assert verify_chain(volume, 1000).intact == 0
    # One bit, at the end of one record.
    with volume.open("r+b") as file:
        file.seek(501 * BLOCK - 1)
        last = file.read(1)[0]
        file.seek(501 * BLOCK - 1)
        file.write(bytes([last ^ 1]))
    report = verify_chain(volume, 1000, seed="mine")
    assert (report.wrong, report.intact, report.leading) == ((500,), 999, 499)


async def test_what_a_killed_guest_has_told_is_on_the_volume(volume: Path, tmp_path: Path) -> None:
    async with Guest(tmp_path, file_disk(volume), {"mode": "count", "max": 4000, "every": 10}) as guest:
        await guest.wait_for(r"^COUNT 200 ")
        guest.kill()
        told = guest.counted()
    report = verify_chain(volume, 4000)
    assert 200 <= told <= report.leading < 4000


async def test_tells_of_a_disk_that_fails(tmp_path: Path) -> None:
    small = tmp_path / "small.raw"
    small.write_bytes(bytes(20 * BLOCK))
    async with Guest(tmp_path, file_disk(small), {"mode": "count", "max": 30}) as guest:
        await guest.wait_for(r"^IOERR write at=81920 ")
        await guest.wait_for(r"^GUEST-DONE ioerr=(?!0)")
        assert guest.complaints()
    assert verify_chain(small, 30).leading == 19


async def test_moves_between_two_exports_of_one_volume(tmp_path: Path) -> None:
    image, socket = tmp_path / "volume.qcow2", tmp_path / "nbd"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", image, str(VOLUME_BYTES)], check=True)
    orders: Orders = {"mode": "count", "max": 600, "rate": 200, "every": 10}
    with storage_daemon(image, socket, ("one", "two")):
        async with (
            Guest(tmp_path, nbd_disk(socket, "one"), orders, name="source") as source,
            Guest(tmp_path, nbd_disk(socket, "two"), orders, name="destination", incoming=True) as destination,
        ):
            await source.wait_for(r"^COUNT 100 ")
            took = await source.migrate_to(destination)
            assert 100 <= source.counted() < 600
            await source.quit()
            await destination.wait_for(r"^COUNT-DONE 600 ")
            await destination.wait_off()
            assert took.downtime_ms < 2000
            assert source.complaints() + destination.complaints() == []
    subprocess.run(["qemu-img", "check", "-q", image], check=True)
    assert verify_chain(image, 600, image_format="qcow2") == ChainReport(600, ())


async def test_goes_on_when_its_destination_dies(volume: Path, tmp_path: Path) -> None:
    orders: Orders = {"mode": "count", "max": 300, "rate": 200, "every": 10}
    async with (
        Guest(tmp_path, file_disk(volume), orders, name="source") as source,
        Guest(tmp_path, file_disk(volume), orders, name="destination", incoming=True) as destination,
    ):
        await source.wait_for(r"^COUNT 50 ")
        await source.begin_migration(destination, bytes_per_s=1 << 20)
        destination.kill()
        with pytest.raises(MigrationFailed):
            await source.finish_migration(destination)
        await source.wait_for(r"^GUEST-DONE ioerr=0 badread=0$")
        await source.wait_off()
    assert verify_chain(volume, 300) == ChainReport(300, ())


async def test_finds_a_destination_that_has_another_disk(volume: Path, tmp_path: Path) -> None:
    stale = tmp_path / "stale.raw"
    orders: Orders = {"mode": "count", "max": 400, "rate": 200, "every": 10}
    async with Guest(tmp_path, file_disk(volume), orders, name="source") as source:
        await source.wait_for(r"^COUNT 50 ")
        shutil.copy(volume, stale)
        async with Guest(tmp_path, file_disk(stale), orders, name="destination", incoming=True) as destination:
            await source.wait_for(r"^COUNT 150 ")
            await source.migrate_to(destination)
            await source.quit()
            await destination.wait_for(r"^BADREAD record=")
            await destination.wait_for(r"^GUEST-DONE ")
    report = verify_chain(stale, 400)
    assert 50 <= report.leading < 150
    assert 0 < report.intact < 400
