"""Calls about live migration (contract, section 8)."""

from datetime import UTC, datetime
from typing import Any

from elemento_storage.api.call import Call, Context, Kind
from elemento_storage.api.export_calls import export_answer, export_options
from elemento_storage.api.schemas import EndMigrationRequest, MigrationAnswer, Nothing, PrepareRequest
from elemento_storage.errors import (
    ExportFailed,
    Forbidden,
    ImageDamaged,
    ImageInUse,
    InvalidValue,
    MigrationConflict,
    MigrationNotFound,
    MissingKey,
    NotOwner,
    ProtocolsExclude,
    VolumeLocked,
    VolumeNotFound,
)
from elemento_storage.service.migration import EndedMigration, Migration


async def prepare(ctx: Context, request: PrepareRequest) -> MigrationAnswer:
    """Give the destination an export of each volume beside the source's, of all of them or of none.

    Until the migration is reverted or concluded nothing else may touch the volumes.
    """
    volume_ids = list(request.volume_ids or [])
    if request.volume_id is not None:
        volume_ids.append(request.volume_id)
    if not volume_ids:
        raise MissingKey("volume_id")
    if request.source == request.destination:
        raise InvalidValue("'destination' is the source: a migration needs two clients", key="destination")
    prepared = await ctx.services.migrating.prepare(
        ctx.actor(None), volume_ids, request.source, request.destination, export_options(request), request.deadline
    )
    answer = _answer(prepared.migration)
    answer.exports = [export_answer(view) for view in prepared.exports]
    return answer


async def revert(ctx: Context, request: EndMigrationRequest) -> MigrationAnswer:
    """Take the destination's exports away; the source's stay exactly as they were."""
    _require_one(request)
    ended = await ctx.services.migrating.revert(
        ctx.actor(None), migration_id=request.migration, volume_id=request.volume_id
    )
    return _ended_answer(ended)


async def conclude(ctx: Context, request: EndMigrationRequest) -> MigrationAnswer:
    """Take the source's exports away, and make ordinary ones of the destination's.

    When the answer comes the source can no longer write.
    """
    _require_one(request)
    ended = await ctx.services.migrating.conclude(
        ctx.actor(None), migration_id=request.migration, volume_id=request.volume_id
    )
    return _ended_answer(ended)


async def migrations(ctx: Context, request: Nothing) -> list[MigrationAnswer]:
    """The live migrations that are neither reverted nor concluded."""
    return [_answer(migration) for migration in await ctx.services.migrating.under_way()]


def _require_one(request: EndMigrationRequest) -> None:
    if request.migration is None and request.volume_id is None:
        raise MissingKey("migration")


def _answer(migration: Migration) -> MigrationAnswer:
    deadline = datetime.fromtimestamp(migration.deadline, UTC)
    return MigrationAnswer(
        migration=migration.migration_id,
        state=migration.phase.value,
        volumes=list(migration.volumes),
        source=migration.source,
        destination=migration.destination,
        deadline=deadline.isoformat(timespec="seconds").replace("+00:00", "Z"),
        overdue=migration.overdue,
    )


def _ended_answer(ended: EndedMigration) -> MigrationAnswer:
    return MigrationAnswer(
        migration=ended.migration_id,
        state=ended.phase.value,
        volumes=list(ended.volumes),
        source=ended.source,
        destination=ended.destination,
    )


_ANY = (VolumeNotFound, InvalidValue, NotOwner, VolumeLocked, ExportFailed, MigrationConflict)

MIGRATION_CALLS: tuple[Call[Any], ...] = (
    Call(
        "livemigration/prepare",
        PrepareRequest,
        MigrationAnswer,
        prepare,
        Kind.CHANGE,
        (*_ANY, ProtocolsExclude, ImageInUse, ImageDamaged),
        aliases=("migration/prepare",),
    ),
    Call(
        "livemigration/revert",
        EndMigrationRequest,
        MigrationAnswer,
        revert,
        Kind.CHANGE,
        (*_ANY, MigrationNotFound),
        aliases=("migration/revert",),
    ),
    Call(
        "livemigration/conclude",
        EndMigrationRequest,
        MigrationAnswer,
        conclude,
        Kind.CHANGE,
        (*_ANY, MigrationNotFound),
        aliases=("migration/conclude",),
    ),
    Call(
        "livemigration",
        Nothing,
        list[MigrationAnswer],
        migrations,
        Kind.READ,
        (Forbidden,),
        aliases=("migration",),
        admin_only=True,
    ),
)
