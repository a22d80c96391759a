"""cloudinit/metadata, as published clients speak it: the call's JSON in the path, files in a form."""

import base64
import binascii
import hashlib
from typing import Any, Final

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from elemento_storage.api import schemas
from elemento_storage.api.body import FORM, media_type, read_form, read_json
from elemento_storage.api.call import idempotency_key, idempotency_scope
from elemento_storage.api.decode import checked_name, decode, ignored_keys, parse_object
from elemento_storage.api.metadata_schemas import (
    MetadataAnswer,
    MetadataCreateRequest,
    MetadataFileRequest,
    metadata_answer,
)
from elemento_storage.api.route import Exchange, Json, Route
from elemento_storage.errors import (
    BodyTooLarge,
    Conflict,
    ImageInUse,
    InvalidRequest,
    InvalidValue,
    JobCancelled,
    KeyReused,
    LocationUnavailable,
    MissingKey,
    NoRoom,
    NotJSON,
    NotOwner,
    TooManyFiles,
    UnsupportedMediaType,
    VolumeExported,
    VolumeLocked,
    VolumeNotFound,
)
from elemento_storage.progress import Progress
from elemento_storage.service.cloud_metadata import LARGEST_FILE_BYTES, MOST_FILES, NewMetadata
from elemento_storage.service.idempotency import derive_uid

_PATH: Final = "cloudinit/metadata"
_FILE: Final = "file"
_DATA: Final = "data"
_IN_PATH: Final = "base64"
_VOLUME_KEYS: Final = ("vid", "volume_id", "volumeID")
_MOST_BODY_BYTES: Final = LARGEST_FILE_BYTES + 256 * 1024  #: one file of the largest kind, and what is around it


async def metadata(exchange: Exchange) -> Response:
    """Make a cloud-init metadata volume, or send it a file.

    The first call names `creatorID`, `name` and `expectedFiles` and may bring a file; every following one `vid` and a
    file, as the field `file` of a form. When all files are there, the seed ISO that cloud-init reads is made of them.
    A file that is sent again replaces the old one. The JSON of the call is the body, the field `data` of the form, or
    the last part of the path, in base64.
    """
    in_path = exchange.parameters.get(_IN_PATH)
    values, files, ignored = await read_call(exchange.request, in_path, exchange.services.core.settings.max_body)
    exchange.payload.update(values)
    if all(values.get(name) is None for name in _VOLUME_KEYS):
        return await _create(exchange, values, files, ignored)
    fill = exchange.caller.stands_for(creates=False)
    request, unknown = decode(values, MetadataFileRequest, fill=fill)
    if not files:
        raise MissingKey(_FILE)
    adding = exchange.services.metadata.add(exchange.actor(request.creator_id), request.vid, files)
    state = await exchange.change(adding)
    return _respond(schemas.encode(metadata_answer(state)), 200 if state.complete else 206, [*ignored, *unknown])


async def _create(exchange: Exchange, values: Json, files: dict[str, bytes], ignored: list[str]) -> Response:
    fill = exchange.caller.stands_for(creates=True)
    request, unknown = decode(values, MetadataCreateRequest, fill=fill)
    exchange.actor(request.creator_id)

    async def create(seed: str | None) -> bytes:
        new = NewMetadata(
            creator_id=request.creator_id,
            name=checked_name(request.name),
            expected=request.expected_files,
            private=request.private,
            bootable=request.bootable,
            clonable=request.clonable,
            alg=request.alg,
            volume_id=derive_uid(seed, 0) if seed else None,
        )
        return schemas.encode(metadata_answer(await exchange.services.metadata.create(new, files, Progress())))

    ignored = [*ignored, *unknown]
    key = idempotency_key(exchange.request.headers)
    if key is None:
        return _respond(await exchange.change(create(None)), 200, ignored)
    scope = idempotency_scope(exchange.caller, request.creator_id, _PATH)
    sent = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    body = msgspec.json.encode([values, sent], order="sorted")
    answer, replayed = await exchange.change(exchange.services.idempotency.once(scope, key, body, create))
    return _respond(answer, 200, ignored, {"Idempotency-Replayed": "true"} if replayed else {})


def _respond(answer: bytes, status: int, ignored: list[str], headers: dict[str, str] | None = None) -> Response:
    return Response(answer, status, {**ignored_keys(ignored), **(headers or {})}, "application/json")


async def read_call(request: Request, in_path: str | None, most_json: int) -> tuple[Json, dict[str, bytes], list[str]]:
    """The call's JSON, the files by name, and the names of fields that mean nothing here.

    Raises InvalidRequest, BodyTooLarge, UnsupportedMediaType.
    """
    values = {} if in_path is None else _decode_base64(in_path)
    if media_type(request) != FORM:
        body = await read_json(request, most_json)
        return {**parse_object(body), **values}, {}, []
    form = await read_form(request, most_bytes=_MOST_BODY_BYTES, most_files=MOST_FILES)
    ignored = [name for name in form.fields if name not in {_DATA, _FILE}]
    if _FILE in form.fields:
        raise InvalidValue("'file' has to be a file with a name, not a text", key=_FILE)
    if _DATA in form.fields:
        data = form.fields[_DATA]
        values = {**(parse_object(data.encode()) if data.lstrip().startswith("{") else _decode_base64(data)), **values}
    files: dict[str, bytes] = {}
    for file in form.files:
        if file.field != _FILE:
            ignored.append(file.field)
        elif file.name in files:
            raise InvalidValue(f"'file' is there twice with the name {file.name[:80]!r}", key=_FILE)
        else:
            files[file.name] = file.content
    return values, files, ignored


def _decode_base64(text: str) -> dict[str, Any]:
    """The JSON object in base64, of the standard alphabet or the one for URLs, padded or not. Raises NotJSON."""
    compact = "".join(text.split()).replace("-", "+").replace("_", "/").rstrip("=")
    try:
        content = base64.b64decode(compact + "=" * (-len(compact) % 4), validate=True)
    except (binascii.Error, ValueError):
        raise NotJSON("what stands for the call's JSON is not base64") from None
    return parse_object(content)


_REF: Final = "#/components/schemas/"
_JSON_KEYS: Final[Json] = {
    "anyOf": [{"$ref": f"{_REF}MetadataCreateRequest"}, {"$ref": f"{_REF}MetadataFileRequest"}],
}
_FORM_KEYS: Final[Json] = {
    "type": "object",
    "properties": {
        _DATA: {"type": "string", "description": "the call's JSON, as it is or in base64"},
        _FILE: {"type": "string", "format": "binary", "description": "its file name is the file's name in the seed"},
    },
}


def _answers(description: str) -> Json:
    content = {"application/json": {"schema": {"$ref": f"{_REF}MetadataAnswer"}}}
    return {"description": description, "content": content}


_ANSWERS: Final[Json] = {
    "200": _answers("the volume was made, or all files are there and the seed with them"),
    "206": _answers("the file is there and others are still to come"),
}
_ERRORS: Final = (
    *(InvalidRequest, MissingKey, InvalidValue, NotJSON, BodyTooLarge, UnsupportedMediaType),
    *(VolumeNotFound, NotOwner, Conflict, VolumeExported, ImageInUse, TooManyFiles, JobCancelled, KeyReused),
    *(VolumeLocked, LocationUnavailable, NoRoom),
)
_TYPES: Final = (MetadataCreateRequest, MetadataFileRequest, MetadataAnswer)
_KEY_HEADER: Final[Json] = {
    "name": "Idempotency-Key",
    "in": "header",
    "description": "Of a first call: the same key and request get the same answer, once only done.",
    "schema": {"type": "string", "pattern": "^[!-~]{1,255}$"},
}

METADATA_ROUTES: Final = (
    Route(
        "POST",
        _PATH,
        metadata,
        _ANSWERS,
        _ERRORS,
        (_KEY_HEADER,),
        {"content": {"application/json": {"schema": _JSON_KEYS}, FORM: {"schema": _FORM_KEYS}}},
        _TYPES,
    ),
    Route(
        "POST",
        f"{_PATH}/{{{_IN_PATH}...}}",
        metadata,
        _ANSWERS,
        _ERRORS,
        (_KEY_HEADER,),
        {"content": {FORM: {"schema": _FORM_KEYS}}},
        _TYPES,
    ),
)
