"""The virtual size an image claims, read straight from its header: no process per volume in a scan or a list.

The QCOW2 header is specified in QEMU's docs/interop/qcow2.txt.
"""

import os
import struct

from elemento_storage.model import MAX_VOLUME_BYTES, VolumeFormat

_QCOW2_MAGIC = b"QFI\xfb"
# magic, version, backing file offset, backing file length, cluster bits, virtual size, encryption method
_QCOW2_HEADER = struct.Struct(">4sIQIIQI")
_QCOW2_INCOMPATIBLE_FEATURES = struct.Struct(">Q")
_INCOMPATIBLE_FEATURES_OFFSET = 72
_EXTERNAL_DATA_FILE = 1 << 2
_CORRUPT = 1 << 1


class BadHeader(ValueError):
    """The header is not one of the format, or claims what we do not accept. The text says which."""


def virtual_size(path: str, image_format: VolumeFormat, file_bytes: int) -> int:
    """Bytes a guest sees. Raises BadHeader, OSError."""
    if image_format is VolumeFormat.QCOW2:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            return qcow2_virtual_size(os.pread(descriptor, 104, 0))
        finally:
            os.close(descriptor)
    return file_bytes


def qcow2_virtual_size(header: bytes) -> int:
    """The virtual size in a QCOW2 header; refuses images whose bytes are not all in this one file."""
    if len(header) < _QCOW2_HEADER.size:
        raise BadHeader("the file is too short for a qcow2 header")
    magic, version, backing_offset, _, cluster_bits, size, _ = _QCOW2_HEADER.unpack_from(header)
    if magic != _QCOW2_MAGIC:
        raise BadHeader("the file does not start like a qcow2 image")
    if version not in (2, 3):
        raise BadHeader(f"qcow2 version {version} is unknown")
    if not 9 <= cluster_bits <= 21:
        raise BadHeader(f"a qcow2 cluster of 2^{cluster_bits} bytes is not valid")
    if size > MAX_VOLUME_BYTES:
        raise BadHeader(f"the header claims {size} bytes")
    if backing_offset:
        raise BadHeader("the image names a backing file")
    if version == 3:
        if len(header) < _INCOMPATIBLE_FEATURES_OFFSET + _QCOW2_INCOMPATIBLE_FEATURES.size:
            raise BadHeader("the file is too short for a qcow2 header")
        (features,) = _QCOW2_INCOMPATIBLE_FEATURES.unpack_from(header, _INCOMPATIBLE_FEATURES_OFFSET)
        if features & _EXTERNAL_DATA_FILE:
            raise BadHeader("the image keeps its data in another file")
        if features & _CORRUPT:
            raise BadHeader("QEMU has marked the image as corrupt: run qemu-img check on it")
    return int(size)
