"""Routes about a volume's bytes: the bytes themselves, where they are, and checksums of them."""

import contextlib
import unicodedata
from typing import Final, TypeVar
from urllib.parse import quote

from starlette.responses import Response

from elemento_storage import API_VERSION
from elemento_storage.api import schemas
from elemento_storage.api.byte_ranges import ByteRange, asked_ranges, entity_tag, is_known
from elemento_storage.api.data_response import BINARY, Body, DataResponse
from elemento_storage.api.data_schemas import (
    MOST_EXTENTS,
    ChecksumAnswer,
    ChecksumRequest,
    DataRequest,
    ExtentAnswer,
    ExtentsAnswer,
    ExtentsRequest,
)
from elemento_storage.api.decode import UID_PATTERN, decode
from elemento_storage.api.route import Exchange, Json, Route, prefers_async
from elemento_storage.engine.checksum import BLOCK_BYTES, Algorithm
from elemento_storage.errors import (
    FormatUnsupported,
    ImageChanged,
    ImageDamaged,
    ImageInUse,
    InvalidValue,
    JobCancelled,
    PreconditionFailed,
    RangeNotSatisfiable,
    VolumeExported,
    VolumeLocked,
    VolumeNotFound,
    VolumeWaiting,
)
from elemento_storage.model import MAX_VOLUME_BYTES, normalise_uid
from elemento_storage.progress import Progress
from elemento_storage.service.volume_data import DataFormat, Image, file_name

R = TypeVar("R", bound=schemas.Request)

_LONGEST_NAME: Final = 150
_JSON: Final = "application/json"


async def data(exchange: Exchange) -> Response:
    """The bytes of a volume: what a guest sees, or an image file of another format.

    `Range`, `If-Range`, `If-Match` and `If-None-Match` are those of RFC 9110. Nothing is written anywhere for it: a
    qcow2 or vmdk image is put together while it is sent, so its length is known and any range of it can be had.
    """
    request = _request(exchange, DataRequest)
    headers = exchange.request.headers
    async with contextlib.AsyncExitStack() as opened:
        actor = exchange.actor(request.client_uid)
        wanted = exchange.services.data.image(actor, _volume_id(exchange), request.format)
        image = await opened.enter_async_context(wanted)
        etag = entity_tag(image.tag, strong=image.is_strong)
        told = {
            "ETag": etag,
            "Accept-Ranges": "bytes",
            "Cache-Control": "private, no-cache, no-transform",
            "X-Content-Type-Options": "nosniff",
        }
        if is_known(headers, etag):
            return Response(None, 304, told)
        told["Content-Disposition"] = content_disposition(image)
        ranges = asked_ranges(headers, etag, image.size_bytes) if exchange.request.method == "GET" else None
        body = Body(image, ranges or [ByteRange(0, image.size_bytes)])
        if ranges is not None and len(ranges) == 1:
            told["Content-Range"] = ranges[0].content_range(image.size_bytes)
        return DataResponse(
            body,
            200 if ranges is None else 206,
            told,
            opened=opened.pop_all(),
            stall_s=exchange.services.core.settings.reader_stall,
            stopping=exchange.stopping,
        )


async def extents(exchange: Exchange) -> Response:
    """Where a volume's data is, and where it is zero, so that a client can fetch only the data."""
    request = _request(exchange, ExtentsRequest)
    page = await exchange.services.data.extents(
        exchange.actor(request.client_uid), _volume_id(exchange), request.start, request.limit
    )
    etag = entity_tag(page.image.tag, strong=page.image.is_strong)
    answer = ExtentsAnswer(
        vid=page.image.volume.volume_id,
        size=page.image.size_bytes,
        etag=etag,
        extents=[
            ExtentAnswer(start=one.start, length=one.length, zero=one.zero, hole=one.hole) for one in page.extents
        ],
        next_start=page.next_start,
    )
    return Response(schemas.encode(answer), headers={"ETag": etag, "Cache-Control": "no-store"}, media_type=_JSON)


async def checksum(exchange: Exchange) -> Response:
    """A checksum of what a guest sees, the same whatever the format; a job.

    `method` `blocks` is the hash of the hashes of 4 MiB blocks, and skips holes; `plain` is that of all bytes in a row.
    """
    request = _request(exchange, ChecksumRequest)
    actor, volume_id = exchange.actor(request.client_uid), _volume_id(exchange)
    core, reader = exchange.services.core, exchange.services.data
    await core.catalog.find(volume_id, actor.require_see)

    async def work(progress: Progress) -> ChecksumAnswer:
        found = await reader.checksum(actor, volume_id, request.algorithm, request.method, progress)
        return ChecksumAnswer(
            vid=volume_id,
            algorithm=found.algorithm,
            method=found.method,
            block_size=BLOCK_BYTES if found.method == "blocks" else None,
            checksum=found.checksum,
            size=found.size_bytes,
        )

    job = core.jobs.start("checksum", work, client=actor.client, volume_id=volume_id)
    if prefers_async(exchange.request):
        address = f"/api/{API_VERSION}/jobs/{job.job_id}"
        headers = {"Location": address, "Preference-Applied": "respond-async"}
        return Response(schemas.encode({"job": job.job_id, "location": address}), 202, headers, _JSON)
    await job.finished.wait()
    if job.error is not None:
        raise job.error
    return Response(schemas.encode(job.result), headers={"Cache-Control": "no-store"}, media_type=_JSON)


def _request(exchange: Exchange, kind: type[R]) -> R:
    return decode(dict(exchange.request.query_params), kind, from_query=True)[0]


def _volume_id(exchange: Exchange) -> str:
    """Raises VolumeNotFound: what is no uid is no volume's."""
    given = exchange.parameters["vid"]
    volume_id = normalise_uid(given)
    if volume_id is None:
        raise VolumeNotFound(given[:80])
    return volume_id


def content_disposition(image: Image) -> str:
    """A file name that is safe wherever it is saved (RFC 6266), and the volume's own for those who read it all."""
    plain = file_name(image.volume, image.format)
    # Without what moves the cursor, turns the direction of the text, or leads into another directory.
    shown = "".join(
        one for one in image.volume.meta.name if unicodedata.category(one)[0] != "C" and one not in '/\\:*?"<>|'
    )
    shown = shown[:_LONGEST_NAME].strip(". ")
    extension = plain.rpartition(".")[2]
    full = f"{shown}.{extension}" if shown else plain
    if full == plain:
        return f'attachment; filename="{plain}"'
    return f"attachment; filename=\"{plain}\"; filename*=UTF-8''{quote(full, safe='')}"


def _query(name: str, schema: Json, description: str) -> Json:
    return {"name": name, "in": "query", "schema": schema, "description": description}


def _header(name: str, description: str) -> Json:
    return {"name": name, "in": "header", "schema": {"type": "string"}, "description": description}


def _json_answer(description: str, name: str) -> Json:
    schema = {"$ref": f"#/components/schemas/{name}"}
    return {"description": description, "content": {_JSON: {"schema": schema}}}


_CLIENT: Final[Json] = {"name": "client_uid", "in": "query", "schema": {"type": "string", "pattern": UID_PATTERN}}
_FORMAT: Final = _query("format", {"enum": [one.value for one in DataFormat], "default": "raw"}, "of the image")
_ETAG: Final = {"ETag": {"schema": {"type": "string"}}}
_BYTES: Final[Json] = {BINARY: {"schema": {"type": "string", "format": "binary"}}}
_MULTIPART: Final[Json] = {"multipart/byteranges": {"schema": {"type": "string", "format": "binary"}}}
_READING: Final = (
    VolumeNotFound,
    VolumeLocked,
    VolumeExported,
    VolumeWaiting,
    FormatUnsupported,
    ImageInUse,
    ImageDamaged,
    ImageChanged,
    InvalidValue,
)
_DATA: Final[dict[str, Json]] = {
    "200": {"description": "all of it", "headers": _ETAG, "content": _BYTES},
    "304": {"description": "the caller has it already", "headers": _ETAG},
}
_PART: Final[Json] = {"description": "the ranges", "headers": _ETAG, "content": {**_BYTES, **_MULTIPART}}
_CONDITIONS: Final = (
    _header("If-Match", "Only if the bytes are those with this ETag, else 412."),
    _header("If-None-Match", "304 if the bytes are those with this ETag."),
)
_RANGES: Final = (
    _header("Range", "`bytes=FIRST-LAST`, or several."),
    _header("If-Range", "Everything instead, if the bytes are not those with this ETag any more."),
)
_CHECKSUM_PARAMETERS: Final = (
    _CLIENT,
    _query("algorithm", {"enum": [one.value for one in Algorithm], "default": "sha256"}, "how it is hashed"),
    _query("method", {"enum": ["blocks", "plain"], "default": "blocks"}, "in blocks, or all in a row"),
    _header("Prefer", "`respond-async` answers 202 with the job's address at once."),
)
_BEGUN: Final[Json] = {
    "description": "begun; the Location header is the job's address",
    "content": {_JSON: {"schema": {"type": "object", "properties": {"job": {"type": "string"}}}}},
}
_PAGE: Final = (
    _CLIENT,
    _query("start", {"type": "integer", "minimum": 0, "maximum": MAX_VOLUME_BYTES}, "the first byte of interest"),
    _query("limit", {"type": "integer", "minimum": 1, "maximum": MOST_EXTENTS}, "how many extents at the most"),
)

DATA_ROUTES: Final = (
    Route(
        "GET",
        "volumes/{vid}/data",
        data,
        {**_DATA, "206": _PART},
        (*_READING, PreconditionFailed, RangeNotSatisfiable),
        (_CLIENT, _FORMAT, *_CONDITIONS, *_RANGES),
    ),
    Route(
        "HEAD",
        "volumes/{vid}/data",
        data,
        _DATA,
        (*_READING, PreconditionFailed),
        (_CLIENT, _FORMAT, *_CONDITIONS),
    ),
    Route(
        "GET",
        "volumes/{vid}/extents",
        extents,
        {"200": _json_answer("a page of the extents", "ExtentsAnswer")},
        _READING,
        _PAGE,
        types=(ExtentsAnswer,),
    ),
    Route(
        "GET",
        "volumes/{vid}/checksum",
        checksum,
        {"200": _json_answer("the checksum", "ChecksumAnswer"), "202": _BEGUN},
        (*_READING, JobCancelled),
        _CHECKSUM_PARAMETERS,
        types=(ChecksumAnswer,),
    ),
)
