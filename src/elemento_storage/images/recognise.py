"""What bytes from outside are, by how they begin. Nobody's word is needed for a name, and nothing is decided by one."""

import struct
from typing import Final

from elemento_storage.images.incoming import Compression, ImageFormat

HEAD_BYTES: Final = 65536  #: as much as anything here wants to see of a file's beginning
VDI_SIGNATURE_OFFSET: Final = 64
VDI_SIGNATURE: Final = struct.pack("<I", 0xBEDA107F)

_COMPRESSIONS: Final = (
    (b"\x1f\x8b\x08", Compression.GZIP),
    (b"\xfd7zXZ\x00", Compression.XZ),
    (b"\x28\xb5\x2f\xfd", Compression.ZSTD),
)
_FORMATS: Final = (
    (0, b"QFI\xfb", ImageFormat.QCOW2),
    (0, b"KDMV", ImageFormat.VMDK),
    (0, b"COWD", ImageFormat.VMDK),
    (0, b"# Disk DescriptorFile", ImageFormat.VMDK),
    (0, b"conectix", ImageFormat.VHD),  # a dynamic one; a fixed one is raw bytes with a footer, and has to be declared
    (0, b"vhdxfile", ImageFormat.VHDX),
    (VDI_SIGNATURE_OFFSET, VDI_SIGNATURE, ImageFormat.VDI),
)


def compression_of(head: bytes) -> Compression:
    """What is around the image."""
    return next((found for magic, found in _COMPRESSIONS if head.startswith(magic)), Compression.NONE)


def format_of(head: bytes) -> ImageFormat:
    """What the image is; raw when it is nothing else."""
    return next(
        (found for offset, magic, found in _FORMATS if head.startswith(magic, offset)),
        ImageFormat.RAW,
    )
