"""Calls about exports (contract, section 7)."""

from collections.abc import Mapping
from typing import Any

import msgspec

from elemento_storage.api.auth import INFRASTRUCTURE_UID
from elemento_storage.api.call import Call, Context, Kind
from elemento_storage.api.schemas import (
    ExportAnswer,
    ExportListAnswer,
    ExportRequest,
    ExportsAnswer,
    ExportsRequest,
    LimitsBody,
    OrphanAnswer,
    PrepareRequest,
    UnexportAnswer,
    UnexportRequest,
)
from elemento_storage.errors import (
    ExportDiffers,
    ExportFailed,
    FormatUnsupported,
    ImageDamaged,
    ImageInUse,
    InvalidValue,
    MissingKey,
    NotExportable,
    NotOwner,
    ProtocolsExclude,
    VolumeExported,
    VolumeLocked,
    VolumeNotFound,
    VolumeWaiting,
)
from elemento_storage.exports.record import Limits, export_id
from elemento_storage.model import TARGET_PREFIX
from elemento_storage.service.exporting import ExportOptions, ExportView


async def export(ctx: Context, request: ExportRequest) -> ExportAnswer:
    """Put a volume within reach of a client; the same again when it is already. It serves when the answer comes."""
    _require_client(request.client_uid)
    view = await ctx.services.exporting.export(
        ctx.actor(request.client_uid), request.volume_id, request.client_uid, export_options(request)
    )
    return export_answer(view)


def _require_client(client_uid: str) -> None:
    if client_uid == INFRASTRUCTURE_UID:  # filled in for an admin's token that names nobody
        raise MissingKey("client_uid")


async def unexport(ctx: Context, request: UnexportRequest) -> UnexportAnswer:
    """Take a volume from a client: its connections are closed and it has no way in any more when the answer comes.

    Nothing if it has none. The owner may take it from anybody.
    """
    _require_client(request.client_uid)
    # A token says who takes it away; without one it is the client itself.
    actor = ctx.actor(None) if ctx.caller.is_user else ctx.actor(request.client_uid)
    await ctx.services.exporting.unexport(actor, request.volume_id, request.client_uid)
    return UnexportAnswer(vid=request.volume_id, client_uid=request.client_uid)


async def exports(ctx: Context, request: ExportsRequest) -> ExportsAnswer:
    """Exports of the client's volumes and exports made for it, with health and traffic.

    Without a client, everything, and what was served although nobody asked for it (`orphans`; it is being withdrawn).
    """
    actor = ctx.actor(request.client_uid)
    views = await ctx.services.exporting.exports(actor)
    wanted = [one for one in views if request.volume_id in (None, one.volume.volume_id)]
    orphans = ctx.services.exporting.orphans() if actor.client is None else []
    return ExportsAnswer(
        exports=[_listed(view) for view in wanted],
        orphans=[OrphanAnswer(name=one.name, vid=one.volume_id, protocol=one.protocol) for one in orphans],
    )


def export_options(request: ExportRequest | PrepareRequest) -> ExportOptions:
    """How something shall be exported."""
    return ExportOptions(
        protocol=request.protocol,
        readonly=request.readonly,
        initiator=request.initiator,
        addresses=None if request.addresses is None else tuple(request.addresses),
        limits=None if request.limits is None else msgspec.convert(request.limits, Limits, from_attributes=True),
    )


def export_answer(view: ExportView) -> ExportAnswer:
    """An export as its client needs it."""
    assert view.record is not None
    assert view.endpoint is not None
    return ExportAnswer(
        vid=view.volume.volume_id,
        client_uid=view.client,
        protocol=view.record.protocol,
        iqn=view.record.target_name,
        readonly=view.record.readonly,
        size=view.volume.size_bytes,
        endpoint=dict(view.endpoint.address),
        credentials=dict(view.endpoint.credentials),
        prepare=list(view.endpoint.prepare),
        qemu=list(view.endpoint.qemu),
        libvirt=view.endpoint.libvirt,
        limits=_limits(view.record.limits),
        migration=view.record.migration,
    )


def _limits(limits: Limits) -> LimitsBody:
    return msgspec.convert(limits, LimitsBody, from_attributes=True)


def _listed(view: ExportView) -> ExportListAnswer:
    record, status = view.record, view.status
    address: Mapping[str, Any] = view.endpoint.address if view.endpoint else {}
    if status is not None:
        state = "healthy" if status.healthy else "failing"
    else:
        state = "elsewhere" if view.fresh else "stale"
    return ExportListAnswer(
        vid=view.volume.volume_id,
        client_uid=view.client,
        protocol=record.protocol.value if record else None,
        iqn=record.target_name if record else TARGET_PREFIX + export_id(view.client, view.volume.volume_id),
        readonly=record.readonly if record else None,
        endpoint=dict(address),
        host=record.host if record else None,
        created=record.created if record else None,
        limits=_limits(record.limits) if record else None,
        migration=record.migration if record else None,
        state=state,
        reason=status.reason if status else None,
        last_probe=status.last_probe if status else None,
        latency_ms=None if status is None or status.latency_s is None else round(status.latency_s * 1000, 3),
        sessions=status.presence.sessions if status else None,
        read_bytes=status.presence.read_bytes if status else None,
        written_bytes=status.presence.written_bytes if status else None,
        repairs=status.repairs if status else None,
    )


_ONE = (VolumeNotFound, InvalidValue, VolumeLocked, ExportFailed)

EXPORT_CALLS: tuple[Call[Any], ...] = (
    Call(
        "export",
        ExportRequest,
        ExportAnswer,
        export,
        Kind.CHANGE,
        (
            *_ONE,
            NotExportable,
            VolumeWaiting,
            ExportDiffers,
            ProtocolsExclude,
            ImageInUse,
            ImageDamaged,
            FormatUnsupported,
        ),
    ),
    Call("unexport", UnexportRequest, UnexportAnswer, unexport, Kind.CHANGE, (*_ONE, NotOwner, VolumeExported)),
    Call("exports", ExportsRequest, ExportsAnswer, exports, Kind.READ, (InvalidValue,)),
)
