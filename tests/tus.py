"""A client of tus that says exactly what a test wants it to, and one that breaks off."""

import base64
import contextlib
import socket
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx

from tests.live import ALICE, LiveServer

OFFSET = "application/offset+octet-stream"
SPARSE = "application/vnd.elemento.sparse+octet-stream"


def metadata(values: Mapping[str, Any]) -> str:
    """The header Upload-Metadata."""
    texts = {key: str(value).lower() if isinstance(value, bool) else str(value) for key, value in values.items()}
    return ",".join(f"{key} {base64.b64encode(text.encode()).decode()}" for key, text in texts.items())


def sparse_body(*frames: tuple[bytes, int]) -> bytes:
    """Data and the zeros behind it, and so on."""
    return b"".join(struct.pack(">QQ", len(data), zeros) + data for data, zeros in frames)


def begin(server: LiveServer, length: int | None, body: bytes | None = None, **more: Any) -> httpx.Response:
    """POST uploads. Keys with a capital are headers, the others metadata."""
    headers = {"Tus-Resumable": "1.0.0"} | {k.replace("_", "-"): v for k, v in more.items() if k[0].isupper()}
    if length is not None:
        headers["Upload-Length"] = str(length)
    values = {k: v for k, v in more.items() if not k[0].isupper()}
    if not values.pop("bare", False):
        values = {"creatorID": ALICE, "name": "disk"} | values
    if values:
        headers.setdefault("Upload-Metadata", metadata(values))
    if body is not None:
        headers.setdefault("Content-Type", OFFSET)
    return server.http.post("uploads", headers=headers, content=body)


def begun(server: LiveServer, length: int | None, **more: Any) -> str:
    """The id of a new upload."""
    response = begin(server, length, **more)
    assert response.status_code == 201, response.text
    return response.headers["Location"].rpartition("/")[2]


def patch(server: LiveServer, upload: str, offset: int, data: Any, **more: str) -> httpx.Response:
    """PATCH uploads/<id>."""
    headers = {"Tus-Resumable": "1.0.0", "Upload-Offset": str(offset), "Content-Type": OFFSET}
    headers |= {key.replace("_", "-"): value for key, value in more.items()}
    return server.http.patch(f"uploads/{upload}", headers=headers, content=data)


def head(server: LiveServer, upload: str, **query: str) -> httpx.Response:
    """HEAD uploads/<id>."""
    return server.http.head(f"uploads/{upload}", headers={"Tus-Resumable": "1.0.0"}, params=query)


def offset(server: LiveServer, upload: str) -> int:
    """Where an upload stands."""
    response = head(server, upload)
    assert response.status_code == 200, response.headers
    return int(response.headers["Upload-Offset"])


def end(server: LiveServer, upload: str, **query: str) -> httpx.Response:
    """DELETE uploads/<id>."""
    return server.http.delete(f"uploads/{upload}", headers={"Tus-Resumable": "1.0.0"}, params=query)


def broken_off(
    server: LiveServer, upload: str, at: int, length: int, data: bytes, *, chunked: bool = False
) -> socket.socket:
    """A PATCH that promises ``length`` bytes and has sent ``data``; the connection is still open."""
    connection = socket.create_connection((server.listen_host, server.port), 10)
    size = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {length}"
    connection.sendall(
        f"PATCH /api/v1.0/uploads/{upload} HTTP/1.1\r\nHost: 127.0.0.1\r\nTus-Resumable: 1.0.0\r\n"
        f"Upload-Offset: {at}\r\nContent-Type: {OFFSET}\r\n{size}\r\n\r\n".encode()
        + (f"{len(data):x}\r\n".encode() + data + b"\r\n" if chunked else data)
    )
    return connection


def content_of(server: LiveServer, upload: str, location: str = "disk") -> Path:
    """The file that an upload's bytes go into."""
    (place,) = (server.root / location / ".elemento" / "staging").glob(f"{upload}.*.lasting")
    return place / ".elemento-tmp-content"


def places(server: LiveServer, location: str = "disk") -> list[str]:
    """What is reserved, and what is known of uploads that are not over: nothing once all is done."""
    work = server.root / location / ".elemento"
    found = [path.name for path in (work / "staging").iterdir()]
    with contextlib.suppress(FileNotFoundError):
        for path in (work / "uploads").iterdir():
            text = (path / "upload.json").read_text() if (path / "upload.json").exists() else "no record"
            if '"phase":"done"' not in text and '"phase":"failed"' not in text:
                found.append(f"{path.name}: {text}")
    return found
