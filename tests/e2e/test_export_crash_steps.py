"""SIGKILL of the real server at every named step of an export, an unexport and the growth of what is exported."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.clients import QemuIo, cannot_write, eventually
from tests.e2e.invariants import assert_clean
from tests.exporting import (
    MIB,
    client_of,
    export,
    identity,
    is_healthy,
    listed_exports,
    marker,
    new_volume,
    orphans,
    unexport,
    volume_pids,
    wait_healthy,
)
from tests.live import ALICE, BOB, LiveServer, live_server

QUICK = ("--heartbeat", "0.3", "--lease", "2", "--sweep-interval", "0.5")
EXPORT = ("export.recorded", "export.attached", "export.served")
UNEXPORT = ("export.withdrawn", "export.erased")
GROW = ("resize.engine-grown", "resize.grown", "resize.recorded")
ELSEWHERE = {"replace.written", "replace.renamed", "lock.written", "lock.removed", "resize.locked"}  # test_crash_steps
WAYS = [("iscsi", "qcow2"), ("nbd", "raw")]
BYSTANDER_REACHES = {"export.attached", "export.target-made"}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[LiveServer]:
    with live_server(tmp_path, *QUICK) as running:
        yield running


def die_at(server: LiveServer, step: str, path: str, body: dict[str, object]) -> None:
    """Restart the server so that it dies at the step, and make the call."""
    server.stop()
    server.start({"ELEMENTO_STORAGE_FAULTPOINT": f"kill:{step}"})
    with contextlib.suppress(httpx.HTTPError):
        response = server.http.post(path, json=body)
        pytest.fail(f"{step} was not reached: {response.status_code} {response.text}")
    server.wait_dead()


def assert_nothing_served(server: LiveServer, vid: str) -> None:
    eventually(lambda: not volume_pids(server, vid))
    eventually(lambda: not (server.run_dir / "v" / vid).exists())
    eventually(lambda: orphans(server) == [])
    assert vid not in {volume for volume, _ in listed_exports(server)}
    assert not marker(server, vid).exists()


def assert_works(answer: dict[str, object], pattern: int) -> None:
    with QemuIo(answer["qemu"]) as client:  # type: ignore[arg-type]
        client.write(0, 65536, pattern)
        assert client.reads(0, 65536, pattern)


@pytest.mark.parametrize(
    ("protocol", "image_format", "step"),
    [*((*way, step) for way in WAYS for step in EXPORT), ("iscsi", "raw", "export.target-made")],
)
def test_kill_while_exporting(server: LiveServer, protocol: str, image_format: str, step: str) -> None:
    vid, bystander = new_volume(server, format=image_format), new_volume(server)
    before = None if step in BYSTANDER_REACHES else export(server, bystander, BOB, protocol=protocol)
    die_at(server, step, "export", {"volume_id": vid, "client_uid": ALICE, "protocol": protocol})
    server.start()
    if marker(server, vid).exists():
        wait_healthy(server, vid)
    else:
        assert_nothing_served(server, vid)
    answer = export(server, vid, protocol=protocol)
    assert_works(answer, 1)
    wait_healthy(server, vid)
    assert identity(export(server, vid)) == identity(answer)
    if before is not None:
        assert identity(export(server, bystander, BOB)) == identity(before), "an acknowledged export is another one"
        assert_works(before, 2)
        unexport(server, bystander, BOB)
    unexport(server, vid)
    assert_nothing_served(server, vid)
    assert_clean_images(server)


@pytest.mark.parametrize(("protocol", "image_format"), WAYS)
@pytest.mark.parametrize("step", UNEXPORT)
def test_kill_while_unexporting(server: LiveServer, protocol: str, image_format: str, step: str) -> None:
    vid = new_volume(server, format=image_format)
    answer = export(server, vid, protocol=protocol)
    with client_of(answer) as client:
        client.write(0, 65536, 1)
        die_at(server, step, "unexport", {"volume_id": vid, "client_uid": ALICE})
        server.start()
        if marker(server, vid).exists():
            wait_healthy(server, vid)
            assert identity(export(server, vid)) == identity(answer)
        else:
            assert_nothing_served(server, vid)
        unexport(server, vid)
        assert_nothing_served(server, vid)
        assert cannot_write(client, 0, 65536, 2, timeout_s=0.5)
    again = export(server, vid, protocol=protocol)
    with client_of(again) as client:
        assert client.reads(0, 65536, 1)
    unexport(server, vid)
    assert_clean_images(server)


@pytest.mark.parametrize(("protocol", "image_format"), WAYS)
@pytest.mark.parametrize("step", GROW)
def test_kill_while_growing(server: LiveServer, protocol: str, image_format: str, step: str) -> None:
    vid = new_volume(server, format=image_format)
    answer = export(server, vid, protocol=protocol)
    body = {"vid": vid, "creatorID": ALICE, "size": 16 * MIB / 1e9}
    with client_of(answer) as client:
        client.write(0, 65536, 1)
        die_at(server, step, "update/resize", body)
        server.start()
        wait_healthy(server, vid)
        assert server.info(vid)["size"] in (8 * MIB, 16 * MIB)
        eventually(lambda: "locked" not in server.info(vid))
        server.call("update/resize", body)
        assert server.info(vid)["size"] == 16 * MIB
        assert client.reads(0, 65536, 1)
        client.succeed(f"truncate {16 * MIB}")
        client.write(15 * MIB, 65536, 2)
        assert identity(export(server, vid)) == identity(answer)
    unexport(server, vid)
    assert_clean_images(server)


@pytest.mark.parametrize(("protocol", "image_format"), WAYS)
@pytest.mark.parametrize("step", ["export.attached", "export.target-made"])
def test_kill_while_bringing_back(server: LiveServer, protocol: str, image_format: str, step: str) -> None:
    if step == "export.target-made" and protocol != "iscsi":
        return
    vid = new_volume(server, format=image_format)
    answer = export(server, vid, protocol=protocol)
    with client_of(answer) as client:
        client.write(0, 65536, 1)
        server.kill()
        server.clean_exports()
        server.start({"ELEMENTO_STORAGE_FAULTPOINT": f"kill:{step}"}, wait=False)
        server.wait_dead()
        server.start()
        wait_healthy(server, vid)
        assert client.reads(0, 65536, 1)
    assert identity(export(server, vid)) == identity(answer)


def assert_clean_images(server: LiveServer) -> None:
    eventually(lambda: not any((server.root / "disk" / ".elemento" / "staging").iterdir()))
    assert_clean(server)


def test_every_step_is_killed(tmp_path: Path) -> None:
    """The tables above name every step that is reached: a new one without a case fails here."""
    trace = tmp_path / "trace"
    with live_server(tmp_path, *QUICK, env={"ELEMENTO_STORAGE_FAULTPOINT": f"trace:{trace}"}) as server:
        vids = [(new_volume(server, format=image_format), protocol) for protocol, image_format in WAYS]
        trace.write_text("")
        for vid, protocol in vids:
            export(server, vid, protocol=protocol)
            server.call("update/resize", {"vid": vid, "creatorID": ALICE, "size": 16 * MIB / 1e9})
            eventually(lambda vid=vid: is_healthy(server, vid))  # type: ignore[misc]
            unexport(server, vid)
    assert set(trace.read_text().split()) - ELSEWHERE == {*EXPORT, *UNEXPORT, *GROW, "export.target-made"}
