"""SIGKILL of the real server at every named step of every operation, then a restart, then a look at everything."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.invariants import assert_clean, read_pattern, write_pattern
from tests.live import ALICE, BOB, LiveServer, live_server

Facts = dict[str, Any] | None


@dataclass(frozen=True)
class Operation:
    """A change of a volume that exists: what is asked, and what may be true after a crash in the middle."""

    path: str
    body: Callable[[str], dict[str, Any]]
    steps: tuple[str, ...]
    headers: tuple[tuple[str, str], ...] = ()
    prepare: Callable[[LiveServer, str], object] = lambda _server, _vid: None
    starts_as: str = "raw"


LOCK = ("lock.written", "lock.removed")
REPLACE = ("replace.written", "replace.renamed")

OPERATIONS = {
    "create": Operation(
        "create",
        lambda _: {"creatorID": ALICE, "name": "second", "size": 0.002, "format": "qcow2"},
        ("create.reserved", "create.allocated", "create.staged", "create.renamed", "create.durable"),
    ),
    "create with key": Operation(
        "create",
        lambda _: {"creatorID": ALICE, "name": "second", "size": 0.002},
        (*REPLACE, "idempotency.recorded", "create.renamed", "create.durable", "idempotency.done"),
        headers=(("Idempotency-Key", "the-key"),),
    ),
    "create/multiple": Operation(
        "create/multiple",
        lambda _: {"volumes": [{"creatorID": ALICE, "name": f"second {n}", "size": 0.002} for n in range(2)]},
        ("create.reserved", "create.allocated", "create.staged"),
    ),
    "update": Operation(
        "update",
        lambda vid: {"vid": vid, "creatorID": ALICE, "name": "renamed"},
        (*REPLACE, "update.durable"),
    ),
    "transfer": Operation(
        "transfer",
        lambda vid: {"vid": vid, "creatorID": ALICE, "newCreatorID": BOB},
        (*REPLACE, "transfer.durable"),
    ),
    "destroy": Operation(
        "destroy",
        lambda vid: {"volume_id": vid},
        ("destroy.renamed", "destroy.durable"),
    ),
    "restore": Operation(
        "restore",
        lambda vid: {"volume_id": vid},
        ("restore.renamed", "restore.durable"),
        prepare=lambda server, vid: server.call("destroy", {"volume_id": vid}),
    ),
    "resize raw": Operation(
        "update/resize",
        lambda vid: {"vid": vid, "creatorID": ALICE, "size": 0.003},
        (*LOCK, "resize.locked", "resize.grown", *REPLACE, "resize.recorded"),
    ),
    "resize qcow2": Operation(
        "update/resize",
        lambda vid: {"vid": vid, "creatorID": ALICE, "size": 0.003},
        ("resize.locked", "resize.grown", "resize.recorded"),
        starts_as="qcow2",
    ),
    "convert": Operation(
        "update/convert",
        lambda vid: {"vid": vid, "creatorID": ALICE, "format": "qcow2"},
        (
            *LOCK,
            "convert.locked",
            "convert.copied",
            "convert.renamed",
            *REPLACE,
            "convert.committed",
            "convert.old-removed",
        ),
    ),
    "convert back": Operation(
        "update/convert",
        lambda vid: {"vid": vid, "creatorID": ALICE, "format": "raw"},
        ("convert.copied", "convert.renamed", "convert.committed", "convert.old-removed"),
        starts_as="qcow2",
    ),
}

CASES = [(name, step) for name, operation in OPERATIONS.items() for step in operation.steps]


@pytest.fixture
def prepared(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[tuple[LiveServer, str, bytes]]:
    """A server with one acknowledged volume that holds known bytes."""
    operation = OPERATIONS[request.getfixturevalue("operation")]
    with live_server(tmp_path) as server:
        vid = server.create(name="first")
        pattern = write_pattern(server, vid, 3)
        if operation.starts_as == "qcow2":
            server.call("update/convert", {"vid": vid, "creatorID": ALICE, "format": "qcow2"})
        operation.prepare(server, vid)
        yield server, vid, pattern


def facts(server: LiveServer, vid: str) -> Facts:
    response = server.post("info", {"volume_id": vid})
    if response.status_code == 404:
        return None
    volume = response.json()
    return {key: volume[key] for key in ("name", "size", "format", "creatorID", "private", "bus")}


def perform(server: LiveServer, operation: Operation, vid: str) -> httpx.Response:
    return server.http.post(operation.path, json=operation.body(vid), headers=dict(operation.headers))


@pytest.mark.parametrize(("operation", "step"), CASES)
def test_kill_at_step(prepared: tuple[LiveServer, str, bytes], operation: str, step: str, tmp_path: Path) -> None:
    server, vid, pattern = prepared
    asked = OPERATIONS[operation]
    before = facts(server, vid)
    others_before = set(server.listed())
    server.stop()
    server.start({"ELEMENTO_STORAGE_FAULTPOINT": f"kill:{step}"})
    with contextlib.suppress(httpx.HTTPError):
        response = perform(server, asked, vid)
        pytest.fail(f"{step} was not reached: {response.status_code} {response.text}")
    server.wait_dead()
    server.start()
    assert_clean(server)
    after_crash = facts(server, vid)

    # Doing it again gives what it would have given the first time, or finds it done.
    again = perform(server, asked, vid)
    if asked.path == "create":
        assert again.status_code == 200
        new = set(server.listed()) - others_before
        if asked.headers:
            assert new == {again.json()["vid"]}, "the same key made a second volume"
        else:
            assert again.json()["vid"] in new
            assert len(new) in (1, 2)
    elif asked.path == "create/multiple":
        assert again.status_code == 200
    elif asked.path == "destroy":
        assert again.status_code == (404 if after_crash is None else 200)
        assert server.call("restore", {"volume_id": vid})["name"] == "first"
    elif asked.path == "restore":
        assert again.status_code == (200 if after_crash is None else 404)
    elif asked.path == "transfer":
        assert again.status_code in (200, 403)
    else:
        assert again.status_code == 200, again.text
    wanted = facts(server, vid)
    assert wanted is not None
    assert after_crash in (before, wanted if asked.path != "destroy" else None), "neither the old state nor the new"
    assert read_pattern(server, vid, tmp_path) == pattern
    assert_clean(server)


@pytest.mark.parametrize(
    ("operation", "step", "recovery_step"),
    [
        ("convert", "convert.copied", "convert.resolved"),
        ("convert", "convert.committed", "convert.resolved"),
        ("convert", "convert.renamed", "lock.removed"),
        ("resize raw", "resize.grown", "resize.resolved"),
        ("resize raw", "resize.grown", "replace.written"),
    ],
)
def test_kill_during_recovery(
    prepared: tuple[LiveServer, str, bytes], operation: str, step: str, recovery_step: str, tmp_path: Path
) -> None:
    server, vid, pattern = prepared
    server.stop()
    server.start({"ELEMENTO_STORAGE_FAULTPOINT": f"kill:{step}"})
    with contextlib.suppress(httpx.HTTPError):
        perform(server, OPERATIONS[operation], vid)
    server.wait_dead()
    server.start({"ELEMENTO_STORAGE_FAULTPOINT": f"kill:{recovery_step}"}, wait=False)
    server.wait_dead()
    server.start()
    assert_clean(server)
    assert perform(server, OPERATIONS[operation], vid).status_code == 200
    assert read_pattern(server, vid, tmp_path) == pattern


@pytest.mark.parametrize("step", ["purge.renamed", "purge.deleted"])
def test_kill_while_purging(tmp_path: Path, step: str) -> None:
    with live_server(tmp_path, "--bin-retention", "0", env={"ELEMENTO_STORAGE_FAULTPOINT": f"kill:{step}"}) as server:
        vid = server.create()
        with contextlib.suppress(httpx.HTTPError):
            server.call("destroy", {"volume_id": vid})
        server.wait_dead()
        server.start()
        assert_clean(server)
        assert facts(server, vid) is None
        assert server.call("bin") == []
        trash = server.root / "disk" / ".elemento" / "trash"
        for _ in range(100):
            if not list(trash.iterdir()):
                break
            server.call("version")
        assert list(trash.iterdir()) == []


def test_every_step_is_killed(tmp_path: Path) -> None:
    """The table above names every step that the operations reach: a new step without a case fails here."""
    trace = tmp_path / "trace"
    with live_server(tmp_path, "--bin-retention", "0", env={"ELEMENTO_STORAGE_FAULTPOINT": f"trace:{trace}"}) as server:
        vid = server.create()
        for operation in OPERATIONS.values():
            if operation.path == "restore":
                continue
            if operation.path == "transfer":
                perform(server, operation, server.create())
                continue
            if operation.path == "destroy":
                perform(server, operation, server.create())
                continue
            assert perform(server, operation, vid).status_code == 200
    killed = {step for _, step in CASES} | {"convert.resolved", "resize.resolved", "purge.renamed", "purge.deleted"}
    assert set(trace.read_text().split()) - killed == set()


def test_interrupted_job_is_known_after_the_restart(tmp_path: Path) -> None:
    """The id that a client was given with 202 says what became of the work."""
    with live_server(tmp_path) as server:
        vid = server.create()
        for step, state in (("convert.copied", "interrupted"), ("convert.committed", "done")):
            server.stop()
            server.start({"ELEMENTO_STORAGE_FAULTPOINT": f"kill:{step}"})
            begun = server.post(
                "update/convert", {"vid": vid, "creatorID": ALICE, "format": "qcow2"}, Prefer="respond-async"
            )
            assert begun.status_code == 202
            server.wait_dead()
            server.start()
            job = server.http.get(f"jobs/{begun.json()['job']}").json()
            assert (job["state"], job["volume_id"]) == (state, vid)
