"""Requests and answers about a volume's bytes."""

from typing import Annotated, Literal

from msgspec import Meta, Struct, field

from elemento_storage.api.decode import Uid
from elemento_storage.api.schemas import Request
from elemento_storage.engine.checksum import Algorithm
from elemento_storage.model import MAX_VOLUME_BYTES
from elemento_storage.service.volume_data import DataFormat

MOST_EXTENTS = 100_000


class DataRequest(Request, kw_only=True):
    """``volumes/<vid>/data``: as which format."""

    client_uid: Uid | None = None
    format: DataFormat = DataFormat.RAW


class ExtentsRequest(Request, kw_only=True):
    """``volumes/<vid>/extents``: from where on, and how many."""

    client_uid: Uid | None = None
    start: Annotated[int, Meta(ge=0, le=MAX_VOLUME_BYTES, description="a whole number of bytes")] = 0
    limit: Annotated[int, Meta(ge=1, le=MOST_EXTENTS, description=f"a whole number from 1 to {MOST_EXTENTS}")] = 10_000


class ExtentAnswer(Struct, kw_only=True):
    """Bytes that are alike. ``zero``: they read as zeros; ``hole``: and take no room."""

    start: int
    length: int
    zero: bool
    hole: bool


class ExtentsAnswer(Struct, kw_only=True):
    """Where a volume's data is. ``next``: where the rest begins; null: there is none."""

    vid: str
    size: int
    etag: str
    extents: list[ExtentAnswer]
    next_start: int | None = field(name="next")


class ChecksumRequest(Request, kw_only=True):
    """``volumes/<vid>/checksum``: of which kind."""

    client_uid: Uid | None = None
    algorithm: Algorithm = Algorithm.SHA256
    method: Literal["blocks", "plain"] = "blocks"


class ChecksumAnswer(Struct, kw_only=True):
    """A checksum of what a guest sees. ``block_size`` is null for ``plain``."""

    vid: str
    algorithm: Algorithm
    method: str
    block_size: int | None
    checksum: str
    size: int
