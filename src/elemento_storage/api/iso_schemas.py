"""Requests and answers about ISO volumes. What makes one in another way builds on ``IsoRequest``."""

from typing import Annotated

from msgspec import Meta, Struct, field

from elemento_storage.api.decode import Uid
from elemento_storage.api.schemas import Name, Request, SizeGB
from elemento_storage.model import CloneAlgorithm, IsoInfo, IsoType, Volume

_MOST_CHARACTERS = 255
Fact = Annotated[str, Meta(max_length=_MOST_CHARACTERS, description=f"a text of at most {_MOST_CHARACTERS} characters")]


class IsoRequest(Request, kw_only=True):
    """What every call that makes an ISO volume takes. ``scope`` and ``version`` stand for the last two as well."""

    creator_id: Uid = field(name="creatorID")
    name: Name
    private: bool = False
    clonable: bool | None = None
    alg: CloneAlgorithm | None = None
    isotype: IsoType
    os_family: Fact
    os_flavour: Fact | None = None
    os_version: Fact | None = None
    tool_scope: Fact | None = None
    tool_version: Fact | None = None

    def info(self) -> IsoInfo:
        """What isoinfo.json will say."""
        return IsoInfo(
            iso_type=self.isotype.value,
            os_family=self.os_family,
            os_flavour=self.os_flavour,
            os_version=self.os_version,
            tool_scope=self.tool_scope,
            tool_version=self.tool_version,
        )


class IsoCreateRequest(IsoRequest, kw_only=True):
    """``iso/create``: an ISO volume that waits for its content. ``size`` is the room that is kept for it, in GB."""

    size: SizeGB | None = None


class IsoAnswer(Struct, kw_only=True):
    """The document's answer to ``iso/create``, nulls included."""

    alg: CloneAlgorithm
    clonable: bool
    creator_id: str = field(name="creatorID")
    isotype: str | None
    name: str
    os_family: str | None
    os_flavour: str | None
    os_version: str | None
    private: bool
    tool_scope: str | None
    tool_version: str | None
    vid: str


def iso_answer(volume: Volume) -> IsoAnswer:
    """What a call that made an ISO volume answers."""
    meta, info = volume.meta, volume.iso or IsoInfo()
    return IsoAnswer(
        alg=meta.alg,
        clonable=meta.clonable,
        creator_id=meta.creator_id,
        isotype=info.iso_type,
        name=meta.name,
        os_family=info.os_family,
        os_flavour=info.os_flavour,
        os_version=info.os_version,
        private=meta.private,
        tool_scope=info.tool_scope,
        tool_version=info.tool_version,
        vid=volume.volume_id,
    )
