"""Plans, driven by hand: what is repeated, what is not, and with which key."""

from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from elemento_storage.client.errors import (
    ApiError,
    BadAnswer,
    ClientError,
    Conflict,
    ConnectionBroken,
    Locked,
    OutcomeUnknown,
    StillRunning,
    Unavailable,
    Unreachable,
)
from elemento_storage.client.events import Reader, follow
from elemento_storage.client.exchange import Emit, Open, Plan, Read, Repeat, Request, Response, Send, Sleep
from elemento_storage.client.group import gigabytes, uid
from elemento_storage.client.groups import Groups
from elemento_storage.client.multipart import form
from elemento_storage.client.retry import Retries, exchange
from elemento_storage.client.types import Event, Progress

UID = "f" * 32
VID = "1" * 32
JOB = "a" * 32
VOLUME = {
    **dict.fromkeys(("private", "bootable", "readonly", "shareable", "clonable", "cloudinit", "ceph"), False),
    **dict.fromkeys(("alg", "bus", "name", "lastUpdated", "location", "format"), "x"),
    "volumeID": VID,
    "creatorID": UID,
    "size": 1,
    "sizeOnDisk": 0,
    "exported": False,
}


class Script:
    """A transport that answers what a test wrote down; what it was asked and how long it slept."""

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)
        self.sent: list[Request] = []
        self.slept: list[float] = []

    def run(self, plan: Plan[Any]) -> Any:
        try:
            step = next(plan)
            while True:
                if isinstance(step, Sleep):
                    self.slept.append(step.seconds)
                    step = plan.send(None)
                    continue
                assert isinstance(step, Send)
                self.sent.append(step.request)
                answer = self.answers.pop(0)
                step = plan.throw(answer) if isinstance(answer, Exception) else plan.send(answer)
        except StopIteration as end:
            return end.value

    def items(self, plan: Plan[None]) -> Any:
        raise AssertionError("no plan of these tests emits items")

    @property
    def bodies(self) -> list[Any]:
        return [msgspec.json.decode(one.body) for one in self.sent if isinstance(one.body, bytes)]


def ok(body: Any, status: int = 200, **headers: str) -> Response:
    return Response(status, {key.replace("_", "-"): value for key, value in headers.items()}, msgspec.json.encode(body))


def no(status: int, code: str, **headers: str) -> Response:
    return ok({"error": "a sentence", "code": code}, status, **headers)


def groups(script: Script, client: str | None = UID, **retries: Any) -> Any:
    return Groups(script, client, Retries(**retries))


def request(repeat: Repeat) -> Request:
    return Request("POST", "info", b"{}", repeat=repeat)


# -- repeating ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("repeat", Repeat)
def test_what_never_arrived_is_sent_again(repeat: Repeat) -> None:
    script = Script(Unreachable("no"), Unreachable("no"), ok({}))
    assert script.run(exchange(request(repeat), Retries())).status == 200
    assert len(script.sent) == 3
    assert 0.1 <= script.slept[0] <= 0.2 <= script.slept[1] <= 0.4


def test_a_change_that_may_have_arrived_is_never_sent_again() -> None:
    script = Script(ConnectionBroken("gone"))
    with pytest.raises(OutcomeUnknown, match="may have been carried out"):
        script.run(exchange(request(Repeat.NEVER), Retries()))
    assert len(script.sent) == 1


def test_what_is_safe_is_sent_again_until_it_is_enough() -> None:
    script = Script(*[ConnectionBroken("gone")] * 3)
    with pytest.raises(ConnectionBroken):
        script.run(exchange(request(Repeat.SAFE), Retries(attempts=3)))
    assert len(script.sent) == 3


def test_retry_after_is_heeded() -> None:
    script = Script(no(503, "unavailable", retry_after="7"), ok({}))
    script.run(exchange(request(Repeat.SAFE), Retries()))
    assert script.slept == [7]
    script = Script(no(503, "unavailable", retry_after="700"))
    with pytest.raises(Unavailable):
        script.run(exchange(request(Repeat.SAFE), Retries()))
    assert script.slept == []


@pytest.mark.parametrize(
    ("status", "code", "family"),
    [(409, "conflict", Conflict), (503, "unavailable", Unavailable), (423, "volume-locked", Locked)],
)
def test_a_change_that_was_refused_is_told(status: int, code: str, family: type[ApiError]) -> None:
    script = Script(no(status, code, x_request_id="r"))
    with pytest.raises(family) as refused:
        script.run(exchange(request(Repeat.NEVER), Retries()))
    assert (refused.value.code, refused.value.status, refused.value.request_id) == (code, status, "r")


def test_a_locked_volume_is_waited_for_if_asked() -> None:
    script = Script(*[no(423, "volume-locked", retry_after="1")] * 3, ok({}))
    script.run(exchange(request(Repeat.NEVER), Retries(attempts=1, while_locked_s=30)))
    assert script.slept == [1, 1, 1]
    script = Script(*[no(423, "volume-locked", retry_after="1")] * 9)
    with pytest.raises(Locked):
        script.run(exchange(request(Repeat.NEVER), Retries(while_locked_s=2.5)))
    assert sum(script.slept) == 2.5


# -- keys and jobs -----------------------------------------------------------------------------------------

CREATED = {
    **dict.fromkeys(("private", "bootable", "readonly", "shareable", "clonable"), False),
    "alg": "cp",
    "bus": "virtio",
    "creatorID": UID,
    "img_format": "raw",
    "name": "d",
    "size": 20,
    "vid": VID,
}


def job(state: str, **more: Any) -> Response:
    return ok({"job": JOB, "purpose": "create", "state": state, "progress": 0.5, **more})


def test_a_create_has_a_key_and_keeps_it() -> None:
    script = Script(ConnectionBroken("gone"), ok(CREATED))
    assert groups(script).volumes.create("d", "20G").volume_id == VID
    first, second = script.sent
    assert first == second
    assert len(first.headers["Idempotency-Key"]) == 32
    assert script.bodies[0] == {"name": "d", "size": 20, "creatorID": UID}
    script = Script(ok(CREATED))
    groups(script).volumes.create("d", "20G", idempotency_key="mine")
    assert script.sent[0].headers["Idempotency-Key"] == "mine"


def test_a_job_is_waited_for_with_its_progress() -> None:
    seen: list[Progress] = []
    script = Script(
        ok({"job": JOB}, 202), job("running", bytes=5, total_bytes=10), ConnectionBroken("gone"),
        job("done", result=CREATED),
    )  # fmt: skip
    assert groups(script).volumes.create("d", 512, on_progress=seen.append).size_gb == 20
    assert [one.fraction for one in seen] == [0.5, 0.5]
    assert (seen[0].done, seen[0].total) == (5, 10)
    assert script.sent[1].path == f"jobs/{JOB}"
    assert script.sent[1].query is None


def test_a_job_that_fails_raises_its_error() -> None:
    script = Script(ok({"job": JOB}, 202), job("failed", error={"error": "no", "code": "volume-exported"}))
    with pytest.raises(Conflict) as failed:
        groups(script).volumes.convert(VID, "raw")
    assert (failed.value.code, failed.value.details["job_id"]) == ("volume-exported", JOB)


def test_a_job_that_its_server_forgot_is_asked_for_again_by_its_key() -> None:
    script = Script(
        ok({"job": JOB}, 202), no(404, "job-not-found"), ok({"job": "b" * 32}, 202), job("done", result=CREATED)
    )
    assert groups(script).volumes.clone(VID).volume_id == VID
    assert script.sent[0] == script.sent[2]


def test_a_job_without_a_key_that_its_server_forgot_is_unknown() -> None:
    script = Script(ok({"job": JOB}, 202), no(404, "job-not-found"))
    with pytest.raises(OutcomeUnknown):
        groups(script).volumes.reset(VID)
    assert len(script.sent) == 2


def test_a_job_that_a_restart_finished_is_answered_from_its_request() -> None:
    script = Script(ok({"job": JOB}, 202), job("done"))
    assert groups(script).volumes.convert(VID, "raw").format == "raw"


def test_waiting_ends_in_time() -> None:
    script = Script(*[job("running")] * 50)
    with pytest.raises(StillRunning):
        groups(script).jobs.wait(JOB, timeout_s=0)


def test_start_returns_the_job() -> None:
    script = Script(ok({"job": JOB}, 202), job("running"))
    assert groups(script).volumes.convert.start(VID, "raw").job == JOB
    script = Script(ok(CREATED))
    started = groups(script).volumes.create.start("d", 1)
    assert started.has_ended
    assert started.result == CREATED


# -- what is said ------------------------------------------------------------------------------------------


def test_nobody_is_named_if_there_is_nobody() -> None:
    script = Script(ok(VOLUME), ok(VOLUME))
    groups(script, None).volumes.get(VID)
    assert script.bodies == [{"volume_id": VID}]
    groups(script, None).on_behalf_of("e" * 32).volumes.get(VID)
    assert script.bodies[1]["client_uid"] == "e" * 32


@pytest.mark.parametrize("wrong", ["", "../secrets", "1" * 31, "volumes/x"])
def test_what_is_no_id_never_becomes_part_of_a_path(wrong: str) -> None:
    with pytest.raises(ValueError, match="no id"):
        groups(Script()).volumes.extents(wrong)


def test_sizes() -> None:
    assert gigabytes("20G") == gigabytes(20 * 10**9) == 20
    assert isinstance(gigabytes("20G"), int)
    assert gigabytes("1GiB") == 1.073741824
    assert gigabytes(512) == 5.12e-07
    assert uid("FFFFFFFF-FFFF-FFFF-FFFF-FFFFFFFFFFFF") == UID
    with pytest.raises(ValueError, match="is not a size"):
        gigabytes("much")


def test_an_answer_of_something_else() -> None:
    with pytest.raises(BadAnswer):
        groups(Script(ok({"hello": "world"}))).volumes.get(VID)


def test_forms_are_the_same_bytes_every_time() -> None:
    kind, body = form({"name": "x"}, {"user-data": b"#cloud-config\n"})
    assert (kind, body) == form({"name": "x"}, {"user-data": b"#cloud-config\n"})
    assert b'name="file"; filename="user-data"' in body
    with pytest.raises(ValueError, match="cannot be a file's name"):
        form({}, {'a"b': b""})


# -- events ------------------------------------------------------------------------------------------------

STREAM = (
    b'event: hello\ndata: {"revision":5,"complete":true}\n\n: still here\n\n'
    b'id: 6\nevent: volume.created\ndata: {"revision":6,"time":"t","subject":"v"}\n\n'
)


@pytest.mark.parametrize("step", [1, 7, 1000])
def test_events_come_out_whole_however_they_arrive(step: int) -> None:
    reader = Reader()
    seen = [event for at in range(0, len(STREAM), step) for event in reader.feed(STREAM[at : at + step])]
    assert [(one.kind, one.revision, one.subject) for one in seen] == [("hello", 5, None), ("volume.created", 6, "v")]
    assert seen[0].data == {"complete": True}


def test_a_stream_that_breaks_goes_on_after_the_last_event() -> None:
    class FakeStream:
        status = 200
        headers: dict[str, str] = {}  # noqa: RUF012

    plan = follow("events", None, None, Retries())
    emitted: list[Event] = []
    opened: list[dict[str, str]] = []
    parts: list[Callable[[], bytes] | bytes | ClientError] = [
        STREAM,
        ConnectionBroken("gone"),
        STREAM.replace(b"6", b"7"),
    ]
    step = next(plan)
    while len(emitted) < 4:
        if isinstance(step, Open):
            opened.append(dict(step.request.headers))
            step = plan.send(FakeStream())
        elif isinstance(step, Read):
            part = parts.pop(0)
            step = plan.throw(part) if isinstance(part, ClientError) else plan.send(part)
        else:
            if isinstance(step, Emit):
                emitted.append(step.item)
            step = plan.send(None)
    assert [one.get("Last-Event-ID") for one in opened] == [None, "6"]
    assert [one.revision for one in emitted] == [5, 6, 5, 7]
