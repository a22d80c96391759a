"""An export as its marker file records it: all that is needed to bring it back after a crash or a reboot.

The marker is ``iqn.2004-10.cloud.elemento:01:<client ^ volume>.exported`` in the volume's directory (contract, section
3), one line of JSON. It holds the credentials of the export and is readable by its owner only.
"""

import re
import secrets
import string
from enum import StrEnum
from typing import Final

import msgspec

from elemento_storage.model import TARGET_PREFIX, normalise_uid

_PLAIN: Final = re.compile(r"[A-Za-z0-9.:/_-]*", re.ASCII)
_LETTERS: Final = string.ascii_letters + string.digits
_SECRET_LENGTH: Final = 16  # every CHAP implementation takes 12 to 16 (Windows no more); 16 of 62 letters are 95 bits


class Protocol(StrEnum):
    """How a client reaches the volume."""

    ISCSI = "iscsi"
    NBD = "nbd"
    SMB = "smb"
    LOCAL = "local"


class PathKind(StrEnum):
    """The two ways to a volume's bytes, which exclude each other (docs/decisions/0008-one-path.md)."""

    SOCKET = "socket"
    FILE = "file"


PATH_OF: Final = {
    Protocol.ISCSI: PathKind.FILE,
    Protocol.SMB: PathKind.FILE,
    Protocol.NBD: PathKind.SOCKET,
    Protocol.LOCAL: PathKind.SOCKET,
}


class Limits(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """What a client may use, per second; 0 is no limit. A ``…_burst`` may be used for ``burst_seconds``.

    QEMU takes either the total or reads and writes apart, not both (QMP reference, ThrottleLimits).
    """

    iops: int = 0
    iops_read: int = 0
    iops_write: int = 0
    iops_burst: int = 0
    bps: int = 0
    bps_read: int = 0
    bps_write: int = 0
    bps_burst: int = 0
    burst_seconds: int = 1

    def throttle_limits(self) -> dict[str, int]:
        """The same as QEMU's ThrottleLimits."""
        found: dict[str, int] = {}
        for unit, total, read, write, burst in (
            ("iops", self.iops, self.iops_read, self.iops_write, self.iops_burst),
            ("bps", self.bps, self.bps_read, self.bps_write, self.bps_burst),
        ):
            for direction, value in (("total", total), ("read", read), ("write", write)):
                if value:
                    found[f"{unit}-{direction}"] = value
                    if burst:
                        found[f"{unit}-{direction}-max"] = max(burst, value)
                        found[f"{unit}-{direction}-max-length"] = self.burst_seconds
        return found

    @property
    def problem(self) -> str | None:
        """Why they cannot be."""
        for unit, total, apart, burst in (
            ("iops", self.iops, self.iops_read or self.iops_write, self.iops_burst),
            ("bps", self.bps, self.bps_read or self.bps_write, self.bps_burst),
        ):
            if total and apart:
                return f"'{unit}' together with '{unit}_read' or '{unit}_write': give the total or the parts"
            if burst and not (total or apart):
                return f"'{unit}_burst' without a limit that it exceeds"
            if burst and burst < max(total, apart):
                return f"'{unit}_burst' is less than the limit itself"
        return None


class ExportRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One volume made reachable for one client over one protocol."""

    volume_id: str = msgspec.field(name="volumeID")
    client: str
    protocol: Protocol
    server: str  #: the server that serves it (its state directory's id, which outlives the process)
    host: str = ""
    created: str = ""
    readonly: bool = False
    initiator: str | None = None
    addresses: tuple[str, ...] = ()
    user: str = ""
    secret: str = ""
    port: int = 0  #: of an NBD server of its own
    limits: Limits = Limits()
    migration: str | None = None  #: the live migration that this export is bound to

    @property
    def export_id(self) -> str:
        """``client ^ volume``, 32 hex digits: unique, and the same whatever the protocol."""
        return export_id(self.client, self.volume_id)

    @property
    def target_name(self) -> str:
        """``iqn.2004-10.cloud.elemento:01:<client ^ volume>``."""
        return TARGET_PREFIX + self.export_id

    def encode(self) -> bytes:
        """The marker's content."""
        return msgspec.json.encode(self) + b"\n"


def export_id(client: str, volume_id: str) -> str:
    """The 128-bit XOR of the two uids."""
    return f"{int(client, 16) ^ int(volume_id, 16):032x}"


def client_of(export: str, volume_id: str) -> str:
    """The other way round: whose export it is."""
    return export_id(export, volume_id)


def decode_record(content: bytes, volume_id: str) -> ExportRecord | None:
    """What a marker says; None when it is not of our making (the vendor's server leaves it empty)."""
    try:
        record = msgspec.json.decode(content, type=ExportRecord)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        return None
    uids = (record.volume_id, record.client, record.server)
    if record.volume_id != volume_id or any(normalise_uid(uid) != uid for uid in uids):
        return None
    # tgtd's parameters are separated by commas: a name with one in it would be more than a name.
    words = (record.user, record.secret, record.initiator or "", *record.addresses)
    if not all(_PLAIN.fullmatch(word) for word in words) or not 0 <= record.port < 65536:
        return None
    return record


def new_secret() -> str:
    """A password that survives every quoting: letters and digits."""
    return "".join(secrets.choice(_LETTERS) for _ in range(_SECRET_LENGTH))
