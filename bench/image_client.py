"""Sends and fetches images as a good client of ours would: what is a hole is not sent, bytes go by the kernel."""

import base64
import json
import os
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bench.context import OWNER
from elemento_storage.durable import fsync_file
from elemento_storage.engine.content import Extent, FileContent, OpenFile, coarse
from elemento_storage.uploads.sparse import CONTENT_TYPE as SPARSE
from elemento_storage.uploads.sparse import FRAME

_PLAIN = "application/offset+octet-stream"
_BUFFER = 2**20
_WRITEBACK = 8 * 2**20
_CONNECTIONS = 2


@dataclass
class _Answer:
    status: int
    headers: dict[str, str]
    rest: bytearray  #: of the body, what came with the head


class _Connection:
    """HTTP/1.1 without a library: the figure is the server's, not the library's."""

    def __init__(self, host: str, port: int) -> None:
        self.socket = socket.create_connection((host, port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def head(self, method: str, path: str, **headers: object) -> None:
        lines = [f"{method} /api/v1.0/{path} HTTP/1.1", "Host: 127.0.0.1"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        self.socket.sendall(("\r\n".join(lines) + "\r\n\r\n").encode())

    def answer(self, *expected: int) -> _Answer:
        received = bytearray()
        while (end := received.find(b"\r\n\r\n")) < 0:
            piece = self.socket.recv(65536)
            if not piece:
                raise ConnectionError(f"the server hung up after {bytes(received[:300])!r}")
            received += piece
        first, *lines = received[:end].decode().split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        answer = _Answer(int(first.split(" ")[1]), headers, received[end + 4 :])
        if answer.status not in expected:
            raise RuntimeError(f"{answer.status}: {bytes(answer.rest[:500])!r}")
        return answer

    def body(self, answer: _Answer) -> bytes:
        missing = int(answer.headers.get("content-length", 0)) - len(answer.rest)
        while missing:
            piece = self.socket.recv(min(missing, _BUFFER))
            if not piece:
                raise ConnectionError("the server hung up within a body")
            answer.rest += piece
            missing -= len(piece)
        return bytes(answer.rest)

    def close(self) -> None:
        self.socket.close()


class ImageClient:
    """A client of one server."""

    def __init__(self, host: str, port: int) -> None:
        self._address = host, port

    def upload(self, image: Path, *, sparse: bool) -> str:
        """By tus, in one PATCH; with our extension for holes or all bytes. The new volume, which is on disk then."""
        file = OpenFile(str(image))
        connection = _Connection(*self._address)
        try:
            values = {"creatorID": OWNER, "name": "upload", "source_format": "raw"}
            told = ",".join(f"{key} {base64.b64encode(value.encode()).decode()}" for key, value in values.items())
            connection.head(
                "POST", "uploads", Tus_Resumable="1.0.0", Upload_Length=file.size_bytes, Upload_Metadata=told
            )
            upload = connection.answer(201).headers["location"].rpartition("/")[2]
            pieces = list(_frames(file)) if sparse else [(b"", 0, file.size_bytes)]
            connection.head(
                "PATCH",
                f"uploads/{upload}",
                Tus_Resumable="1.0.0",
                Upload_Offset=0,
                Content_Type=SPARSE if sparse else _PLAIN,
                Content_Length=sum(len(head) + length for head, _, length in pieces),
            )
            for head, start, length in pieces:
                if head:
                    connection.socket.sendall(head, socket.MSG_MORE)
                position = start
                while (left := start + length - position) > 0:
                    position += os.sendfile(connection.socket.fileno(), file.descriptor, position, left)
            return connection.answer(204).headers["elemento-volume"]
        finally:
            connection.close()
            file.close()

    def download(self, volume_id: str, target: Path, *, sparse: bool = True) -> None:
        """The disk as a raw image, on disk when this returns; ``sparse``: only what is data is fetched."""
        size, extents = self._extents(volume_id)
        wanted = [one for one in extents if not one.zero] if sparse else [Extent(0, size, zero=False, hole=False)]
        descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            os.ftruncate(descriptor, size)
            if sparse:
                parts = [wanted[first::_CONNECTIONS] for first in range(_CONNECTIONS)]
                threads = [threading.Thread(target=self._fetch, args=(volume_id, part, descriptor)) for part in parts]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
            else:
                self._fetch(volume_id, wanted, descriptor)
        finally:
            os.close(descriptor)
        fsync_file(str(target))

    def checksum(self, volume_id: str) -> str:
        """The block checksum."""
        connection = _Connection(*self._address)
        try:
            connection.head("GET", f"volumes/{volume_id}/checksum")
            return str(json.loads(connection.body(connection.answer(200)))["checksum"])
        finally:
            connection.close()

    def _extents(self, volume_id: str) -> tuple[int, list[Extent]]:
        connection = _Connection(*self._address)
        found: list[Extent] = []
        size = 0
        start: int | None = 0
        try:
            while start is not None:
                connection.head("GET", f"volumes/{volume_id}/extents?start={start}")
                page = json.loads(connection.body(connection.answer(200)))
                size, start = page["size"], page["next"]
                found += [Extent(one["start"], one["length"], one["zero"], one["hole"]) for one in page["extents"]]
        finally:
            connection.close()
        return size, list(coarse(found))

    def _fetch(self, volume_id: str, wanted: list[Extent], descriptor: int) -> None:
        connection = _Connection(*self._address)
        buffer = memoryview(bytearray(_BUFFER))
        try:
            for one in wanted:
                connection.head("GET", f"volumes/{volume_id}/data", Range=f"bytes={one.start}-{one.stop - 1}")
                rest = connection.answer(206).rest
                os.pwrite(descriptor, rest, one.start)
                position = begun = one.start + len(rest)
                while position < one.stop:
                    count = connection.socket.recv_into(buffer, min(_BUFFER, one.stop - position), socket.MSG_WAITALL)
                    if not count:
                        raise ConnectionError("the server hung up within a range")
                    os.pwrite(descriptor, buffer[:count], position)
                    position += count
                    if position - begun >= _WRITEBACK or position == one.stop:
                        os.posix_fadvise(descriptor, begun, position - begun, os.POSIX_FADV_DONTNEED)
                        begun = position
        finally:
            connection.close()


def _frames(file: OpenFile) -> Iterator[tuple[bytes, int, int]]:
    """Frames of the extension for holes: the head, and where the data behind it lies in the file."""
    start = length = 0
    for extent in coarse(FileContent(file).extents(0, file.size_bytes)):
        if extent.zero:
            yield FRAME.pack(length, extent.length), start, length
            start, length = extent.stop, 0
        else:
            start, length = extent.start, extent.length
    if length:
        yield FRAME.pack(length, 0), start, length
