"""The document's calls about volumes (contract, section 6)."""

from typing import Any

import msgspec
from msgspec import UNSET, UnsetType

from elemento_storage.api.call import Call, Context, Kind, Reply
from elemento_storage.api.decode import checked_name, decode, size_bytes
from elemento_storage.api.schemas import (
    AccessibleRequest,
    BinnedAnswer,
    CanCreateAnswer,
    CanCreateManyRequest,
    CanCreateRequest,
    ClientRequest,
    ConvertAnswer,
    ConvertRequest,
    CreateAnswer,
    CreateManyRequest,
    CreateRequest,
    DestroyRequest,
    HasAnswer,
    InfoRequest,
    Locked,
    ResizeAnswer,
    ResizeRequest,
    TransferAnswer,
    TransferRequest,
    UpdateAnswer,
    UpdateRequest,
    VidAnswer,
    VolumeAnswer,
    volume_answer,
)
from elemento_storage.catalog.catalog import describe_lock
from elemento_storage.errors import (
    CannotShrink,
    Conflict,
    ExportFailed,
    FormatUnsupported,
    HasSnapshots,
    ImageInUse,
    InvalidRequest,
    InvalidValue,
    JobCancelled,
    JobNotFound,
    KeyReused,
    NoRoom,
    NotOwner,
    PreconditionFailed,
    VolumeExists,
    VolumeExported,
    VolumeLocked,
    VolumeNotFound,
)
from elemento_storage.model import IsoInfo, Preallocation, Volume, VolumeFormat, in_gigabytes
from elemento_storage.service.create import NewVolume
from elemento_storage.service.idempotency import derive_uid
from elemento_storage.service.listing import Query, list_volumes
from elemento_storage.service.volumes import VolumeChanges


async def create(ctx: Context, request: CreateRequest) -> CreateAnswer:
    """Create an empty volume. Sparse unless `preallocation` says otherwise; on disk when the answer comes."""
    volume = await ctx.services.creating.create(_new_volume(ctx, request, 0), ctx.progress)
    return create_answer(volume, request.size)


async def ceph_create(ctx: Context, request: CreateRequest) -> CreateAnswer:
    """Create an empty volume in a Ceph pool: `create` with `ceph` true, and `format` is rbd."""
    request.ceph = True
    return await create(ctx, request)


async def create_multiple(ctx: Context, request: CreateManyRequest) -> list[CreateAnswer]:
    """Create several volumes, or none of them when one cannot be made."""
    requests = []
    for position, values in enumerate(request.volumes):
        try:
            one, ignored = decode(values, CreateRequest, fill=ctx.fill)
            requests.append(one)
            ctx.ignored += [name for name in ignored if name not in ctx.ignored]
        except InvalidRequest as error:
            raise InvalidValue(f"volume {position}: {error.reason}", key="volumes", position=position) from error
    specs = [_new_volume(ctx, one, position) for position, one in enumerate(requests)]
    volumes = await ctx.services.creating.create_many(specs, ctx.progress)
    return [create_answer(volume, one.size) for volume, one in zip(volumes, requests, strict=True)]


def _new_volume(ctx: Context, request: CreateRequest, index: int) -> NewVolume:
    ctx.actor(request.creator_id)
    if request.ceph and request.format == "qcow2":
        raise InvalidValue("'format' of a volume with 'ceph' true is rbd", key="format")
    image_format = VolumeFormat.RBD if request.ceph else VolumeFormat(request.format)
    return NewVolume(
        creator_id=request.creator_id,
        name=checked_name(request.name),
        size_bytes=size_bytes("size", request.size),
        format=image_format,
        private=request.private,
        readonly=request.readonly,
        shareable=request.shareable,
        bootable=request.bootable,
        clonable=request.clonable,
        alg=request.alg,
        bus=request.bus,
        preallocation=request.preallocation,
        volume_id=derive_uid(ctx.seed, index) if ctx.seed else None,
    )


def create_answer(volume: Volume, size: float | None = None) -> CreateAnswer:
    """What a call that made a volume answers; ``size`` in GB, as it was asked for."""
    meta = volume.meta
    return CreateAnswer(
        alg=meta.alg,
        bootable=meta.bootable,
        bus=meta.bus,
        clonable=meta.clonable,
        creator_id=meta.creator_id,
        img_format=meta.format,
        name=meta.name,
        private=meta.private,
        readonly=meta.readonly,
        shareable=meta.shareable,
        size=in_gigabytes(volume.size_bytes) if size is None else size,
        vid=volume.volume_id,
    )


async def accessible(ctx: Context, request: AccessibleRequest) -> Reply:
    """List the volumes a client can see: its own and those that are not private.

    `name` may be a pattern (`web-*`); `iso_type` and the five keys after it pick ISO volumes that are exactly so.
    `sort` is volumeID, name, size, sizeOnDisk or lastUpdated with `-` before it for descending. With `limit`, the
    header `X-Next-Cursor` holds the `cursor` of the next page; `X-Total-Count` counts all.
    """
    query = Query(
        include_locked=request.include_locked,
        name=request.name,
        format=request.format,
        iso=IsoInfo(
            iso_type=request.iso_type,
            os_family=request.os_family,
            os_flavour=request.os_flavour,
            os_version=request.os_version,
            tool_scope=request.tool_scope,
            tool_version=request.tool_version,
        ),
        sort=request.sort,
        limit=request.limit,
        cursor=request.cursor,
    )
    page = await list_volumes(ctx.services.core, ctx.actor(request.client_uid), query)
    answers = [
        volume_answer(volume, await _locked(ctx, volume)) if volume.locks else ctx.listed.answer(volume)
        for volume in page.volumes
    ]
    headers = {"X-Total-Count": str(page.total)}
    if page.next_cursor:
        headers["X-Next-Cursor"] = page.next_cursor
    return Reply(answers, headers)


async def info(ctx: Context, request: InfoRequest) -> Reply:
    """One volume. `ETag` names the state of its metadata, for `If-Match` on `update`."""
    volume = await _visible(ctx, request)
    answer = volume_answer(volume, await _locked(ctx, volume) if volume.locks else UNSET)
    return Reply(answer, {"ETag": f'"{volume.meta_digest}"'})


async def has(ctx: Context, request: InfoRequest) -> HasAnswer:
    """Whether this server has a volume that the client may see."""
    try:
        await _visible(ctx, request)
    except VolumeNotFound:
        return HasAnswer(has=False, volume_id=request.volume_id)
    return HasAnswer(has=True, volume_id=request.volume_id)


async def _visible(ctx: Context, request: InfoRequest) -> Volume:
    check = ctx.actor(request.client_uid).require_see
    return (await ctx.services.core.catalog.find(request.volume_id, check))[1]


async def _locked(ctx: Context, volume: Volume) -> Locked | UnsetType:
    catalog = ctx.services.core.catalog
    location = catalog.locations.by_name[volume.location]
    for lock in await catalog.read_locks(location, volume):
        return locked_answer(ctx, describe_lock(lock))
    return UNSET


def locked_answer(ctx: Context, described: dict[str, Any]) -> Locked:
    """The `locked` object, with the progress when the job runs here."""
    locked = msgspec.convert(described, Locked)
    try:
        locked.progress = round(ctx.services.core.jobs.get(locked.job, None).progress.fraction, 4)
    except JobNotFound:
        locked.progress = None
    return locked


async def destroy(ctx: Context, request: DestroyRequest) -> VidAnswer:
    """Move a volume into its location's bin, from where `restore` brings it back until the retention time is over."""
    await ctx.services.volumes.destroy(ctx.actor(request.creator_id), request.volume_id)
    return VidAnswer(vid=request.volume_id)


async def restore(ctx: Context, request: InfoRequest) -> VolumeAnswer:
    """Bring a destroyed volume back."""
    return volume_answer(await ctx.services.volumes.restore(ctx.actor(request.client_uid), request.volume_id))


async def bin_(ctx: Context, request: ClientRequest) -> list[BinnedAnswer]:
    """The client's destroyed volumes that can be restored, oldest first."""
    retention_s = ctx.services.core.settings.bin_retention
    return [
        BinnedAnswer(
            volume_id=binned.volume.volume_id,
            creator_id=binned.volume.meta.creator_id,
            name=binned.volume.meta.name,
            size=binned.volume.size_bytes,
            format=binned.volume.meta.format,
            location=binned.volume.location,
            destroyed=binned.entry.destroyed.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            purge_at=binned.entry.purge_at(retention_s).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        )
        for binned in await ctx.services.volumes.binned(ctx.actor(request.client_uid))
    ]


async def update(ctx: Context, request: UpdateRequest) -> Reply:
    """Change metadata. With `If-Match`, only if nobody changed it since the `ETag` was read."""
    changes = VolumeChanges(
        name=None if request.name is None else checked_name(request.name),
        private=request.private,
        readonly=request.readonly,
        shareable=request.shareable,
        bootable=request.bootable,
        clonable=request.clonable,
        alg=request.alg,
        bus=request.bus,
    )
    volume = await ctx.services.volumes.update(
        ctx.actor(request.creator_id), request.vid, changes, if_match=_if_match(ctx)
    )
    meta = volume.meta
    answer = UpdateAnswer(
        vid=volume.volume_id,
        creator_id=meta.creator_id,
        name=meta.name,
        private=meta.private,
        readonly=meta.readonly,
        shareable=meta.shareable,
        bootable=meta.bootable,
        clonable=meta.clonable,
        alg=meta.alg,
        bus=meta.bus,
    )
    return Reply(answer, {"ETag": f'"{volume.meta_digest}"'})


def _if_match(ctx: Context) -> frozenset[str] | None:
    header = ctx.headers.get("if-match")
    if header is None or header.strip() == "*":
        return None
    return frozenset(part.strip().strip('"') for part in header.split(","))


async def resize(ctx: Context, request: ResizeRequest) -> ResizeAnswer:
    """Make a volume larger, at once."""
    wanted = size_bytes("size", request.size)
    volume = await ctx.services.resizing.resize(ctx.actor(request.creator_id), request.vid, wanted)
    return ResizeAnswer(vid=volume.volume_id, creator_id=volume.meta.creator_id, size=request.size)


async def convert(ctx: Context, request: ConvertRequest) -> ConvertAnswer:
    """Convert a volume between raw and qcow2. The old data stays until the new is complete and on disk."""
    volume = await ctx.services.converting.convert(
        ctx.actor(request.creator_id), request.vid, request.format, ctx.progress
    )
    return ConvertAnswer(vid=volume.volume_id, creator_id=volume.meta.creator_id, format=volume.meta.format)


async def transfer(ctx: Context, request: TransferRequest) -> TransferAnswer:
    """Give a volume to another client."""
    volume = await ctx.services.volumes.transfer(ctx.actor(request.creator_id), request.vid, request.new_creator_id)
    return TransferAnswer(vid=volume.volume_id, creator_id=volume.meta.creator_id)


async def cancreate(ctx: Context, request: CanCreateRequest) -> CanCreateAnswer:
    """Whether a volume of this size would find room now, and where not why."""
    return await _cancreate(ctx, [_size_or_text("size", request.size)])


async def cancreate_multiple(ctx: Context, request: CanCreateManyRequest) -> CanCreateAnswer:
    """Whether volumes of these sizes would find room now, all of them, wherever each may go."""
    return await _cancreate(ctx, [_size_or_text("sizes", size) for size in request.sizes])


async def _cancreate(ctx: Context, sizes_bytes: list[int]) -> CanCreateAnswer:
    fits, reasons = await ctx.services.core.catalog.room.can_take(sizes_bytes)
    return CanCreateAnswer(cancreate=fits, locations=reasons)


def _size_or_text(key: str, size: float | str) -> int:
    if isinstance(size, str):
        size = int(size) if size.isdigit() else float(size)
    return size_bytes(key, size)


_ONE = (VolumeNotFound, InvalidValue)
_CHANGE = (*_ONE, NotOwner, VolumeLocked)
_CREATE = (InvalidValue, FormatUnsupported, JobCancelled, KeyReused, NoRoom)

VOLUME_CALLS: tuple[Call[Any], ...] = (
    Call(
        "create",
        CreateRequest,
        CreateAnswer,
        create,
        Kind.LONG,
        _CREATE,
        creates=True,
        is_slow=lambda request: request.preallocation is not Preallocation.OFF,
    ),
    Call("ceph/create", CreateRequest, CreateAnswer, ceph_create, Kind.LONG, _CREATE, creates=True),
    Call(
        "create/multiple",
        CreateManyRequest,
        list[CreateAnswer],
        create_multiple,
        Kind.LONG,
        _CREATE,
        creates=True,
        is_slow=lambda request: any(volume.get("preallocation") not in (None, "off") for volume in request.volumes),
    ),
    Call("accessible", AccessibleRequest, list[VolumeAnswer], accessible, Kind.READ, (InvalidValue,)),
    Call("info", InfoRequest, VolumeAnswer, info, Kind.READ, _ONE),
    Call("has", InfoRequest, HasAnswer, has, Kind.READ, (InvalidValue,)),
    Call(
        "destroy",
        DestroyRequest,
        VidAnswer,
        destroy,
        Kind.CHANGE,
        (*_CHANGE, VolumeExported, ImageInUse),
        aliases=("delete",),
    ),
    Call("restore", InfoRequest, VolumeAnswer, restore, Kind.CHANGE, (*_CHANGE, VolumeExists, NoRoom)),
    Call("bin", ClientRequest, list[BinnedAnswer], bin_, Kind.READ),
    Call(
        "update",
        UpdateRequest,
        UpdateAnswer,
        update,
        Kind.CHANGE,
        (*_CHANGE, PreconditionFailed, VolumeExported, ImageInUse),
    ),
    Call(
        "update/resize",
        ResizeRequest,
        ResizeAnswer,
        resize,
        Kind.CHANGE,
        (*_CHANGE, CannotShrink, VolumeExported, FormatUnsupported, NoRoom, ExportFailed),
    ),
    Call(
        "update/convert",
        ConvertRequest,
        ConvertAnswer,
        convert,
        Kind.LONG,
        (*_CHANGE, VolumeExported, ImageInUse, FormatUnsupported, HasSnapshots, JobCancelled, NoRoom),
    ),
    Call(
        "transfer",
        TransferRequest,
        TransferAnswer,
        transfer,
        Kind.CHANGE,
        (*_CHANGE, Conflict),
        aliases=("update/transfer",),
    ),
    Call("cancreate", CanCreateRequest, CanCreateAnswer, cancreate, Kind.READ, (InvalidValue,)),
    Call(
        "cancreate/multiple",
        CanCreateManyRequest,
        CanCreateAnswer,
        cancreate_multiple,
        Kind.READ,
        (InvalidValue,),
        needs_body=True,
    ),
)
