"""Every error the library raises on purpose: one tree.

    ClientError
    ├─ Unreachable          the server could not be reached; nothing was carried out
    ├─ ConnectionBroken     the connection broke, of something that may be repeated, too often
    ├─ OutcomeUnknown       the connection broke over a change: it may have been carried out, or not
    ├─ BadAnswer            what answered is no storage server, or one of another age
    ├─ StillRunning         a job was not over in the time that was given
    ├─ FileChanged          a local file or the volume changed while it was sent or fetched
    ├─ Corrupted            what was fetched does not have its checksum
    └─ ApiError             the server said no: ``status``, ``code``, ``details``, ``request_id``
       ├─ InvalidRequest    the request is wrong, or too large
       ├─ Unauthenticated, Forbidden, NotFound, Gone
       ├─ Conflict          the state of the volume forbids it
       ├─ PreconditionFailed, Locked, NoRoom
       ├─ Refused           an image arrived, and no volume can be made of it
       ├─ Interrupted       a body did not come, or not as it was sent
       ├─ DownloadFailed    the server that the image was to come from did not deliver it
       ├─ Unavailable       something does not answer: the outcome is unknown or nothing happened
       └─ ServerFault       a fault of the server: its log has the reason

``code`` is one of the table in docs/api.md, and stable; the message is a sentence for people.
"""

from collections.abc import Mapping
from typing import Any, Final

import msgspec


class ClientError(Exception):
    """The root of the tree."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class Unreachable(ClientError):
    """No connection came about, so nothing was carried out."""


class ConnectionBroken(ClientError):
    """The connection broke or fell silent in the middle of an exchange."""


class OutcomeUnknown(ClientError):
    """A change may have been carried out, or not: look before you try again."""


class BadAnswer(ClientError):
    """The answer is not what a storage server says."""


class StillRunning(ClientError):
    """A job was not over in the time that was given; it goes on."""


class FileChanged(ClientError):
    """What is transferred was changed meanwhile: begin again."""


class Corrupted(ClientError):
    """What arrived is not what was sent."""


class ApiError(ClientError):
    """The server answered with an error. ``details`` are the further keys of its answer."""

    def __init__(
        self, message: str, *, status: int, code: str, details: Mapping[str, Any] | None = None, request_id: str = ""
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.details: Mapping[str, Any] = details or {}
        self.request_id = request_id


class InvalidRequest(ApiError):
    """The request is wrong; ``details["key"]`` names the key, where it is one."""


class Unauthenticated(ApiError):
    """No token, or one that is unknown or revoked."""


class Forbidden(ApiError):
    """Known, and not allowed."""


class NotFound(ApiError):
    """No such thing, or somebody else's private one."""


class Gone(ApiError):
    """It was there, and is over."""


class Conflict(ApiError):
    """The state of the volume forbids it; ``code`` says how."""


class PreconditionFailed(ApiError):
    """It is not in the state that If-Match named."""


class Locked(ApiError):
    """Another operation holds it; ``details["locked"]`` says which."""


class Refused(ApiError):
    """Everything arrived, and no volume can be made of it; ``details["reason"]`` is the code that says why."""


class Interrupted(ApiError):
    """A body did not come to its end, or not as it was sent; what arrived of an upload is kept."""


class DownloadFailed(ApiError):
    """The server that an image was to come from did not deliver it."""


class Unavailable(ApiError):
    """Something outside the server does not answer."""


class NoRoom(ApiError):
    """No location has room; ``details["locations"]`` has each one's reason."""


class ServerFault(ApiError):
    """A fault of the server; its log has the reason, under ``request_id``."""


_FAMILY_OF_STATUS: Final[Mapping[int, type[ApiError]]] = {
    400: InvalidRequest,
    401: Unauthenticated,
    403: Forbidden,
    404: NotFound,
    405: InvalidRequest,
    408: Interrupted,
    409: Conflict,
    410: Gone,
    412: PreconditionFailed,
    413: InvalidRequest,
    415: InvalidRequest,
    416: InvalidRequest,
    422: Refused,
    423: Locked,
    429: Unavailable,
    460: Interrupted,
    502: DownloadFailed,
    503: Unavailable,
    504: Unavailable,
    507: NoRoom,
}
#: The statuses of codes, for errors that come without one: those of jobs. All others are 409.
_STATUS_OF_CODE: Final[Mapping[str, int]] = {
    **dict.fromkeys(("bad-request", "missing-key", "invalid-value", "not-json", "not-an-iso", "url-refused"), 400),
    **dict.fromkeys(("unauthenticated",), 401),
    **dict.fromkeys(("forbidden", "not-owner"), 403),
    **dict.fromkeys(
        ("not-found", "route-not-found", "volume-not-found", "location-not-found", "import-not-found"), 404
    ),
    **dict.fromkeys(("migration-not-found", "job-not-found", "upload-not-found", "snapshot-not-found"), 404),
    **dict.fromkeys(("backup-not-found",), 404),
    **dict.fromkeys(("method-not-allowed",), 405),
    **dict.fromkeys(("stalled", "upload-stalled"), 408),
    **dict.fromkeys(("gone", "upload-ended"), 410),
    **dict.fromkeys(("precondition-failed", "tus-version-unsupported"), 412),
    **dict.fromkeys(("body-too-large", "image-too-large"), 413),
    **dict.fromkeys(("unsupported-media-type",), 415),
    **dict.fromkeys(("range-not-satisfiable",), 416),
    **dict.fromkeys(("idempotency-key-reused", "upload-failed"), 422),
    **dict.fromkeys(("volume-locked", "upload-busy", "backups-busy"), 423),
    **dict.fromkeys(("too-many-attempts",), 429),
    **dict.fromkeys(("upload-checksum-mismatch",), 460),
    **dict.fromkeys(("internal-error", "tool-failed", "tool-timeout", "tool-missing", "configuration"), 500),
    **dict.fromkeys(("download-failed",), 502),
    **dict.fromkeys(("unavailable", "export-failed", "location-unavailable", "servers-silent"), 503),
    **dict.fromkeys(("ceph-unavailable", "ceph-denied", "ceph-not-installed"), 503),
    **dict.fromkeys(("no-room",), 507),
}
_OTHER_STATUS: Final = 409
_SENTENCE_LONGEST: Final = 300


def family_of(status: int, code: str = "") -> type[ApiError]:
    """The class of errors with this status; a server that is newer may have statuses that nobody knew of here."""
    if code == "idempotency-key-reused":
        return InvalidRequest
    return _FAMILY_OF_STATUS.get(status) or (ServerFault if status >= 500 else InvalidRequest)


def error_of_answer(status: int, body: bytes, request_id: str) -> ApiError | BadAnswer:
    """The error that an answer stands for."""
    try:
        said = msgspec.json.decode(body)
        message, code = said.pop("error"), said.pop("code")
        request_id = said.pop("requestID", request_id)
    except (msgspec.DecodeError, UnicodeDecodeError, AttributeError, KeyError, TypeError, RecursionError):
        if status == 503 or status in (429, 502, 504):
            # Of a proxy in between, which has no words of ours.
            return Unavailable(f"the way to the server is not open: status {status}", status=status, code="unavailable")
        return BadAnswer(f"status {status} without an error that a storage server would give: is it one?")
    return family_of(status, str(code))(
        str(message), status=status, code=str(code), details=said, request_id=str(request_id)
    )


def error_of_status(status: int, reason_code: str, request_id: str) -> ApiError:
    """The error of an answer that has no body, as those to HEAD."""
    message = f"the server answered {status}"
    return family_of(status)(message, status=status, code=reason_code, request_id=request_id)


def error_of_job(said: Mapping[str, Any], job_id: str) -> ApiError:
    """The error that a job ended with."""
    details = {key: value for key, value in said.items() if key not in ("error", "code")}
    code = str(said.get("code", "internal-error"))
    status = _STATUS_OF_CODE.get(code, _OTHER_STATUS)
    message = str(said.get("error", "the operation failed"))[: _SENTENCE_LONGEST * 10]
    return family_of(status, code)(message, status=status, code=code, details={**details, "job_id": job_id})
