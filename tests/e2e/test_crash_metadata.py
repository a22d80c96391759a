"""SIGKILL of the real server at every step of iso/create and cloudinit/metadata."""

import contextlib
from pathlib import Path
from typing import Any

import httpx
import pytest

from elemento_storage.engine.seed_iso import build_seed
from tests.e2e.invariants import assert_clean
from tests.e2e.test_cloud_metadata import FIRST, META, USER, send
from tests.e2e.test_iso_library import INSTALLER
from tests.live import ALICE, LiveServer, live_server

NEW_USER = b"#cloud-config\nhostname: two\n" + b"#" * 5000
#: What they share with other operations, which tests/e2e/test_crash_steps.py kills at these steps.
CREATE = ("create.reserved", "create.allocated", "create.staged", "create.renamed", "create.durable")
SHARED = (*CREATE, "replace.written", "replace.renamed", "lock.written", "lock.removed")
BUILD = ("metadata.received", "metadata.locked", "metadata.replaced", "metadata.recorded")


def kill_at(server: LiveServer, step: str, ask: Any) -> None:
    """Let the server die at a step of what is asked, start it again, and find everything clean."""
    server.stop()
    server.start({"ELEMENTO_STORAGE_FAULTPOINT": f"kill:{step}"})
    with contextlib.suppress(httpx.HTTPError):
        response = ask()
        pytest.fail(f"{step} was not reached: {response.status_code} {response.text}")
    server.wait_dead()
    server.start()
    assert_clean(server)


def inside(server: LiveServer, vid: str) -> dict[str, bytes]:
    directory = server.directory(vid) / "cloud-init-metadata"
    return {path.name: path.read_bytes() for path in directory.iterdir() if not path.name.startswith("elemento.")}


def test_a_volume_in_the_making_and_a_file_that_arrives(tmp_path: Path) -> None:
    with live_server(tmp_path) as server:
        kill_at(server, "create.staged", lambda: send(server, FIRST, ("user-data", USER)))
        assert server.listed() == {}
        kill_at(server, "create.renamed", lambda: send(server, FIRST, ("user-data", USER)))
        ((vid, volume),) = server.listed().items()
        assert volume["waiting"]
        assert inside(server, vid) == {"user-data": USER}
        kill_at(server, "replace.written", lambda: send(server, {"vid": vid}, ("user-data", NEW_USER)))
        assert inside(server, vid) == {"user-data": USER}
        kill_at(server, "metadata.received", lambda: send(server, {"vid": vid}, ("user-data", NEW_USER)))
        assert inside(server, vid) == {"user-data": NEW_USER}
        assert server.info(vid)["waiting"]
        kill_at(server, "create.staged", lambda: server.post("iso/create", INSTALLER))
        assert server.listed("f" * 32, iso_type="os_generic") == {}


def test_the_file_that_completes_the_seed(tmp_path: Path) -> None:
    with live_server(tmp_path) as server:
        for step in BUILD:
            vid = send(server, {**FIRST, "expectedFiles": 2}, ("meta-data", META)).json()["vid"]
            kill_at(server, step, lambda vid=vid: send(server, {"vid": vid}, ("user-data", USER)))
            assert inside(server, vid) == {"meta-data": META, "user-data": USER}
            assert server.info(vid)["waiting"] is (step in BUILD[:2])
            again = send(server, {"vid": vid}, ("user-data", USER))
            assert (again.status_code, again.json()["received"]) == (200, 2)
            made = (server.directory(vid) / "data.iso").read_bytes()
            assert made == build_seed({"meta-data": META, "user-data": USER})
        assert_clean(server)


def test_a_seed_that_is_replaced_is_the_old_or_the_new_one(tmp_path: Path) -> None:
    old = build_seed({"meta-data": META, "user-data": USER})
    new = build_seed({"meta-data": META, "user-data": NEW_USER})
    assert len(old) != len(new)
    with live_server(tmp_path) as server:
        vid = send(server, {**FIRST, "expectedFiles": 2}, ("meta-data", META), ("user-data", USER)).json()["vid"]
        image = server.directory(vid) / "data.iso"
        for step, found in (("metadata.locked", old), ("metadata.replaced", new)):
            assert image.read_bytes() == old
            kill_at(server, step, lambda: send(server, {"vid": vid}, ("user-data", NEW_USER)))
            assert image.read_bytes() == found
            assert server.info(vid)["size"] == server.listed(ALICE)[vid]["size"] == len(found)
        # Once more, and the server that recovers from it dies as well.
        assert send(server, {"vid": vid}, ("user-data", USER)).status_code == 200
        server.stop()
        server.start({"ELEMENTO_STORAGE_FAULTPOINT": "kill:metadata.replaced"})
        with contextlib.suppress(httpx.HTTPError):
            send(server, {"vid": vid}, ("user-data", NEW_USER))
        server.wait_dead()
        server.start({"ELEMENTO_STORAGE_FAULTPOINT": "kill:metadata.resolved"}, wait=False)
        server.wait_dead()
        server.start()
        assert_clean(server)
        assert image.read_bytes() == new
        assert server.info(vid)["size"] == len(new)


def test_every_step_is_killed(tmp_path: Path) -> None:
    """A new step without a case fails here."""
    trace = tmp_path / "trace"
    with live_server(tmp_path, env={"ELEMENTO_STORAGE_FAULTPOINT": f"trace:{trace}"}) as server:
        server.call("iso/create", INSTALLER)
        vid = send(server, {**FIRST, "expectedFiles": 2}, ("meta-data", META)).json()["vid"]
        assert send(server, {"vid": vid}, ("user-data", USER)).status_code == 200
    assert set(trace.read_text().split()) <= {*SHARED, *BUILD}
