"""The headers of tus 1.0.0 (https://tus.io/protocols/resumable-upload), read and written."""

import base64
import binascii
import hashlib
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import formatdate
from typing import Final
from urllib.parse import unquote, urlsplit

from starlette.datastructures import Headers

from elemento_storage.errors import BodyTooLarge, InvalidValue, MissingKey, TusVersionUnsupported, UnsupportedMediaType
from elemento_storage.model import MAX_VOLUME_BYTES, normalise_uid
from elemento_storage.service.uploading import CHECKSUMS
from elemento_storage.uploads.sparse import CONTENT_TYPE as SPARSE

VERSION: Final = "1.0.0"
EXTENSIONS: Final = (
    *("creation", "creation-with-upload", "creation-defer-length", "expiration", "checksum", "termination"),
    *("concatenation", "elemento-sparse"),
)
OFFSET_STREAM: Final = "application/offset+octet-stream"
ALWAYS: Final = {"Tus-Resumable": VERSION, "Tus-Version": VERSION, "Cache-Control": "no-store"}
_MOST_METADATA_BYTES: Final = 64 * 1024
_MOST_PARTS: Final = 1000
_UPLOAD_PATH: Final = re.compile(r"/api/v1(?:\.0)?/uploads/([^/]+)/?")


@dataclass(frozen=True)
class Creation:
    """What a request that begins an upload says. ``values``: Upload-Metadata, decoded, without what is no text."""

    length: int | None
    metadata: str
    values: Mapping[str, str]
    concat: str
    parts: tuple[str, ...]

    @property
    def is_part(self) -> bool:
        """Whether it will be concatenated with others."""
        return self.concat == "partial"


def require_version(headers: Headers) -> None:
    """Raises TusVersionUnsupported."""
    version = headers.get("tus-resumable")
    if version != VERSION:
        told = "is missing" if version is None else f"is {version[:40]!r}"
        raise TusVersionUnsupported(f"the header Tus-Resumable {told}: this server speaks {VERSION}")


def number(headers: Headers, name: str) -> int | None:
    """A header that is a number of bytes. Raises InvalidValue."""
    text = headers.get(name)
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) <= 20):
        raise InvalidValue(f"'{name}' is {text[:40]!r}, it has to be a number of bytes", key=name)
    return int(text)


def length(headers: Headers) -> int | None:
    """Upload-Length. Raises InvalidValue, BodyTooLarge."""
    found = number(headers, "Upload-Length")
    if found == 0:
        raise InvalidValue("'Upload-Length' is 0: nothing is no image", key="Upload-Length")
    if found is not None and found > MAX_VOLUME_BYTES:
        raise BodyTooLarge(f"an upload has at most {MAX_VOLUME_BYTES} bytes (Tus-Max-Size), {found} were asked for")
    return found


def offset(headers: Headers) -> int:
    """Upload-Offset. Raises MissingKey, InvalidValue."""
    found = number(headers, "Upload-Offset")
    if found is None:
        raise MissingKey("Upload-Offset")
    return found


def creation(headers: Headers) -> Creation:
    """What a POST to ``uploads`` says. Raises MissingKey, InvalidValue, BodyTooLarge."""
    concat = headers.get("upload-concat", "").strip()
    parts: tuple[str, ...] = ()
    if concat.startswith("final;"):
        parts = tuple(_part_id(address) for address in concat.removeprefix("final;").split())
        if not 0 < len(parts) <= _MOST_PARTS:
            raise InvalidValue(f"'Upload-Concat' names {len(parts)} parts, 1 to {_MOST_PARTS} can be put together")
    elif concat not in ("", "partial"):
        raise InvalidValue("'Upload-Concat' has to be partial, or final; and the addresses of the parts")
    found = length(headers)
    deferred = headers.get("upload-defer-length")
    if deferred not in (None, "1"):
        raise InvalidValue("'Upload-Defer-Length' has to be 1", key="Upload-Defer-Length")
    if parts and (found is not None or deferred):
        raise InvalidValue("'Upload-Length' of an upload that is made of parts is theirs: leave it out")
    if found is not None and deferred:
        raise InvalidValue("there are both 'Upload-Length' and 'Upload-Defer-Length'", key="Upload-Length")
    if found is None and not parts and (not deferred or concat):
        raise MissingKey("Upload-Length")
    metadata = headers.get("upload-metadata", "")
    return Creation(found, metadata, parse_metadata(metadata), concat, parts)


def _part_id(address: str) -> str:
    match = _UPLOAD_PATH.fullmatch(unquote(urlsplit(address).path))
    upload_id = normalise_uid(match[1]) if match else None
    if upload_id is None:
        raise InvalidValue(
            f"'Upload-Concat' names {address[:200]!r}, which is no upload's address", key="Upload-Concat"
        )
    return upload_id


def parse_metadata(header: str) -> dict[str, str]:
    """Keys and values of Upload-Metadata; values that are no UTF-8 are left out. Raises InvalidValue."""
    if len(header) > _MOST_METADATA_BYTES:
        raise InvalidValue(f"'Upload-Metadata' is longer than {_MOST_METADATA_BYTES} bytes", key="Upload-Metadata")
    values: dict[str, str] = {}
    seen = set()
    for pair in header.split(",") if header.strip() else ():
        key, _, encoded = pair.strip(" ").partition(" ")
        if not key or key in seen:
            raise InvalidValue("'Upload-Metadata' has a key that is empty or there twice", key="Upload-Metadata")
        seen.add(key)
        try:
            values[key] = base64.b64decode(encoded.strip(" "), validate=True).decode()
        except UnicodeDecodeError:
            continue
        except (binascii.Error, ValueError):
            raise InvalidValue(f"'Upload-Metadata': {key[:40]!r} is not base64", key="Upload-Metadata") from None
    return values


def checksum(headers: Headers) -> tuple[str, bytes] | None:
    """Upload-Checksum: the algorithm and the digest. Raises InvalidValue."""
    header = headers.get("upload-checksum")
    if header is None:
        return None
    name, _, encoded = header.strip().partition(" ")
    if name not in CHECKSUMS:
        raise InvalidValue(f"'Upload-Checksum' is in {name[:40]!r}, it has to be in {', '.join(CHECKSUMS)}")
    try:
        digest = base64.b64decode(encoded.strip(), validate=True)
    except (binascii.Error, ValueError):
        digest = b""
    if len(digest) != hashlib.new(name, usedforsecurity=False).digest_size:
        raise InvalidValue(f"'Upload-Checksum' has no digest of {name} in base64", key="Upload-Checksum")
    return name, digest


def is_sparse(headers: Headers) -> bool:
    """Whether the body leaves out its zeros. Raises UnsupportedMediaType for what is no body of an upload."""
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind not in (OFFSET_STREAM, SPARSE):
        raise UnsupportedMediaType(f"the Content-Type is {kind[:80]!r}, it has to be {OFFSET_STREAM} or {SPARSE}")
    return kind == SPARSE


def has_body(headers: Headers) -> bool:
    """Whether a request brings bytes."""
    return headers.get("content-length", "0") != "0" or "transfer-encoding" in headers


def http_date(seconds: float) -> str:
    """A time as headers write it."""
    return formatdate(min(seconds, time.time() + 10**9), usegmt=True)
