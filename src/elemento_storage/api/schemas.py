"""Requests and answers of the API as types; OpenAPI is made from them."""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType, field

from elemento_storage.api.decode import Uid
from elemento_storage.exports.record import Protocol
from elemento_storage.model import (
    MAX_NAME_BYTES,
    MAX_SIZE_GB,
    Bus,
    CloneAlgorithm,
    IsoInfo,
    Preallocation,
    Volume,
    VolumeFormat,
    format_last_updated,
)
from elemento_storage.service.listing import SORT_KEYS

Name = Annotated[str, Meta(max_length=MAX_NAME_BYTES, description=f"a text of at most {MAX_NAME_BYTES} bytes")]
_SIZE = Meta(
    gt=0, le=MAX_SIZE_GB, description=f"a number greater than 0 and at most {MAX_SIZE_GB}, in GB of 10^9 bytes"
)
SizeGB = Annotated[int, _SIZE] | Annotated[float, _SIZE]
_SIZE_TEXT = Meta(
    pattern=r"^(0*[1-9][0-9]{0,8}(\.[0-9]{1,9})?|0*\.[0-9]{0,8}[1-9][0-9]{0,8})$", description="the same as text"
)
SizeOrText = SizeGB | Annotated[str, _SIZE_TEXT]
Sort = Annotated[
    str,
    Meta(pattern=f"^-?({'|'.join(SORT_KEYS)})$", description=f"one of {', '.join(SORT_KEYS)}, or the same after a -"),
]
Count = Annotated[int, Meta(ge=1, le=10_000, description="a whole number from 1 to 10000")]
Revision = Annotated[int, Meta(ge=0, le=2**53, description="a revision this server gave out")]


class Request(Struct, kw_only=True):
    """The base of all request types."""


class Nothing(Request):
    """A call without keys."""


# -- requests ----------------------------------------------------------------------------------------------


class CreateRequest(Request):
    """``create``: a new, empty volume."""

    creator_id: Uid = field(name="creatorID")
    name: Name
    size: SizeGB
    private: bool = False
    readonly: bool = False
    shareable: bool = False
    bootable: bool = False
    clonable: bool | None = None
    alg: CloneAlgorithm | None = None
    format: Literal["raw", "qcow2", "rbd"] = "raw"
    ceph: bool = False
    bus: Bus = Bus.VIRTIO
    preallocation: Preallocation = Preallocation.OFF


class CreateManyRequest(Request):
    """``create/multiple``: several volumes, or none if one of them cannot be made."""

    volumes: Annotated[
        list[Annotated[dict[str, Any], Meta(extra_json_schema={"$ref": "#/components/schemas/CreateRequest"})]],
        Meta(min_length=1, max_length=100, description="a list of 1 to 100 bodies of create"),
    ]


class AccessibleRequest(Request):
    """``accessible``: the volumes a client can see."""

    client_uid: Uid
    include_locked: bool = False
    name: str | None = None
    format: VolumeFormat | None = None
    iso_type: str | None = None
    os_family: str | None = None
    os_flavour: str | None = None
    os_version: str | None = None
    tool_scope: str | None = None
    tool_version: str | None = None
    sort: Sort = "volumeID"
    limit: Count | None = None
    cursor: str | None = None


class InfoRequest(Request):
    """``info``, ``has`` and ``restore``: one volume."""

    volume_id: Uid
    client_uid: Uid | None = None


class DestroyRequest(Request):
    """``destroy``: one volume, on behalf of ``creatorID`` when it is given."""

    volume_id: Uid
    creator_id: Uid | None = field(name="creatorID", default=None)


class UpdateRequest(Request):
    """``update``: metadata to change."""

    vid: Uid
    creator_id: Uid = field(name="creatorID")
    name: Name | None = None
    private: bool | None = None
    readonly: bool | None = None
    shareable: bool | None = None
    bootable: bool | None = None
    clonable: bool | None = None
    alg: CloneAlgorithm | None = None
    bus: Bus | None = None


class ResizeRequest(Request):
    """``update/resize``: the new size in GB."""

    vid: Uid
    creator_id: Uid = field(name="creatorID")
    size: SizeGB


class ConvertRequest(Request):
    """``update/convert``: the new format."""

    vid: Uid
    creator_id: Uid = field(name="creatorID")
    format: VolumeFormat


class TransferRequest(Request):
    """``transfer``: the new owner."""

    vid: Uid
    creator_id: Uid = field(name="creatorID")
    new_creator_id: Uid = field(name="newCreatorID")


class CanCreateRequest(Request):
    """``cancreate``: would a volume of this size find room?"""

    size: SizeOrText


class CanCreateManyRequest(Request):
    """``cancreate/multiple``: would volumes of these sizes find room together?"""

    sizes: Annotated[list[SizeOrText], Meta(min_length=1, max_length=100, description="a list of 1 to 100 sizes")]


class ClientRequest(Request):
    """A call about what a client may see."""

    client_uid: Uid | None = None


class RevisionsRequest(Request):
    """``revisions``: what changed after ``since``."""

    since: Revision = 0
    client_uid: Uid | None = None


Limit = Annotated[int, Meta(ge=0, le=10**15, description="a whole number, at most 10^15; 0 is no limit")]


class LimitsBody(Struct, kw_only=True, forbid_unknown_fields=True):
    """What an export may use, per second. ``iops`` and ``bps`` are totals; a burst may last ``burst_seconds``."""

    iops: Limit = 0
    iops_read: Limit = 0
    iops_write: Limit = 0
    iops_burst: Limit = 0
    bps: Limit = 0
    bps_read: Limit = 0
    bps_write: Limit = 0
    bps_burst: Limit = 0
    burst_seconds: Annotated[int, Meta(ge=1, le=3600, description="a whole number from 1 to 3600")] = 1


class ExportRequest(Request):
    """``export``: put a volume within reach of a client."""

    volume_id: Uid
    client_uid: Uid
    protocol: Protocol | None = None
    readonly: bool | None = None
    initiator: str | None = None
    addresses: list[str] | None = None
    limits: LimitsBody | None = None


class UnexportRequest(Request):
    """``unexport``: take it away again."""

    volume_id: Uid
    client_uid: Uid


class ExportsRequest(Request):
    """``exports``: what is exported, of one volume or all."""

    client_uid: Uid | None = None
    volume_id: Uid | None = None


Seconds = Annotated[float, Meta(gt=0, le=2_592_000, description="a number of seconds, at most 30 days")]
Uids = Annotated[list[Uid], Meta(min_length=1, max_length=100, description="a list of 1 to 100 volume ids")]


class PrepareRequest(Request):
    """``livemigration/prepare``: one volume, or several together. ``deadline`` is in seconds from now."""

    source: Uid
    destination: Uid
    volume_id: Uid | None = None
    volume_ids: Uids | None = None
    protocol: Protocol | None = None
    readonly: bool | None = None
    initiator: str | None = None
    addresses: list[str] | None = None
    limits: LimitsBody | None = None
    deadline: Seconds = 3600


class EndMigrationRequest(Request):
    """``livemigration/revert`` and ``…/conclude``: the migration, by its id or by one of its volumes."""

    migration: Uid | None = None
    volume_id: Uid | None = None


# -- answers -----------------------------------------------------------------------------------------------


class CreateAnswer(Struct, kw_only=True):
    """The document's answer to ``create``; ``size`` is as it was given, in GB."""

    alg: CloneAlgorithm
    bootable: bool
    bus: Bus
    clonable: bool
    creator_id: str = field(name="creatorID")
    img_format: VolumeFormat
    name: str
    private: bool
    readonly: bool
    shareable: bool
    size: int | float
    vid: str


class Locked(Struct, kw_only=True):
    """The operation that holds a volume. ``job`` is its job here or on the server that runs it.

    ``shared``: it only reads, and others may read as well.
    """

    purpose: str
    job: str
    since: str | None = None
    host: str | None = None
    progress: float | None = None
    shared: bool = False


class VolumeAnswer(Struct, kw_only=True):
    """One volume; ``size`` and ``sizeOnDisk`` are bytes. ``waiting``: an ISO volume without content.

    ``linked``: a linked clone, which stands on another volume.
    """

    volume_id: str = field(name="volumeID")
    creator_id: str = field(name="creatorID")
    size: int
    name: str
    format: VolumeFormat
    iso_type: str | UnsetType = UNSET
    os_family: str | UnsetType = UNSET
    os_flavour: str | UnsetType = UNSET
    os_version: str | UnsetType = UNSET
    tool_scope: str | UnsetType = UNSET
    tool_version: str | UnsetType = UNSET
    waiting: bool | UnsetType = UNSET
    private: bool
    bootable: bool
    readonly: bool
    shareable: bool
    clonable: bool
    alg: CloneAlgorithm
    bus: Bus
    cloudinit: bool
    ceph: bool
    exported: bool
    size_on_disk: int = field(name="sizeOnDisk")
    last_updated: str = field(name="lastUpdated")
    location: str
    snapshots: int
    snapshots_on_disk: int = field(name="snapshotsOnDisk")
    linked: bool | UnsetType = UNSET
    locked: Locked | UnsetType = UNSET


class BinnedAnswer(Struct, kw_only=True):
    """A destroyed volume that can be restored until ``purgeAt``."""

    volume_id: str = field(name="volumeID")
    creator_id: str = field(name="creatorID")
    name: str
    size: int
    format: VolumeFormat
    location: str
    destroyed: str
    purge_at: str = field(name="purgeAt")


class VidAnswer(Struct, kw_only=True):
    """The volume it was about."""

    vid: str


class UpdateAnswer(Struct, kw_only=True):
    """The values after an update."""

    vid: str
    creator_id: str = field(name="creatorID")
    name: str
    private: bool
    readonly: bool
    shareable: bool
    bootable: bool
    clonable: bool
    alg: CloneAlgorithm
    bus: Bus


class ResizeAnswer(Struct, kw_only=True):
    """``size`` is as it was given, in GB."""

    vid: str
    creator_id: str = field(name="creatorID")
    size: int | float


class ConvertAnswer(Struct, kw_only=True):
    """The format after a conversion."""

    vid: str
    creator_id: str = field(name="creatorID")
    format: VolumeFormat


class TransferAnswer(Struct, kw_only=True):
    """The new owner."""

    vid: str
    creator_id: str = field(name="creatorID")


class HasAnswer(Struct, kw_only=True):
    """Whether this server has the volume and the client may see it."""

    has: bool
    volume_id: str


class CanCreateAnswer(Struct, kw_only=True):
    """Whether there is room; for each location null, or why it has none."""

    cancreate: bool
    locations: dict[str, str | None]


class LocationAnswer(Struct, kw_only=True):
    """A location with its limits and what is used of them. Sizes are bytes; a null limit is none.

    ``pool``: the Ceph pool that it stands for.
    """

    name: str
    path: str
    usable: bool
    reason: str | None
    file_system: str = field(name="file-system")
    max_volumes: int | None = field(name="max-volumes")
    max_volume_size: int | None = field(name="max-volume-size")
    max_total_size: int | None = field(name="max-total-size")
    volumes: int
    virtual_bytes: int
    total_bytes: int | None
    free_bytes: int | None
    odd: list[dict[str, str]]
    pool: str | None = None


class RescanAnswer(Struct, kw_only=True):
    """What a full look at the disk found."""

    volumes: int
    added: list[str]
    changed: list[str]
    removed: list[str]
    odd: list[dict[str, str]]
    differences: list[dict[str, str | int]]
    foreign_locks: list[dict[str, str]]


class JobAnswer(Struct, kw_only=True):
    """A job; ``result`` is the call's answer once it is done, ``error`` what went wrong."""

    job: str
    purpose: str
    state: str
    progress: float
    phase: str
    volume_id: str | None
    created: str
    ended: str | None
    bytes: int | None = None
    total_bytes: int | None = None
    rate: int | None = None
    eta: float | None = None
    result: Any = None
    error: dict[str, Any] | None = None


class RevisionsAnswer(Struct, kw_only=True):
    """What changed. ``complete`` false: too long ago to know, read everything again."""

    revision: int
    complete: bool
    changed: list[str]
    removed: list[str]


class ExportAnswer(Struct, kw_only=True):
    """An export, and how to attach it. ``prepare`` are commands to be run on the client's host before."""

    vid: str
    client_uid: str
    protocol: Protocol
    iqn: str
    readonly: bool
    size: int
    endpoint: dict[str, Any]
    credentials: dict[str, str]
    prepare: list[str]
    qemu: list[str]
    libvirt: str
    limits: LimitsBody
    migration: str | None


class UnexportAnswer(Struct, kw_only=True):
    """What it was about."""

    vid: str
    client_uid: str


class ExportListAnswer(Struct, kw_only=True):
    """An export and how it is: ``healthy``, ``failing`` with a reason, ``elsewhere`` (another server's) or ``stale``.

    ``sessions`` and bytes are those of connections that are open now, where the protocol tells.
    """

    vid: str
    client_uid: str
    protocol: str | None
    iqn: str
    readonly: bool | None
    endpoint: dict[str, Any]
    host: str | None
    created: str | None
    limits: LimitsBody | None
    migration: str | None
    state: str
    reason: str | None
    last_probe: str | None
    latency_ms: float | None
    sessions: int | None
    read_bytes: int | None
    written_bytes: int | None
    repairs: int | None


class OrphanAnswer(Struct, kw_only=True):
    """Something that was served at the last look although no marker asks for it."""

    name: str
    vid: str | None
    protocol: str | None


class ExportsAnswer(Struct, kw_only=True):
    """``exports``."""

    exports: list[ExportListAnswer]
    orphans: list[OrphanAnswer]


class MigrationAnswer(Struct, kw_only=True):
    """A live migration. ``exports`` are the destination's, one for each volume, while it is prepared."""

    migration: str
    state: str
    volumes: list[str]
    source: str
    destination: str
    deadline: str | None = None
    overdue: bool = False
    exports: list[ExportAnswer] = []


class VersionAnswer(Struct, kw_only=True):
    """What runs here."""

    version: str
    api: str
    qemu_img: str = field(name="qemu-img")


class HealthAnswer(Struct, kw_only=True):
    """``ok`` or ``degraded``; the reasons and numbers are for admins."""

    status: str
    problems: list[str]
    locations: int | None
    volumes: int | None
    exports: int | None
    running_jobs: int | None


class ErrorAnswer(Struct, kw_only=True):
    """Every error: a sentence for people and a code for programs; details may follow."""

    error: str
    code: str


def volume_answer(volume: Volume, locked: Locked | UnsetType = UNSET) -> VolumeAnswer:
    """A volume as the API shows it."""
    meta = volume.meta
    answer = VolumeAnswer(
        volume_id=volume.volume_id,
        creator_id=meta.creator_id,
        size=volume.size_bytes,
        name=meta.name,
        format=meta.format,
        private=meta.private,
        bootable=meta.bootable,
        readonly=meta.readonly,
        shareable=meta.shareable,
        clonable=meta.clonable,
        alg=meta.alg,
        bus=meta.bus,
        cloudinit=meta.cloudinit,
        ceph=meta.ceph,
        exported=volume.exported,
        size_on_disk=volume.allocated_bytes,
        last_updated=format_last_updated(volume.modified_ns),
        location=volume.location,
        snapshots=volume.snapshots,
        snapshots_on_disk=volume.snapshot_bytes,
        locked=locked,
    )
    if volume.parent is not None:
        answer.linked = True
    if meta.format is VolumeFormat.ISO:
        answer.waiting = volume.waiting
        for fact, value in msgspec.structs.asdict(volume.iso or IsoInfo()).items():
            if value is not None:
                setattr(answer, fact, value)
    return answer


def encode(answer: object) -> bytes:
    """JSON of an answer."""
    return msgspec.json.encode(answer)
