"""The web page: what `make setup` built of ``web/``, at ``/`` and below ``/assets/``.

The server runs without it, and then says at ``/`` how to build it. Everything is read once, at the first request for
it, so that a path in a request is never a path on the disk. What is below ``/assets/`` has a hash of its content in its
name and stays in browsers for good; the rest is asked for every time, and answered with 304 while it is the same.
"""

import asyncio
import hashlib
import mimetypes
import os
from dataclasses import dataclass, field
from typing import Final

from starlette.requests import Request
from starlette.responses import Response

BUILT: Final = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "page")
"""Where the build puts the page."""

_MISSING: Final = """\
The Elemento Storage Server runs here. Its web page was not built.

To build it: `make setup` where the server's source is (it needs node 18 or newer, and npm), then restart the server.

The API is at /api/v1.0/, and is described at /schema.
"""

# Nothing from elsewhere, nothing inline, no place in another page, and no markup made from texts.
SECURITY_HEADERS: Final = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; font-src 'self'; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
_ENCODINGS: Final = (("br", ".br"), ("gzip", ".gz"))  # the better first
_FOR_GOOD: Final = "public, max-age=31536000, immutable"
_ASK_EVERY_TIME: Final = "no-cache"


@dataclass(frozen=True)
class _File:
    """One file of the page, as it is and compressed."""

    media_type: str
    cache: str
    etag: str
    plain: bytes
    encoded: dict[str, bytes] = field(default_factory=dict)


class Page:
    """The files of the page. None is there when it was not built."""

    def __init__(self, directory: str = BUILT) -> None:
        self._directory = directory
        self._files: dict[str, _File] | None = None

    async def answer(self, request: Request) -> Response | None:
        """The answer to GET or HEAD of a path outside the API; None when the page has no such file."""
        if self._files is None:
            self._files = await asyncio.to_thread(_read, self._directory)
        path: str = request.scope["path"]
        found = self._files.get("/index.html" if path == "/" else path)
        if found is None:
            return Response(_MISSING, media_type="text/plain", headers=dict(SECURITY_HEADERS)) if path == "/" else None
        return _respond(request, found)


def _respond(request: Request, found: _File) -> Response:
    encoding, body = _negotiate(request.headers.get("accept-encoding", ""), found)
    etag = f'"{found.etag}-{encoding}"' if encoding else f'"{found.etag}"'
    headers = {**SECURITY_HEADERS, "Cache-Control": found.cache, "ETag": etag, "Vary": "Accept-Encoding"}
    if etag in [one.strip().removeprefix("W/") for one in request.headers.get("if-none-match", "").split(",")]:
        return Response(status_code=304, headers=headers)
    if encoding:
        headers["Content-Encoding"] = encoding
    response = Response(body, headers=headers, media_type=found.media_type)
    if request.method == "HEAD":
        response.body = b""
    return response


def _negotiate(accepted: str, found: _File) -> tuple[str, bytes]:
    """The best form that the client takes (RFC 9110, section 12.5.3); the plain one has no name."""
    refused = {"q=0", "q=0.0", "q=0.00", "q=0.000"}
    wanted = set()
    for one in accepted.lower().split(","):
        name, _, weight = one.partition(";")
        if weight.replace(" ", "") not in refused:
            wanted.add(name.strip())
    return next(
        ((name, found.encoded[name]) for name, _ in _ENCODINGS if name in wanted and name in found.encoded),
        ("", found.plain),
    )


def _read(directory: str) -> dict[str, _File]:
    """Blocks. Every file below the directory by its path in requests."""
    files = {}
    endings = tuple(ending for _, ending in _ENCODINGS)
    for parent, _, names in os.walk(directory):
        for name in names:
            if name.endswith(endings) or name.startswith("."):
                continue
            full = os.path.join(parent, name)
            path = "/" + os.path.relpath(full, directory).replace(os.sep, "/")
            plain = _bytes(full)
            files[path] = _File(
                media_type=_media_type(name),
                cache=_FOR_GOOD if path.startswith("/assets/") else _ASK_EVERY_TIME,
                etag=hashlib.sha256(plain).hexdigest()[:16],
                plain=plain,
                encoded={word: _bytes(full + end) for word, end in _ENCODINGS if os.path.exists(full + end)},
            )
    return files


def _media_type(name: str) -> str:
    if name.endswith((".js", ".mjs")):
        return "text/javascript"  # the machine's table of types may say otherwise
    if name.endswith(".woff2"):
        return "font/woff2"
    return mimetypes.guess_type(name)[0] or "application/octet-stream"


def _bytes(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()
