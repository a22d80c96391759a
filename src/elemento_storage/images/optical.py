"""Whether a file is an image of an optical disc: ISO 9660 (ECMA-119) or UDF (ECMA-167)."""

import os
import struct
from typing import Final

from elemento_storage.errors import NotAnIso

_SECTOR: Final = 2048
_FIRST_DESCRIPTOR: Final = 16  #: sectors before it belong to the system that boots from the disc
_MOST_DESCRIPTORS: Final = 64
_PRIMARY: Final = 1
_UDF: Final = {b"NSR02", b"NSR03"}
_KNOWN: Final = {b"CD001", b"CDW02", b"BEA01", b"BOOT2", b"TEA01", *_UDF}
_PADDING: Final = 150 * _SECTOR  #: some writers count the run-out that they do not write


def require_optical_start(head: bytes) -> None:
    """Look at the first 64 KiB of what arrives. Raises NotAnIso."""
    _require(head[_FIRST_DESCRIPTOR * _SECTOR :])


def require_optical(path: str) -> None:
    """Read the volume descriptors. Blocks. Raises NotAnIso, OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        file_bytes = os.fstat(descriptor).st_size
        descriptors = os.pread(descriptor, _MOST_DESCRIPTORS * _SECTOR, _FIRST_DESCRIPTOR * _SECTOR)
    finally:
        os.close(descriptor)
    primary_bytes = _require(descriptors)
    if primary_bytes is not None and file_bytes + _PADDING < primary_bytes:
        raise NotAnIso(f"the ISO image says it has {primary_bytes} bytes, and {file_bytes} arrived: it was cut short")


def _require(descriptors: bytes) -> int | None:
    """What the primary descriptor of ISO 9660 says of the size, if there is one."""
    primary_bytes: int | None = None
    is_udf = False
    for offset in range(0, len(descriptors) - _SECTOR + 1, _SECTOR):
        sector = descriptors[offset : offset + _SECTOR]
        identifier = sector[1:6]
        if identifier not in _KNOWN:
            break
        is_udf = is_udf or identifier in _UDF
        if identifier == b"CD001" and sector[0] == _PRIMARY and primary_bytes is None:
            blocks, block_bytes = struct.unpack_from("<I", sector, 80)[0], struct.unpack_from("<H", sector, 128)[0]
            primary_bytes = blocks * block_bytes
    if not is_udf and primary_bytes is None:
        raise NotAnIso("what arrived is not an ISO image: neither ISO 9660 nor UDF begins like this")
    return primary_bytes
