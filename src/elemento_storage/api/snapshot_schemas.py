"""Requests and answers of the calls about snapshots."""

from msgspec import Struct, field

from elemento_storage.api.clone_schemas import LocationName
from elemento_storage.api.decode import Uid
from elemento_storage.api.schemas import Name, Request
from elemento_storage.model import VolumeFormat


class SnapshotsRequest(Request):
    """``snapshots``: of one volume."""

    vid: Uid
    client_uid: Uid | None = None


class CreateSnapshotRequest(Request):
    """``snapshots/create``: what the new one is called."""

    vid: Uid
    creator_id: Uid = field(name="creatorID")
    name: Name = ""
    description: Name = ""


class RestoreSnapshotRequest(Request):
    """``snapshots/restore``: which one; ``keep`` makes one of what the volume holds now first."""

    vid: Uid
    creator_id: Uid = field(name="creatorID")
    snapshot: Uid
    keep: bool = False


class DeleteSnapshotRequest(Request):
    """``snapshots/delete``: which one."""

    vid: Uid
    creator_id: Uid = field(name="creatorID")
    snapshot: Uid


class CloneSnapshotRequest(Request):
    """``snapshots/clone``: a new volume with what one of them holds."""

    vid: Uid
    creator_id: Uid = field(name="creatorID")
    snapshot: Uid
    name: Name | None = None
    private: bool | None = None
    format: VolumeFormat | None = None
    location: LocationName | None = None


class SnapshotAnswer(Struct, kw_only=True):
    """One snapshot. ``size``: what a guest would see. ``sizeOnDisk``: its file's, null where it is inside the image."""

    vid: str
    snapshot: str
    name: str
    description: str
    created: str
    size: int
    size_on_disk: int | None = field(name="sizeOnDisk")
    vm_state_bytes: int = field(name="vmState")


class RestoredAnswer(Struct, kw_only=True):
    """The volume after it was restored; ``kept`` is the snapshot of what it held before."""

    vid: str
    snapshot: str
    size: int
    kept: str | None


class DeletedAnswer(Struct, kw_only=True):
    """What is no more."""

    vid: str
    snapshot: str
