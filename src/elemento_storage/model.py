"""The words of the product as frozen data: volumes, formats, sizes, ids. Anyone may import this."""

import math
import os
import re
import secrets
import time
from datetime import UTC, datetime
from decimal import Decimal
from enum import StrEnum
from typing import Final

import msgspec

GIGABYTE: Final = 10**9  #: the unit of sizes in the API (contract, section 2)
SECTOR_BYTES: Final = 512  #: virtual sizes are whole sectors: QEMU rounds up to them, so do we
MAX_VOLUME_BYTES: Final = 2**63 - SECTOR_BYTES  #: what an off_t can hold
MAX_SIZE_GB: Final = MAX_VOLUME_BYTES // GIGABYTE
MAX_NAME_BYTES: Final = 4096
VOLUME_PREFIX: Final = "vid."
VOLUME_SUFFIX: Final = ".elimg"
TARGET_PREFIX: Final = "iqn.2004-10.cloud.elemento:01:"
MARKER_SUFFIX: Final = ".exported"


class VolumeFormat(StrEnum):
    """Image formats of the document."""

    RAW = "raw"
    QCOW2 = "qcow2"
    RBD = "rbd"
    ISO = "iso"

    @classmethod
    def _missing_(cls, value: object) -> "VolumeFormat | None":
        # The document's table of keys writes rbd as rdb, and so may a meta.json.
        return cls.RBD if value == "rdb" else None

    @property
    def extension(self) -> str:
        """The suffix of the data file: ``img`` for raw, else the format's name."""
        return "img" if self is VolumeFormat.RAW else self.value

    @property
    def data_file(self) -> str:
        """The name of the data file inside the volume directory."""
        return _DATA_FILES[self]


# A sweep asks for it once for each volume.
_DATA_FILES: Final = {image_format: f"data.{image_format.extension}" for image_format in VolumeFormat}


class Bus(StrEnum):
    """The bus a guest sees the disk on."""

    VIRTIO = "virtio"
    SCSI = "scsi"
    SATA = "sata"
    IDE = "ide"


class CloneAlgorithm(StrEnum):
    """How the volume is cloned; ``no`` goes with ``clonable: false``."""

    CP = "cp"
    RCLONE = "rclone"
    RSYNC = "rsync"
    NO = "no"


class Preallocation(StrEnum):
    """How much of a new image is allocated at once (the words of qemu-img)."""

    OFF = "off"
    METADATA = "metadata"
    FALLOC = "falloc"
    FULL = "full"


class VolumeMeta(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What ``meta.json`` says. Defaults are those of a missing key (contract, section 3)."""

    volume_id: str = msgspec.field(name="volumeID", default="")
    creator_id: str = msgspec.field(name="creatorID", default="")
    size: int | float | None = None
    name: str = ""
    format: VolumeFormat = VolumeFormat.RAW
    private: bool = False
    bootable: bool = False
    readonly: bool = False
    shareable: bool = False
    clonable: bool = True
    alg: CloneAlgorithm = CloneAlgorithm.CP
    bus: Bus = Bus.VIRTIO
    cloudinit: bool = False
    ceph: bool = False


class IsoType(StrEnum):
    """What an ISO volume of the library is for."""

    TOOL = "tool"  #: drivers and the like
    OS_GENERIC = "os_generic"  #: an installer or a live system: something to boot from


class IsoInfo(msgspec.Struct, frozen=True, kw_only=True, gc=False, omit_defaults=True):
    """What ``isoinfo.json`` says, with the document's keys. None is what it does not say.

    ``isotype`` is a text, because that of another product may be none of ours.
    """

    iso_type: str | None = msgspec.field(name="isotype", default=None)
    os_family: str | None = None
    os_flavour: str | None = None
    os_version: str | None = None
    tool_scope: str | None = msgspec.field(name="scope", default=None)
    tool_version: str | None = msgspec.field(name="version", default=None)

    def encode(self) -> bytes:
        """The file's bytes: one line of JSON."""
        return msgspec.json.encode(self)


def decode_iso_info(content: bytes) -> IsoInfo | None:
    """What an isoinfo.json says, whoever wrote it; None when it is no JSON object.

    Also in the words of the API (``tool_scope``, ``tool_version``), and with numbers (``12.9``) for texts.
    """
    try:
        said = msgspec.json.decode(content)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    if not isinstance(said, dict):
        return None
    facts = {}
    for spec in msgspec.structs.fields(IsoInfo):
        value = said.get(spec.encode_name, said.get(spec.name))
        if isinstance(value, str | int | float) and not isinstance(value, bool):
            facts[spec.name] = str(value)
    return IsoInfo(**facts)


class Volume(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A volume as last seen on disk. ``size_bytes`` is what the image says, whatever meta.json says."""

    meta: VolumeMeta
    volume_id: str
    location: str
    size_bytes: int
    allocated_bytes: int
    modified_ns: int
    iso: IsoInfo | None = None  #: what isoinfo.json says, of an ISO volume
    locks: tuple[str, ...] = ()  #: names of the lock files in the directory
    hidden: bool = False  #: at least one of them is not of somebody who only reads, so lists leave the volume out
    markers: tuple[str, ...] = ()  #: names of the export markers in the directory
    exported: bool = False  #: at least one marker is not stale
    scheduled: bool = False  #: it is backed up by a schedule of its own
    meta_digest: str = ""  #: identifies the bytes of meta.json, the ETag of an update
    parent: str | None = None  #: the volume whose image this one's stands on
    has_clones: bool = False  #: there are linked clones of it, or were not long ago
    snapshots: int = 0
    snapshot_bytes: int = 0  #: allocated by files of snapshots; those inside the image count as the image's

    @property
    def directory_name(self) -> str:
        """``vid.<volume_uid>.elimg``."""
        return volume_directory_name(self.volume_id)

    @property
    def waiting(self) -> bool:
        """Whether it is an ISO volume without content: a hole of the size that is kept for what will come.

        No file system holds an image of ISO 9660 or UDF without allocating anything: both begin with 32 KiB and a
        descriptor that is not zero.
        """
        return self.meta.format is VolumeFormat.ISO and self.allocated_bytes == 0


def volume_directory_name(volume_id: str) -> str:
    """The name of a volume's directory."""
    return f"{VOLUME_PREFIX}{volume_id}{VOLUME_SUFFIX}"


_UID = re.compile(r"[0-9a-f]{32}", re.ASCII)
_DASHED_UID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.ASCII)


def normalise_uid(text: str) -> str | None:
    """32 lower-case hex digits from a UUID with or without dashes in any case; None if it is not one."""
    lowered = text.lower()
    if _UID.fullmatch(lowered):
        return lowered
    return lowered.replace("-", "") if _DASHED_UID.fullmatch(lowered) else None


def new_uid() -> str:
    """A fresh random uid."""
    return secrets.token_hex(16)


def volume_id_of_directory(name: str) -> str | None:
    """The uid in a volume directory's name; None when the name is not exactly of that form."""
    if name.startswith(VOLUME_PREFIX) and name.endswith(VOLUME_SUFFIX):
        uid = name[len(VOLUME_PREFIX) : -len(VOLUME_SUFFIX)]
        return uid if _UID.fullmatch(uid) else None
    return None


def gigabytes_to_bytes(size_gb: float) -> int:
    """Bytes of a size in GB (10^9), rounded up to whole sectors.

    Exact for decimal fractions such as 0.1: the float's shortest text is what the caller wrote.
    Raises ValueError when the size is not a positive, finite number a file can have.
    """
    if isinstance(size_gb, float) and not math.isfinite(size_gb):
        raise ValueError("not a finite number")
    if size_gb <= 0:
        raise ValueError("not greater than 0")
    if size_gb > MAX_SIZE_GB:
        raise ValueError(f"more than a file can hold ({MAX_SIZE_GB} GB)")
    exact = size_gb * GIGABYTE if isinstance(size_gb, int) else Decimal(repr(size_gb)) * GIGABYTE
    return round_up_to_sector(math.ceil(exact))


def in_gigabytes(size_bytes: int) -> int | float:
    """Bytes as a size in GB (10^9)."""
    return size_bytes / GIGABYTE if size_bytes % GIGABYTE else size_bytes // GIGABYTE


def round_up_to_sector(size_bytes: int) -> int:
    """The next multiple of 512."""
    return -(-size_bytes // SECTOR_BYTES) * SECTOR_BYTES


_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(?:([KMGTP])(i?)B?|B)?", re.IGNORECASE | re.ASCII)
_LARGEST_SIZE: Final = 10**30
_POWERS: Final = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4, "P": 5}


def parse_size(value: str | int | float) -> int:
    """Bytes of a size as settings write it: ``50G`` is 50×10^9, ``50Gi`` and ``50GiB`` are 50×2^30, bare is bytes.

    Raises ValueError for anything else.
    """
    if isinstance(value, bool):
        raise ValueError("a size is a number or a text such as 50G")  # noqa: TRY004  one kind for the caller
    if not isinstance(value, str) and not 0 <= value <= _LARGEST_SIZE:
        raise ValueError("a size is not negative, and not more than there is")
    try:
        size_bytes = _parse_size_text(value) if isinstance(value, str) else math.ceil(value)
    except ArithmeticError as error:
        raise ValueError("a size has to be a number that can be held") from error
    if size_bytes > _LARGEST_SIZE:
        raise ValueError("a size is not more than there is")
    return size_bytes


def _parse_size_text(text: str) -> int:
    match = _SIZE.fullmatch(text.strip())
    if not match:
        raise ValueError(f"{text[:40]!r} is not a size such as 50G, 50GiB or 50000000000")
    number, letter, binary = match.groups()
    factor: int = (1024 if binary else 1000) ** _POWERS[(letter or "").upper()]
    return math.ceil(Decimal(number) * factor)


def format_last_updated(modified_ns: int) -> str:
    """The document's form of a time: UTC, ``2025-02-05 23:34:07.1850``."""
    seconds, rest = divmod(modified_ns, 10**9)
    moment = time.gmtime(seconds)
    return (
        f"{moment.tm_year:04}-{moment.tm_mon:02}-{moment.tm_mday:02} "
        f"{moment.tm_hour:02}:{moment.tm_min:02}:{moment.tm_sec:02}.{rest // 100_000:04}"
    )


def iso_time(moment_ns: int) -> str:
    """A time since the epoch, ISO 8601 in UTC with milliseconds; the first one for what no calendar has."""
    try:
        moment = datetime.fromtimestamp(moment_ns / 1e9, UTC)
    except (OverflowError, ValueError, OSError):
        moment = datetime.fromtimestamp(0, UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def utc_now() -> str:
    """The present time, ISO 8601 in UTC with milliseconds."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def printable(name: str) -> str:
    """A file name as text that can be shown and sent: bytes that are not UTF-8 become ``\\xff``."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def marker_name(client_id: str, volume_id: str) -> str:
    """The name of the export marker of one volume for one client: their uids XORed."""
    return f"{TARGET_PREFIX}{int(client_id, 16) ^ int(volume_id, 16):032x}{MARKER_SUFFIX}"
