"""Requests and answers about images from outside, whether they are sent or fetched."""

from typing import Annotated, Literal

from msgspec import Meta, field

from elemento_storage.api.decode import Uid, checked_name, size_bytes
from elemento_storage.api.iso_schemas import Fact
from elemento_storage.api.schemas import CreateAnswer, Name, Request, SizeGB
from elemento_storage.images.incoming import CHECKSUM_PATTERN, Compression, ImageFormat, Incoming, parse_checksum
from elemento_storage.model import Bus, CloneAlgorithm, IsoType, VolumeFormat
from elemento_storage.service.create import clone_settings, refuse_bootable_and_shareable

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


class ImageRequest(SourceRequest, kw_only=True):
    """A volume made of an image from outside. ``size``, in GB: a smaller image is grown to it."""

    creator_id: Uid = field(name="creatorID")
    name: Name
    size: SizeGB | None = None
    private: bool = False
    clonable: bool | None = None
    alg: CloneAlgorithm | None = None
    format: Literal["raw", "qcow2"] = "raw"
    bus: Bus = Bus.VIRTIO

    def incoming(
        self,
        volume_id: str,
        *,
        bootable: bool,
        readonly: bool = False,
        shareable: bool = False,
        cloudinit: bool = False,
    ) -> Incoming:
        """What it says of the volume to be made. Raises InvalidValue."""
        refuse_bootable_and_shareable(bootable=bootable, shareable=shareable)
        clonable, alg = clone_settings(self.clonable, self.alg)
        return Incoming(
            volume_id=volume_id,
            creator_id=self.creator_id,
            name=checked_name(self.name),
            private=self.private,
            readonly=readonly,
            shareable=shareable,
            bootable=bootable,
            clonable=clonable,
            alg=alg,
            bus=self.bus,
            cloudinit=cloudinit,
            format=VolumeFormat(self.format),
            size_bytes=None if self.size is None else size_bytes("size", self.size),
            image_format=None if self.source_format is None else ImageFormat(self.source_format),
            compression=self.compression,
            checksum=parse_checksum(self.checksum),
        )


class UploadRequest(ImageRequest, kw_only=True):
    """``create/upload``: a volume made of the image that comes."""

    readonly: bool = False
    shareable: bool = False
    bootable: bool = False


class CreateUrlRequest(UploadRequest, kw_only=True):
    """``create/url``: a volume from an image on the web."""

    url: Url


class CloudInitCreateRequest(ImageRequest, kw_only=True):
    """``cloudinit/create``: a bootable volume from a cloud image on the web."""

    url: Url


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
