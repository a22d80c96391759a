"""What is read is what was written: under load, after discards, and after a power failure of everything.

``ELEMENTO_TEST_LOAD`` (default 1) makes the load so many times as long.
"""

import contextlib
import os
import random
import re
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.clients import Attach, ClientFailed, QemuIo, as_nbd, eventually, iscsi_url
from tests.exporting import MIB, PROTOCOLS, client_of, export, new_volume, unexport, wait_healthy
from tests.live import LiveServer, free_port, live_server

LOAD = int(os.environ.get("ELEMENTO_TEST_LOAD", "1"))
KIB = 1024
each_way = pytest.mark.parametrize(
    ("protocol", "image_format"), [(protocol, one) for protocol in PROTOCOLS for one in ("raw", "qcow2")]
)


@pytest.fixture
def server(shared: LiveServer) -> LiveServer:
    """All tests here leave it as they found it."""
    return shared


def assert_sound(server: LiveServer, vid: str) -> None:
    """The image's own tables are right; room that was lost to a crash is allowed (3: leaks)."""
    (data,) = server.directory(vid).glob("data.*")
    if data.suffix == ".qcow2":
        checked = subprocess.run(
            ["qemu-img", "check", "-f", "qcow2", data], capture_output=True, text=True, check=False
        )
        assert checked.returncode in (0, 3), checked.stdout


# -- load ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def sessions(answer: dict[str, Any], count: int) -> Iterator[list[str]]:
    """NBD URIs of so many connections to one export, through an initiator each where it is iSCSI."""
    if answer["protocol"] != "iscsi":
        yield [answer["endpoint"]["uri"]] * count
        return
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(as_nbd(answer["qemu"])) for _ in range(count)]


@each_way
def test_everything_is_right_under_load(server: LiveServer, tmp_path: Path, protocol: str, image_format: str) -> None:
    """Each session has a region and a block size of its own; all of them at the same time, 16 deep, verified."""
    vid = new_volume(server, 128, format=image_format)
    answer = export(server, vid, protocol=protocol)
    sizes = ((4 * KIB, 4), (64 * KIB, 16), (MIB, 24), (4 * MIB, 32))
    with sessions(answer, len(sizes)) as uris:
        lines = [
            "[global]",
            *("ioengine=nbd", "rw=randwrite", "iodepth=16", "verify=crc32c", "verify_fatal=1", "do_verify=1"),
            *("fsync=32", "randseed=7", f"loops={LOAD}", "thread=0"),
        ]
        for number, ((block, mebibytes), uri) in enumerate(zip(sizes, uris, strict=True)):
            place = [f"offset={number * 32}m", f"size={mebibytes}m", f"bs={block}"]
            lines += [f"[{block}]", f"uri={uri}", *place]
        job = tmp_path / "load.fio"
        job.write_text("\n".join(lines))
        done = subprocess.run(["fio", str(job)], capture_output=True, text=True, check=False, cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "verify:" not in done.stdout + done.stderr
    unexport(server, vid)
    assert_sound(server, vid)


# -- discards --------------------------------------------------------------------------------------------------


ODD = [
    *((512, 512), (4096 + 512, 3 * 512), (65536, 65536), (65536 * 3 - 512, 1024), (100 * KIB, 200 * KIB)),
    *((MIB - 512, 64 * KIB + 1024), (2 * MIB + 4096, 128 * KIB), (3 * MIB + 512, 511 * 512)),
]


@each_way
def test_zeroes_are_zeros_and_nothing_else_is_lost(server: LiveServer, protocol: str, image_format: str) -> None:
    vid = new_volume(server, format=image_format)
    with client_of(export(server, vid, protocol=protocol)) as client:
        for command in ("write -z", "write -z -u"):
            client.write(0, 4 * MIB, 9)
            for offset, length in ODD:
                client.succeed(f"{command} {offset} {length}", f"wrote {length}/{length} bytes")
            client.flush()
            assert_pieces(client, ODD, 9)
        assert client.reads(4 * MIB, 4 * MIB, 0)
    unexport(server, vid)
    assert_sound(server, vid)


@each_way
def test_a_discard_takes_what_it_names_or_nothing(server: LiveServer, protocol: str, image_format: str) -> None:
    """Every sector in the range is as it was or zero, every other one as it was."""
    vid = new_volume(server, format=image_format)
    (data,) = server.directory(vid).glob("data.*")
    with client_of(export(server, vid, protocol=protocol)) as client:
        client.write(0, 4 * MIB, 9)
        for offset, length in ODD:
            client.succeed(f"discard {offset} {length}", f"discard {length}/{length} bytes")
        client.flush()
        for start, end in gaps(ODD, 4 * MIB):
            assert client.reads(start, end - start, 9)
        for offset, length in ODD:
            for sector in range(offset, offset + length, 512):
                assert client.reads(sector, 512, 0) or client.reads(sector, 512, 9)
        before = data.stat().st_blocks
        client.succeed(f"discard 0 {4 * MIB}", "discard")
        client.flush()
        if (protocol, image_format) != ("iscsi", "qcow2"):  # over FUSE it is not safe, and not offered
            assert client.reads(0, 4 * MIB, 0)
            assert data.stat().st_blocks < before - 4 * MIB // 512 // 2, "no room was given back"
        client.write(0, 4 * MIB, 3)
        assert client.reads(0, 4 * MIB, 3)
    unexport(server, vid)
    assert_sound(server, vid)


def gaps(ranges: Sequence[tuple[int, int]], end: int) -> list[tuple[int, int]]:
    """What is left of 0 to ``end``."""
    found, position = [], 0
    for offset, length in sorted(ranges):
        if offset > position:
            found.append((position, offset))
        position = max(position, offset + length)
    return [*found, (position, end)]


def assert_pieces(client: QemuIo, zeroed: Sequence[tuple[int, int]], pattern: int) -> None:
    for offset, length in zeroed:
        assert client.reads(offset, length, 0), (offset, length)
    for start, end in gaps(zeroed, 4 * MIB):
        assert client.reads(start, end - start, pattern), (start, end)


# -- power failures --------------------------------------------------------------------------------------------


@each_way
def test_what_was_flushed_survives_everything(tmp_path: Path, protocol: str, image_format: str) -> None:
    """The guest, its daemons and the server are killed in the middle of a write."""
    generator = random.Random(f"{protocol}{image_format}")
    with live_server(tmp_path, "--heartbeat", "0.3", "--lease", "2") as server:
        vid = new_volume(server, 32, format=image_format)
        answer = export(server, vid, protocol=protocol)
        flushed: dict[int, int] = {}
        for _ in range(2 * LOAD):
            write_until_killed(server, answer, flushed, generator)
            server.start()
            wait_healthy(server, vid)
            with client_of(answer) as client:
                wrong = {block for block, pattern in flushed.items() if not client.reads(block * 16384, 16384, pattern)}
            assert wrong == set(), f"{len(wrong)} of {len(flushed)} flushed blocks are lost"
        assert len(flushed) > 20
        unexport(server, vid)
        assert_sound(server, vid)


def write_until_killed(
    server: LiveServer, answer: dict[str, Any], flushed: dict[int, int], generator: random.Random
) -> None:
    client = client_of(answer)
    in_doubt: set[int] = set()

    def write() -> None:
        with contextlib.suppress(ClientFailed, OSError):
            while True:
                batch = {generator.randrange(2048): generator.randrange(1, 255) for _ in range(4)}
                in_doubt.update(batch)
                for block, pattern in batch.items():
                    client.succeed(f"write -P {pattern} {block * 16384} 16384", "wrote 16384/16384 bytes")
                client.flush()
                flushed.update(batch)
                in_doubt.difference_update(batch)

    writer = threading.Thread(target=write)
    writer.start()
    time.sleep(0.3 + generator.random() / 3)
    os.kill(client.pid, signal.SIGKILL)
    server.kill()
    server.kill_daemons()
    writer.join(30)
    client.kill()
    for block in in_doubt:
        flushed.pop(block, None)


# -- the SCSI test suite ---------------------------------------------------------------------------------------

# What tgtd 1.0.85 does not do, on whatever file it stands. Where discards are offered its GET LBA STATUS is wrong as
# well, which brings the whole suite out of step: there our export is compared with a bare tgtd of the same kind.
ACCEPTED = {
    "GetLBAStatus.BeyondEol",
    "PrinServiceactionRange.Range",
    *(f"ProutReserve.Ownership{kind}" for kind in ("EA", "WE", "EARO", "WERO")),
    "Reserve6.2Initiators",
    "iSCSIdatasn.iSCSIDataSnInvalid",
}
IN_STEP = ("Read16", "Write16", "WriteSame10", "WriteSame16", "Verify16", "WriteVerify16", "OrWrite", "ReadCapacity16")


def failed_tests(url: str, chosen: str = "ALL") -> set[str]:
    """The names of what iscsi-test-cu finds wrong. It overwrites the disk."""
    argv = ["iscsi-test-cu", "-d", "-n", "-t", chosen, url]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=250)
    ran = re.search(r"tests\s+(\d+)\s+(\d+)", done.stdout)
    assert ran is not None, done.stdout[-2000:] + done.stderr[-2000:]
    assert int(ran[2]) >= (200 if chosen == "ALL" else 1)
    return {f"{suite}.{test}" for suite, test in re.findall(r"Suite (\S+), Test (\S+) had failures", done.stdout)}


@contextlib.contextmanager
def bare_tgtd(directory: Path, *, thin: bool) -> Iterator[str]:
    """The URL of a LUN of a tgtd of our own, on a plain file."""
    image, port = directory / "bare.img", free_port()
    with image.open("wb") as file:
        file.truncate(128 * MIB)
    environment = {**os.environ, "TGT_IPC_SOCKET": str(directory / "ipc")}
    daemon = subprocess.Popen(
        ["tgtd", "-f", "-C", "1", "--iscsi", f"portal=127.0.0.1:{port}"], env=environment, stderr=subprocess.DEVNULL
    )

    def told(*words: str) -> bool:
        argv = ["tgtadm", "-C", "1", "--lld", "iscsi", *words]
        return subprocess.run(argv, env=environment, check=False, capture_output=True).returncode == 0

    try:
        eventually(lambda: told("--op", "show", "--mode", "target"))
        lun = ("--mode", "logicalunit", "--tid", "1", "--lun", "1")
        assert told("--op", "new", "--mode", "target", "--tid", "1", "--targetname", "iqn.2001-04.com.example:bare")
        assert told("--op", "new", *lun, "--backing-store", str(image), "--bstype", "rdwr")
        assert told("--op", "update", *lun, "--params", f"thin_provisioning={int(thin)}")
        assert told("--op", "bind", "--mode", "target", "--tid", "1", "--initiator-address", "ALL")
        yield f"iscsi://127.0.0.1:{port}/iqn.2001-04.com.example:bare/1"
    finally:
        daemon.kill()
        daemon.wait(10)


def test_scsi_as_far_as_tgtd_goes(server: LiveServer, tmp_path: Path) -> None:
    answer = export(server, new_volume(server, 128))
    with bare_tgtd(tmp_path, thin=True) as bare, ThreadPoolExecutor(2) as pool:
        ours, theirs = pool.map(failed_tests, (iscsi_url(answer), bare))
    assert ours - theirs == set()
    for suite in IN_STEP:
        assert failed_tests(iscsi_url(answer), f"SCSI.{suite}") == set()


@pytest.mark.skipif(LOAD < 2, reason="WRITE SAME over FUSE takes a minute")
def test_scsi_over_fuse_as_far_as_tgtd_goes(server: LiveServer) -> None:
    answer = export(server, new_volume(server, 128, format="qcow2"))
    assert failed_tests(iscsi_url(answer)) == ACCEPTED


# -- copies ----------------------------------------------------------------------------------------------------


@each_way
def test_a_client_copies_the_disk(server: LiveServer, tmp_path: Path, protocol: str, image_format: str) -> None:
    """qemu-img asks which parts are zeros, and copies only the others."""
    vid = new_volume(server, 16, format=image_format)
    answer = export(server, vid, protocol=protocol)
    expected = bytearray(16 * MIB)
    with client_of(answer) as client:
        for number, (offset, length) in enumerate([*ODD, (9 * MIB + 512, 2048), (16 * MIB - 512, 512)]):
            client.write(offset, length, number + 1)
            expected[offset : offset + length] = bytes([number + 1]) * length
        client.succeed(f"discard {5 * MIB} {MIB}", "discard")
        client.flush()
        attach = Attach.of(answer["qemu"])
    argv = ["qemu-img", "convert", "--image-opts", *(word for one in attach.objects for word in ("--object", one))]
    copied = subprocess.run([*argv, attach.blockdev, "-O", "raw", tmp_path / "copy"], capture_output=True, check=False)
    assert copied.returncode == 0, copied.stderr
    assert (tmp_path / "copy").read_bytes() == bytes(expected)
