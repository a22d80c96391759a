"""Errors as HTTP: the one place where families meet statuses (contract, section 5)."""

import logging
from collections.abc import Mapping

from elemento_storage import errors
from elemento_storage.errors import ConfigurationError, InternalFault, StorageError

log = logging.getLogger(__name__)

# The first family that an error belongs to decides.
STATUS_OF_FAMILY: Mapping[type[StorageError], int] = {
    errors.UnsupportedMediaType: 415,
    errors.BodyTooLarge: 413,
    errors.MethodNotAllowed: 405,
    errors.InvalidRequest: 400,
    errors.Unauthenticated: 401,
    errors.TooManyAttempts: 429,
    errors.Forbidden: 403,
    errors.NotFound: 404,
    errors.Stalled: 408,
    errors.Gone: 410,
    errors.UploadFailed: 422,
    errors.UploadChecksumMismatch: 460,
    errors.Conflict: 409,
    errors.PreconditionFailed: 412,
    errors.RangeNotSatisfiable: 416,
    errors.KeyReused: 422,
    errors.VolumeLocked: 423,
    errors.Unavailable: 503,
    errors.DownloadFailed: 502,
    errors.NoRoom: 507,
    errors.InternalFault: 500,
    errors.ConfigurationError: 500,
}


def status_of(error: type[StorageError]) -> int:
    """The status of an error class; 500 for what has no family."""
    for family, status in STATUS_OF_FAMILY.items():
        if issubclass(error, family):
            return status
    return 500


def error_body(error: Exception, request_id: str, payload: object) -> tuple[int, dict[str, object]]:
    """Status and JSON of an error. For a fault of ours the payload goes back, and the reason only into the log."""
    if not isinstance(error, StorageError) or isinstance(error, ConfigurationError):
        error = InternalFault(f"something went wrong inside the server; its log has the reason, request {request_id}")
    status = status_of(type(error))
    if status != 500:
        return status, {"error": error.message, "code": error.code, **error.details}
    echoed = payload if isinstance(payload, dict) else {}
    return 500, {**echoed, "error": error.message, "code": error.code, "requestID": request_id}


def log_fault(error: Exception, request_id: str) -> None:
    """The full story of a fault of ours, for the operator; nothing for an error that is the caller's."""
    if not isinstance(error, StorageError):
        log.error("request %s failed", request_id, exc_info=error)
    elif isinstance(error, InternalFault):
        log.error("request %s: %s: %s", request_id, error.code, error.for_the_log(), exc_info=error.__cause__)
    elif status_of(type(error)) == 500:
        log.error("request %s: %s: %s", request_id, error.code, error.message)
