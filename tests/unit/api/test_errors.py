import logging

import msgspec
import pytest

from elemento_storage import errors
from elemento_storage.api.errors import STATUS_OF_FAMILY, error_body, log_fault, status_of
from elemento_storage.errors import (
    ConfigurationError,
    InternalFault,
    InvalidValue,
    MissingKey,
    NoRoom,
    NotOwner,
    StorageError,
    ToolFailed,
    ToolMissing,
    VolumeLocked,
    VolumeNotFound,
)
from tests.unit.support import uid

ALL = [
    value
    for value in vars(errors).values()
    if isinstance(value, type) and issubclass(value, StorageError) and value is not StorageError
]
STATUSES = {
    "InvalidRequest": 400, "MissingKey": 400, "InvalidValue": 400, "NotJSON": 400,
    "UnsupportedMediaType": 415, "BodyTooLarge": 413, "MethodNotAllowed": 405,
    "Unauthenticated": 401, "Forbidden": 403, "NotOwner": 403,
    "NotFound": 404, "RouteNotFound": 404, "VolumeNotFound": 404, "JobNotFound": 404,
    "Conflict": 409, "VolumeExported": 409, "CannotShrink": 409, "FormatUnsupported": 409,
    "VolumeExists": 409, "JobEnded": 409, "JobCancelled": 409,
    "PreconditionFailed": 412, "KeyReused": 422, "VolumeLocked": 423,
    "Unavailable": 503, "LocationUnavailable": 503, "NoRoom": 507,
    "InternalFault": 500, "ToolFailed": 500, "ToolTimeout": 500, "ToolMissing": 500, "ConfigurationError": 500,
}  # fmt: skip


@pytest.mark.parametrize("error", ALL, ids=lambda error: error.__name__)
def test_every_error_has_a_family_and_the_status_of_the_contract(error: type[StorageError]) -> None:
    """A class that somebody adds has to be put into a family, not left to the 500 of the unknown."""
    families = [family for family in STATUS_OF_FAMILY if issubclass(error, family)]
    assert len(families) == 1
    assert status_of(error) == STATUSES.get(error.__name__, status_of(families[0]))


def test_no_status_is_of_an_error_that_is_gone() -> None:
    assert {error.__name__ for error in ALL} >= set(STATUSES)


def test_codes_are_unique_and_stay_readable() -> None:
    """Except the opaque fault, which shares its code with the root: both mean "unknown"."""
    codes = [error.code for error in ALL]
    assert len(set(codes)) == len(codes)
    assert all(code == code.lower() and code.replace("-", "").isalpha() for code in codes)


def test_every_error_says_in_its_docstring_what_it_means() -> None:
    assert [error.__name__ for error in ALL if not (error.__doc__ or "").strip()] == []


def test_the_whole_tree_is_drawn_and_nothing_else() -> None:
    told = errors.__doc__ or ""
    families = {error for error in ALL if error.__base__ is StorageError}
    assert [family.__name__ for family in families if family.__name__ not in told] == []


def test_an_error_of_the_caller_has_its_sentence_code_and_details() -> None:
    status, body = error_body(VolumeNotFound(uid(1)), "request", {"volume_id": uid(1)})
    assert status == 404
    assert body == {"error": f"no volume {uid(1)}", "code": "volume-not-found", "volume_id": uid(1)}
    status, body = error_body(MissingKey("name"), "request", {})
    assert (status, body["error"]) == (400, "request was badly formatted. 'name'")
    status, body = error_body(NoRoom("full", locations={"disk": "full"}), "request", {})
    assert (status, body["locations"]) == (507, {"disk": "full"})
    status, body = error_body(VolumeLocked("locked", locked={"job": "j"}), "request", {})
    assert (status, body["locked"]) == (423, {"job": "j"})


def test_what_the_caller_sent_does_not_come_back_with_its_own_errors() -> None:
    for error in (NotOwner("no"), InvalidValue("wrong", key="size")):
        assert "name" not in error_body(error, "request", {"name": "x"})[1]


def test_an_unknown_error_is_opaque_and_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    payload = {"name": "x", "size": 1, "error": "mine"}
    error = ValueError("/secret/path")
    log_fault(error, "request-7")
    status, body = error_body(error, "request-7", payload)
    assert status == 500
    assert body == {
        "name": "x",
        "size": 1,
        "error": body["error"],
        "code": "internal-error",
        "requestID": "request-7",
    }
    assert "/secret" not in str(body)
    assert "request-7" in str(body["error"])
    assert "/secret/path" in caplog.text
    assert "request-7" in caplog.text


def test_a_tool_that_failed_is_told_in_the_log_only(caplog: pytest.LogCaptureFixture) -> None:
    error = ToolFailed(["qemu-img", "resize", "/mnt/disk/data.img"], 1, "no such thing")
    log_fault(error, "request-7")
    status, body = error_body(error, "request-7", {"vid": "v"})
    assert status == 500
    assert (body["vid"], body["code"], body["requestID"]) == ("v", "tool-failed", "request-7")
    assert "data.img" not in str(body)
    assert "no such thing" not in str(body)
    assert "/mnt/disk/data.img" in caplog.text
    assert "no such thing" in caplog.text


def test_the_cause_of_a_fault_is_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    error = InternalFault("something")
    error.__cause__ = KeyError("the real reason")
    log_fault(error, "r")
    assert "the real reason" in caplog.text


@pytest.mark.parametrize("payload", [None, [1], "text", 5])
def test_a_payload_that_is_no_object_is_not_echoed(payload: object) -> None:
    for error in (ToolMissing("none"), ConfigurationError("x"), RuntimeError()):
        status, body = error_body(error, "r", payload)
        assert status == 500
        assert set(body) == {"error", "code", "requestID"}


def test_errors_of_the_caller_are_not_logged_as_faults(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        for error in (VolumeNotFound(uid(1)), NoRoom("full"), VolumeLocked("locked")):
            log_fault(error, "r")
    assert caplog.text == ""


def test_every_answer_is_json() -> None:
    for error in (MissingKey("k"), NoRoom("x", locations={}), ToolFailed(["a"], 1, "b"), VolumeLocked("x", locked={})):
        assert msgspec.json.decode(msgspec.json.encode(error_body(error, "r", {"size": 1.5})[1]))
