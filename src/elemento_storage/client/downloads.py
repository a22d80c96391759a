"""How a volume becomes a file: by ranges of one and the same state, resumed after whatever breaks.

Beside the file that grows (``<path>.part``) lies a note of which state of which volume it is, and how far it is on the
disk; so a new process, or one after a power failure, goes on. Of a raw image only what is data is fetched.
"""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from elemento_storage.client.errors import (
    ApiError,
    BadAnswer,
    ConnectionBroken,
    Corrupted,
    FileChanged,
    PreconditionFailed,
    Unreachable,
    error_of_answer,
    error_of_status,
)
from elemento_storage.client.exchange import Close, Long, Open, Plan, Read, Repeat, Request, Send, Sleep, Work
from elemento_storage.client.exchange import M as Kind
from elemento_storage.client.group import Group, uid
from elemento_storage.client.pace import Pace
from elemento_storage.client.small_file import read_json, remove, sync_directory, write_json
from elemento_storage.client.types import Checksum, Extents, OnProgress, Progress

_CHUNK: Final = 2**20
_BLOCK: Final = 4 * 2**20
_SYNC_EVERY: Final = 64 * 2**20
_WORTH_A_REQUEST: Final = 4 * 2**20  #: a hole that is smaller is fetched with what is around it
_PAGE: Final = 100_000
_ERROR_LONGEST: Final = 2**20


@dataclass(frozen=True)
class Downloaded:
    """A file that has everything. ``checksum``: that of the method ``blocks``, if it was compared."""

    path: str
    size: int
    etag: str
    checksum: str | None


@dataclass(frozen=True)
class _Wanted:
    """One state of a volume, and the parts of it that are data."""

    etag: str
    size: int
    parts: list[tuple[int, int]]  #: from, to


class Fetcher(Group[Kind]):
    """What fetches files: the group ``volumes`` is such."""

    def fetch_file(
        self,
        volume_id: str,
        path: str,
        image_format: str,
        *,
        verify: bool,
        overwrite: bool,
        on_progress: OnProgress | None,
    ) -> Plan[Downloaded]:
        """Fetch a volume as an image file.

        Raises FileExistsError, FileChanged when the volume changed meanwhile, Corrupted, what the server says.
        """
        vid = uid(volume_id)
        if verify and image_format != "raw":
            raise ValueError("only raw images can be compared with a checksum of the server")
        if not overwrite and (yield Work(lambda: os.path.lexists(path))):
            raise FileExistsError(f"{path} is there already")
        part, note = f"{path}.part", f"{path}.part.json"
        wanted: _Wanted = yield from (self._raw(vid) if image_format == "raw" else self._image(vid, image_format))
        about = {"volume": vid, "format": image_format, "etag": wanted.etag, "size": wanted.size}
        known = (yield Work(lambda: read_json(note))) or {}
        done = int(known.get("done", 0)) if {**known, "done": 0} == {**about, "done": 0} else 0
        target: Target = yield Work(lambda: Target(part, note, about, wanted.size, done))
        pace = Pace("fetching", wanted.size, on_progress)
        pace.starts_at(done)
        try:
            for begin, end in wanted.parts:
                if end > target.position:
                    yield from self._part(vid, image_format, wanted, max(begin, target.position), end, target, pace)
                pace.is_at(end)
            yield Work(target.complete)
        except (FileChanged, PreconditionFailed):
            yield Work(target.discard)
            raise FileChanged(f"volume {vid} was changed while it was fetched: begin again") from None
        finally:
            target.close()
        checksum = (yield from self._compared(vid, part, wanted, on_progress)) if verify else None
        yield Work(lambda: _publish(part, path, note))
        return Downloaded(path, wanted.size, wanted.etag, checksum)

    def _raw(self, vid: str) -> Plan[_Wanted]:
        start: int | None = 0
        etag, size, parts = "", 0, list[tuple[int, int]]()
        while start is not None:
            page: Extents = yield from self._look(f"volumes/{vid}/extents", Extents, start=start, limit=_PAGE)
            if etag and page.etag != etag:
                raise FileChanged(f"volume {vid} was changed while it was looked at: begin again")
            etag, size, start = page.etag, page.size, page.next_start
            for extent in page.extents:
                if extent.zero:
                    continue
                end = extent.start + extent.length
                if parts and extent.start - parts[-1][1] < _WORTH_A_REQUEST:
                    parts[-1] = (parts[-1][0], end)
                else:
                    parts.append((extent.start, end))
        return _Wanted(etag, size, parts)

    def _image(self, vid: str, image_format: str) -> Plan[_Wanted]:
        query = self._query(format=image_format)
        response = yield Send(Request("HEAD", f"volumes/{vid}/data", query=query, repeat=Repeat.SAFE))
        if response.status != 200:
            # A HEAD has no words for it; a GET has.
            request = Request("GET", f"volumes/{vid}/data", b"", {"Range": "bytes=0-0"}, query, Repeat.SAFE)
            yield from self._send(request)
            raise error_of_status(response.status, "unknown", response.headers.get("x-request-id", ""))
        size = int(response.headers["content-length"])
        return _Wanted(response.headers["etag"], size, [(0, size)])

    def _part(
        self, vid: str, image_format: str, wanted: _Wanted, begin: int, end: int, target: "Target", pace: Pace
    ) -> Plan[None]:
        """Fetch bytes ``begin`` to ``end``, over as many connections as it takes."""
        failures, at = 0, begin
        while at < end:
            headers = {"Range": f"bytes={at}-{end - 1}", "If-Match": wanted.etag}
            query = self._query(format=image_format)
            before = at
            try:
                stream = yield Open(
                    Request("GET", f"volumes/{vid}/data", b"", headers, query, Repeat.SAFE), chunk=_CHUNK
                )
                if stream.status != 206:
                    raise (yield from _said(stream))
                while data := (yield Read(stream)):
                    if len(data) > end - at:
                        raise BadAnswer("more bytes came than were asked for")
                    yield Work(lambda: target.write(at, data))  # noqa: B023  it is called at once
                    at += len(data)
                    pace.is_at(at)
                yield Close(stream)
                if at < end:
                    raise ConnectionBroken("the connection ended before all bytes had come")
            except (Unreachable, ConnectionBroken, ApiError) as error:
                if isinstance(error, ApiError) and error.status != 503:
                    raise
                failures = 1 if at > before else failures + 1
                pause_s = self._retries.pause_s(failures, None)
                if failures >= self._retries.attempts or pause_s is None:
                    raise
                yield Sleep(pause_s)

    def _compared(self, vid: str, part: str, wanted: _Wanted, on_progress: OnProgress | None) -> Plan[str]:
        if on_progress is not None:
            on_progress(Progress("comparing"))
        query = {"client_uid": self.uid, "algorithm": "sha256", "method": "blocks"}
        theirs: Checksum = yield from self.carry_out(Long(f"volumes/{vid}/checksum", query, Checksum, method="GET"))
        ours = yield Work(lambda: checksum_of(part))
        again: Extents = yield from self._look(f"volumes/{vid}/extents", Extents, limit=1)
        if again.etag != wanted.etag:
            raise FileChanged(f"volume {vid} was changed before its checksum was taken: begin again")
        if theirs.checksum != ours:
            raise Corrupted(f"{part} is not what volume {vid} holds: its checksum is {ours}, not {theirs.checksum}")
        return str(ours)


class Target:
    """The file that grows. ``position``: up to where everything is written."""

    def __init__(self, part: str, note: str, about: Mapping[str, Any], size: int, done: int) -> None:
        self._part, self._note, self._about, self._size = part, note, about, size
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        self._file = os.open(part, flags, 0o600)
        self.position = min(done, os.fstat(self._file).st_size)
        if self.position == 0:
            os.ftruncate(self._file, 0)
            write_json(note, {**about, "done": 0})
        os.ftruncate(self._file, size)
        self._synced = self.position

    def write(self, at: int, data: bytes) -> None:
        """Write bytes; from time to time make them last, and note how far they do."""
        view = memoryview(data)
        while view:
            written = os.pwrite(self._file, view, at)
            at += written
            view = view[written:]
        self.position = at
        if at - self._synced >= _SYNC_EVERY:
            self._make_last()

    def complete(self) -> None:
        """Everything is there: make it last."""
        self.position = self._size
        self._make_last()

    def discard(self) -> None:
        """It will never be whole."""
        self._synced = self.position
        remove(self._part)
        remove(self._note)

    def close(self) -> None:
        """Leave it as it is, for whoever goes on."""
        try:
            if self.position > self._synced:
                self._make_last()
        finally:
            os.close(self._file)

    def _make_last(self) -> None:
        os.fsync(self._file)
        write_json(self._note, {**self._about, "done": self.position})
        self._synced = self.position


def _publish(part: str, path: str, note: str) -> None:
    os.replace(part, path)
    sync_directory(os.path.dirname(os.path.abspath(path)))
    remove(note)


def checksum_of(path: str) -> str:
    """The checksum of a raw image by the method ``blocks`` (docs/api.md). Holes cost nothing."""
    outer = hashlib.sha256()
    zeros = hashlib.sha256(bytes(_BLOCK)).digest()
    with open(path, "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        data_from = -1
        for start in range(0, size, _BLOCK):
            length = min(_BLOCK, size - start)
            if data_from < start:
                try:
                    data_from = os.lseek(file.fileno(), start, os.SEEK_DATA)
                except OSError:
                    data_from = size
            if data_from >= start + length:
                outer.update(zeros if length == _BLOCK else hashlib.sha256(bytes(length)).digest())
                continue
            block = b""
            while len(block) < length and (more := os.pread(file.fileno(), length - len(block), start + len(block))):
                block += more
            outer.update(hashlib.sha256(block).digest())
    return outer.hexdigest()


def _said(stream: Any) -> Plan[Exception]:
    """The error that an answer is which should have been bytes."""
    body = b""
    while len(body) < _ERROR_LONGEST and (data := (yield Read(stream))):
        body += data
    yield Close(stream)
    return error_of_answer(stream.status, body, stream.headers.get("x-request-id", ""))
