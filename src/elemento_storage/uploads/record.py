"""What is known of an upload, durably: ``.elemento/uploads/<uid>/`` in the location that holds its bytes.

``upload.json`` says what the upload is and how far its life has gone; ``offset`` how many bytes are safe, and whose
turn it is to write (``turn.py``). The bytes themselves are in the reserved directory in ``.elemento/staging/``, where
they become the volume by a rename. The record is beside it and not in it, because it lives longer: a client asks for
the outcome after the directory has become a volume, or is gone because the image was refused.

Every function blocks.
"""

import contextlib
import os
import shutil
from enum import StrEnum
from typing import Final

import msgspec

from elemento_storage.catalog.guard import WORK_DIRECTORY
from elemento_storage.catalog.location import TRASH_DIRECTORY
from elemento_storage.durable import create, fsync_directory, replace
from elemento_storage.faultpoints import reached
from elemento_storage.images.incoming import Incoming
from elemento_storage.model import new_uid, normalise_uid

UPLOADS_DIRECTORY: Final = f"{WORK_DIRECTORY}/uploads"
RECORD_FILE: Final = "upload.json"
OFFSET_FILE: Final = "offset"
_OFFSET_DIGITS: Final = 20
OFFSET_START: Final = f"{0:0{_OFFSET_DIGITS}}\n".encode()
_LARGEST_BYTES: Final = 1 << 20


class Phase(StrEnum):
    """How far an upload's life has gone."""

    RECEIVING = "receiving"  #: bytes are missing
    FINISHING = "finishing"  #: all are there; the volume is being made of them
    DONE = "done"  #: the volume is there
    FAILED = "failed"  #: the image was refused, or the work was cancelled; the room was given back


class Problem(msgspec.Struct, frozen=True):
    """Why an upload failed: as the error's answer would say it."""

    code: str
    message: str


class UploadRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One upload. ``length`` is None until the client has said it."""

    upload_id: str
    owner: str | None
    length: int | None
    created: str
    phase: Phase = Phase.RECEIVING
    metadata: str = ""  #: the header Upload-Metadata as it came
    concat: str = ""  #: the header Upload-Concat as it came
    target: Incoming | None = None  #: what shall become of it, for whoever finishes it; None of a part of another
    attempts: int = 0  #: how often it was begun to make a volume of it
    job: str | None = None  #: that finishes it, or did
    volume_id: str | None = None  #: the volume that it has become, or has filled
    problem: Problem | None = None

    @property
    def is_part(self) -> bool:
        """Whether it only waits to be concatenated with others."""
        return self.target is None

    @property
    def is_assembled(self) -> bool:
        """Whether it is made of parts, in one go, and not by its client."""
        return self.concat.startswith("final")


_decoder = msgspec.json.Decoder(UploadRecord)


def directory_of(location_path: str, upload_id: str) -> str:
    """Where the record is."""
    return f"{location_path}/{UPLOADS_DIRECTORY}/{upload_id}"


def begin(location_path: str, record: UploadRecord) -> None:
    """Enter a new upload; durable when it returns. Raises OSError."""
    uploads = f"{location_path}/{UPLOADS_DIRECTORY}"
    with contextlib.suppress(FileExistsError):
        os.mkdir(uploads, 0o755)
        fsync_directory(os.path.dirname(uploads))
    directory = directory_of(location_path, record.upload_id)
    os.mkdir(directory, 0o755)
    create(f"{directory}/{OFFSET_FILE}", OFFSET_START, mode=0o600, sync=True)
    write(location_path, record)
    fsync_directory(uploads)
    reached("upload.recorded")


def write(location_path: str, record: UploadRecord) -> None:
    """Replace the record; durable when it returns. Only by whose turn it is. Raises OSError."""
    path = f"{directory_of(location_path, record.upload_id)}/{RECORD_FILE}"
    replace(path, msgspec.json.encode(record), mode=0o600)


def read(location_path: str, upload_id: str) -> UploadRecord | None:
    """The record; None when there is no such upload here, or nothing that could be one. Raises OSError."""
    path = f"{directory_of(location_path, upload_id)}/{RECORD_FILE}"
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        record = _decoder.decode(os.read(descriptor, _LARGEST_BYTES))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    finally:
        os.close(descriptor)
    return record if record.upload_id == upload_id else None


def ids(location_path: str) -> list[str]:
    """The uploads that have a directory here, with a record or not. Raises OSError."""
    try:
        names = os.listdir(f"{location_path}/{UPLOADS_DIRECTORY}")
    except FileNotFoundError:
        return []
    return [name for name in names if normalise_uid(name) == name]


def remove(location_path: str, upload_id: str) -> None:
    """Forget an upload in one rename. Idempotent; what a crash leaves is in the trash. Raises OSError."""
    trash = f"{location_path}/{TRASH_DIRECTORY}/{new_uid()}"
    try:
        os.rename(directory_of(location_path, upload_id), trash)
    except FileNotFoundError:
        return
    reached("upload.forgotten")
    shutil.rmtree(trash, ignore_errors=True)


def is_old(location_path: str, upload_id: str, now_s: float, age_s: float) -> bool:
    """Whether nobody touched its directory for so long: one without a record is a crash's. Raises OSError."""
    try:
        return now_s - os.lstat(directory_of(location_path, upload_id)).st_mtime > age_s
    except FileNotFoundError:
        return False


def parse_offset(content: bytes) -> int:
    """The bytes that are safe, as the offset file says. Raises OSError for what is no number."""
    text = content.rstrip(b"\n")
    if not (text.isdigit() and len(text) <= _OFFSET_DIGITS):
        raise OSError(f"the offset of an upload cannot be read: {content[:40]!r}")
    return int(text)


def format_offset(offset: int) -> bytes:
    """As the offset file says it: always as long, so that it is overwritten in place, within one sector."""
    return f"{offset:0{_OFFSET_DIGITS}}\n".encode()
