"""Real guests on exported volumes: they boot, write, move between hosts, and the old host is kept out."""

import contextlib
import os
import shutil
import subprocess
import time
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.clients import ClientFailed, NoAnswer, QemuIo, as_nbd, eventually
from tests.e2e.moving import (
    ROUTES,
    clients,
    data_file,
    end,
    export,
    exported,
    locks,
    marker_path,
    prepare,
    taken_out,
)
from tests.guest.build import BOOT_DISK_AREA, BOOT_DISK_BYTES, images
from tests.guest.chain import BLOCK, ChainReport, verify_chain, verify_pattern
from tests.guest.vm import Guest, MigrationFailed, Orders
from tests.live import BOB, CAROL, LiveServer

COUNT: Orders = {"mode": "count", "max": 600, "rate": 200, "every": 10}
ALL_RECORDS = ChainReport(600, ())


@pytest.mark.parametrize(("image_format", "protocol"), [("raw", "iscsi"), ("qcow2", "nbd")])
async def test_boots_from_an_export(server: LiveServer, tmp_path: Path, image_format: str, protocol: str) -> None:
    vid = server.create(format=image_format, size=BOOT_DISK_BYTES / 10**9, bootable=True)
    boot_disk, volume = images().boot_disk, data_file(server, vid)
    subprocess.run(["qemu-img", "convert", "-n", "-f", "raw", "-O", image_format, boot_disk, volume], check=True)
    answer = export(server, vid, protocol=protocol)
    async with Guest(tmp_path, answer["qemu"], {"mode": "rw", "seed": "out there"}, boots_itself=True) as guest:
        await guest.wait_for(r"^RW-OK extents=32$", 120)
        await guest.wait_off()
        assert guest.complaints() == []
    left = taken_out(server, vid, BOB, tmp_path)
    assert verify_pattern(left, base=BOOT_DISK_AREA, seed="out there", image_format=image_format) == []
    _require_sound(left)


@pytest.mark.parametrize(("image_format", "protocol"), ROUTES)
async def test_a_running_guest_moves(server: LiveServer, tmp_path: Path, image_format: str, protocol: str) -> None:
    vid = exported(server, image_format, protocol)
    async with Guest(tmp_path, export(server, vid)["qemu"], COUNT, name="source") as source:
        await source.wait_for(r"^COUNT 50 ", 120)
        to = prepare(server, vid)["exports"][0]["qemu"]
        async with Guest(tmp_path, to, COUNT, name="destination", incoming=True) as destination:
            await source.migrate_to(destination)
            assert 50 <= source.counted() < 600
            assert end(server, "conclude", vid)["state"] == "concluded"
            assert list(clients(server, vid)) == [CAROL]
            await destination.wait_for(r"^COUNT-DONE 600 ", 120)
            await destination.wait_off()
            assert source.complaints() + destination.complaints() == []
    left = taken_out(server, vid, CAROL, tmp_path)
    assert verify_chain(left, 600, image_format=image_format) == ALL_RECORDS
    _require_sound(left)


@pytest.mark.parametrize(("image_format", "protocol"), ROUTES[:2])
async def test_a_guest_stays_when_its_destination_dies(
    server: LiveServer, tmp_path: Path, image_format: str, protocol: str
) -> None:
    vid = exported(server, image_format, protocol)
    before = marker_path(server, vid, BOB).read_bytes()
    async with Guest(tmp_path, export(server, vid)["qemu"], COUNT, name="source") as source:
        await source.wait_for(r"^COUNT 50 ", 120)
        to = prepare(server, vid)["exports"][0]["qemu"]
        async with Guest(tmp_path, to, COUNT, name="destination", incoming=True) as destination:
            await source.begin_migration(destination, bytes_per_s=1 << 20)
            destination.kill()
            with pytest.raises(MigrationFailed):
                await source.finish_migration(destination)
        assert end(server, "revert", vid)["state"] == "reverted"
        assert list(clients(server, vid)) == [BOB]
        assert marker_path(server, vid, BOB).read_bytes() == before
        await source.wait_for(r"^GUEST-DONE ioerr=0 badread=0$", 120)
        await source.wait_off()
    left = taken_out(server, vid, BOB, tmp_path)
    assert verify_chain(left, 600, image_format=image_format) == ALL_RECORDS
    _require_sound(left)


async def test_a_destination_with_an_old_copy_is_found_out(server: LiveServer, tmp_path: Path) -> None:
    """The control: had the destination another disk than the source, the tests above would say so."""
    vid, stale = exported(server), server.create(size=0.005)
    async with Guest(tmp_path, export(server, vid)["qemu"], COUNT, name="source") as source:
        await source.wait_for(r"^COUNT 50 ", 120)
        shutil.copy(data_file(server, vid), data_file(server, stale))
        to = export(server, stale, CAROL)["qemu"]
        await source.wait_for(r"^COUNT 100 ", 120)
        async with Guest(tmp_path, to, COUNT, name="destination", incoming=True) as destination:
            await source.migrate_to(destination)
            await source.quit()
            await destination.wait_for(r"^BADREAD record=", 120)
            await destination.wait_for(r"^GUEST-DONE ", 120)
    report = verify_chain(taken_out(server, stale, CAROL, tmp_path), 600)
    assert 50 <= report.leading < 600
    assert 0 < report.intact < 600


# -- the old host ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("image_format", "protocol"), ROUTES)
def test_the_old_host_is_fenced(server: LiveServer, image_format: str, protocol: str) -> None:
    vid = exported(server, image_format, protocol)
    old_way = export(server, vid)["qemu"]
    with QemuIo(old_way) as old:
        old.write(0, 65536, 0x11)
        with QemuIo(prepare(server, vid)["exports"][0]["qemu"]) as new:
            assert new.reads(0, 65536, 0x11)
            # Both at once, until it is decided.
            old.write(65536, 65536, 0x12)
            assert new.reads(65536, 65536, 0x12)
            end(server, "conclude", vid)
            old.send("write -P 102 131072 65536")
            with pytest.raises((ClientFailed, NoAnswer)):
                QemuIo(old_way, timeout_s=2)
            assert _failed_or_waits(old)
            new.write(65536, 65536, 0x13)
            assert new.reads(0, 65536, 0x11)
            assert new.reads(131072, 65536, 0)
    assert locks(server, vid) == []


def _failed_or_waits(client: QemuIo) -> bool:
    try:
        return "write failed" in client.wait(0)
    except (ClientFailed, NoAnswer):
        return True


@pytest.mark.parametrize(("image_format", "protocol"), ROUTES)
def test_nothing_of_a_busy_old_host_comes_after_the_answer(
    server: LiveServer, image_format: str, protocol: str
) -> None:
    vid = exported(server, image_format, protocol, size=4)
    volume = data_file(server, vid)
    empty = volume.stat().st_blocks
    with _writer(export(server, vid)["qemu"]):
        eventually(lambda: volume.stat().st_blocks > empty + 4096)
        prepare(server, vid)
        written = volume.stat().st_blocks
        eventually(lambda: volume.stat().st_blocks > written)
        end(server, "conclude", vid)
        touched = volume.stat().st_mtime_ns
        content = _fingerprint(volume)
        time.sleep(2)
        assert volume.stat().st_mtime_ns == touched
        assert _fingerprint(volume) == content


@contextlib.contextmanager
def _writer(qemu: Sequence[str]) -> Iterator[None]:
    """A client that never stops writing new blocks, with 16 requests under way."""
    words = ["qemu-img", "bench", "-w", "-d", "16", "-s", "4096", "-c", "1000000", "--pattern", "90", "-f", "raw"]
    quiet = subprocess.DEVNULL
    with as_nbd(qemu) as uri, subprocess.Popen([*words, uri], stdout=quiet, stderr=quiet) as process:
        try:
            yield
        finally:
            process.kill()


def _fingerprint(path: Path) -> int:
    """Of all that a file holds. Zeros count for nothing: the kernel may turn them into a hole, or a hole into them."""
    found, at = 0, 0
    with path.open("rb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            # Raises at the end.
            at = os.lseek(file.fileno(), at, os.SEEK_DATA) // BLOCK * BLOCK
            block = os.pread(file.fileno(), BLOCK, at)
            if block.strip(b"\0"):
                found = zlib.crc32(block, zlib.crc32(at.to_bytes(8, "big"), found))
            at += BLOCK
    return found


def _require_sound(volume: Path) -> None:
    if volume.suffix == ".qcow2":
        subprocess.run(["qemu-img", "check", "-q", volume], check=True)
