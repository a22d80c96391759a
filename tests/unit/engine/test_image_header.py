import os
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elemento_storage.engine.image_header import BadHeader, qcow2_virtual_size, virtual_size
from elemento_storage.model import MAX_VOLUME_BYTES, VolumeFormat
from tests.unit.support import qemu_img


def header(
    *,
    magic: bytes = b"QFI\xfb",
    version: int = 3,
    backing: int = 0,
    cluster_bits: int = 16,
    size: int = 1 << 20,
    incompatible: int = 0,
) -> bytes:
    start = struct.pack(">4sIQIIQ", magic, version, backing, 0, cluster_bits, size)
    return start.ljust(72, b"\0") + struct.pack(">Q", incompatible) + bytes(24)


def create(path: Path, *options: str, size: str = "1M") -> Path:
    qemu_img("create", "-q", "-f", "qcow2", *options, str(path), *([size] if size else []))
    return path


@pytest.mark.parametrize("size", [512, 1 << 20, 10**9 // 512 * 512, 5 << 40])
@pytest.mark.parametrize("options", [[], ["-o", "compat=0.10"], ["-o", "cluster_size=2M"], ["-o", "extended_l2=on"]])
def test_the_size_that_qemu_wrote(tmp_path: Path, size: int, options: list[str]) -> None:
    path = create(tmp_path / "image", *options, size=str(size))
    assert virtual_size(str(path), VolumeFormat.QCOW2, path.stat().st_size) == size


@pytest.mark.parametrize("image_format", [VolumeFormat.RAW, VolumeFormat.ISO])
def test_other_images_are_as_large_as_their_file(tmp_path: Path, image_format: VolumeFormat) -> None:
    path = create(tmp_path / "looks-like-qcow2")
    assert virtual_size(str(path), image_format, 12345) == 12345


def test_a_backing_file_is_refused(tmp_path: Path) -> None:
    base = create(tmp_path / "base")
    path = create(tmp_path / "image", "-F", "qcow2", "-b", str(base), size="")
    with pytest.raises(BadHeader, match="backing file"):
        virtual_size(str(path), VolumeFormat.QCOW2, 0)


def test_an_external_data_file_is_refused(tmp_path: Path) -> None:
    path = create(tmp_path / "image", "-o", f"data_file={tmp_path}/other")
    with pytest.raises(BadHeader, match="another file"):
        virtual_size(str(path), VolumeFormat.QCOW2, 0)


def test_other_features_are_no_reason_to_refuse() -> None:
    dirty_and_extended_l2 = 1 << 0 | 1 << 4
    assert qcow2_virtual_size(header(incompatible=dirty_and_extended_l2)) == 1 << 20


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (header(magic=b"QFI\xfa"), "does not start like"),
        (header(version=1), "version 1"),
        (header(version=4), "version 4"),
        (header(cluster_bits=8), "cluster"),
        (header(cluster_bits=22), "cluster"),
        (header(size=MAX_VOLUME_BYTES + 1), "claims"),
        (header(size=2**64 - 1), "claims"),
        (header(backing=104), "backing file"),
        (header(incompatible=1 << 1), "corrupt"),
        (header(incompatible=1 << 2), "another file"),
        (b"", "too short"),
        (header()[:31], "too short"),
        (header()[:79], "too short"),
    ],
)
def test_headers_that_are_refused(wrong: bytes, told: str) -> None:
    with pytest.raises(BadHeader, match=told):
        qcow2_virtual_size(wrong)


def test_limits_of_the_header_are_accepted() -> None:
    for accepted in (header(cluster_bits=9), header(cluster_bits=21), header(version=2)):
        assert qcow2_virtual_size(accepted) == 1 << 20
    assert qcow2_virtual_size(header(size=MAX_VOLUME_BYTES)) == MAX_VOLUME_BYTES
    assert qcow2_virtual_size(header(size=0)) == 0


mutations = st.lists(st.tuples(st.integers(0, 103), st.integers(0, 255)), max_size=4)


def mutate(changes: list[tuple[int, int]]) -> bytes:
    mutated = bytearray(header())
    for position, value in changes:
        mutated[position] = value
    return bytes(mutated)


@given(st.binary(max_size=120) | st.binary(max_size=100).map(lambda rest: b"QFI\xfb" + rest) | mutations.map(mutate))
def test_any_bytes_are_a_size_or_a_bad_header(content: bytes) -> None:
    try:
        size = qcow2_virtual_size(content)
    except BadHeader as error:
        assert str(error)
        return
    assert 0 <= size <= MAX_VOLUME_BYTES
    assert content[:4] == b"QFI\xfb"
    assert content[8:16] == bytes(8), "an image with a backing file is never accepted"


def test_an_image_behind_a_link_is_not_opened(tmp_path: Path) -> None:
    create(tmp_path / "image")
    (tmp_path / "link").symlink_to(tmp_path / "image")
    with pytest.raises(OSError, match="symbolic links"):
        virtual_size(str(tmp_path / "link"), VolumeFormat.QCOW2, 0)


def test_reading_takes_no_more_than_the_header(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(header())
    os.truncate(path, 1 << 42)
    assert virtual_size(str(path), VolumeFormat.QCOW2, 0) == 1 << 20
