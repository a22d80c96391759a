"""Calls about snapshots."""

from typing import Any

from elemento_storage.api.call import Call, Context, Kind
from elemento_storage.api.decode import checked_name
from elemento_storage.api.schemas import CreateAnswer
from elemento_storage.api.snapshot_schemas import (
    CloneSnapshotRequest,
    CreateSnapshotRequest,
    DeletedAnswer,
    DeleteSnapshotRequest,
    RestoredAnswer,
    RestoreSnapshotRequest,
    SnapshotAnswer,
    SnapshotsRequest,
)
from elemento_storage.api.volume_calls import create_answer
from elemento_storage.engine.snapshot_files import Description
from elemento_storage.errors import (
    Conflict,
    ExportFailed,
    FormatUnsupported,
    HasClones,
    ImageChanged,
    ImageDamaged,
    ImageInUse,
    InvalidValue,
    JobCancelled,
    KeyReused,
    LocationNotFound,
    NoRoom,
    NotClonable,
    NotOwner,
    SnapshotNotFound,
    SnapshotUnclear,
    TooManySnapshots,
    VolumeExported,
    VolumeLocked,
    VolumeNotFound,
)
from elemento_storage.service.clone import NewClone
from elemento_storage.service.idempotency import derive_uid
from elemento_storage.service.snapshots import Snapshot


async def snapshots(ctx: Context, request: SnapshotsRequest) -> list[SnapshotAnswer]:
    """The snapshots of a volume, oldest first, those that other tools have made included."""
    found = await ctx.services.snapshotting.snapshots(ctx.actor(request.client_uid), request.vid)
    return [_answer(request.vid, one) for one in found]


async def create(ctx: Context, request: CreateSnapshotRequest) -> SnapshotAnswer:
    """Keep what a volume holds now, also while its clients write.

    All that a client was told is flushed before the call is in it, and it is what the volume held at one moment.
    """
    label = Description(
        name=checked_name(request.name), description=checked_name(request.description, key="description")
    )
    snapshot_id = derive_uid(ctx.seed, 0) if ctx.seed else None
    made = await ctx.services.snapshotting.create(
        ctx.actor(request.creator_id), request.vid, label, ctx.progress, snapshot_id=snapshot_id
    )
    return _answer(request.vid, made)


async def restore(ctx: Context, request: RestoreSnapshotRequest) -> RestoredAnswer:
    """Make a volume what it was, its size included. The snapshot stays; what the volume holds now is lost.

    With `keep` that becomes a snapshot first.
    """
    keep = Description(name="before a restore", description=f"of {request.snapshot}") if request.keep else None
    volume, kept = await ctx.services.snapshotting.restore(
        ctx.actor(request.creator_id), request.vid, request.snapshot, keep, ctx.progress
    )
    return RestoredAnswer(vid=request.vid, snapshot=request.snapshot, size=volume.size_bytes, kept=kept)


async def clone(ctx: Context, request: CloneSnapshotRequest) -> CreateAnswer:
    """Make a new volume that holds what a snapshot does, of the size that the volume had then.

    Its volume stays as it is, and its clients go on meanwhile.
    """
    spec = NewClone(
        creator_id=request.creator_id,
        name=None if request.name is None else checked_name(request.name),
        private=request.private,
        format=request.format,
        location=request.location,
        volume_id=derive_uid(ctx.seed, 0) if ctx.seed else None,
    )
    actor = ctx.actor(request.creator_id)
    made = await ctx.services.cloning.clone_snapshot(actor, request.vid, request.snapshot, spec, ctx.progress)
    return create_answer(made)


async def delete(ctx: Context, request: DeleteSnapshotRequest) -> DeletedAnswer:
    """Forget a snapshot, in any order; the volume and its other snapshots stay as they are."""
    actor = ctx.actor(request.creator_id)
    await ctx.services.snapshotting.delete(actor, request.vid, request.snapshot, ctx.progress)
    return DeletedAnswer(vid=request.vid, snapshot=request.snapshot)


def _answer(vid: str, snapshot: Snapshot) -> SnapshotAnswer:
    return SnapshotAnswer(
        vid=vid,
        snapshot=snapshot.snapshot_id,
        name=snapshot.name,
        description=snapshot.description,
        created=snapshot.created,
        size=snapshot.stored.size_bytes,
        size_on_disk=snapshot.stored.allocated_bytes,
        vm_state_bytes=snapshot.stored.vm_state_bytes,
    )


_ONE = (VolumeNotFound, InvalidValue, ImageDamaged)
_CHANGE = (*_ONE, NotOwner, VolumeLocked, FormatUnsupported, HasClones, VolumeExported, ImageInUse, JobCancelled)

SNAPSHOT_CALLS: tuple[Call[Any], ...] = (
    Call("snapshots", SnapshotsRequest, list[SnapshotAnswer], snapshots, Kind.READ, _ONE),
    Call(
        "snapshots/create",
        CreateSnapshotRequest,
        SnapshotAnswer,
        create,
        Kind.LONG,
        (*_CHANGE, TooManySnapshots, NoRoom, ExportFailed, KeyReused),
        creates=True,
    ),
    Call(
        "snapshots/restore",
        RestoreSnapshotRequest,
        RestoredAnswer,
        restore,
        Kind.LONG,
        (*_CHANGE, SnapshotNotFound, TooManySnapshots, NoRoom),
    ),
    Call(
        "snapshots/delete",
        DeleteSnapshotRequest,
        DeletedAnswer,
        delete,
        Kind.LONG,
        (*_CHANGE, SnapshotNotFound, SnapshotUnclear, ExportFailed),
    ),
    Call(
        "snapshots/clone",
        CloneSnapshotRequest,
        CreateAnswer,
        clone,
        Kind.LONG,
        (
            *(*_ONE, NotOwner, VolumeLocked, SnapshotNotFound, NotClonable, FormatUnsupported, LocationNotFound),
            *(Conflict, ImageChanged, NoRoom, JobCancelled, KeyReused),
        ),
        creates=True,
    ),
)
