"""The table of snapshots in a qcow2 image: as QEMU writes it, and as somebody would who means harm."""

import struct
import subprocess
from pathlib import Path

import pytest

from elemento_storage.engine.image_header import BadHeader
from elemento_storage.engine.qcow2_snapshots import read_internal_snapshots
from tests.unit.support import qemu_img

MB = 1 << 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", str(path), "8M")
    return path


def change(path: Path, offset: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(content)


def table_of(path: Path) -> int:
    return int(struct.unpack(">Q", path.read_bytes()[64:72])[0])


def test_an_image_without(image: Path) -> None:
    assert read_internal_snapshots(str(image)) == []


def test_what_qemu_has_written(image: Path) -> None:
    tags = ["first", "zweiter, mit Ümlaut", "-d", "x" * 200]
    for tag in tags:
        qemu_img("snapshot", "-c", tag, str(image))
    qemu_img("resize", "-q", "-f", "qcow2", str(image), "16M")
    qemu_img("snapshot", "-c", "large", str(image))
    found = read_internal_snapshots(str(image))
    assert [one.tag for one in found] == [*tags, "large"]
    assert [one.key for one in found] == ["1", "2", "3", "4", "5"]
    assert [one.size_bytes for one in found] == [8 * MB] * 4 + [16 * MB]
    assert {one.vm_state_bytes for one in found} == {0}
    assert abs(found[0].created_ns / 1e9 - image.stat().st_mtime) < 60


def test_of_another_tool_with_the_state_of_a_guest(image: Path) -> None:
    qemu_img("snapshot", "-c", "vm", str(image))
    change(image, table_of(image) + 40, struct.pack(">Q", 12345))  # the large size, in the extra data
    assert read_internal_snapshots(str(image))[0].vm_state_bytes == 12345


@pytest.mark.parametrize(
    ("offset", "content"),
    [
        (60, b"\xff\xff\xff\xff"),  # four thousand million snapshots
        (60, struct.pack(">I", 65536)),  # more than the table has
        (64, struct.pack(">Q", 2**63 - 1)),  # beyond the end
        (64, struct.pack(">Q", 1 << 40)),
    ],
)
def test_a_header_that_lies_is_refused(image: Path, offset: int, content: bytes) -> None:
    qemu_img("snapshot", "-c", "one", str(image))
    change(image, offset, content)
    with pytest.raises((BadHeader, OSError)):
        read_internal_snapshots(str(image))


def test_an_entry_that_is_longer_than_anybody_believes_is_refused(image: Path) -> None:
    qemu_img("snapshot", "-c", "one", str(image))
    change(image, table_of(image) + 36, struct.pack(">I", 0xFFFFFFFF))
    with pytest.raises(BadHeader):
        read_internal_snapshots(str(image))


def test_it_can_be_read_while_snapshots_come_and_go(image: Path) -> None:
    qemu_img("snapshot", "-c", "stays", str(image))
    script = 'for n in 1 2 3 4 5 6; do qemu-img snapshot -c "$n" "$0" && qemu-img snapshot -d "$n" "$0" || exit 1; done'
    with subprocess.Popen(["sh", "-c", script, str(image)]) as other:
        while other.poll() is None:
            assert read_internal_snapshots(str(image))[0].tag == "stays"
    assert other.returncode == 0
