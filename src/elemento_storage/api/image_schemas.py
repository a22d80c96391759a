"""Requests and answers about images from outside that the server fetches itself."""

from typing import Annotated, Literal

from msgspec import Meta, field

from elemento_storage.api.decode import Uid
from elemento_storage.api.iso_schemas import Fact
from elemento_storage.api.schemas import CreateAnswer, Name, Request, SizeGB
from elemento_storage.images.incoming import CHECKSUM_PATTERN, Compression
from elemento_storage.model import Bus, CloneAlgorithm, IsoType, Volume, gigabytes_to_bytes, in_gigabytes

Url = Annotated[
    str,
    Meta(max_length=8192, pattern=r"^[Hh][Tt][Tt][Pp][Ss]?://[^\s]+$", description="a URL, of http or https"),
]
Checksum = Annotated[str, Meta(pattern=CHECKSUM_PATTERN, description="sha256: or sha512: and the digest in hex digits")]


class SourceRequest(Request, kw_only=True):
    """What is known of an image from outside; what is not said is found from the bytes."""

    checksum: Checksum | None = None
    source_format: Literal["raw", "qcow2", "vmdk", "vdi", "vhd", "vhdx"] | None = None
    compression: Compression | None = None


class CreateUrlRequest(SourceRequest, kw_only=True):
    """``create/url``: a volume from an image on the web."""

    creator_id: Uid = field(name="creatorID")
    name: Name
    url: Url
    size: SizeGB | None = None
    private: bool = False
    readonly: bool = False
    shareable: bool = False
    bootable: bool = False
    clonable: bool | None = None
    alg: CloneAlgorithm | None = None
    format: Literal["raw", "qcow2"] = "raw"
    bus: Bus = Bus.VIRTIO


class CloudInitCreateRequest(SourceRequest, kw_only=True):
    """``cloudinit/create``: a bootable volume from a cloud image on the web."""

    creator_id: Uid = field(name="creatorID")
    name: Name
    url: Url
    size: SizeGB | None = None
    private: bool = False
    clonable: bool | None = None
    alg: CloneAlgorithm | None = None
    format: Literal["raw", "qcow2"] = "raw"
    bus: Bus = Bus.VIRTIO


class IsoUrlRequest(Request, kw_only=True):
    """``iso/create/url``: an ISO volume from the web, or content for the one of ``vid`` that waits for it."""

    creator_id: Uid = field(name="creatorID")
    url: Url
    checksum: Checksum | None = None
    compression: Compression | None = None
    vid: Uid | None = None
    name: Name | None = None
    private: bool = False
    clonable: bool | None = None
    alg: CloneAlgorithm | None = None
    isotype: IsoType | None = None
    os_family: Fact | None = None
    os_flavour: Fact | None = None
    os_version: Fact | None = None
    tool_scope: Fact | None = None
    tool_version: Fact | None = None


class UrlAnswer(CreateAnswer, kw_only=True):
    """The document's answer to a call that fetches an image. ``size`` in GB is what it came to."""

    cloudinit: bool
    url: str


def url_answer(volume: Volume, url: str, asked: SizeGB | None) -> UrlAnswer:
    """What a call that fetched an image answers; the size as it was asked for, if that is what it came to."""
    meta = volume.meta
    as_asked = asked is not None and gigabytes_to_bytes(asked) == volume.size_bytes
    return UrlAnswer(
        alg=meta.alg,
        bootable=meta.bootable,
        bus=meta.bus,
        clonable=meta.clonable,
        cloudinit=meta.cloudinit,
        creator_id=meta.creator_id,
        img_format=meta.format,
        name=meta.name,
        private=meta.private,
        readonly=meta.readonly,
        shareable=meta.shareable,
        size=asked if asked is not None and as_asked else in_gigabytes(volume.size_bytes),
        url=url,
        vid=volume.volume_id,
    )
