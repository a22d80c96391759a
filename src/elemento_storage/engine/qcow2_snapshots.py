"""The internal snapshots of a qcow2 image, read straight from its tables: no process for a list.

The layout is that of QEMU's docs/interop/qcow2.txt, "Snapshots". QEMU writes a new table beside the old one and then
changes the header in one write, so a reader finds the old table or the new one; the old one's clusters may be used
again at once, which is why the header is read once more afterwards.
"""

import os
import struct
from dataclasses import dataclass
from typing import Final

from elemento_storage.engine.image_header import BadHeader, read_header
from elemento_storage.model import VolumeFormat

_HEADER_BYTES: Final = 104
_COUNT_AND_OFFSET: Final = struct.Struct(">IQ")
_COUNT_AT: Final = 60
_ENTRY: Final = struct.Struct(">QIHHIIQII")
_LARGE_SIZES: Final = struct.Struct(">QQ")
_LARGEST_TABLE: Final = 1 << 20  # QEMU takes 1 GB; a thousand snapshots are 100 KB
_MOST: Final = 65536  # QCOW_MAX_SNAPSHOTS
_TRIES: Final = 5


@dataclass(frozen=True)
class InternalSnapshot:
    """One entry of the table. ``key`` is unique within the image; the tag is any text that its maker chose."""

    key: str
    tag: str
    created_ns: int
    size_bytes: int  #: virtual size at that time
    vm_state_bytes: int  #: memory of a guest that its maker saved with it


def read_internal_snapshots(path: str) -> list[InternalSnapshot]:
    """The snapshots in an image, oldest first, also while QEMU writes to it. Blocks. Raises BadHeader, OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        for _ in range(_TRIES):
            header = os.pread(descriptor, _HEADER_BYTES, 0)
            size_bytes = read_header(path, VolumeFormat.QCOW2, 0).size_bytes
            try:
                found = _read_table(descriptor, header, size_bytes)
            except BadHeader:
                if header == os.pread(descriptor, _HEADER_BYTES, 0):
                    raise
                continue
            if _place_of_table(header) == _place_of_table(os.pread(descriptor, _HEADER_BYTES, 0)):
                return found
        raise BadHeader("its table of snapshots changes faster than it can be read")
    finally:
        os.close(descriptor)


def _place_of_table(header: bytes) -> tuple[int, int]:
    count, offset = _COUNT_AND_OFFSET.unpack_from(header, _COUNT_AT)
    return count, offset


def _read_table(descriptor: int, header: bytes, size_bytes: int) -> list[InternalSnapshot]:
    count, offset = _place_of_table(header)
    if not count:
        return []
    if count > _MOST:
        raise BadHeader(f"the header claims {count} snapshots")
    table = os.pread(descriptor, _LARGEST_TABLE, offset)
    found, position = [], 0
    for _ in range(count):
        entry, position = _read_entry(table, position, size_bytes)
        found.append(entry)
    return found


def _read_entry(table: bytes, position: int, size_bytes: int) -> tuple[InternalSnapshot, int]:
    def take(length: int) -> bytes:
        nonlocal position
        taken = table[position : position + length]
        if len(taken) < length:
            raise BadHeader("its table of snapshots is cut off, or larger than is believed")
        position += length
        return taken

    _, _, key_bytes, tag_bytes, seconds, nanoseconds, _, vm_state_bytes, extra_bytes = _ENTRY.unpack(take(_ENTRY.size))
    extra = take(extra_bytes)
    if extra_bytes >= _LARGE_SIZES.size:
        vm_state_bytes, size_bytes = _LARGE_SIZES.unpack_from(extra)
    key, tag = (take(length).decode("utf-8", "backslashreplace") for length in (key_bytes, tag_bytes))
    created_ns = seconds * 10**9 + nanoseconds
    return InternalSnapshot(key, tag, created_ns, size_bytes, vm_state_bytes), -(-position // 8) * 8
