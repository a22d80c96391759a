"""The headers of images from outside, read by our own few lines before a program of QEMU's may open them.

What may be adopted as it is, what has to be converted, and what is not let in: whatever would make QEMU open another
file (a backing file, an external data file, a parent, an extent), whatever is encrypted, whatever claims tables that a
real image does not have. The formats are specified in QEMU's docs/interop/qcow2.txt, VMware's Virtual Disk Format 5.0,
Microsoft's VHD and [MS-VHDX]; VDI's is in VirtualBox's VDICore.h. Where QEMU's driver reads them differently, it is
QEMU's way that counts here, because it is QEMU that will open the file.
"""

import os
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from elemento_storage.errors import ImageDamaged, ImageRefused
from elemento_storage.images.incoming import ImageFormat
from elemento_storage.images.recognise import HEAD_BYTES, VDI_SIGNATURE, VDI_SIGNATURE_OFFSET
from elemento_storage.model import MAX_VOLUME_BYTES

_MIB: Final = 2**20


@dataclass(frozen=True)
class Header:
    """What a header says. ``virtual_bytes`` None: only QEMU can tell."""

    virtual_bytes: int | None
    adoptable: bool = False  #: a qcow2 image that can be kept as it is
    outdated: bool = False  #: of qcow2 version 2, without what snapshots and backups need


@dataclass(frozen=True)
class _File:
    """The beginning of a file and, when all of it is there, its length and its end."""

    head: bytes
    total_bytes: int | None = None
    tail: bytes = b""

    def require(self, length: int, what: str) -> None:
        if len(self.head) < length:
            raise ImageDamaged(f"the file is too short for a {what} header: it was cut short, or is something else")

    def require_reaching(self, end: int, what: str) -> None:
        if self.total_bytes is not None and end > self.total_bytes:
            raise ImageDamaged(f"{what} lies beyond the end of the file: it was cut short")


def read_header(path: str, image_format: ImageFormat) -> Header:
    """Look at a file that has arrived. Blocks. Raises ImageRefused, ImageDamaged, OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        total_bytes = os.fstat(descriptor).st_size
        head = os.pread(descriptor, HEAD_BYTES, 0)
        tail = os.pread(descriptor, 512, max(0, total_bytes - 512))
    finally:
        os.close(descriptor)
    return _checked(_READERS[image_format](_File(head, total_bytes, tail)))


def foresee_header(head: bytes, image_format: ImageFormat) -> Header:
    """Look at the first bytes of what arrives. Raises ImageRefused, ImageDamaged."""
    return _checked(_READERS[image_format](_File(head)))


def _checked(header: Header) -> Header:
    if header.virtual_bytes is not None:
        _require_possible(header.virtual_bytes)
    return header


def _require_possible(size: int) -> None:
    if size > MAX_VOLUME_BYTES:
        raise ImageRefused(f"the image claims to be a disk of {size} bytes, more than a file can hold")


def _raw(file: _File) -> Header:
    return Header(file.total_bytes)


# -- qcow2 -------------------------------------------------------------------------------------------------

# magic, version, backing offset and length, cluster bits, size, encryption, L1 entries and offset, refcount table
# offset and clusters, snapshots and their offset
_QCOW2: Final = struct.Struct(">4sIQIIQIIQQIIQ")
_QCOW2_FEATURES: Final = struct.Struct(">QQQII")  # incompatible, compatible, autoclear, refcount order, header length
_DIRTY, _CORRUPT, _EXTERNAL_DATA, _COMPRESSION_TYPE, _EXTENDED_L2 = (1 << bit for bit in range(5))
_QCOW2_KNOWN: Final = _DIRTY | _CORRUPT | _EXTERNAL_DATA | _COMPRESSION_TYPE | _EXTENDED_L2
_L1_LARGEST: Final = 32 * _MIB  # QEMU takes no more either
_REFCOUNT_TABLE_LARGEST: Final = 8 * _MIB
_ADOPTED_CLUSTER_BITS: Final = range(14, 22)  # smaller ones make large tables and slow disks: those are converted


def _qcow2(file: _File) -> Header:
    file.require(_QCOW2.size, "qcow2")
    (magic, version, backing, _, cluster_bits, size, encryption, l1_entries, l1_offset, refcounts, refcount_clusters,
     snapshots, _) = _QCOW2.unpack_from(file.head)  # fmt: skip
    if magic != b"QFI\xfb" or version not in (2, 3):
        raise ImageDamaged("the file does not start like a qcow2 image of version 2 or 3")
    if not 9 <= cluster_bits <= 21:
        raise ImageDamaged(f"a qcow2 cluster of 2^{cluster_bits} bytes is not valid")
    _require_possible(size)
    if backing:
        raise ImageRefused("the image names a backing file: merge them first (qemu-img convert)")
    if encryption:
        raise ImageRefused("the image is encrypted: decrypt it first (qemu-img convert)")
    features = autoclear = 0
    if version == 3:
        file.require(_QCOW2.size + _QCOW2_FEATURES.size, "qcow2")
        features, _, autoclear, refcount_order, _ = _QCOW2_FEATURES.unpack_from(file.head, _QCOW2.size)
        if features & _EXTERNAL_DATA:
            raise ImageRefused("the image keeps its data in another file: merge them first (qemu-img convert)")
        if features & _CORRUPT:
            raise ImageDamaged("QEMU has marked the image as corrupt: repair it first (qemu-img check -r all)")
        if features & ~_QCOW2_KNOWN:
            raise ImageRefused(f"the image needs features that are unknown here ({features & ~_QCOW2_KNOWN:#x})")
        if refcount_order > 6:
            raise ImageDamaged(f"a qcow2 refcount of 2^{refcount_order} bits is not valid")
    cluster_bytes = 1 << cluster_bits
    per_l2_table = cluster_bytes // (16 if features & _EXTENDED_L2 else 8)
    if l1_entries * 8 > _L1_LARGEST or refcount_clusters * cluster_bytes > _REFCOUNT_TABLE_LARGEST:
        raise ImageRefused("the image claims tables larger than any qcow2 image has")
    if l1_entries * per_l2_table * cluster_bytes < size:
        raise ImageDamaged("the image's first table is too small for its size")
    if l1_offset % cluster_bytes or refcounts % cluster_bytes or not refcounts:
        raise ImageDamaged("the image's tables do not begin where clusters do")
    file.require_reaching(l1_offset + l1_entries * 8, "the image's first table")
    file.require_reaching(refcounts + 8, "the image's table of reference counts")
    # Snapshots and bitmaps are somebody else's: they go, with those of unfinished writers, when it is converted.
    plain = not snapshots and not autoclear and not features & _DIRTY
    return Header(size, adoptable=plain and cluster_bits in _ADOPTED_CLUSTER_BITS, outdated=version == 2)


# -- VMDK --------------------------------------------------------------------------------------------------

_VMDK: Final = struct.Struct("<4sIIQQQQ")  # magic, version, flags, capacity, grain, descriptor offset and size
_VMDK_DESCRIPTOR_BYTES: Final = 20 * 512  # QEMU reads so much
_VMDK_GRAIN_LARGEST: Final = 64 * _MIB // 512


def _vmdk(file: _File) -> Header:
    if file.head.startswith(b"# Disk DescriptorFile"):
        raise ImageRefused("this is only the description of a disk: send the image as one file (streamOptimized)")
    file.require(512, "VMDK")
    magic, _, _, capacity, grain, descriptor_sector, _ = _VMDK.unpack_from(file.head)
    if magic != b"KDMV":
        raise ImageRefused("of VMDK images only sparse ones in one file are taken (monolithicSparse, streamOptimized)")
    if not capacity:  # then QEMU would open the files that the descriptor names
        raise ImageRefused("the image keeps its data in other files: send it as one file (streamOptimized)")
    if not 0 < grain <= _VMDK_GRAIN_LARGEST:
        raise ImageDamaged(f"a VMDK grain of {grain} sectors is not valid")
    for start in {512, min(descriptor_sector, HEAD_BYTES) * 512}:
        if b"parentfilenamehint" in file.head[start : start + _VMDK_DESCRIPTOR_BYTES].lower():
            raise ImageRefused("the image names a parent: merge them first (qemu-img convert)")
    return Header(None if file.total_bytes is not None else capacity * 512)


# -- VDI ---------------------------------------------------------------------------------------------------

_VDI_TYPE: Final = 0x4C
_VDI_OFFSETS: Final = 0x154  # of the block map and the data
_VDI_SIZES: Final = struct.Struct("<QIIII")  # disk, block, extra, blocks in the image, blocks allocated
_VDI_SIZES_OFFSET: Final = 0x170
_VDI_MAP_LARGEST: Final = 64 * _MIB  # 16 TiB in blocks of 1 MiB


def _vdi(file: _File) -> Header:
    file.require(512, "VDI")
    if not file.head.startswith(VDI_SIGNATURE, VDI_SIGNATURE_OFFSET):
        raise ImageDamaged("the file does not start like a VDI image")
    (kind,) = struct.unpack_from("<I", file.head, _VDI_TYPE)
    if kind not in (1, 2):  # dynamic, static; others are differences to a parent
        raise ImageRefused(f"a VDI image of type {kind} is not whole by itself: clone it in VirtualBox first")
    map_offset, data_offset = struct.unpack_from("<II", file.head, _VDI_OFFSETS)
    size, block, _, blocks, allocated = _VDI_SIZES.unpack_from(file.head, _VDI_SIZES_OFFSET)
    if blocks * 4 > _VDI_MAP_LARGEST:
        raise ImageRefused("the image claims a table larger than any VDI image has")
    if blocks * block < size or allocated > blocks:
        raise ImageDamaged("the image's numbers of blocks contradict its size")
    file.require_reaching(map_offset + blocks * 4, "the image's block map")
    file.require_reaching(data_offset + allocated * block, "some of the image's blocks")
    return Header(None if file.total_bytes is not None else size)


# -- VHD and VHDX ------------------------------------------------------------------------------------------

_VHD_COOKIE: Final = b"conectix"
_VHD_SIZE_OFFSET: Final = 48
_VHD_TYPE_OFFSET: Final = 60
_VHD_FIXED, _VHD_DYNAMIC = 2, 3


def _vhd(file: _File) -> Header:
    if file.total_bytes is not None and not file.tail.startswith(_VHD_COOKIE):
        raise ImageDamaged("the file does not end like a VHD image: it was cut short, or is something else")
    footer = file.head if file.head.startswith(_VHD_COOKIE) else file.tail
    if not footer:
        return Header(None)  # a fixed one: what tells of it comes last
    if len(footer) < 512:
        raise ImageDamaged("the file is too short for a VHD image: it was cut short, or is something else")
    (kind,) = struct.unpack_from(">I", footer, _VHD_TYPE_OFFSET)
    if kind not in (_VHD_FIXED, _VHD_DYNAMIC):
        raise ImageRefused(f"a VHD image of type {kind} is not whole by itself: merge it with its parent first")
    (size,) = struct.unpack_from(">Q", footer, _VHD_SIZE_OFFSET)
    if file.total_bytes is not None and kind == _VHD_FIXED and size + 512 > file.total_bytes:
        raise ImageDamaged(f"the image says it has {size} bytes, and {file.total_bytes} arrived: it was cut short")
    return Header(None if file.total_bytes is not None else size)


def _vhdx(file: _File) -> Header:
    if not file.head.startswith(b"vhdxfile"):
        raise ImageDamaged("the file does not start like a VHDX image")
    file.require_reaching(_MIB, "the image's header")
    return Header(None)  # behind two tables; QEMU refuses what has a parent, and knows no data in other files


_READERS: Final[Mapping[ImageFormat, Callable[[_File], Header]]] = {
    ImageFormat.RAW: _raw,
    ImageFormat.ISO: _raw,
    ImageFormat.QCOW2: _qcow2,
    ImageFormat.VMDK: _vmdk,
    ImageFormat.VDI: _vdi,
    ImageFormat.VHD: _vhd,
    ImageFormat.VHDX: _vhdx,
}
