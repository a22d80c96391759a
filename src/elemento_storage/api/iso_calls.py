"""The calls about ISO volumes (contract, section 6)."""

from typing import Any

from elemento_storage.api.call import Call, Context, Kind
from elemento_storage.api.decode import checked_name, size_bytes
from elemento_storage.api.iso_schemas import IsoAnswer, IsoCreateRequest, IsoRequest, iso_answer
from elemento_storage.errors import InvalidValue, JobCancelled, KeyReused, NoRoom
from elemento_storage.service.idempotency import derive_uid
from elemento_storage.service.iso_library import NewIso


async def iso_create(ctx: Context, request: IsoCreateRequest) -> IsoAnswer:
    """Create an ISO volume that waits for its content, with room kept for it.

    It is read-only, on a SATA bus, and bootable unless it is a tool.
    """
    new = new_iso(ctx, request, None if request.size is None else size_bytes("size", request.size))
    return iso_answer(await ctx.services.isos.create(new, ctx.progress))


def new_iso(ctx: Context, request: IsoRequest, room_bytes: int | None) -> NewIso:
    """What a request asks for. ``room_bytes``: what to keep for the content; None: what is usual for its type."""
    ctx.actor(request.creator_id)
    return NewIso(
        creator_id=request.creator_id,
        name=checked_name(request.name),
        iso_type=request.isotype,
        info=request.info(),
        private=request.private,
        clonable=request.clonable,
        alg=request.alg,
        size_bytes=room_bytes,
        volume_id=derive_uid(ctx.seed, 0) if ctx.seed else None,
    )


ISO_CALLS: tuple[Call[Any], ...] = (
    Call(
        "iso/create",
        IsoCreateRequest,
        IsoAnswer,
        iso_create,
        Kind.CHANGE,
        (InvalidValue, KeyReused, NoRoom, JobCancelled),
        creates=True,
    ),
)
