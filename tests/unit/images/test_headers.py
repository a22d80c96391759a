"""Headers of images from outside: what is let in, what is converted, what is refused."""

import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elemento_storage.errors import ImageDamaged, ImageRefused, NotAnIso, StorageError
from elemento_storage.images.headers import foresee_header, read_header
from elemento_storage.images.incoming import Compression, ImageFormat
from elemento_storage.images.optical import require_optical, require_optical_start
from elemento_storage.images.recognise import HEAD_BYTES, compression_of, format_of
from tests.images import DISK_BYTES, compressed, iso_bytes, make_image, patched


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("images")


@pytest.fixture(scope="module")
def qcow2(directory: Path) -> Path:
    return make_image(directory, "disk.qcow2", "qcow2", content=bytes(DISK_BYTES))


@pytest.fixture(scope="module")
def foreign(directory: Path) -> dict[ImageFormat, Path]:
    kinds = (ImageFormat.VMDK, ImageFormat.VDI, ImageFormat.VHD, ImageFormat.VHDX)
    return {kind: make_image(directory, f"disk.{kind}", kind) for kind in kinds}


def test_qcow2_of_either_version_is_adoptable(directory: Path, qcow2: Path) -> None:
    header = read_header(str(qcow2), ImageFormat.QCOW2)
    assert (header.virtual_bytes, header.adoptable, header.outdated) == (DISK_BYTES, True, False)
    old = make_image(directory, "old.qcow2", "qcow2", "-o", "compat=0.10")
    header = read_header(str(old), ImageFormat.QCOW2)
    assert (header.adoptable, header.outdated) == (True, True)
    small = make_image(directory, "small.qcow2", "qcow2", "-o", "cluster_size=4k")
    assert not read_header(str(small), ImageFormat.QCOW2).adoptable
    extended = make_image(directory, "extended.qcow2", "qcow2", "-o", "extended_l2=on,compression_type=zstd", "-c")
    assert read_header(str(extended), ImageFormat.QCOW2).adoptable


@pytest.mark.parametrize(
    ("offset", "layout", "values", "adoptable"),
    [
        (60, ">I", (1,), False),  # snapshots
        (72, ">Q", (1,), False),  # dirty
        (88, ">Q", (1,), False),  # bitmaps
        (72, ">Q", (8,), True),  # another compression
    ],
)
def test_what_others_left_in_a_qcow2_image_makes_it_be_converted(
    qcow2: Path, tmp_path: Path, offset: int, layout: str, values: tuple[int, ...], adoptable: bool
) -> None:
    image = tmp_path / "image"
    image.write_bytes(patched(qcow2, offset, layout, *values))
    assert read_header(str(image), ImageFormat.QCOW2).adoptable is adoptable


QCOW2_REFUSED = {
    "backing file": (8, ">QI", (512, 11)),
    "encrypted": (32, ">I", (2,)),
    "external data": (72, ">Q", (4,)),
    "unknown feature": (72, ">Q", (1 << 40,)),
    "9 EB": (20, ">IQII", (21, 2**63, 0, 4 << 20)),
    "giant L1": (36, ">I", (2**31,)),
    "giant refcount table": (56, ">I", (2**31,)),
}
QCOW2_DAMAGED = {
    "corrupt": (72, ">Q", (2,)),
    "version 9": (4, ">I", (9,)),
    "cluster of one byte": (20, ">I", (0,)),
    "cluster of 4 GiB": (20, ">I", (32,)),
    "L1 too small": (36, ">I", (0,)),
    "L1 beyond the end": (40, ">Q", (1 << 40,)),
    "L1 unaligned": (40, ">Q", (7,)),
    "no refcounts": (48, ">Q", (0,)),
    "refcounts beyond the end": (48, ">Q", (1 << 40,)),
    "refcounts of 2^9 bits": (96, ">I", (9,)),
}


@pytest.mark.parametrize("name", [*QCOW2_REFUSED, *QCOW2_DAMAGED])
def test_hostile_qcow2_headers(qcow2: Path, tmp_path: Path, name: str) -> None:
    offset, layout, values = {**QCOW2_REFUSED, **QCOW2_DAMAGED}[name]
    content = patched(qcow2, offset, layout, *values)
    image = tmp_path / "image"
    image.write_bytes(content)
    error = ImageRefused if name in QCOW2_REFUSED else ImageDamaged
    with pytest.raises(error):
        read_header(str(image), ImageFormat.QCOW2)
    if "beyond the end" not in name:
        with pytest.raises(error):
            foresee_header(content[:HEAD_BYTES], ImageFormat.QCOW2)


def test_the_other_formats(foreign: dict[ImageFormat, Path]) -> None:
    for kind, path in foreign.items():
        head = path.read_bytes()[:HEAD_BYTES]
        assert format_of(head) is kind
        header = read_header(str(path), kind)
        assert not header.adoptable
        foreseen = foresee_header(head, kind)
        assert foreseen.virtual_bytes is None if kind is ImageFormat.VHDX else foreseen.virtual_bytes
    assert foresee_header(foreign[ImageFormat.VMDK].read_bytes()[:512], ImageFormat.VMDK).virtual_bytes == DISK_BYTES


FOREIGN_REFUSED = [
    (ImageFormat.VMDK, 12, "<Q", (0,)),  # no capacity: QEMU opens what the descriptor names
    (ImageFormat.VMDK, 0, "4s", (b"COWD",)),
    (ImageFormat.VDI, 0x4C, "<I", (4,)),  # a difference to a parent
    (ImageFormat.VDI, 0x180, "<I", (2**31,)),
    (ImageFormat.VHD, 60, ">I", (4,)),  # a difference to a parent
]


@pytest.mark.parametrize(("kind", "offset", "layout", "values"), FOREIGN_REFUSED)
def test_hostile_headers_of_other_formats(
    foreign: dict[ImageFormat, Path], tmp_path: Path, kind: ImageFormat, offset: int, layout: str, values: tuple[int]
) -> None:
    image = tmp_path / "image"
    image.write_bytes(patched(foreign[kind], offset, layout, *values))
    with pytest.raises(ImageRefused):
        read_header(str(image), kind)


def test_a_vmdk_with_a_parent_or_in_several_files(foreign: dict[ImageFormat, Path], tmp_path: Path) -> None:
    image = tmp_path / "image"
    content = foreign[ImageFormat.VMDK].read_bytes()
    hint = b'parentFileNameHint="/etc/shadow"\n'
    image.write_bytes(content[:600] + hint + content[600 + len(hint) :])
    with pytest.raises(ImageRefused):
        read_header(str(image), ImageFormat.VMDK)
    description = b'# Disk DescriptorFile\nversion=1\nRW 8 FLAT "/etc/shadow" 0\n'.ljust(2048, b"\n")
    assert format_of(description) is ImageFormat.VMDK
    image.write_bytes(description)
    with pytest.raises(ImageRefused):
        read_header(str(image), ImageFormat.VMDK)


def test_truncated_images_are_damaged(foreign: dict[ImageFormat, Path], qcow2: Path, tmp_path: Path) -> None:
    image = tmp_path / "image"
    for kind, path in {**foreign, ImageFormat.QCOW2: qcow2}.items():
        for length in (0, 3, 100):
            image.write_bytes(path.read_bytes()[:length])
            with pytest.raises(ImageDamaged):
                read_header(str(image), kind)
    for kind in (ImageFormat.VDI, ImageFormat.VHD):
        image.write_bytes(foreign[kind].read_bytes()[:-70000])
        with pytest.raises(ImageDamaged):
            read_header(str(image), kind)


@settings(max_examples=300, deadline=None)
@given(kind=st.sampled_from(list(ImageFormat)), noise=st.binary(max_size=700), magic=st.booleans())
def test_no_header_does_anything_but_be_refused(kind: ImageFormat, noise: bytes, magic: bool) -> None:
    starts = {
        ImageFormat.QCOW2: b"QFI\xfb\0\0\0\x03",
        ImageFormat.VMDK: b"KDMV",
        ImageFormat.VDI: bytes(64) + struct.pack("<I", 0xBEDA107F),
        ImageFormat.VHD: b"conectix",
        ImageFormat.VHDX: b"vhdxfile",
    }
    head = (starts.get(kind, b"") if magic else b"") + noise
    try:
        foresee_header(head, kind)
    except StorageError as error:
        assert isinstance(error, ImageRefused | ImageDamaged)


def test_what_is_around_an_image(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.write_bytes(b"x" * 1000)
    for program, compression in (("gzip", Compression.GZIP), ("xz", Compression.XZ), ("zstd", Compression.ZSTD)):
        assert compression_of(compressed(plain, program).read_bytes()) is compression
    assert compression_of(plain.read_bytes()) is Compression.NONE
    assert compression_of(b"") is Compression.NONE
    assert format_of(b"") is format_of(b"x" * 1000) is ImageFormat.RAW


def test_optical_discs(tmp_path: Path) -> None:
    image = tmp_path / "image"
    udf = bytes(32768) + b"".join(b"\0" + word + b"\x01" + bytes(2041) for word in (b"BEA01", b"NSR03", b"TEA01"))
    for content in (iso_bytes(), udf):
        image.write_bytes(content)
        require_optical(str(image))
        require_optical_start(content[:HEAD_BYTES])
    for content in (b"", bytes(100_000), b"CD001" * 20_000, iso_bytes(1000)[:100_000]):
        image.write_bytes(content)
        with pytest.raises(NotAnIso):
            require_optical(str(image))
