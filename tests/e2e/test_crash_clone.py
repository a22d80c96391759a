"""SIGKILL of the real server at every step of clone, overlay/compact and reset, then a restart and a look."""

import contextlib
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.invariants import assert_clean, read_pattern, write_pattern
from tests.live import ALICE, LiveServer, live_server


@dataclass(frozen=True)
class Operation:
    """What is asked of the source or of a linked clone of it, and the steps that are killed."""

    path: str
    steps: tuple[str, ...]
    of_the_clone: bool = False
    more: tuple[tuple[str, Any], ...] = ()


OPERATIONS = {
    "clone": Operation("clone", ("clone.locked", "clone.reserved", "clone.copied", "create.renamed", "lock.removed")),
    "linked": Operation("clone", ("clone.parent-marked", "create.renamed"), more=(("linked", True),)),
    "compact": Operation(
        "overlay/compact",
        ("compact.locked", "compact.made", "compact.committed"),
        of_the_clone=True,
    ),
    "reset": Operation("reset", ("reset.made", "reset.old-kept", "reset.committed"), of_the_clone=True),
}
CASES = [(name, step) for name, operation in OPERATIONS.items() for step in operation.steps]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """One server, killed and started again by every test."""
    with live_server(tmp_path_factory.mktemp("crashes")) as one:
        yield one


def own_bytes(server: LiveServer, vid: str) -> None:
    data = server.directory(vid) / "data.qcow2"
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", "write -P 9 131072 512", data], check=True, capture_output=True)


def restarted(server: LiveServer, env: dict[str, str] | None = None) -> None:
    if server.process is not None:
        server.stop()
    server.start(env)


def prepared(server: LiveServer, operation: Operation) -> tuple[str, str | None, bytes]:
    vid = server.create(name="source")
    pattern = write_pattern(server, vid, 3)
    if not operation.of_the_clone:
        return vid, None, pattern
    copy = str(server.call("clone", {"volume_id": vid, "creatorID": ALICE, "linked": True})["vid"])
    own_bytes(server, copy)
    return vid, copy, pattern


def remove(server: LiveServer, *vids: str) -> None:
    for vid in vids:
        server.call("destroy", {"volume_id": vid})
        for one in (server.root / "disk" / "elemento-bin").iterdir():
            shutil.rmtree(one)  # a clone in the bin protects its parent


@pytest.mark.parametrize(("name", "step"), CASES)
def test_kill_at_step(server: LiveServer, name: str, step: str, tmp_path: Path) -> None:
    operation = OPERATIONS[name]
    vid, copy, pattern = prepared(server, operation)
    before = set(server.listed())
    subject = copy or vid
    body = {"vid": subject, "creatorID": ALICE, **dict(operation.more)}
    restarted(server, {"ELEMENTO_STORAGE_FAULTPOINT": f"kill:{step}"})
    begun = server.post(operation.path, body, Prefer="respond-async") if name == "clone" else None
    if begun is None:
        with contextlib.suppress(httpx.HTTPError):
            response = server.post(operation.path, body)
            pytest.fail(f"{step} was not reached: {response.status_code} {response.text}")
    server.wait_dead()
    restarted(server)
    assert_clean(server)
    made = set(server.listed()) - before
    if operation.path == "clone":
        # None or a whole one; the job that its caller knows says which.
        assert len(made) == (1 if step in ("create.renamed", "create.durable", "lock.removed") else 0)
        for one in made:
            assert read_pattern(server, one, tmp_path) == pattern
        if begun is not None and step not in ("lock.written", "lock.removed"):
            told = server.http.get(f"jobs/{begun.json()['job']}").json()
            assert told["state"] == ("done" if made else "interrupted")
    else:
        assert not made
        assert copy is not None
        content = read_pattern(server, copy, tmp_path)
        changed = pattern[:512] if operation.path == "reset" else b"\x09" * 512
        is_over = step.endswith(("committed", "removed"))
        assert content == (changed if is_over else b"\x09" * 512) + pattern[512:]
        assert server.info(copy).get("linked") is (None if is_over and operation.path != "reset" else True)
    assert read_pattern(server, vid, tmp_path) == pattern
    assert server.post(operation.path, body).status_code == 200
    assert_clean(server)
    new = set(server.listed()) - {vid}
    remove(server, *new, vid)


def test_the_recovery_of_a_reset_may_be_killed_too(server: LiveServer, tmp_path: Path) -> None:
    vid, copy, pattern = prepared(server, OPERATIONS["reset"])
    assert copy is not None
    restarted(server, {"ELEMENTO_STORAGE_FAULTPOINT": "kill:reset.old-kept"})
    with contextlib.suppress(httpx.HTTPError):
        server.post("reset", {"vid": copy, "creatorID": ALICE})
    server.wait_dead()
    server.start({"ELEMENTO_STORAGE_FAULTPOINT": "kill:reset.resolved"}, wait=False)
    server.wait_dead()
    restarted(server)
    assert_clean(server)
    assert read_pattern(server, copy, tmp_path) == b"\x09" * 512 + pattern[512:]
    remove(server, copy, vid)


def test_a_key_makes_one_clone_over_a_crash(server: LiveServer) -> None:
    vid, _, _ = prepared(server, OPERATIONS["clone"])
    body = {"volume_id": vid, "creatorID": ALICE}
    before = set(server.listed())
    restarted(server, {"ELEMENTO_STORAGE_FAULTPOINT": "kill:create.durable"})
    with contextlib.suppress(httpx.HTTPError):
        server.post("clone", body, Idempotency_Key="over-a-crash")
    server.wait_dead()
    restarted(server)
    told = server.post("clone", body, Idempotency_Key="over-a-crash")
    assert told.status_code == 200
    assert set(server.listed()) - before == {told.json()["vid"]}
    remove(server, told.json()["vid"], vid)


def test_every_step_is_killed(server: LiveServer, tmp_path: Path) -> None:
    """A new step without a case fails here."""
    trace = tmp_path / "trace"
    restarted(server, {"ELEMENTO_STORAGE_FAULTPOINT": f"trace:{trace}"})
    vid = server.create()
    copies = [
        str(server.call("clone", {"volume_id": vid, "creatorID": ALICE, **more})["vid"])
        for more in ({}, {"linked": True})
    ]
    for path in ("reset", "overlay/compact"):
        server.call(path, {"vid": copies[1], "creatorID": ALICE})
    killed = {step for _, step in CASES} | {"reset.locked", "reset.resolved", "compact.old-kept", "compact.resolved"}
    reached = {step for step in trace.read_text().split() if step.startswith(("clone.", "compact.", "reset."))}
    assert reached - killed == set()
    restarted(server)
    remove(server, *copies, vid)
