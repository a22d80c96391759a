"""From what a client says of its upload, in whichever way it says it, to what is to be made of it."""

from collections.abc import Mapping
from dataclasses import dataclass

from elemento_storage.api.auth import Caller
from elemento_storage.api.decode import checked_name, decode
from elemento_storage.api.image_schemas import UploadRequest
from elemento_storage.api.iso_schemas import IsoRequest
from elemento_storage.api.upload_schemas import FillRequest, IsoUploadRequest
from elemento_storage.images.incoming import Compression, ImageFormat, Incoming, parse_checksum
from elemento_storage.model import VolumeFormat, new_uid
from elemento_storage.service.iso_library import NewIso

Values = Mapping[str, str]


@dataclass(frozen=True)
class Told:
    """What was said of an upload, and which keys meant nothing."""

    incoming: Incoming
    ignored: list[str]


def told(caller: Caller, values: Values) -> Told:
    """The kind follows from the keys: ``volume_id`` fills, ``isotype`` makes an ISO volume, else it is an image.

    Raises MissingKey, InvalidValue, Forbidden.
    """
    if any(key in values for key in ("volume_id", "vid", "volumeID")):
        return _fill(caller, values)
    return iso(caller, values) if "isotype" in values else image(caller, values)


def image(caller: Caller, values: Values, volume_id: str | None = None) -> Told:
    """A volume made of an image, with this id or a new one. Raises MissingKey, InvalidValue, Forbidden."""
    request, ignored = decode(values, UploadRequest, fill=caller.stands_for(creates=True), from_query=True)
    caller.actor(request.creator_id)
    incoming = request.incoming(
        volume_id or new_uid(), bootable=request.bootable, readonly=request.readonly, shareable=request.shareable
    )
    return Told(incoming, ignored)


def iso(caller: Caller, values: Values, volume_id: str | None = None) -> Told:
    """A volume of the ISO library, with this id or a new one. Raises MissingKey, InvalidValue, Forbidden."""
    request, ignored = decode(values, IsoUploadRequest, fill=caller.stands_for(creates=True), from_query=True)
    caller.actor(request.creator_id)
    return Told(_iso(request, request.compression, request.checksum, volume_id), ignored)


def _iso(request: IsoRequest, compression: Compression | None, checksum: str | None, volume_id: str | None) -> Incoming:
    new = NewIso(
        creator_id=request.creator_id,
        name=checked_name(request.name),
        iso_type=request.isotype,
        info=request.info(),
        private=request.private,
        clonable=request.clonable,
        alg=request.alg,
        volume_id=volume_id,
    )
    meta = new.meta()
    return Incoming(
        volume_id=meta.volume_id,
        creator_id=meta.creator_id,
        name=meta.name,
        private=meta.private,
        readonly=meta.readonly,
        bootable=meta.bootable,
        clonable=meta.clonable,
        alg=meta.alg,
        bus=meta.bus,
        format=VolumeFormat.ISO,
        files={name: content.decode() for name, content in new.files().items()},
        image_format=ImageFormat.ISO,
        compression=compression,
        checksum=parse_checksum(checksum),
    )


def _fill(caller: Caller, values: Values) -> Told:
    request, ignored = decode(values, FillRequest, fill=caller.stands_for(creates=False), from_query=True)
    incoming = Incoming(
        volume_id=request.volume_id,
        creator_id=caller.actor(request.creator_id).client or "",
        fills=True,
        format=VolumeFormat.ISO,
        image_format=ImageFormat.ISO,
        compression=request.compression,
        checksum=parse_checksum(request.checksum),
    )
    return Told(incoming, ignored)
