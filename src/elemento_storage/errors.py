"""Every error the product raises on purpose.

One tree; the second level are the *families*, which the API maps to a status (``api/errors.py``) and the
command line to an exit code. Each class has a stable ``code`` that clients may test for; the message is for
people and says what to do next.

    StorageError
    ├─ InvalidRequest        the caller's input is wrong
    │  ├─ MissingKey, InvalidValue, NotJSON, NotAnIso, UrlRefused
    ├─ UnsupportedMediaType, BodyTooLarge, MethodNotAllowed
    ├─ Unauthenticated       no token, or one that is not ours
    ├─ TooManyAttempts       too many wrong passwords
    ├─ Forbidden             known, but not allowed
    ├─ NotFound              no such volume, location, job or route
    ├─ Gone                  it was there, and is over
    ├─ Stalled               the client sent nothing for too long
    ├─ Conflict              the state of the volume forbids it
    ├─ PreconditionFailed    If-Match did not match
    ├─ RangeNotSatisfiable   the bytes that were asked for are not there
    ├─ KeyReused             an Idempotency-Key was used for another body
    ├─ UploadFailed          everything arrived, and no volume can be made of it
    ├─ UploadChecksumMismatch  a part of an upload arrived otherwise than it was sent
    ├─ VolumeLocked          another operation holds the volume
    ├─ Unavailable           a location or a server does not answer; try again
    ├─ DownloadFailed        another server did not deliver what it was asked for
    ├─ NoRoom                no location can take the volume
    ├─ InternalFault         our fault: ToolFailed, ToolMissing, Cancelled …
    └─ ConfigurationError    the server cannot start like this
"""

import os
from collections.abc import Mapping
from typing import ClassVar


class StorageError(Exception):
    """The root of the tree. ``details`` are further JSON keys of the answer and hold no secrets."""

    code: ClassVar[str] = "internal-error"

    def __init__(self, message: str, **details: object) -> None:
        super().__init__(message)
        self.message = message
        self.details: Mapping[str, object] = details


class InvalidRequest(StorageError):
    """The input is wrong. The sentence always starts as the document shows it."""

    code = "bad-request"

    def __init__(self, reason: str, **details: object) -> None:
        super().__init__(f"request was badly formatted. {reason}", **details)
        self.reason = reason


class MissingKey(InvalidRequest):
    """A required key is absent. The document shows its answer to the letter."""

    code = "missing-key"

    def __init__(self, key: str) -> None:
        super().__init__(f"'{key}'", key=key)


class InvalidValue(InvalidRequest):
    """A key's value is of the wrong type or out of range."""

    code = "invalid-value"


class NotJSON(InvalidRequest):
    """The body is not a JSON object."""

    code = "not-json"


class NotAnIso(InvalidRequest):
    """What arrived for an ISO volume is neither ISO 9660 nor UDF; a volume that waited waits still."""

    code = "not-an-iso"


class UrlRefused(InvalidRequest):
    """The server does not fetch from there: another scheme, or an address it may not connect to."""

    code = "url-refused"


class UnsupportedMediaType(StorageError):
    """The body's Content-Type is not ``application/json``."""

    code = "unsupported-media-type"


class BodyTooLarge(StorageError):
    """The body is larger than any call of this kind needs."""

    code = "body-too-large"


class ImageTooLarge(BodyTooLarge):
    """More bytes than an image from outside may have, or than were announced."""

    code = "image-too-large"


class MethodNotAllowed(StorageError):
    """The route exists, the method does not."""

    code = "method-not-allowed"


class Unauthenticated(StorageError):
    """No token, or one that is unknown or revoked."""

    code = "unauthenticated"


class TooManyAttempts(StorageError):
    """Too many wrong passwords; ``retry_after`` says how many seconds to wait."""

    code = "too-many-attempts"


class Forbidden(StorageError):
    """The caller is known and may not do this."""

    code = "forbidden"


class NotOwner(Forbidden):
    """Only the owner may do this; the volume is one the caller may see."""

    code = "not-owner"


class NotFound(StorageError):
    """Nothing of that name, or nothing the caller may know of."""

    code = "not-found"


class RouteNotFound(NotFound):
    """No such path, or no such API version."""

    code = "route-not-found"


class VolumeNotFound(NotFound):
    """No such volume, or a private one of somebody else: the answer is the same."""

    code = "volume-not-found"

    def __init__(self, volume_id: str) -> None:
        super().__init__(f"no volume {volume_id}", volume_id=volume_id)


class JobNotFound(NotFound):
    """No such job, one that ended too long ago, or somebody else's."""

    code = "job-not-found"

    def __init__(self, job_id: str) -> None:
        super().__init__(f"no job {job_id}; jobs are forgotten an hour after their end", job_id=job_id)


class LocationNotFound(NotFound):
    """No location of that name."""

    code = "location-not-found"


class ImportNotFound(NotFound):
    """Nothing of that name waits in a location's directory for imports."""

    code = "import-not-found"


class SnapshotNotFound(NotFound):
    """The volume has no such snapshot."""

    code = "snapshot-not-found"

    def __init__(self, snapshot_id: str) -> None:
        super().__init__(f"the volume has no snapshot {snapshot_id}; `snapshots` lists them", snapshot=snapshot_id)


class MigrationNotFound(NotFound):
    """No migration of that id or of that volume is under way."""

    code = "migration-not-found"


class UploadNotFound(NotFound):
    """No such upload, one that was ended and forgotten, or somebody else's."""

    code = "upload-not-found"

    def __init__(self, upload_id: str) -> None:
        super().__init__(f"no upload {upload_id}: it was ended, it expired, or it never was", upload_id=upload_id)


class Gone(StorageError):
    """It was there, and is over."""

    code = "gone"


class UploadEnded(Gone):
    """The upload expired or failed: nothing can be added to it; ``state`` says which."""

    code = "upload-ended"


class Stalled(StorageError):
    """The client sent nothing for too long."""

    code = "stalled"


class UploadStalled(Stalled):
    """The rest of the body did not come; what arrived of a resumable upload is kept."""

    code = "upload-stalled"


class UploadFailed(StorageError):
    """Everything arrived, and no volume can be made of it; ``reason`` is the code of the error that says why.

    Not a Conflict: to clients of tus 409 means "ask for the offset and go on", for ever.
    """

    code = "upload-failed"


class UploadChecksumMismatch(StorageError):
    """What arrived does not have the checksum that came with it; none of it was kept."""

    code = "upload-checksum-mismatch"


class BackupNotFound(NotFound):
    """No such backup, or somebody else's: the answer is the same."""

    code = "backup-not-found"


class Conflict(StorageError):
    """The volume's state forbids the operation."""

    code = "conflict"


class VolumeExported(Conflict):
    """The operation needs the volume for itself, and it is exported."""

    code = "volume-exported"


class VolumeWaiting(Conflict):
    """The volume is an ISO whose content has not come yet."""

    code = "volume-waiting"


class TooManyFiles(Conflict):
    """More files than were announced for a metadata volume."""

    code = "too-many-files"


class NotClonable(Conflict):
    """The volume says ``clonable: false``, or nothing is in it yet that could be cloned."""

    code = "not-clonable"


class HasClones(Conflict):
    """Linked clones stand on the volume, so its data has to stay as it is; ``clones`` counts them."""

    code = "has-clones"


class NotLinkable(Conflict):
    """A linked clone cannot be made like this: of this volume, in this format or in this location."""

    code = "not-linkable"


class NoFirstState(Conflict):
    """There is no state that the volume could be reset to."""

    code = "no-first-state"


class CannotShrink(Conflict):
    """A resize to less than the present size."""

    code = "cannot-shrink"


class FormatUnsupported(Conflict):
    """The volume's format does not allow the operation (an ISO is never converted or resized)."""

    code = "format-unsupported"


class VolumeExists(Conflict):
    """A volume of this id exists already."""

    code = "volume-exists"


class HasSnapshots(Conflict):
    """The operation would lose the volume's snapshots."""

    code = "has-snapshots"


class TooManySnapshots(Conflict):
    """The volume has as many snapshots as the settings allow."""

    code = "too-many-snapshots"


class SnapshotUnclear(Conflict):
    """Another tool has given two snapshots of the image the same name, and QEMU cannot tell them apart."""

    code = "snapshot-unclear"


class NotExportable(Conflict):
    """The document's graph says no: the volume is exported already and not shareable."""

    code = "not-exportable"


class ExportDiffers(Conflict):
    """The volume is exported to this client, but in another way than the one asked for."""

    code = "export-differs"


class ProtocolsExclude(Conflict):
    """The volume is exported over a protocol that has another path to its bytes; both at once would lose data."""

    code = "protocols-exclude"


class ImageInUse(Conflict):
    """Another program has the image open."""

    code = "image-in-use"


class ImageDamaged(Conflict):
    """The image cannot be opened, or its own tables contradict each other; ``findings`` says how."""

    code = "image-damaged"


class ImageRefused(Conflict):
    """An image from outside that needs more than its own bytes, is encrypted, or claims what cannot be."""

    code = "image-refused"


class ChecksumMismatch(Conflict):
    """What arrived is not what the checksum is of."""

    code = "checksum-mismatch"


class ImageChanged(Conflict):
    """Somebody wrote to the image while it was read, past all locks; what was read is worth nothing."""

    code = "image-changed"


class MigrationConflict(Conflict):
    """The migration's state, or the volume's, forbids the step."""

    code = "migration-conflict"


class OffsetMismatch(Conflict):
    """The upload does not go on at this offset; ``offset`` says where."""

    code = "upload-offset-mismatch"


class BackupDamaged(Conflict):
    """A backup, or one that it needs, is not what was written, or not there."""

    code = "backup-damaged"


class NoIncrement(Conflict):
    """Nothing says for certain what changed since; ``reason`` says why. A full backup is possible."""

    code = "no-increment"


class NotDue(Conflict):
    """A backup of a schedule was made by another server in the meantime."""

    code = "not-due"


class BackupSessionLost(Conflict):
    """What a backup program reads is not there any more, or no longer what it was: what it has read is worthless."""

    code = "backup-session-lost"


class JobEnded(Conflict):
    """The job is over: nothing is left to cancel."""

    code = "job-ended"


class JobCancelled(Conflict):
    """The operation was cancelled at the caller's wish; the volume is as it was."""

    code = "job-cancelled"


class PreconditionFailed(StorageError):
    """If-Match named another state of the volume."""

    code = "precondition-failed"


class RangeNotSatisfiable(StorageError):
    """None of the bytes that ``Range`` names are there, or it names too many ranges; ``size`` is how many there are."""

    code = "range-not-satisfiable"


class TusVersionUnsupported(PreconditionFailed):
    """The request is in another version of tus, or does not say in which."""

    code = "tus-version-unsupported"


class KeyReused(StorageError):
    """An Idempotency-Key came back with another body."""

    code = "idempotency-key-reused"


class VolumeLocked(StorageError):
    """Another operation holds the volume; ``locked`` says which."""

    code = "volume-locked"


class UploadBusy(VolumeLocked):
    """Another request writes this upload, or it is being made a volume."""

    code = "upload-busy"


class BackupsBusy(VolumeLocked):
    """The backups of a volume are being read or put in order."""

    code = "backups-busy"


class Unavailable(StorageError):
    """Something outside this process does not answer. The outcome is unknown or nothing happened; try again."""

    code = "unavailable"


class LocationUnavailable(Unavailable):
    """A location is gone, hangs, or is read-only."""

    code = "location-unavailable"


class CephUnavailable(LocationUnavailable):
    """A location's Ceph cluster does not answer, or has no such pool."""

    code = "ceph-unavailable"


class CephDenied(LocationUnavailable):
    """A location's Ceph cluster does not let this server's key do what it has to."""

    code = "ceph-denied"


class CephNotInstalled(LocationUnavailable):
    """The packages that speak to a Ceph cluster are not there."""

    code = "ceph-not-installed"


class ExportFailed(Unavailable):
    """A daemon that serves exports cannot be started or does not do as it is told; nothing was changed."""

    code = "export-failed"


class ServersSilent(Unavailable):
    """Of the gateway: storage servers whose answer would be needed gave none; ``silent`` says which, and why."""

    code = "servers-silent"


class DownloadFailed(StorageError):
    """The server that an image was to come from did not deliver it; nothing was made."""

    code = "download-failed"


class NoRoom(StorageError):
    """No location has room; ``locations`` gives each one's reason."""

    code = "no-room"


class InternalFault(StorageError):
    """Our fault, or the host's. The request's payload goes back with a request id; details are in the log."""

    code = "internal-error"

    def for_the_log(self) -> str:
        """What the operator needs to know."""
        return self.message


class ToolFailed(InternalFault):
    """A program we ran failed. Holds its arguments and the end of what it said on stderr, for the log."""

    code = "tool-failed"

    def __init__(self, argv: list[str], status: int, stderr: str) -> None:
        super().__init__(f"{os.path.basename(argv[0])} failed with exit status {status}")
        self.argv = argv
        self.status = status
        self.stderr = stderr

    def for_the_log(self) -> str:
        """The command and the end of what it said."""
        return f"{self.message}: {' '.join(self.argv)}: {self.stderr}"


class ToolTimeout(InternalFault):
    """A program we ran did not end in time and was killed."""

    code = "tool-timeout"


class ToolMissing(InternalFault):
    """A program we need is not installed."""

    code = "tool-missing"


class ConfigurationError(StorageError):
    """The settings do not allow the server to start."""

    code = "configuration"
