"""Requests and answers about clones, reset and import."""

from typing import Annotated, Literal

from msgspec import Meta, Struct, field

from elemento_storage.api.decode import Uid
from elemento_storage.api.schemas import Name, Request
from elemento_storage.model import Bus, VolumeFormat

LocationName = Annotated[str, Meta(max_length=4096, description="the name of a location, as `locations` shows it")]


class CloneRequest(Request):
    """``clone``: a new volume with what another one holds."""

    volume_id: Uid
    creator_id: Uid = field(name="creatorID")
    name: Name | None = None
    private: bool | None = None
    format: VolumeFormat | None = None
    location: LocationName | None = None
    linked: bool = False


class OwnVolumeRequest(Request):
    """``overlay/compact`` and ``reset``: one's own volume."""

    vid: Uid
    creator_id: Uid = field(name="creatorID")


class ImportRequest(Request):
    """``import``: something in a location's directory for imports."""

    creator_id: Uid = field(name="creatorID")
    path: Annotated[str, Meta(min_length=1, max_length=4096, description="a path of 1 to 4096 characters")]
    name: Name | None = None
    private: bool | None = None
    bootable: bool | None = None
    bus: Bus | None = None
    format: Literal["raw", "qcow2", "iso"] | None = None


class OwnVolumeAnswer(Struct, kw_only=True):
    """The volume it was about."""

    vid: str
    creator_id: str = field(name="creatorID")
