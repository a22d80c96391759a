"""Requests and answers of cloudinit/metadata."""

from typing import Annotated

from msgspec import Meta, Struct, field

from elemento_storage.api.decode import Uid
from elemento_storage.api.schemas import Name, Request
from elemento_storage.model import CloneAlgorithm
from elemento_storage.service.cloud_metadata import MOST_FILES, MetadataState

Expected = Annotated[int, Meta(ge=1, le=MOST_FILES, description=f"a whole number from 1 to {MOST_FILES}")]


class MetadataCreateRequest(Request, kw_only=True):
    """``cloudinit/metadata``, the first call: a new metadata volume, and how many files it will have."""

    creator_id: Uid = field(name="creatorID")
    name: Name
    expected_files: Expected = field(name="expectedFiles")
    private: bool = False
    bootable: bool = False
    clonable: bool | None = None
    alg: CloneAlgorithm | None = None


class MetadataFileRequest(Request, kw_only=True):
    """``cloudinit/metadata``, the following calls: the volume that the file is for."""

    vid: Uid
    creator_id: Uid | None = field(name="creatorID", default=None)


class MetadataAnswer(Struct, kw_only=True):
    """How many files are there and how many there will be; the names; what cloud-init would not like about them."""

    vid: str
    received: int
    expected: int
    files: list[str]
    warnings: list[str]


def metadata_answer(state: MetadataState) -> MetadataAnswer:
    """What both kinds of calls answer."""
    return MetadataAnswer(
        vid=state.volume.volume_id,
        received=len(state.names),
        expected=state.expected,
        files=list(state.names),
        warnings=list(state.warnings),
    )
