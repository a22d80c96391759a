"""What the server answers, as frozen types. Sizes are bytes; keys of a newer server are passed over.

Names are Python's; ``name=`` is the key on the wire, docs/api.md says what each means. Words such as formats and
states are texts, so that a new one breaks nobody.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from msgspec import Struct, field

_ENDED: Final = frozenset({"done", "failed", "cancelled", "interrupted"})


class Answer(Struct, frozen=True, kw_only=True):
    """The base of all answers."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far something is. What is not known is None; ``fraction`` is 0 to 1, ``eta`` seconds, ``rate`` bytes/s."""

    phase: str = ""
    fraction: float | None = None
    done: int | None = None
    total: int | None = None
    rate: float | None = None
    eta: float | None = None


OnProgress = Callable[[Progress], None]


class Created(Answer, frozen=True, kw_only=True):
    """A new volume. ``size_gb`` is in GB of 10^9 bytes, as it was asked for or came to."""

    volume_id: str = field(name="vid")
    owner: str = field(name="creatorID")
    name: str
    size_gb: float = field(name="size")
    format: str = field(name="img_format")
    private: bool
    readonly: bool
    shareable: bool
    bootable: bool
    clonable: bool
    alg: str
    bus: str


class CreatedFromUrl(Created, frozen=True, kw_only=True):
    """A new volume that was fetched from the web."""

    cloudinit: bool
    url: str


class CreatedIso(Answer, frozen=True, kw_only=True):
    """A new ISO volume."""

    volume_id: str = field(name="vid")
    owner: str = field(name="creatorID")
    name: str
    private: bool
    clonable: bool
    alg: str
    isotype: str | None
    os_family: str | None
    os_flavour: str | None
    os_version: str | None
    tool_scope: str | None
    tool_version: str | None


class Locked(Answer, frozen=True, kw_only=True):
    """The operation that holds a volume."""

    purpose: str
    job: str
    since: str | None = None
    host: str | None = None
    progress: float | None = None
    shared: bool = False


class Volume(Answer, frozen=True, kw_only=True):
    """A volume. ``locked`` is None unless an operation holds it; what only ISO volumes have is None of others."""

    volume_id: str = field(name="volumeID")
    owner: str = field(name="creatorID")
    name: str
    size: int
    format: str
    private: bool
    bootable: bool
    readonly: bool
    shareable: bool
    clonable: bool
    alg: str
    bus: str
    cloudinit: bool
    ceph: bool
    exported: bool
    size_on_disk: int = field(name="sizeOnDisk")
    last_updated: str = field(name="lastUpdated")
    location: str
    linked: bool = False
    waiting: bool = False
    iso_type: str | None = None
    os_family: str | None = None
    os_flavour: str | None = None
    os_version: str | None = None
    tool_scope: str | None = None
    tool_version: str | None = None
    snapshots: int = 0
    snapshots_on_disk: int = field(name="snapshotsOnDisk", default=0)
    locked: Locked | None = None


class Binned(Answer, frozen=True, kw_only=True):
    """A destroyed volume that can be restored until ``purge_at``."""

    volume_id: str = field(name="volumeID")
    owner: str = field(name="creatorID")
    name: str
    size: int
    format: str
    location: str
    destroyed: str
    purge_at: str = field(name="purgeAt")


class Destroyed(Answer, frozen=True, kw_only=True):
    """A volume that is in the bin now."""

    volume_id: str = field(name="vid")


class Updated(Answer, frozen=True, kw_only=True):
    """The values after an update."""

    volume_id: str = field(name="vid")
    owner: str = field(name="creatorID")
    name: str
    private: bool
    readonly: bool
    shareable: bool
    bootable: bool
    clonable: bool
    alg: str
    bus: str


class Resized(Answer, frozen=True, kw_only=True):
    """``size_gb`` is in GB of 10^9 bytes."""

    volume_id: str = field(name="vid")
    owner: str = field(name="creatorID")
    size_gb: float = field(name="size")


class Converted(Answer, frozen=True, kw_only=True):
    """The format after a conversion."""

    volume_id: str = field(name="vid")
    owner: str = field(name="creatorID")
    format: str


class Owned(Answer, frozen=True, kw_only=True):
    """A volume and whose it is: after a transfer, a reset, a compaction."""

    volume_id: str = field(name="vid")
    owner: str = field(name="creatorID")


class Has(Answer, frozen=True, kw_only=True):
    """Whether a server has a volume that the client may see."""

    has: bool
    volume_id: str


class Room(Answer, frozen=True, kw_only=True):
    """Whether there is room; for each location None, or why it has none."""

    cancreate: bool
    locations: Mapping[str, str | None]


class Extent(Answer, frozen=True, kw_only=True):
    """Bytes that are alike. ``zero``: they read as zeros; ``hole``: and take no room."""

    start: int
    length: int
    zero: bool
    hole: bool


class Extents(Answer, frozen=True, kw_only=True):
    """Where a volume's data is. ``next_start``: where the rest begins; None: there is none."""

    volume_id: str = field(name="vid")
    size: int
    etag: str
    extents: list[Extent]
    next_start: int | None = field(name="next")


class Checksum(Answer, frozen=True, kw_only=True):
    """A checksum of what a guest sees. ``block_size`` is None of the method ``plain``."""

    volume_id: str = field(name="vid")
    algorithm: str
    method: str
    block_size: int | None
    checksum: str
    size: int


class Metadata(Answer, frozen=True, kw_only=True):
    """The files of a cloud-init metadata volume; ``warnings`` say what cloud-init would not like."""

    volume_id: str = field(name="vid")
    received: int
    expected: int
    files: list[str]
    warnings: list[str]


class Snapshot(Answer, frozen=True, kw_only=True):
    """A snapshot. ``size_on_disk``: its file's, None where it is inside the image."""

    volume_id: str = field(name="vid")
    snapshot: str
    name: str
    description: str
    created: str
    size: int
    size_on_disk: int | None = field(name="sizeOnDisk")
    vm_state: int = field(name="vmState", default=0)


class SnapshotRestored(Answer, frozen=True, kw_only=True):
    """A volume that was restored; ``kept`` is the snapshot of what it held before."""

    volume_id: str = field(name="vid")
    snapshot: str
    size: int
    kept: str | None


class SnapshotDeleted(Answer, frozen=True, kw_only=True):
    """A snapshot that is no more."""

    volume_id: str = field(name="vid")
    snapshot: str


class Backup(Answer, frozen=True, kw_only=True):
    """A backup. ``reason``: why it was made a full one; ``damaged``: what is wrong with it."""

    backup: str
    volume_id: str = field(name="vid")
    owner: str = field(name="creatorID")
    name: str
    created: str
    mode: str
    reason: str | None
    parent: str | None
    size: int
    size_on_disk: int = field(name="sizeOnDisk")
    format: str
    location: str
    scheduled: bool
    sha256: str
    damaged: str | None


class BackupDeleted(Answer, frozen=True, kw_only=True):
    """A backup that is no more."""

    backup: str


class BackupSession(Answer, frozen=True, kw_only=True):
    """A moment of a volume that another backup program reads over NBD, at ``uri``."""

    session: str
    volume_id: str = field(name="vid")
    uri: str
    size: int
    since: str | None
    context: str | None
    tracked: bool
    reason: str | None
    ends: str


class Schedule(Answer, frozen=True, kw_only=True):
    """When a volume is backed up, and how that gets on."""

    volume_id: str = field(name="vid")
    every: str
    at: str | None = None
    keep: int | None = None
    keep_days: float | None = None
    full_every: int | None = None
    last: str | None = None
    next: str | None = None
    running: bool = False
    failures: int = 0
    reason: str | None = None


class Limits(Answer, frozen=True, kw_only=True):
    """What an export may use, per second; 0 is no limit. A burst may last ``burst_seconds``."""

    iops: int = 0
    iops_read: int = 0
    iops_write: int = 0
    iops_burst: int = 0
    bps: int = 0
    bps_read: int = 0
    bps_write: int = 0
    bps_burst: int = 0
    burst_seconds: int = 1


class Exported(Answer, frozen=True, kw_only=True):
    """An export, and how to attach it. ``credentials``, ``qemu`` and ``prepare`` hold secrets."""

    volume_id: str = field(name="vid")
    client: str = field(name="client_uid")
    protocol: str
    iqn: str
    readonly: bool
    size: int
    endpoint: Mapping[str, Any]
    credentials: Mapping[str, str]
    prepare: list[str]
    qemu: list[str]
    libvirt: str
    limits: Limits
    migration: str | None


class Unexported(Answer, frozen=True, kw_only=True):
    """What it was about."""

    volume_id: str = field(name="vid")
    client: str = field(name="client_uid")


class Export(Answer, frozen=True, kw_only=True):
    """An export and how it is: ``state`` is healthy, failing (with a ``reason``), elsewhere or stale."""

    volume_id: str = field(name="vid")
    client: str = field(name="client_uid")
    protocol: str | None
    iqn: str
    readonly: bool | None
    endpoint: Mapping[str, Any]
    host: str | None
    created: str | None
    limits: Limits | None
    migration: str | None
    state: str
    reason: str | None
    last_probe: str | None
    latency_ms: float | None
    sessions: int | None
    read_bytes: int | None
    written_bytes: int | None
    repairs: int | None


class Orphan(Answer, frozen=True, kw_only=True):
    """What was served although no marker asked for it."""

    name: str
    volume_id: str | None = field(name="vid")
    protocol: str | None


class Exports(Answer, frozen=True, kw_only=True):
    """Exports; orphans are told to those who name no client."""

    exports: list[Export]
    orphans: list[Orphan]


class Migration(Answer, frozen=True, kw_only=True):
    """A live migration; ``exports`` are the destination's while it is prepared."""

    migration: str
    state: str
    volumes: list[str]
    source: str
    destination: str
    deadline: str | None = None
    overdue: bool = False
    exports: list[Exported] = []


class Job(Answer, frozen=True, kw_only=True):
    """A job. ``result`` is the call's answer as JSON once it is done, ``error`` what went wrong."""

    job: str
    purpose: str
    state: str
    progress: float
    phase: str = ""
    volume_id: str | None = None
    created: str = ""
    ended: str | None = None
    bytes: int | None = None
    total_bytes: int | None = None
    rate: int | None = None
    eta: float | None = None
    result: Any = None
    error: dict[str, Any] | None = None

    @property
    def has_ended(self) -> bool:
        """Whether it is over, well or not."""
        return self.state in _ENDED

    @property
    def how_far(self) -> Progress:
        """Its progress."""
        return Progress(self.phase or self.purpose, self.progress, self.bytes, self.total_bytes, self.rate, self.eta)


class UploadProblem(Answer, frozen=True, kw_only=True):
    """Why no volume could be made of an upload."""

    error: str
    code: str


class Upload(Answer, frozen=True, kw_only=True):
    """A resumable upload; ``state`` is receiving, finishing, done or failed."""

    upload_id: str
    state: str
    offset: int
    length: int | None
    created: str
    expires: str
    owner: str | None = field(name="creatorID")
    job: str | None
    volume_id: str | None = field(name="vid")
    error: UploadProblem | None


class Revisions(Answer, frozen=True, kw_only=True):
    """What changed. ``complete`` false: too long ago to know, read everything again."""

    revision: int
    complete: bool
    changed: list[str]
    removed: list[str]


@dataclass(frozen=True, slots=True)
class Event:
    """A server-sent event. ``hello`` begins a connection; its ``data`` says whether what was missed is ``complete``."""

    kind: str
    revision: int
    subject: str | None
    time: str | None
    data: Mapping[str, Any]


class Location(Answer, frozen=True, kw_only=True):
    """A location, its limits (None: none), and what is used of them."""

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


class Rescan(Answer, frozen=True, kw_only=True):
    """What a full look at the disk found."""

    volumes: int
    added: list[str]
    changed: list[str]
    removed: list[str]
    odd: list[dict[str, str]]
    differences: list[dict[str, Any]]
    foreign_locks: list[dict[str, str]]


class Health(Answer, frozen=True, kw_only=True):
    """``status`` is ok or degraded; reasons and numbers are for admins."""

    status: str
    problems: list[str]
    locations: int | None
    volumes: int | None
    exports: int | None
    running_jobs: int | None


class Whoami(Answer, frozen=True, kw_only=True):
    """Whose token it is, None on a trusted network; ``role`` is user or admin, ``auth`` how the server runs."""

    client: str | None
    role: str
    auth: str


class Version(Answer, frozen=True, kw_only=True):
    """What runs there."""

    version: str
    api: str
    qemu_img: str = field(name="qemu-img")


class LocationHistory(Answer, frozen=True, kw_only=True):
    """A location at the times of a ``History``; None is what was not known."""

    name: str
    used_bytes: list[int | None]
    virtual_bytes: list[int | None]


class History(Answer, frozen=True, kw_only=True):
    """Columns of equal length, oldest first: ``times`` in seconds since 1970, rates in bytes per second."""

    interval: float
    times: list[float]
    read_rate: list[float]
    write_rate: list[float]
    running_jobs: list[int]
    locations: list[LocationHistory]
