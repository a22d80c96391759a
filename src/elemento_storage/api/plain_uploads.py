"""Uploads in one request, for small tools: ``curl -T`` and ``curl -F``. Who wants to go on after a break uses tus."""

from collections.abc import Mapping
from typing import Final

import msgspec
from starlette.responses import Response

from elemento_storage import API_VERSION
from elemento_storage.api import schemas, tus_headers, upload_requests
from elemento_storage.api.decode import UID_PATTERN, ignored_keys
from elemento_storage.api.iso_schemas import IsoAnswer, iso_answer
from elemento_storage.api.multipart import Form
from elemento_storage.api.route import Exchange, Json, Route, prefers_async
from elemento_storage.api.schemas import CreateAnswer
from elemento_storage.api.upload_bodies import feed, pieces, pour
from elemento_storage.api.upload_requests import Told
from elemento_storage.api.upload_schemas import FillRequest, IsoUploadRequest, UploadRequest
from elemento_storage.api.volume_calls import create_answer
from elemento_storage.errors import (
    BodyTooLarge,
    Conflict,
    InvalidRequest,
    InvalidValue,
    JobCancelled,
    LocationUnavailable,
    MissingKey,
    NoRoom,
    NotOwner,
    UploadStalled,
    VolumeLocked,
    VolumeNotFound,
)
from elemento_storage.model import MAX_VOLUME_BYTES, Volume, VolumeFormat, in_gigabytes
from elemento_storage.progress import Progress
from elemento_storage.service.uploading import Whole

_FORM: Final = "multipart/form-data"
_FILLS: Final = ("volume_id", "vid", "volumeID")


async def create_upload(exchange: Exchange) -> Response:
    """Create a volume of the image in the body: its bytes, with the keys in the query; or a form with a file.

    In a form the fields come before the file, whose name is ignored.
    """
    return await _upload(exchange, "create/upload")


async def iso_create_upload(exchange: Exchange) -> Response:
    """Create an ISO volume with its content, or fill the one that waits for it and that `volume_id` names.

    The body is the ISO image, with the keys in the query; or a form, with the fields before the file.
    """
    return await _upload(exchange, "iso/create/upload")


async def _upload(exchange: Exchange, path: str) -> Response:
    request = exchange.request
    content_type = request.headers.get("content-type", "")
    values: dict[str, str] = dict(request.query_params)
    length = tus_headers.number(request.headers, "Content-Length")
    if length is not None and length > MAX_VOLUME_BYTES:
        raise BodyTooLarge(f"an image has at most {MAX_VOLUME_BYTES} bytes")
    form: Form | None = None
    if content_type.partition(";")[0].strip().lower() == _FORM:
        stall_s = exchange.services.core.settings.upload_stall
        form = Form(content_type, pieces(request, exchange.stopping, stall_s))
        values |= await form.fields()
    said = _told(exchange, path, values)
    whole = await exchange.services.uploading.whole(said.incoming, length)
    try:
        await _receive(exchange, whole, form)
    except BaseException:
        await whole.drop()
        raise
    return await _finish(exchange, path, whole, said)


def _told(exchange: Exchange, path: str, values: Mapping[str, str]) -> Told:
    if any(key in values for key in _FILLS):
        return upload_requests.told(exchange.caller, values)
    read = upload_requests.image if path == "create/upload" else upload_requests.iso
    return read(exchange.caller, values)


async def _receive(exchange: Exchange, whole: Whole, form: Form | None) -> None:
    if form is not None:
        await feed(form.file(), whole.receiving)
        return
    uploading = exchange.services.uploading
    stall_s = exchange.services.core.settings.upload_stall
    await pour(exchange.request, whole.receiving, stall_s=stall_s, by_thread=uploading.has_thread)


async def _finish(exchange: Exchange, path: str, whole: Whole, said: Told) -> Response:
    async def work(progress: Progress) -> msgspec.Struct:
        return _answer(await whole.finish(progress))

    jobs = exchange.services.core.jobs
    incoming = said.incoming
    job = jobs.start(path, work, client=incoming.creator_id or None, volume_id=incoming.volume_id)
    headers = ignored_keys(said.ignored)
    if prefers_async(exchange.request):
        address = f"/api/{API_VERSION}/jobs/{job.job_id}"
        headers |= {"Location": address, "Preference-Applied": "respond-async"}
        return _json({"job": job.job_id, "location": address}, 202, headers)
    await job.finished.wait()
    if job.error is not None:
        raise job.error
    return _json(job.result, 200, headers)


def _answer(volume: Volume) -> msgspec.Struct:
    if volume.meta.format is VolumeFormat.ISO:
        return iso_answer(volume)
    return create_answer(volume, in_gigabytes(volume.size_bytes))


def _json(answer: object, status: int, headers: Mapping[str, str]) -> Response:
    return Response(schemas.encode(answer), status, headers, "application/json")


def _query(*kinds: type[msgspec.Struct]) -> tuple[Json, ...]:
    """The keys of all kinds of requests, as parameters of the query; what is required depends on the kind."""
    names = dict.fromkeys(key.encode_name for kind in kinds for key in msgspec.structs.fields(kind))
    return tuple({"name": name, "in": "query", "schema": _schema_of(name)} for name in names)


def _schema_of(name: str) -> Json:
    return {"type": "string", "pattern": UID_PATTERN} if name in ("creatorID", "volume_id") else {"type": "string"}


_BODY: Final[Json] = {
    "content": {
        "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
        _FORM: {"schema": {"type": "object", "properties": {"file": {"type": "string", "format": "binary"}}}},
    }
}
_ERRORS: Final = (
    *(InvalidRequest, InvalidValue, MissingKey, BodyTooLarge, UploadStalled, NoRoom, LocationUnavailable),
    *(Conflict, JobCancelled, VolumeLocked, VolumeNotFound, NotOwner),
)


def _answers(kind: type[msgspec.Struct]) -> dict[str, Json]:
    schema = {"$ref": f"#/components/schemas/{kind.__name__}"}
    begun = {"type": "object", "properties": {"job": {"type": "string"}}}
    return {
        "200": {"description": "the volume is there", "content": {"application/json": {"schema": schema}}},
        "202": {
            "description": "all arrived; the Location header is the job's address",
            "content": {"application/json": {"schema": begun}},
        },
    }


PLAIN_UPLOAD_ROUTES: Final = tuple(
    Route(method, path, handle, _answers(answer), _ERRORS, parameters, _BODY, (answer,))
    for path, handle, answer, parameters in (
        ("create/upload", create_upload, CreateAnswer, _query(UploadRequest)),
        ("iso/create/upload", iso_create_upload, IsoAnswer, _query(IsoUploadRequest, FillRequest)),
    )
    for method in ("PUT", "POST")
)
