"""Calls about backups."""

import time
from datetime import UTC, datetime
from typing import Any

from elemento_storage.api.backup_schemas import (
    BackupAnswer,
    BackupRequest,
    BackupsRequest,
    CloseBackupRequest,
    DeletedBackupAnswer,
    OneBackupRequest,
    OpenBackupRequest,
    RenewBackupRequest,
    RestoreBackupRequest,
    ScheduleAnswer,
    ScheduleRequest,
    SessionAnswer,
    SessionsRequest,
)
from elemento_storage.api.call import Call, Context, Kind
from elemento_storage.api.schemas import VolumeAnswer, volume_answer
from elemento_storage.catalog.backup_directory import Backup, BackupMode
from elemento_storage.catalog.backup_schedule import Schedule, parse_period
from elemento_storage.errors import (
    BackupDamaged,
    BackupNotFound,
    BackupsBusy,
    BackupSessionLost,
    ExportFailed,
    FormatUnsupported,
    HasClones,
    HasSnapshots,
    ImageDamaged,
    ImageInUse,
    InvalidValue,
    JobCancelled,
    NoIncrement,
    NoRoom,
    NotOwner,
    VolumeExported,
    VolumeLocked,
    VolumeNotFound,
)
from elemento_storage.service.backup_schedules import ScheduleState
from elemento_storage.service.backup_sessions import Session
from elemento_storage.service.backups import Wanted


async def create(ctx: Context, request: BackupRequest) -> BackupAnswer:
    """Back a volume up as it is now, exported or not. On disk and checked when the answer comes.

    `mode` is auto (an increment where one can be trusted), full or incremental.
    """
    backup = await ctx.services.backups.create(
        ctx.actor(request.creator_id), request.vid, ctx.progress, wanted=Wanted(request.mode), name=request.name
    )
    return _backup(backup)


async def backups(ctx: Context, request: BackupsRequest) -> list[BackupAnswer]:
    """The client's backups, of one volume or of all, also of volumes that are no more; oldest first."""
    found = await ctx.services.backups.visible(ctx.actor(request.client_uid), request.vid)
    return [_backup(one) for one in found]


async def restore(ctx: Context, request: RestoreBackupRequest) -> VolumeAnswer:
    """A volume with the content of a backup: a new one, or `vid`, whose content is overwritten.

    With the `vid` of a volume that was destroyed since, it is made again under its old id.
    """
    volume = await ctx.services.restoring.restore(
        ctx.actor(request.creator_id), request.backup, ctx.progress, volume_id=request.vid, name=request.name
    )
    return volume_answer(volume)


async def delete(ctx: Context, request: OneBackupRequest) -> DeletedBackupAnswer:
    """Delete a backup. Those that were made after it stay whole."""
    await ctx.services.backups.delete(ctx.actor(request.creator_id), request.backup)
    return DeletedBackupAnswer(backup=request.backup)


async def verify(ctx: Context, request: OneBackupRequest) -> BackupAnswer:
    """Read a backup and all that it needs, and compare with what was written."""
    actor = ctx.actor(request.creator_id)
    return _backup(await ctx.services.backups.verify(actor, request.backup, ctx.progress))


async def open_(ctx: Context, request: OpenBackupRequest) -> SessionAnswer:
    """Serve this moment of a volume over NBD, read-only, with what changed since an earlier session.

    Guests go on writing. It ends with `backups/close`, or when its lease is over.
    """
    session = await ctx.services.backup_sessions.open(
        ctx.actor(request.creator_id), request.vid, since=request.since, lease_s=request.lease
    )
    return _session(session)


async def renew(ctx: Context, request: RenewBackupRequest) -> SessionAnswer:
    """Let a session last longer: its lease begins anew."""
    actor = ctx.actor(request.creator_id)
    return _session(ctx.services.backup_sessions.renew(actor, request.session, request.lease))


async def close(ctx: Context, request: CloseBackupRequest) -> SessionAnswer:
    """End a session. With `saved`, the next one may ask for what changed `since` this one."""
    actor = ctx.actor(request.creator_id)
    return _session(await ctx.services.backup_sessions.close(actor, request.session, saved=request.saved))


async def sessions(ctx: Context, request: SessionsRequest) -> list[SessionAnswer]:
    """The sessions that are open."""
    return [_session(one) for one in ctx.services.backup_sessions.visible(ctx.actor(request.client_uid))]


async def schedule(ctx: Context, request: ScheduleRequest) -> ScheduleAnswer:
    """Back a volume up in every period from now on; `every: "off"` ends it. What was made stays."""
    wanted = None
    if request.every != "off":
        try:
            parse_period(request.every)
        except ValueError as error:
            raise InvalidValue(f"'every' is {request.every!r}, it is {error}", key="every") from None
        wanted = Schedule(
            creator_id=request.creator_id,
            every=request.every,
            at=request.at or "",
            keep=request.keep,
            keep_days=request.keep_days,
            full_every=request.full_every,
            since=time.time(),
        )
    state = await ctx.services.backup_schedules.set(ctx.actor(request.creator_id), request.vid, wanted)
    return ScheduleAnswer(vid=request.vid, every=request.every) if state is None else _schedule(state)


async def schedules(ctx: Context, request: SessionsRequest) -> list[ScheduleAnswer]:
    """The schedules of the client's volumes, and how they get on."""
    return [_schedule(one) for one in ctx.services.backup_schedules.visible(ctx.actor(request.client_uid))]


def _backup(backup: Backup) -> BackupAnswer:
    record = backup.record
    return BackupAnswer(
        backup=record.backup_id,
        vid=record.volume_id,
        creator_id=record.creator_id,
        name=record.name,
        created=record.created,
        # What it is now: an increment whose predecessors were deleted has become a full one.
        mode=(BackupMode.INCREMENTAL if backup.parent else BackupMode.FULL).value,
        reason=record.reason or None,
        parent=backup.parent,
        size=record.size,
        size_on_disk=backup.file_bytes,
        format=record.format,
        location=backup.location,
        scheduled=record.scheduled,
        sha256=record.sha256,
        damaged=record.damaged or backup.problem or None,
    )


def _session(session: Session) -> SessionAnswer:
    return SessionAnswer(
        session=session.session_id,
        vid=session.volume_id,
        uri=session.uri,
        size=session.size_bytes,
        since=session.since,
        context=session.context,
        tracked=session.tracked,
        reason=session.reason or None,
        ends=_time(session.ends),
    )


def _schedule(state: ScheduleState) -> ScheduleAnswer:
    wanted = state.schedule
    return ScheduleAnswer(
        vid=state.volume.volume_id,
        every=wanted.every,
        at=wanted.at or None,
        keep=wanted.keep,
        keep_days=wanted.keep_days,
        full_every=wanted.full_every,
        last=None if state.last is None else _time(state.last),
        next=_time(max(state.due, state.retry)),
        running=state.running,
        failures=state.failures,
        reason=state.reason or None,
    )


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


_VOLUME = (VolumeNotFound, InvalidValue, NotOwner, VolumeLocked)
_MOMENT = (*_VOLUME, VolumeExported, ImageInUse, ImageDamaged, FormatUnsupported, NoIncrement, NoRoom, ExportFailed)
_ONE = (BackupNotFound, InvalidValue)

BACKUP_CALLS: tuple[Call[Any], ...] = (
    Call("backups/create", BackupRequest, BackupAnswer, create, Kind.LONG, (*_MOMENT, BackupDamaged, JobCancelled)),
    Call("backups", BackupsRequest, list[BackupAnswer], backups, Kind.READ, (InvalidValue,)),
    Call(
        "backups/restore",
        RestoreBackupRequest,
        VolumeAnswer,
        restore,
        Kind.LONG,
        (
            *(*_ONE, *_VOLUME, BackupDamaged, BackupsBusy, VolumeExported, HasClones, HasSnapshots, ImageInUse, NoRoom),
            JobCancelled,
        ),
    ),
    Call("backups/delete", OneBackupRequest, DeletedBackupAnswer, delete, Kind.CHANGE, _ONE),
    Call(
        "backups/verify",
        OneBackupRequest,
        BackupAnswer,
        verify,
        Kind.LONG,
        (*_ONE, BackupDamaged, BackupsBusy, JobCancelled),
    ),
    Call("backups/open", OpenBackupRequest, SessionAnswer, open_, Kind.CHANGE, _MOMENT),
    Call("backups/renew", RenewBackupRequest, SessionAnswer, renew, Kind.CHANGE, _ONE),
    Call("backups/close", CloseBackupRequest, SessionAnswer, close, Kind.CHANGE, (*_ONE, BackupSessionLost)),
    Call("backups/sessions", SessionsRequest, list[SessionAnswer], sessions, Kind.READ, (InvalidValue,)),
    Call("backups/schedule", ScheduleRequest, ScheduleAnswer, schedule, Kind.CHANGE, (*_VOLUME, FormatUnsupported)),
    Call("backups/schedules", SessionsRequest, list[ScheduleAnswer], schedules, Kind.READ, (InvalidValue,)),
)
