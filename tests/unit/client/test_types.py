"""The library's answers are the server's, key for key; its errors know every code."""

from collections.abc import Iterator
from typing import Any, get_args

import msgspec
import pytest

from elemento_storage.api.app import CALLS
from elemento_storage.api.data_schemas import ChecksumAnswer, ExtentAnswer, ExtentsAnswer
from elemento_storage.api.errors import status_of
from elemento_storage.api.history_calls import LocationHistory
from elemento_storage.api.metadata_schemas import MetadataAnswer
from elemento_storage.api.schemas import Locked
from elemento_storage.api.upload_schemas import UploadAnswer, UploadProblem
from elemento_storage.client import errors, types
from elemento_storage.client.errors import error_of_answer, error_of_job, family_of
from elemento_storage.errors import StorageError

ANSWERS = {
    "create": types.Created,
    "create/multiple": types.Created,
    "ceph/create": types.Created,
    "create/url": types.CreatedFromUrl,
    "cloudinit/create": types.CreatedFromUrl,
    "iso/create": types.CreatedIso,
    "iso/create/url": types.CreatedIso,
    "clone": types.Created,
    "import": types.Created,
    "accessible": types.Volume,
    "info": types.Volume,
    "restore": types.Volume,
    "bin": types.Binned,
    "destroy": types.Destroyed,
    "update": types.Updated,
    "update/resize": types.Resized,
    "update/convert": types.Converted,
    "transfer": types.Owned,
    "overlay/compact": types.Owned,
    "reset": types.Owned,
    "has": types.Has,
    "cancreate": types.Room,
    "cancreate/multiple": types.Room,
    "snapshots": types.Snapshot,
    "snapshots/create": types.Snapshot,
    "snapshots/restore": types.SnapshotRestored,
    "snapshots/clone": types.Created,
    "snapshots/delete": types.SnapshotDeleted,
    "backups": types.Backup,
    "backups/create": types.Backup,
    "backups/verify": types.Backup,
    "backups/restore": types.Volume,
    "backups/delete": types.BackupDeleted,
    "backups/open": types.BackupSession,
    "backups/renew": types.BackupSession,
    "backups/close": types.BackupSession,
    "backups/sessions": types.BackupSession,
    "backups/schedule": types.Schedule,
    "backups/schedules": types.Schedule,
    "export": types.Exported,
    "unexport": types.Unexported,
    "exports": types.Exports,
    "livemigration": types.Migration,
    "livemigration/prepare": types.Migration,
    "livemigration/revert": types.Migration,
    "livemigration/conclude": types.Migration,
    "jobs": types.Job,
    "revisions": types.Revisions,
    "locations": types.Location,
    "rescan": types.Rescan,
    "health": types.Health,
    "version": types.Version,
    "whoami": types.Whoami,
    "history": types.History,
}
#: Calls that the library has no method for: it offers ``call``.
UNTYPED: set[str] = set()
OTHERS: list[tuple[Any, Any]] = [
    (LocationHistory, types.LocationHistory),
    (ChecksumAnswer, types.Checksum),
    (ExtentAnswer, types.Extent),
    (ExtentsAnswer, types.Extents),
    (MetadataAnswer, types.Metadata),
    (Locked, types.Locked),
    (UploadAnswer, types.Upload),
    (UploadProblem, types.UploadProblem),
]


def keys(answer: Any) -> set[str]:
    return {one.encode_name for one in msgspec.structs.fields(answer)}


def required(answer: Any) -> set[str]:
    return {one.encode_name for one in msgspec.structs.fields(answer) if one.required}


def structs() -> Iterator[Any]:
    for call in CALLS:
        theirs = get_args(call.answer)[0] if get_args(call.answer) else call.answer
        if call.path not in UNTYPED:
            yield pytest.param(theirs, ANSWERS[call.path], id=call.path)
    for theirs, ours in OTHERS:
        yield pytest.param(theirs, ours, id=theirs.__name__)


@pytest.mark.parametrize(("theirs", "ours"), list(structs()))
def test_an_answer_has_the_servers_keys(theirs: Any, ours: Any) -> None:
    assert keys(theirs) <= keys(ours)
    assert required(ours) <= required(theirs), "what the server may leave out has to have a default"


def test_what_is_told_beyond_the_known_keys_is_passed_over() -> None:
    told = b'{"version": "9", "api": "v9", "qemu-img": "1", "moon": "full"}'
    assert msgspec.json.decode(told, type=types.Version).qemu_img == "1"


def error_classes(base: type[StorageError] = StorageError) -> Iterator[type[StorageError]]:
    yield base
    for kind in base.__subclasses__():
        yield from error_classes(kind)


@pytest.mark.parametrize("kind", list(error_classes()), ids=lambda kind: kind.code)
def test_every_code_of_a_job_means_what_it_means_of_an_answer(kind: type[StorageError]) -> None:
    ended = error_of_job({"error": "a sentence", "code": kind.code, "volume_id": "x"}, "j")
    assert ended.status == status_of(kind), "client/errors.py does not know this code, or another status of it"
    answered = error_of_answer(status_of(kind), b'{"error": "a sentence", "code": "%s"}' % kind.code.encode(), "r")
    assert type(answered) is type(ended)
    assert (ended.code, ended.message, dict(ended.details)) == (
        kind.code,
        "a sentence",
        {"volume_id": "x", "job_id": "j"},
    )


def test_what_is_no_error_of_ours() -> None:
    assert isinstance(error_of_answer(404, b"<html>", ""), errors.BadAnswer)
    assert isinstance(error_of_answer(502, b"<html>", ""), errors.Unavailable)
    assert isinstance(error_of_answer(500, b"[]", ""), errors.BadAnswer)
    assert family_of(599) is errors.ServerFault
    assert family_of(418) is errors.InvalidRequest
