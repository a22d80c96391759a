"""``client.uploads``, and how a file becomes a volume: tus 1.0.0, resumed after whatever breaks.

What is known of an upload that is under way is on the server; a new process needs its id only. ``Record`` keeps that
in a small file beside what identifies the local one, so that nothing is sent that has already arrived.
"""

import base64
import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from struct import Struct as Packing
from typing import Any, Final

import msgspec

from elemento_storage.client.errors import (
    ApiError,
    ConnectionBroken,
    FileChanged,
    Gone,
    NotFound,
    Unreachable,
    error_of_answer,
    error_of_job,
    error_of_status,
)
from elemento_storage.client.exchange import M as Kind
from elemento_storage.client.exchange import Parts, Plan, Repeat, Request, Response, Send, Sleep, Work, operation
from elemento_storage.client.group import Group, decoded, uid
from elemento_storage.client.pace import Pace
from elemento_storage.client.small_file import read_json, remove, write_json
from elemento_storage.client.types import OnProgress, Upload, Volume

UploadList = list[Upload]
_TUS: Final = {"Tus-Resumable": "1.0.0"}
_PLAIN: Final = "application/offset+octet-stream"
_SPARSE: Final = "application/vnd.elemento.sparse+octet-stream"
_FRAME: Final = Packing(">QQ")
_CHUNK: Final = 2**20
#: Statuses of a PATCH after which the offset is asked for and the upload goes on.
_GO_ON: Final = frozenset({408, 409, 423, 460, 503})
#: Statuses that say nothing of what will become of an upload.
_PASSING: Final = frozenset({401, 403, 423, 429, 503, 504, 507})
_BETWEEN_LOOKS_S: Final = 0.25


class Uploads(Group[Kind]):
    """Resumable uploads that are under way, or were not long ago."""

    @operation
    def list(self) -> Plan[UploadList]:
        """The client's uploads, oldest first."""
        return self._look("uploads", UploadList)

    @operation
    def get(self, upload_id: str) -> Plan[Upload]:
        """One upload."""
        return self._look(f"uploads/{uid(upload_id)}", Upload)

    @operation
    def cancel(self, upload_id: str) -> Plan[None]:
        """End an upload; what arrived is removed."""
        yield from self._send(_request("DELETE", uid(upload_id), self._query(), repeat=Repeat.SAFE))


@dataclass(frozen=True)
class Source:
    """A local file as it was when its upload began."""

    path: str
    size: int
    mtime_ns: int
    inode: int

    def still(self, status: os.stat_result) -> bool:
        """Whether it is the same file with the same content, as far as can be told."""
        return (status.st_size, status.st_mtime_ns, status.st_ino) == (self.size, self.mtime_ns, self.inode)


@dataclass(frozen=True)
class Piece:
    """Bytes of a file, and a hole behind them."""

    start: int
    length: int
    zeros: int


class Sender(Group[Kind]):
    """What sends files: the groups ``volumes`` and ``isos`` are such."""

    def send_file(
        self,
        path: str,
        metadata: Mapping[str, Any],
        *,
        resume_file: str | None,
        verify: bool,
        on_progress: OnProgress | None,
    ) -> Plan[Volume]:
        """Upload a file; the volume that was made of it.

        Raises FileChanged, Refused, what the server says, and the last ConnectionBroken when nothing arrives any more.
        """
        source: Source = yield Work(lambda: look_at(path))
        pace = Pace("sending", source.size, on_progress)
        told = {"creatorID": self.uid, **metadata}
        upload_id, offset = yield from self._found_again(source, told, resume_file)
        if upload_id is None:
            if verify:
                told["checksum"] = "sha256:" + (yield Work(lambda: digest(path, source.size, pace)))
            upload_id = yield from self._begin(source, told)
            if resume_file is not None:
                record = {**_identity(source, told), "upload_id": upload_id}
                yield Work(lambda: write_json(resume_file, record))
            offset = 0
        pace.starts_at(offset)
        try:
            job_id = yield from self._send_rest(source, upload_id, offset, pace)
            volume_id = yield from self._become_volume(upload_id, job_id, on_progress)
            volume: Volume = yield from self._read("info", Volume, volume_id=volume_id, client_uid=self.uid)
        except FileChanged:
            yield from self._send(_request("DELETE", upload_id, self._query(), repeat=Repeat.SAFE))
            if resume_file is not None:
                yield Work(lambda: remove(resume_file))
            raise
        except ApiError as error:
            # It is over. After anything else the same call in a new process finds what became of it.
            if resume_file is not None and error.status not in _PASSING:
                yield Work(lambda: remove(resume_file))
            raise
        if resume_file is not None:
            yield Work(lambda: remove(resume_file))
        return volume

    def _begin(self, source: Source, told: Mapping[str, Any]) -> Plan[str]:
        headers = {**_TUS, "Upload-Length": str(source.size), "Upload-Metadata": metadata_header(told)}
        # A second try may leave an upload that nobody goes on with; it makes no volume, and expires.
        response = yield from self._send(Request("POST", "uploads", b"", headers, self._query(), Repeat.SAFE))
        return uid(response.headers.get("location", "").rstrip("/").rpartition("/")[2])

    def _found_again(
        self, source: Source, told: Mapping[str, Any], resume_file: str | None
    ) -> Plan[tuple[str | None, int]]:
        """The upload that an earlier process began, if it is of the same file for the same purpose; its offset."""
        record = (yield Work(lambda: read_json(resume_file))) if resume_file is not None else None
        if record is None or {**record, "upload_id": ""} != {**_identity(source, told), "upload_id": ""}:
            return None, 0
        upload_id = uid(str(record.get("upload_id")))
        try:
            headers = yield from self._head(upload_id)
        except (NotFound, Gone):
            return None, 0
        return upload_id, int(headers.get("upload-offset", "0"))

    def _head(self, upload_id: str) -> Plan[Mapping[str, str]]:
        """Where an upload stands. Raises NotFound, Gone, and other errors by their status."""
        failures = 0
        while True:
            try:
                response: Response = yield Send(_request("HEAD", upload_id, self._query(), repeat=Repeat.SAFE))
            except (Unreachable, ConnectionBroken):
                failures += 1
                pause_s = self._retries.pause_s(failures, None)
                if failures >= self._retries.attempts or pause_s is None:
                    raise
                yield Sleep(pause_s)
                continue
            if response.status < 400:
                return response.headers
            failures += 1
            if response.status not in (423, 503) or failures >= self._retries.attempts:
                raise error_of_status(response.status, "unknown", response.headers.get("x-request-id", ""))
            yield Sleep(self._retries.pause_s(failures, None) or 0)

    def _send_rest(self, source: Source, upload_id: str, offset: int, pace: Pace) -> Plan[str | None]:
        """Send what is missing, over as many connections as it takes; the job that makes the volume, if it is known."""
        failures = 0
        while offset < source.size:
            pieces: list[Piece] = yield Work(lambda: pieces_of(source, offset))  # noqa: B023  it is called at once
            request = _patch(source, upload_id, offset, pieces, pace, self._query())
            problem: Exception
            retry_after_s = 0.0
            try:
                response: Response = yield Send(request)
            except (Unreachable, ConnectionBroken) as error:
                problem = error
            else:
                if response.status < 400:
                    offset = int(response.headers.get("upload-offset", source.size))
                    if offset >= source.size:
                        return response.headers.get("elemento-job")
                    continue
                problem = error_of_answer(response.status, response.body, response.headers.get("x-request-id", ""))
                if response.status not in _GO_ON:
                    raise problem
                retry_after_s = 1.0 if response.status in (423, 503) else 0.0
            failures += 1
            pause_s = self._retries.pause_s(failures, None)
            if failures >= self._retries.attempts or pause_s is None:
                raise problem
            yield Sleep(max(pause_s, retry_after_s))
            try:
                headers = yield from self._head(upload_id)
            except Gone:
                return None  # refused for its beginning, which was told to a connection that was just sending
            arrived = int(headers.get("upload-offset", "0"))
            if arrived > offset:
                failures = 0
            offset = arrived
            pace.starts_at(offset)
        return None

    def _become_volume(self, upload_id: str, job_id: str | None, on_progress: OnProgress | None) -> Plan[str]:
        """Wait for the volume; its id. Raises why none could be made."""
        failed: tuple[str, ApiError] | None = None
        while True:
            if job_id:
                try:
                    yield from self.until_over(job_id, on_progress, ours=True)
                except ApiError as error:
                    # A server that stops cancels its jobs, and goes on with the upload when it runs again: what counts
                    # is what has become of that. Of a job that nobody knows a restarted server says as little.
                    failed = (job_id, error)
                    job_id = None
            try:
                headers = yield from self._head(upload_id)
            except (Gone, NotFound):
                if failed is not None and not isinstance(failed[1], NotFound):
                    raise failed[1] from None
                request = Request("GET", f"uploads/{upload_id}", query=self._query(), repeat=Repeat.SAFE)
                ended: Upload = decoded((yield from self._send(request)), Upload)
                problem = ended.error
                said = {"error": problem.error, "code": problem.code} if problem else {}
                raise error_of_job(said, ended.job or "") from None
            if headers.get("elemento-state") == "done":
                return uid(headers["elemento-volume"])
            again = headers.get("elemento-job")
            if failed is not None and again == failed[0] and not isinstance(failed[1], NotFound):
                raise failed[1]
            job_id = None if failed is not None and again == failed[0] else again
            yield Sleep(_BETWEEN_LOOKS_S)


# -- what is sent ------------------------------------------------------------------------------------------


def look_at(path: str) -> Source:
    """A file that can be uploaded. Raises OSError, ValueError."""
    status = os.stat(path)
    if not os.path.isfile(path):
        raise ValueError(f"{path} is no regular file")
    if status.st_size == 0:
        raise ValueError(f"{path} is empty: nothing is no image")
    return Source(os.path.abspath(path), status.st_size, status.st_mtime_ns, status.st_ino)


def pieces_of(source: Source, offset: int) -> list[Piece]:
    """What is data from ``offset`` on; one piece without a hole where the file system cannot tell."""
    pieces: list[Piece] = []
    with open(source.path, "rb") as file:
        at = offset
        while at < source.size:
            try:
                start = os.lseek(file.fileno(), at, os.SEEK_DATA)
            except OSError:
                start = source.size  # ENXIO: the rest is a hole
            start = min(start, source.size)
            if start > at:
                if pieces:
                    last = pieces.pop()
                    pieces.append(Piece(last.start, last.length, start - at))
                else:
                    pieces.append(Piece(at, 0, start - at))
            if start == source.size:
                break
            end = min(os.lseek(file.fileno(), start, os.SEEK_HOLE), source.size)
            pieces.append(Piece(start, end - start, 0))
            at = end
    return pieces


def _patch(
    source: Source, upload_id: str, offset: int, pieces: list[Piece], pace: Pace, query: Mapping[str, str] | None
) -> Request:
    is_sparse = any(piece.zeros for piece in pieces)
    length = sum(piece.length for piece in pieces) + (len(pieces) * _FRAME.size if is_sparse else 0)
    headers = {
        "Upload-Offset": str(offset),
        "Content-Type": _SPARSE if is_sparse else _PLAIN,
        "Content-Length": str(length),
        "Prefer": "respond-async",
    }
    parts = _parts(source, pieces, pace, is_sparse=is_sparse)
    return _request("PATCH", upload_id, query, headers, parts)


def _parts(source: Source, pieces: list[Piece], pace: Pace, *, is_sparse: bool) -> Parts:
    def parts() -> Iterator[bytes]:
        with open(source.path, "rb", buffering=0) as file:
            for piece in pieces:
                if is_sparse:
                    yield _FRAME.pack(piece.length, piece.zeros)
                at, end = piece.start, piece.start + piece.length
                while at < end:
                    data = os.pread(file.fileno(), min(_CHUNK, end - at), at)
                    # Before the last byte is gone: what was changed meanwhile never becomes a volume.
                    if not data or not source.still(os.fstat(file.fileno())):
                        raise FileChanged(f"{source.path} was changed while it was sent: begin again")
                    yield data
                    at += len(data)
                    pace.is_at(at)
                pace.is_at(end + piece.zeros)

    return parts


def digest(path: str, size: int, pace: Pace) -> str:
    """SHA-256 of a file, in hex digits."""
    summed = hashlib.sha256()
    pace.phase = "reading"
    with open(path, "rb", buffering=0) as file:
        done = 0
        while done < size and (data := file.read(4 * _CHUNK)):
            summed.update(data)
            done += len(data)
            pace.is_at(done)
    pace.phase = "sending"
    return summed.hexdigest()


def metadata_header(told: Mapping[str, Any]) -> str:
    """Upload-Metadata. Keys that are None are left out."""
    texts = {key: str(value).lower() if isinstance(value, bool) else str(value) for key, value in told.items()}
    return ",".join(
        f"{key} {base64.b64encode(text.encode()).decode()}" for key, text in texts.items() if told[key] is not None
    )


def _identity(source: Source, told: Mapping[str, Any]) -> dict[str, Any]:
    """What an upload has to have in common with an earlier one to go on with it."""
    said = {key: value for key, value in told.items() if value is not None and key != "checksum"}
    file = {"path": source.path, "size": source.size, "mtime_ns": source.mtime_ns, "inode": source.inode}
    return {"file": file, "metadata": msgspec.to_builtins(said)}


def _request(
    method: str,
    upload_id: str,
    query: Mapping[str, str] | None,
    headers: Mapping[str, str] | None = None,
    body: bytes | Parts = b"",
    repeat: Repeat = Repeat.NEVER,
) -> Request:
    return Request(method, f"uploads/{upload_id}", body, {**_TUS, **(headers or {})}, query, repeat)
