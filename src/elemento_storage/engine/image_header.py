"""The virtual size an image claims, read straight from its header: no process per volume in a scan or a list.

The QCOW2 header is specified in QEMU's docs/interop/qcow2.txt.
"""

import os
import re
import struct
from dataclasses import dataclass
from typing import Final

from elemento_storage.model import MAX_VOLUME_BYTES, VolumeFormat, volume_directory_name

_QCOW2_MAGIC = b"QFI\xfb"
# magic, version, backing file offset, backing file length, cluster bits, virtual size, encryption method
_QCOW2_HEADER = struct.Struct(">4sIQIIQI")
_QCOW2_INCOMPATIBLE_FEATURES = struct.Struct(">Q")
_INCOMPATIBLE_FEATURES_OFFSET = 72
_EXTERNAL_DATA_FILE = 1 << 2
_CORRUPT = 1 << 1
_HEADER_LENGTH_OFFSET = 100
_SNAPSHOTS_OFFSET = 60
_AUTOCLEAR_OFFSET = 88
_BITMAPS = 1 << 0
_EXTENSION = struct.Struct(">II")  #: type, length; its data is padded to a multiple of 8
_BACKING_FORMAT = 0xE2792ACA
_READ_BYTES: Final = 104  #: what every qcow2 image is asked for
_LINKED_READ_BYTES: Final = 4096  #: what one that names a backing file is: ours has all of it within the first 300
_PARENT = re.compile(rb"\.\./vid\.([0-9a-f]{32})\.elimg/data\.(img|qcow2)")


class BadHeader(ValueError):
    """The header is not one of the format, or claims what we do not accept. The text says which."""


@dataclass(frozen=True)
class Parent:
    """The volume that another one's image stands on: an overlay has only what differs."""

    volume_id: str
    format: VolumeFormat

    @property
    def backing_file(self) -> str:
        """The backing file as an overlay's header names it, the same wherever the location is mounted."""
        return f"../{volume_directory_name(self.volume_id)}/{self.format.data_file}"


@dataclass(frozen=True)
class ImageHeader:
    """What an image says of itself."""

    size_bytes: int  #: what a guest sees
    parent: Parent | None = None
    has_history: bool = False  #: snapshots or dirty bitmaps are inside
    snapshots: int = 0  #: that are inside


def read_header(path: str, image_format: VolumeFormat, file_bytes: int) -> ImageHeader:
    """The header of a volume's image, which may stand on another volume's. Blocks. Raises BadHeader, OSError."""
    if image_format is not VolumeFormat.QCOW2:
        return ImageHeader(file_bytes)
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        header = os.pread(descriptor, _READ_BYTES, 0)
        if names_backing_file(header):
            header = os.pread(descriptor, _LINKED_READ_BYTES, 0)
    finally:
        os.close(descriptor)
    return qcow2_header(header)


def virtual_size(path: str, image_format: VolumeFormat, file_bytes: int) -> int:
    """Bytes a guest sees, of an image that stands on no other. Raises BadHeader, OSError."""
    if image_format is VolumeFormat.QCOW2:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            return qcow2_virtual_size(os.pread(descriptor, _READ_BYTES, 0))
        finally:
            os.close(descriptor)
    return file_bytes


def names_backing_file(header: bytes) -> bool:
    """Whether the beginning of a qcow2 image says that it stands on another file."""
    if len(header) < _QCOW2_HEADER.size:
        return False
    magic, _, offset, *_ = _QCOW2_HEADER.unpack_from(header)
    return bool(magic == _QCOW2_MAGIC and offset)


def qcow2_header(header: bytes) -> ImageHeader:
    """The header of a volume's image, which may stand on another volume beside it and on nothing else.

    Raises BadHeader.
    """
    parent = _parent(header) if names_backing_file(header) else None
    size_bytes = _qcow2_size(header)
    (snapshots,) = struct.unpack_from(">I", header, _SNAPSHOTS_OFFSET) if len(header) >= 72 else (0,)
    version = _QCOW2_HEADER.unpack_from(header)[1]
    autoclear = 0
    if version == 3 and len(header) >= _AUTOCLEAR_OFFSET + 8:
        (autoclear,) = struct.unpack_from(">Q", header, _AUTOCLEAR_OFFSET)
    return ImageHeader(size_bytes, parent, bool(snapshots) or bool(autoclear & _BITMAPS), snapshots)


def _parent(header: bytes) -> Parent:
    """The parent that an overlay of ours names, and the format in which it is to be opened."""
    _, version, offset, length, *_ = _QCOW2_HEADER.unpack_from(header)
    name = header[offset : offset + length]
    match = _PARENT.fullmatch(name) if len(name) == length else None
    if match is None or version != 3:
        raise BadHeader("the image names a backing file that is no volume beside it")
    parent = Parent(match[1].decode(), VolumeFormat.RAW if match[2] == b"img" else VolumeFormat.QCOW2)
    # Without the format, QEMU would guess it from what the parent's guest has written.
    if _backing_format(header, offset) != parent.format.value.encode():
        raise BadHeader("the image names a backing file without its format")
    return parent


def _backing_format(header: bytes, end: int) -> bytes | None:
    (position,) = struct.unpack_from(">I", header, _HEADER_LENGTH_OFFSET) if len(header) >= _READ_BYTES else (0,)
    while _READ_BYTES <= position <= min(end, len(header)) - _EXTENSION.size:
        kind, length = _EXTENSION.unpack_from(header, position)
        position += _EXTENSION.size
        if kind == 0:
            break
        if kind == _BACKING_FORMAT:
            return header[position : position + length]
        position += -(-length // 8) * 8
    return None


def qcow2_virtual_size(header: bytes) -> int:
    """The virtual size in a QCOW2 header; refuses images whose bytes are not all in this one file."""
    if names_backing_file(header):
        raise BadHeader("the image names a backing file")
    return _qcow2_size(header)


def _qcow2_size(header: bytes) -> int:
    if len(header) < _QCOW2_HEADER.size:
        raise BadHeader("the file is too short for a qcow2 header")
    magic, version, _, _, cluster_bits, size, _ = _QCOW2_HEADER.unpack_from(header)
    if magic != _QCOW2_MAGIC:
        raise BadHeader("the file does not start like a qcow2 image")
    if version not in (2, 3):
        raise BadHeader(f"qcow2 version {version} is unknown")
    if not 9 <= cluster_bits <= 21:
        raise BadHeader(f"a qcow2 cluster of 2^{cluster_bits} bytes is not valid")
    if size > MAX_VOLUME_BYTES:
        raise BadHeader(f"the header claims {size} bytes")
    if version == 3:
        if len(header) < _INCOMPATIBLE_FEATURES_OFFSET + _QCOW2_INCOMPATIBLE_FEATURES.size:
            raise BadHeader("the file is too short for a qcow2 header")
        (features,) = _QCOW2_INCOMPATIBLE_FEATURES.unpack_from(header, _INCOMPATIBLE_FEATURES_OFFSET)
        if features & _EXTERNAL_DATA_FILE:
            raise BadHeader("the image keeps its data in another file")
        if features & _CORRUPT:
            raise BadHeader("QEMU has marked the image as corrupt: run qemu-img check on it")
    return int(size)
