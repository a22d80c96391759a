"""qcow2 images read without QEMU: what a guest sees is what QEMU says, and whatever is not plain is left to it."""

import os
import random
import struct
import subprocess
from pathlib import Path

import pytest

from elemento_storage.engine.content import Content, FileContent, OpenFile, read_into
from elemento_storage.engine.qcow2_content import NotPlain, Qcow2Content

MIB = 2**20


def make(tmp_path: Path, size: int, *commands: str, options: str = "") -> Path:
    """An empty image and what qemu-io does to it."""
    path = tmp_path / "image.qcow2"
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", "-o", options or "lazy_refcounts=off", path, str(size)], check=True
    )
    qemu_io(path, *commands)
    return path


def qemu_io(path: Path, *commands: str) -> None:
    if commands:
        told = [part for command in commands for part in ("-c", command)]
        subprocess.run(["qemu-io", "-f", "qcow2", *told, path], check=True, capture_output=True)


def guest(path: Path) -> bytes:
    """What QEMU says a guest reads."""
    raw = path.with_name("raw")
    subprocess.run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", path, raw], check=True)
    return raw.read_bytes()


def read(content: Qcow2Content, start: int, stop: int) -> bytes:
    buffer = bytearray(stop - start)
    read_into(content, start, memoryview(buffer))
    return bytes(buffer)


def require_same(path: Path, below: Content | None = None) -> Qcow2Content:
    """All of it, many stretches of it, and that what is told to be zero is."""
    expected = guest(path)
    content = Qcow2Content(OpenFile(str(path)), below)
    size = content.size_bytes
    assert size == len(expected)
    assert read(content, 0, size) == expected
    some = random.Random(size)
    for _ in range(200):
        start = some.randrange(size)
        stop = min(size, start + some.choice((1, 511, 4096, 65536, 65537, 3 * MIB)))
        assert read(content, start, stop) == expected[start:stop]
        at = start
        for one in content.extents(start, stop):
            assert one.start == at
            assert not one.zero or not any(expected[one.start : one.stop])
            at = one.stop
        assert at == stop
    return content


@pytest.mark.parametrize(
    "options", ["", "cluster_size=512", "cluster_size=2M", "compat=0.10", "preallocation=metadata"]
)
def test_what_qemu_reads(tmp_path: Path, options: str) -> None:
    some = random.Random(options)
    writes = [
        f"write -P {some.randrange(1, 255)} {some.randrange(0, 7 * MIB) // 512 * 512} {some.randrange(1, 400) * 512}"
        for _ in range(30)
    ]
    holes = [] if "0.10" in options else ["write -z 1M 300k", "write -z -u 3M 1M"]
    path = make(tmp_path, 8 * MIB + 512, *writes, *holes, "discard 2M 64k", "write -P 7 8M 512", options=options)
    require_same(path)


def test_what_has_no_table_is_one_hole(tmp_path: Path) -> None:
    content = Qcow2Content(OpenFile(str(make(tmp_path, 100 * 2**40 // 2))))
    (extent,) = content.extents(0, content.size_bytes)
    assert extent.zero
    assert extent.hole
    assert len(list(content.parts(0, content.size_bytes))) == 1


def test_rooms_that_were_only_promised_are_holes(tmp_path: Path) -> None:
    path = make(tmp_path, 64 * MIB, "write 5M 64k", options="preallocation=metadata")
    content = require_same(path)
    assert sum(one.length for one in content.extents(0, content.size_bytes) if not one.zero) == 65536


def test_neighbours_in_the_file_are_sent_at_once(tmp_path: Path) -> None:
    path = make(tmp_path, 64 * MIB, "write -P 1 8M 16M")
    content = Qcow2Content(OpenFile(str(path)))
    assert len(list(content.parts(0, 64 * MIB))) == 3


def test_a_file_that_ends_within_its_last_cluster(tmp_path: Path) -> None:
    path = make(tmp_path, MIB, "write -P 9 0 64k")
    os.truncate(path, path.stat().st_size - 4096)
    assert read(Qcow2Content(OpenFile(str(path))), 0, 65536) == b"\x09" * 61440 + bytes(4096)
    require_same(path)


def test_snapshots_are_not_what_a_guest_sees(tmp_path: Path) -> None:
    path = make(tmp_path, MIB, "write -P 1 0 256k")
    subprocess.run(["qemu-img", "snapshot", "-c", "before", path], check=True)
    qemu_io(path, "write -P 2 64k 64k")
    require_same(path)


@pytest.mark.parametrize("lowest", ["raw", "qcow2"])
def test_images_that_stand_on_others(tmp_path: Path, lowest: str) -> None:
    """Ours as volumes beside each other, the ones above larger than those below, with zeros over data."""
    directories = [tmp_path / f"vid.{number:032x}.elimg" for number in range(3)]
    for directory in directories:
        directory.mkdir()
    below = directories[0] / ("data.img" if lowest == "raw" else "data.qcow2")
    subprocess.run(["qemu-img", "create", "-q", "-f", lowest, below, str(2 * MIB + 4096)], check=True)
    told = ["-c", "write -P 1 0 1M", "-c", "write -P 2 2M 4096"]
    subprocess.run(["qemu-io", "-f", lowest, *told, below], check=True, capture_output=True)
    file = OpenFile(str(below))
    content: Content = FileContent(file) if lowest == "raw" else Qcow2Content(file)
    for number, size in ((1, 4 * MIB), (2, 5 * MIB)):
        path = directories[number] / "data.qcow2"
        name = f"../{directories[number - 1].name}/{below.name if number == 1 else 'data.qcow2'}"
        base = ["-b", name, "-F", lowest if number == 1 else "qcow2"]
        subprocess.run(
            ["qemu-img", "create", "-q", "-f", "qcow2", *base, path, str(size)], check=True, cwd=directories[number]
        )
        qemu_io(path, f"write -P {number + 4} {number * 256}k 100k", f"write -z {number * 512}k 128k")
        content = require_same(path, content)
    with pytest.raises(NotPlain):
        Qcow2Content(OpenFile(str(path)))
    with pytest.raises(NotPlain):
        Qcow2Content(OpenFile(str(make(tmp_path, MIB))), content)


@pytest.mark.parametrize(
    "made", ["compressed", "zstd", "subclusters", "encrypted", "backing", "external", "dirty", "unknown feature"]
)
def test_what_only_qemu_can_read(tmp_path: Path, made: str) -> None:
    options = {
        "zstd": "compression_type=zstd",
        "subclusters": "extended_l2=on",
        "external": f"data_file={tmp_path}/data",
        "dirty": "lazy_refcounts=on",
    }
    path = make(tmp_path, MIB, "write -P 1 0 64k", options=options.get(made, ""))
    if made == "compressed":
        qemu_io(path, "write -c -P 1 256k 64k")
    elif made == "backing":
        path = tmp_path / "overlay"
        base = ["-b", "image.qcow2", "-F", "qcow2"]
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *base, path], check=True, cwd=tmp_path)
    elif made in ("dirty", "unknown feature", "encrypted"):
        with path.open("r+b") as file:
            if made == "encrypted":
                os.pwrite(file.fileno(), struct.pack(">I", 1), 32)
            else:
                os.pwrite(file.fileno(), struct.pack(">Q", 1 if made == "dirty" else 1 << 40), 72)
    with pytest.raises(NotPlain):
        Qcow2Content(OpenFile(str(path)))


def l1_offset(path: Path) -> int:
    return int(struct.unpack(">Q", path.read_bytes()[40:48])[0])


@pytest.mark.parametrize(
    ("what", "value"),
    [
        ("header: L1 table", 2**64 - 1),
        ("header: L1 table", 2**40),
        ("header: L1 table", 0x30200),
        ("header: L1 entries", 0),
        ("L1", 2**55),
        ("L1", 0x30200),
        ("L1", 1 << 60 | 0x40000),
        ("L2", 1 << 57 | 0x50000),
        ("L2", 0x50000 | 4),
    ],
)
def test_odd_tables_are_left_to_qemu(tmp_path: Path, what: str, value: int) -> None:
    path = make(tmp_path, MIB, "write -P 1 0 64k")
    l1 = l1_offset(path)
    l2 = struct.unpack(">Q", path.read_bytes()[l1 : l1 + 8])[0] & 0x00FFFFFFFFFFFE00
    with path.open("r+b") as file:
        if what == "header: L1 entries":
            os.pwrite(file.fileno(), struct.pack(">I", value), 36)
        else:
            at = {"header: L1 table": 40, "L1": l1, "L2": l2}[what]
            os.pwrite(file.fileno(), struct.pack(">Q", value), at)
    with pytest.raises(NotPlain):
        Qcow2Content(OpenFile(str(path)))


def test_an_entry_between_clusters_is_damage(tmp_path: Path) -> None:
    path = make(tmp_path, MIB, "write -P 1 0 64k")
    l1 = l1_offset(path)
    l2 = struct.unpack(">Q", path.read_bytes()[l1 : l1 + 8])[0] & 0x00FFFFFFFFFFFE00
    with path.open("r+b") as file:
        os.pwrite(file.fileno(), struct.pack(">Q", 0x50200), l2)
    with pytest.raises(OSError, match="damaged"):
        read(Qcow2Content(OpenFile(str(path))), 0, 4096)


def test_what_points_beyond_the_end_is_zeros(tmp_path: Path) -> None:
    path = make(tmp_path, MIB, "write -P 1 0 64k")
    l1 = l1_offset(path)
    l2 = struct.unpack(">Q", path.read_bytes()[l1 : l1 + 8])[0] & 0x00FFFFFFFFFFFE00
    with path.open("r+b") as file:
        os.pwrite(file.fileno(), struct.pack(">Q", 1 << 50), l2)
    content = Qcow2Content(OpenFile(str(path)))
    assert read(content, 0, MIB) == bytes(MIB)


def test_what_is_no_qcow2_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "image"
    for content in (b"", b"QFI\xfb" + bytes(40), bytes(65536)):
        path.write_bytes(content)
        with pytest.raises(NotPlain):
            Qcow2Content(OpenFile(str(path)))
