"""Reading the bodies of requests, with limits: JSON, and forms with files."""

from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Final

from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from elemento_storage.errors import BodyTooLarge, InvalidRequest, UnsupportedMediaType

_JSON: Final = "application/json"
FORM: Final = "multipart/form-data"
_MOST_FIELDS: Final = 32


@dataclass(frozen=True)
class FormFile:
    """A file of a form: the field's name, the file's own, and its bytes."""

    field: str
    name: str
    content: bytes


@dataclass(frozen=True)
class Form:
    """A form that was read into memory."""

    fields: dict[str, str] = field(default_factory=dict)
    files: list[FormFile] = field(default_factory=list)


def media_type(request: Request) -> str:
    """The type of the body, in lower case and without parameters; JSON where none is named."""
    return request.headers.get("content-type", _JSON).partition(";")[0].strip().lower()


async def read_json(request: Request, most_bytes: int) -> bytes:
    """The body of a call. Raises BodyTooLarge, UnsupportedMediaType."""
    content_type = media_type(request)
    body = b"".join([piece async for piece in _limited(request, most_bytes)])
    if body and content_type != _JSON and not content_type.endswith("+json"):
        raise UnsupportedMediaType(f"the Content-Type is {content_type[:80]!r}, it has to be {_JSON}")
    return body


class _FormParser(MultiPartParser):
    """Starlette's, which takes a form that breaks off for one that is over."""

    def __init__(self, headers: Headers, stream: AsyncGenerator[bytes, None], *, max_files: int, max_fields: int):
        super().__init__(headers, self._to_the_end(stream), max_files=max_files, max_fields=max_fields)
        self._is_over = False

    def on_end(self) -> None:
        self._is_over = True

    async def _to_the_end(self, stream: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
        async for piece in stream:
            yield piece
        if not self._is_over:
            raise MultiPartException("it breaks off before its last boundary")


async def read_form(request: Request, *, most_bytes: int, most_files: int) -> Form:
    """A form of small files, which are kept in memory: nothing is written where it may fill another's disk.

    Raises BodyTooLarge, InvalidRequest.
    """
    parser = _FormParser(request.headers, _limited(request, most_bytes), max_files=most_files, max_fields=_MOST_FIELDS)
    parser.spool_max_size = most_bytes + 1
    try:
        parsed = await parser.parse()
    except MultiPartException as error:
        raise InvalidRequest(f"the form in the body cannot be read: {error.message}") from None
    form = Form()
    for name, value in parsed.multi_items():
        if isinstance(value, UploadFile):
            form.files.append(FormFile(name, value.filename or "", await value.read()))
            await value.close()
        else:
            form.fields[name] = value
    return form


async def _limited(request: Request, most_bytes: int) -> AsyncGenerator[bytes, None]:
    received = 0
    async for piece in request.stream():
        received += len(piece)
        if received > most_bytes:
            raise BodyTooLarge(f"the body is larger than {most_bytes} bytes")
        yield piece
