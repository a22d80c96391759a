"""The calls about clones, about giving a volume another image, and import (contract, section 6)."""

from typing import Any

from elemento_storage.api.call import Call, Context, Kind
from elemento_storage.api.clone_schemas import CloneRequest, ImportRequest, OwnVolumeAnswer, OwnVolumeRequest
from elemento_storage.api.decode import checked_name
from elemento_storage.api.schemas import CreateAnswer
from elemento_storage.api.volume_calls import create_answer
from elemento_storage.errors import (
    Conflict,
    ExportFailed,
    Forbidden,
    FormatUnsupported,
    HasClones,
    HasSnapshots,
    ImageChanged,
    ImageDamaged,
    ImageInUse,
    ImageRefused,
    ImageTooLarge,
    ImportNotFound,
    InvalidValue,
    JobCancelled,
    KeyReused,
    LocationNotFound,
    NoFirstState,
    NoRoom,
    NotAnIso,
    NotClonable,
    NotLinkable,
    NotOwner,
    VolumeExists,
    VolumeExported,
    VolumeLocked,
    VolumeNotFound,
    VolumeWaiting,
)
from elemento_storage.model import Volume, VolumeFormat
from elemento_storage.service.clone import NewClone
from elemento_storage.service.idempotency import derive_uid
from elemento_storage.service.importing import NewImport


async def clone(ctx: Context, request: CloneRequest) -> CreateAnswer:
    """Make a new volume that holds what another one holds now. The caller owns it.

    Where clients write to the source, what it held at one moment of the call is cloned, and they go on.

    `linked` makes one that stands on its source and takes room for nothing but what differs. Until it is made
    independent (`overlay/compact`) or gone, its source cannot be changed or destroyed.
    """
    spec = NewClone(
        creator_id=request.creator_id,
        name=None if request.name is None else checked_name(request.name),
        private=request.private,
        format=request.format,
        location=request.location,
        linked=request.linked,
        volume_id=derive_uid(ctx.seed, 0) if ctx.seed else None,
    )
    actor = ctx.actor(request.creator_id)
    return create_answer(await ctx.services.cloning.clone(actor, request.volume_id, spec, ctx.progress))


async def import_(ctx: Context, request: ImportRequest) -> CreateAnswer:
    """Make a volume of what lies in a location's directory `elemento-import`: a volume's directory, or an image.

    It stays on its file system, nothing is copied, and it is gone from there afterwards.
    """
    spec = NewImport(
        creator_id=request.creator_id,
        path=request.path,
        name=None if request.name is None else checked_name(request.name),
        private=request.private,
        bootable=request.bootable,
        bus=request.bus,
        format=None if request.format is None else VolumeFormat(request.format),
        volume_id=derive_uid(ctx.seed, 0) if ctx.seed else None,
    )
    ctx.actor(request.creator_id)
    return create_answer(await ctx.services.importing.import_volume(spec, ctx.progress))


async def compact(ctx: Context, request: OwnVolumeRequest) -> OwnVolumeAnswer:
    """Make a linked clone independent of the volume it stands on. Any other volume is independent already."""
    actor = ctx.actor(request.creator_id)
    return _own(await ctx.services.replacing.compact(actor, request.vid, ctx.progress))


async def reset(ctx: Context, request: OwnVolumeRequest) -> OwnVolumeAnswer:
    """Throw away what a volume holds: it is empty afterwards, a linked clone again what its source is."""
    actor = ctx.actor(request.creator_id)
    return _own(await ctx.services.replacing.reset(actor, request.vid, ctx.progress))


def _own(volume: Volume) -> OwnVolumeAnswer:
    return OwnVolumeAnswer(vid=volume.volume_id, creator_id=volume.meta.creator_id)


_CHANGE = (
    *(VolumeNotFound, InvalidValue, NotOwner, VolumeLocked, VolumeExported, ImageInUse, ImageDamaged),
    *(HasClones, HasSnapshots, NoRoom, JobCancelled),
)

CLONE_CALLS: tuple[Call[Any], ...] = (
    Call(
        "clone",
        CloneRequest,
        CreateAnswer,
        clone,
        Kind.LONG,
        (
            *(VolumeNotFound, InvalidValue, VolumeLocked, VolumeExported, ImageInUse, ImageDamaged, NotClonable),
            *(NotLinkable, FormatUnsupported, VolumeWaiting, LocationNotFound, NoRoom, ExportFailed),
            *(JobCancelled, KeyReused, ImageChanged),
        ),
        creates=True,
    ),
    Call(
        "import",
        ImportRequest,
        CreateAnswer,
        import_,
        Kind.LONG,
        (
            *(
                Forbidden,
                InvalidValue,
                ImportNotFound,
                Conflict,
                FormatUnsupported,
                ImageRefused,
                ImageDamaged,
                NotAnIso,
            ),
            *(ImageInUse, ImageTooLarge, VolumeExists, VolumeLocked, NoRoom, JobCancelled, KeyReused),
        ),
        creates=True,
        admin_only=True,
    ),
    Call("overlay/compact", OwnVolumeRequest, OwnVolumeAnswer, compact, Kind.LONG, _CHANGE),
    Call("reset", OwnVolumeRequest, OwnVolumeAnswer, reset, Kind.LONG, (*_CHANGE, NoFirstState, FormatUnsupported)),
)
