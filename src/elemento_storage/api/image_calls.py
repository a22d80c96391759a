"""The calls that make volumes of images on the web (contract, section 6)."""

from typing import Any

import msgspec

from elemento_storage.api.call import Call, Context, Kind
from elemento_storage.api.image_schemas import (
    CloudInitCreateRequest,
    CreateUrlRequest,
    IsoUrlRequest,
    UrlAnswer,
)
from elemento_storage.api.iso_calls import new_iso
from elemento_storage.api.iso_schemas import IsoAnswer, IsoRequest, iso_answer
from elemento_storage.api.volume_calls import create_answer
from elemento_storage.errors import (
    ChecksumMismatch,
    Conflict,
    DownloadFailed,
    ImageDamaged,
    ImageRefused,
    ImageTooLarge,
    InvalidValue,
    JobCancelled,
    KeyReused,
    MissingKey,
    NoRoom,
    NotAnIso,
    NotOwner,
    UrlRefused,
    VolumeExported,
    VolumeLocked,
    VolumeNotFound,
)
from elemento_storage.images.incoming import Incoming, parse_checksum
from elemento_storage.model import Bus, VolumeFormat, gigabytes_to_bytes, new_uid
from elemento_storage.service.idempotency import derive_uid


async def create_url(ctx: Context, request: CreateUrlRequest) -> UrlAnswer:
    """Create a volume from an image on the web.

    It may be qcow2, raw, VMDK, VDI, VHD or VHDX, and compressed; the volume is raw or qcow2. `checksum` is of the bytes
    as they arrive. The volume appears when all of it has been verified and is on disk.
    """
    incoming = request.incoming(
        _volume_id(ctx), bootable=request.bootable, readonly=request.readonly, shareable=request.shareable
    )
    return await _from_web(ctx, request, incoming, "create/url")


async def cloudinit_create(ctx: Context, request: CloudInitCreateRequest) -> UrlAnswer:
    """Create a bootable volume from a cloud image on the web, and grow it to `size`."""
    incoming = request.incoming(_volume_id(ctx), bootable=True, cloudinit=True)
    return await _from_web(ctx, request, incoming, "cloudinit/create")


async def _from_web(
    ctx: Context, request: CreateUrlRequest | CloudInitCreateRequest, incoming: Incoming, call: str
) -> UrlAnswer:
    ctx.actor(request.creator_id)
    volume = await ctx.services.downloading.download(incoming, request.url, call, ctx.progress)
    asked = request.size
    # As it was asked for, if that is what it came to.
    size = asked if asked is not None and gigabytes_to_bytes(asked) == volume.size_bytes else None
    answer = msgspec.structs.asdict(create_answer(volume, size))
    return UrlAnswer(**answer, cloudinit=volume.meta.cloudinit, url=request.url)


async def iso_create_url(ctx: Context, request: IsoUrlRequest) -> IsoAnswer:
    """Create an ISO volume from an image on the web, or fetch the content of the ISO volume `vid`, which waits for it.

    What arrives has to be ISO 9660 or UDF; otherwise nothing is made, and a volume that waited waits still.
    """
    client = ctx.actor(request.creator_id).client
    checksum = parse_checksum(request.checksum)
    if request.vid is not None:
        incoming = Incoming(
            volume_id=request.vid,
            creator_id=client or "",
            fills=True,
            format=VolumeFormat.ISO,
            compression=request.compression,
            checksum=checksum,
        )
    else:
        new = new_iso(ctx, _whole(request), None)
        meta = new.meta()
        incoming = Incoming(
            volume_id=meta.volume_id,
            creator_id=meta.creator_id,
            name=meta.name,
            private=meta.private,
            readonly=True,
            bootable=meta.bootable,
            clonable=meta.clonable,
            alg=meta.alg,
            bus=Bus.SATA,
            format=VolumeFormat.ISO,
            files={name: content.decode() for name, content in new.files().items()},
            compression=request.compression,
            checksum=checksum,
        )
    volume = await ctx.services.downloading.download(incoming, request.url, "iso/create/url", ctx.progress)
    return iso_answer(volume)


def _whole(request: IsoUrlRequest) -> IsoRequest:
    """What a new volume needs. Raises MissingKey."""
    if request.name is None:
        raise MissingKey("name")
    if request.isotype is None:
        raise MissingKey("isotype")
    if request.os_family is None:
        raise MissingKey("os_family")
    return IsoRequest(
        creator_id=request.creator_id,
        name=request.name,
        private=request.private,
        clonable=request.clonable,
        alg=request.alg,
        isotype=request.isotype,
        os_family=request.os_family,
        os_flavour=request.os_flavour,
        os_version=request.os_version,
        tool_scope=request.tool_scope,
        tool_version=request.tool_version,
    )


def _volume_id(ctx: Context) -> str:
    return derive_uid(ctx.seed, 0) if ctx.seed else new_uid()


_FETCHED = (
    InvalidValue,
    UrlRefused,
    DownloadFailed,
    ChecksumMismatch,
    ImageTooLarge,
    JobCancelled,
    KeyReused,
    NoRoom,
)

IMAGE_CALLS: tuple[Call[Any], ...] = (
    Call(
        "create/url",
        CreateUrlRequest,
        UrlAnswer,
        create_url,
        Kind.LONG,
        (*_FETCHED, ImageRefused, ImageDamaged),
        creates=True,
    ),
    Call(
        "cloudinit/create",
        CloudInitCreateRequest,
        UrlAnswer,
        cloudinit_create,
        Kind.LONG,
        (*_FETCHED, ImageRefused, ImageDamaged),
        creates=True,
    ),
    Call(
        "iso/create/url",
        IsoUrlRequest,
        IsoAnswer,
        iso_create_url,
        Kind.LONG,
        (*_FETCHED, NotAnIso, VolumeNotFound, NotOwner, VolumeLocked, VolumeExported, Conflict),
        creates=True,
    ),
)
