"""Images that are put together while they are sent: QEMU takes them, and any stretch of them can be had."""

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from elemento_storage.engine.content import Content, FileContent, FileRange, OpenFile, Readable, Zeros, read_into
from elemento_storage.engine.qcow2_layout import Qcow2Layout
from elemento_storage.engine.vmdk_layout import VmdkLayout
from elemento_storage.errors import FormatUnsupported
from tests.unit.engine.test_content import MIB, sparse
from tests.unit.support import qemu_img

LAYOUTS: dict[str, Callable[[Content], Readable]] = {
    "qcow2": Qcow2Layout,
    "vmdk": lambda content: VmdkLayout(content, "a name.vmdk"),
}


def content_of(path: Path) -> FileContent:
    return FileContent(OpenFile(str(path)))


def write_to(readable: Readable, path: Path) -> None:
    """All of it, as a client would save it; zeros as holes."""
    with path.open("wb") as file:
        for part in readable.parts(0, readable.size_bytes):
            if isinstance(part, Zeros):
                file.seek(part.length, os.SEEK_CUR)
            elif isinstance(part, FileRange):
                file.write(os.pread(part.descriptor, part.length, part.offset))
            else:
                file.write(part)
        file.truncate()


def scattered(path: Path, size: int, seed: int) -> Path:
    some = random.Random(seed)
    data = sorted((some.randrange(0, size - 200_000) // 512 * 512, some.randrange(512, 200_000)) for _ in range(12))
    return sparse(path, size, *((offset, some.randbytes(length)) for offset, length in data))


@pytest.mark.parametrize("image_format", LAYOUTS)
@pytest.mark.parametrize("shape", ["empty", "full", "scattered", "large", "odd", "last sector"])
def test_qemu_reads_the_same(tmp_path: Path, image_format: str, shape: str) -> None:
    path = tmp_path / "disk.img"
    if shape == "empty":
        sparse(path, 10 * MIB)
    elif shape == "full":
        path.write_bytes(random.Random(1).randbytes(3 * MIB))
    elif shape == "scattered":
        scattered(path, 64 * MIB, 3)
    elif shape == "large":  # several L2 tables, and several grain tables
        sparse(path, 1500 * MIB, (0, b"a" * 4096), (700 * MIB, b"b" * 70_000), (1500 * MIB - 512, b"c" * 512))
    elif shape == "odd":
        scattered(path, 5 * MIB + 512, 4)
    else:
        sparse(path, 2 * MIB + 1536, (2 * MIB + 1024, b"z" * 512))
    readable = LAYOUTS[image_format](content_of(path))
    made = tmp_path / f"made.{image_format}"
    write_to(readable, made)
    assert made.stat().st_size == readable.size_bytes
    qemu_img("compare", "-f", "raw", "-F", image_format, str(path), str(made))
    qemu_img("check", "-f", image_format, str(made))
    told = qemu_img("info", "-f", image_format, "--output=json", str(made)).stdout
    assert f'"virtual-size": {path.stat().st_size}' in told


@pytest.mark.parametrize("image_format", LAYOUTS)
def test_any_stretch_can_be_had(tmp_path: Path, image_format: str) -> None:
    readable = LAYOUTS[image_format](content_of(scattered(tmp_path / "disk.img", 40 * MIB, 5)))
    made = tmp_path / "made"
    write_to(readable, made)
    whole = made.read_bytes()
    some = random.Random(6)
    edges = [0, 1, 7, 65535, 65536, 65537, 10752, 131072, len(whole) - 1, len(whole)]
    for _ in range(300):
        start, stop = sorted(some.choice([*edges, some.randrange(len(whole))]) for _ in range(2))
        buffer = bytearray(stop - start)
        read_into(readable, start, memoryview(buffer))
        assert buffer == whole[start:stop], (start, stop)


@pytest.mark.parametrize("image_format", LAYOUTS)
def test_holes_take_no_room_in_the_image(tmp_path: Path, image_format: str) -> None:
    readable = LAYOUTS[image_format](content_of(sparse(tmp_path / "a", 100 * MIB, (MIB, b"x" * 4096))))
    assert readable.size_bytes < 1.5 * MIB


def test_a_large_disk_has_large_clusters(tmp_path: Path) -> None:
    path = sparse(tmp_path / "a", 2**43, (2**42, b"x" * 4096), (2**43 - 4096, b"y" * 4096))
    made = tmp_path / "made.qcow2"
    layout = Qcow2Layout(content_of(path))
    assert layout.size_bytes < 64 * MIB
    write_to(layout, made)
    qemu_img("check", "-f", "qcow2", str(made))
    qemu_img("compare", "-f", "raw", "-F", "qcow2", str(path), str(made))


class Claimed:
    """Content that is said to be large."""

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes

    def extents(self, start: int, stop: int) -> list[object]:  # type: ignore[empty-body]
        """None."""


@pytest.mark.parametrize(("image_format", "size"), [("qcow2", 2**46 + 512), ("vmdk", 2**41)])
def test_what_a_format_cannot_hold_is_refused(image_format: str, size: int) -> None:
    with pytest.raises(FormatUnsupported):
        LAYOUTS[image_format](Claimed(size))  # type: ignore[arg-type]


def test_the_digest_tells_layouts_apart(tmp_path: Path) -> None:
    one = Qcow2Layout(content_of(sparse(tmp_path / "a", 10 * MIB, (0, b"x"))))
    same = Qcow2Layout(content_of(sparse(tmp_path / "b", 10 * MIB, (100, b"y"))))
    other = Qcow2Layout(content_of(sparse(tmp_path / "c", 10 * MIB, (MIB, b"x"))))
    assert one.digest == same.digest != other.digest
    content = content_of(tmp_path / "a")
    assert VmdkLayout(content, "a.vmdk").digest != VmdkLayout(content, "b.vmdk").digest
