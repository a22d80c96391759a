"""What is to become of an image from outside, as data that an upload keeps on disk for as long as it lasts."""

import hashlib
import re
from enum import StrEnum
from typing import TYPE_CHECKING, Final

import msgspec

from elemento_storage.durable import TEMPORARY_PREFIX
from elemento_storage.errors import InvalidValue
from elemento_storage.model import Bus, CloneAlgorithm, VolumeFormat, VolumeMeta

if TYPE_CHECKING:
    from hashlib import _Hash

CONTENT: Final = f"{TEMPORARY_PREFIX}content"
"""The name of the file, inside the reserved directory, that the bytes go into as they arrive.

Everything else there that is not yet a volume's begins with ``TEMPORARY_PREFIX`` too: should the server die right
after the directory became a volume, it is taken for what it is and removed.
"""

_CHECKSUM = re.compile(r"(sha256:[0-9a-fA-F]{64}|sha512:[0-9a-fA-F]{128})", re.ASCII)
CHECKSUM_PATTERN: Final = f"^{_CHECKSUM.pattern}$"


class ImageFormat(StrEnum):
    """What an image from outside may be."""

    RAW = "raw"
    QCOW2 = "qcow2"
    VMDK = "vmdk"
    VDI = "vdi"
    VHD = "vhd"
    VHDX = "vhdx"
    ISO = "iso"


class Compression(StrEnum):
    """What may be around it."""

    NONE = "none"
    GZIP = "gzip"
    XZ = "xz"
    ZSTD = "zstd"


class Incoming(msgspec.Struct, frozen=True, kw_only=True):
    """A volume that is to be made of an image from outside, or content for one that waits for it.

    JSON by ``msgspec.json``: an upload keeps it on disk over restarts.
    """

    volume_id: str
    creator_id: str  #: on whose behalf; "" is the infrastructure itself, only with ``fills``
    fills: bool = False  #: the volume exists and waits for this content; of all below only the source's keys count
    name: str = ""
    private: bool = False
    readonly: bool = False
    shareable: bool = False
    bootable: bool = False
    clonable: bool = True
    alg: CloneAlgorithm = CloneAlgorithm.CP
    bus: Bus = Bus.VIRTIO
    cloudinit: bool = False
    format: VolumeFormat = VolumeFormat.RAW  #: the volume's: raw, qcow2 or iso
    size_bytes: int | None = None  #: a smaller image is grown to this; None: as it comes
    files: dict[str, str] = {}  #: small ones beside meta.json, name to text, such as isoinfo.json

    image_format: ImageFormat | None = None  #: None: found from the bytes
    compression: Compression | None = None  #: None: found from the bytes; with ``image_format`` raw there is then none
    checksum: str | None = None  #: ``sha256:<hex>`` or ``sha512:<hex>`` of the bytes as they arrive

    def hasher(self) -> "_Hash | None":
        """What a transport feeds with the bytes as they come, so that they need not be read again for it.

        None when no checksum was given. Its ``hexdigest()`` goes to ``Intake.finish``.
        """
        return None if self.checksum is None else hashlib.new(self.checksum.partition(":")[0])

    def meta(self, size_bytes: int) -> VolumeMeta:
        """The new volume's meta.json."""
        return VolumeMeta(
            volume_id=self.volume_id,
            creator_id=self.creator_id,
            size=size_bytes,
            name=self.name,
            format=self.format,
            private=self.private,
            bootable=self.bootable,
            readonly=self.readonly,
            shareable=self.shareable,
            clonable=self.clonable,
            alg=self.alg,
            bus=self.bus,
            cloudinit=self.cloudinit,
        )


def parse_checksum(text: str | None, key: str = "checksum") -> str | None:
    """A checksum in the form that ``Incoming`` has. Raises InvalidValue."""
    if text is None:
        return None
    if not _CHECKSUM.fullmatch(text):
        raise InvalidValue(f"'{key}' has to be sha256: or sha512: and the digest in hex digits", key=key)
    return text.lower()
