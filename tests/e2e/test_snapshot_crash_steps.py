"""SIGKILL of the real server at every named step of making, restoring and deleting a snapshot."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.clients import eventually
from tests.e2e.invariants import assert_clean
from tests.e2e.killing import armed, die_at, start_armed
from tests.e2e.test_snapshots import assert_sound, delete, listed, reads, restore, take, write
from tests.exporting import MIB, client_of, export, new_volume, unexport, wait_healthy
from tests.live import ALICE, LiveServer, live_server

QUICK = ("--heartbeat", "0.3", "--lease", "2", "--sweep-interval", "0.5", "--max-snapshots", "3")
CREATE = ("snapshot.locked", "snapshot.described", "snapshot.taken")
RAW_CREATE = (*CREATE, "snapshot.copied", "snapshot.renamed")
RESTORE = ("snapshot.kept", "snapshot.restore-begun", "snapshot.recorded")
CASES = [
    *(("create", "raw", step) for step in RAW_CREATE),
    ("create", "qcow2", "snapshot.taken"),
    *(("restore", "raw", step) for step in ("snapshot.restored-beside", *RESTORE, "snapshot.exchanged")),
    *(("restore", "qcow2", step) for step in (*RESTORE[:2], "snapshot.restored-in-place")),
    *(("delete", image_format, "snapshot.deleted") for image_format in ("raw", "qcow2")),
]
LIVE = [
    ("create", "raw", "snapshot.copying"),
    ("delete", "qcow2", "snapshot.deleted"),
]
ELSEWHERE = {"replace.written", "replace.renamed", "lock.written", "lock.rewritten", "lock.removed"}


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    directory = tmp_path_factory.mktemp("crash")
    with live_server(directory, *QUICK, env=armed(directory)) as one:
        yield one


@pytest.fixture
def server(running: LiveServer) -> LiveServer:
    return running


def asked(vid: str, operation: str, snapshot: str) -> dict[str, Any]:
    more: dict[str, dict[str, Any]] = {
        "restore": {"snapshot": snapshot, "keep": True},
        "delete": {"snapshot": snapshot},
        "create": {"name": "new"},
    }
    return {"vid": vid, "creatorID": ALICE, **more[operation]}


def ids(server: LiveServer, vid: str) -> set[str]:
    return {one["snapshot"] for one in listed(server, vid)}


def assert_nothing_else_is_left(server: LiveServer, vid: str) -> None:
    """Of every snapshot that there is, its files, and no others."""
    there = ids(server, vid)
    files = {item.name.partition(".")[0] for item in (server.directory(vid) / "snapshots").iterdir()}
    assert files == there


@pytest.mark.parametrize(("operation", "image_format", "step"), CASES)
def test_kill_at_step(server: LiveServer, operation: str, image_format: str, step: str) -> None:
    vid = new_volume(server, 4, format=image_format)
    write(server, vid, 0, 1)
    old = take(server, vid, "old")
    server.call("update/resize", {"vid": vid, "creatorID": ALICE, "size": 8 * MIB / 1e9})
    write(server, vid, 0, 2)
    write(server, vid, 7 * MIB, 2)
    body = asked(vid, operation, old)
    die_at(server, step, f"snapshots/{operation}", body)
    start_armed(server)
    eventually(lambda: "locked" not in server.info(vid))
    assert_clean(server)
    assert_sound(server, vid)
    assert_nothing_else_is_left(server, vid)
    there, size = ids(server, vid), server.info(vid)["size"]
    if operation == "restore" and size == 4 * MIB:
        assert reads(server, vid, 0, 1)
        [kept] = there - {old}
        restore(server, vid, kept)
        assert server.info(vid)["size"] == 8 * MIB
    elif operation == "restore":
        assert there == {old}
    else:
        assert len(there) == (len(there & {old}) if operation == "delete" else 1 + len(there - {old}))
    assert reads(server, vid, 0, 2)
    assert reads(server, vid, 7 * MIB, 2)
    # Again it does what it would have done the first time, or finds it done.
    again = server.post(f"snapshots/{operation}", body)
    assert again.status_code == (404 if operation == "delete" and old not in there else 200), again.text
    for one in sorted(ids(server, vid)):
        if operation != "restore":
            restore(server, vid, one)
            assert reads(server, vid, 0, 1 if one == old else 2)
        delete(server, vid, one)
    assert_sound(server, vid)
    assert_clean(server)
    server.call("destroy", {"volume_id": vid})


@pytest.mark.parametrize(("operation", "image_format", "step"), LIVE)
def test_kill_while_a_client_writes(server: LiveServer, operation: str, image_format: str, step: str) -> None:
    vid = new_volume(server, 32, format=image_format)
    write(server, vid, 0, 1, 16 * MIB)
    old = take(server, vid, "old")
    with client_of(export(server, vid, protocol="iscsi")) as client:
        client.write(0, 65536, 2)
        die_at(server, step, f"snapshots/{operation}", asked(vid, operation, old))
        client.write(65536, 65536, 3)
        start_armed(server)
        eventually(lambda: "locked" not in server.info(vid))
        wait_healthy(server, vid)
        assert client.reads(0, 65536, 2)
        assert client.reads(65536, 65536, 3)
        assert_nothing_else_is_left(server, vid)
        one = take(server, vid, "after")
        client.write(0, 65536, 4)
    unexport(server, vid)
    restore(server, vid, one)
    assert reads(server, vid, 0, 2)
    assert reads(server, vid, 65536, 3)
    for snapshot in ids(server, vid):
        delete(server, vid, snapshot)
    assert_sound(server, vid)
    assert_clean(server)
    server.call("destroy", {"volume_id": vid})


@pytest.mark.parametrize(("image_format", "step"), [("raw", "snapshot.exchanged"), ("qcow2", "snapshot.restore-begun")])
def test_kill_during_recovery(server: LiveServer, image_format: str, step: str) -> None:
    vid = new_volume(server, format=image_format)
    write(server, vid, 0, 1)
    old = take(server, vid)
    write(server, vid, 0, 2)
    die_at(server, step, "snapshots/restore", asked(vid, "restore", old))
    server.start({"ELEMENTO_STORAGE_FAULTPOINT": "kill:snapshot.resolved"}, wait=False)
    server.wait_dead()
    start_armed(server)
    eventually(lambda: "locked" not in server.info(vid))
    assert reads(server, vid, 0, 1)
    assert_nothing_else_is_left(server, vid)
    assert_sound(server, vid)
    assert_clean(server)
    server.call("destroy", {"volume_id": vid})


def test_the_job_says_what_became_of_it(server: LiveServer) -> None:
    vid = new_volume(server)
    for step, state in (("snapshot.described", "interrupted"), ("snapshot.taken", "done")):
        begun = die_at(server, step, "snapshots/create", {"vid": vid, "creatorID": ALICE}, Prefer="respond-async")
        start_armed(server)
        eventually(lambda: "locked" not in server.info(vid))
        job = server.http.get(f"jobs/{begun['job']}").json()
        assert (job["state"], job["purpose"], job["volume_id"]) == (state, "snapshots/create", vid)
    assert len(listed(server, vid)) == 1


def test_no_more_than_the_settings_allow(server: LiveServer) -> None:
    vid = new_volume(server)
    made = [take(server, vid) for _ in range(3)]
    for path, more in (("snapshots/create", {}), ("snapshots/restore", {"snapshot": made[0], "keep": True})):
        response = server.post(path, {"vid": vid, "creatorID": ALICE, **more})
        assert (response.status_code, response.json()["code"]) == (409, "too-many-snapshots")
    restore(server, vid, made[0])
    delete(server, vid, made[1])
    take(server, vid)


def test_every_step_is_killed(server: LiveServer, tmp_path: Path) -> None:
    """The tables above name every step that the operations reach: a new step without a case fails here."""
    trace = tmp_path / "trace"
    server.stop()
    server.start({"ELEMENTO_STORAGE_FAULTPOINT": f"trace:{trace}"})
    for image_format in ("raw", "qcow2"):
        vid = new_volume(server, format=image_format)
        export(server, vid, protocol="iscsi")
        take(server, vid)
        unexport(server, vid)
        old = take(server, vid)
        restore(server, vid, old, keep=True)
        delete(server, vid, old)
    reached = {step for step in trace.read_text().split() if step.startswith(("snapshot.", "lock.", "replace."))}
    assert reached - ELSEWHERE == {step for _, _, step in (*CASES, *LIVE)}
    server.stop()
    start_armed(server)
