"""A location whose file system hangs: a FUSE mount whose daemon is stopped, which answers to nothing, not even stat."""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.e2e.invariants import assert_clean
from tests.exporting import client_of, export, marker, wait_healthy
from tests.live import ALICE, BOB, LiveServer, live_server, make_location


@dataclass
class Hangable:
    """A mount that can be made to hang."""

    pid: int

    def hang(self) -> None:
        os.kill(self.pid, signal.SIGSTOP)

    def go_on(self) -> None:
        os.kill(self.pid, signal.SIGCONT)


@pytest.fixture
def hangable(tmp_path: Path) -> Iterator[Hangable]:
    """``mnt/nas`` on a file system that can be made to hang, and ``mnt/disk`` on one that is well."""
    behind, mount = tmp_path / "behind", tmp_path / "mnt" / "nas"
    make_location(tmp_path, "behind", max_total_size="900G")
    make_location(tmp_path / "mnt", max_total_size="100G")
    mount.mkdir()
    daemon = subprocess.Popen(["bindfs", "-f", behind, mount])
    deadline = time.monotonic() + 10
    while not mount.is_mount():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    yield Hangable(daemon.pid)
    daemon.send_signal(signal.SIGCONT)
    subprocess.run(["umount", "-l", mount], check=False)
    daemon.terminate()
    daemon.wait(10)


def duration(call: object) -> float:
    assert callable(call)
    started = time.monotonic()
    call()
    return time.monotonic() - started


def test_the_rest_of_the_server_does_not_notice(tmp_path: Path, hangable: Hangable) -> None:
    with live_server(tmp_path, "--disk-timeout", "3", "--heartbeat", "0.5", "--lease", "2") as server:
        away = server.create(name="on the nas", private=True)
        assert server.info(away)["location"] == "nas"
        here = None
        hangable.hang()
        try:
            server.listed()  # the first to find out may have to wait
            time.sleep(2)
            here = server.create(name="here")
            assert server.info(here)["location"] == "disk"
            for path, body in {
                "accessible": {"client_uid": ALICE},
                "info": {"volume_id": here},
                "has": {"volume_id": "0123456789abcdef" * 2},
                "create": {"creatorID": ALICE, "name": "x", "size": 0.001},
                "update": {"vid": here, "creatorID": ALICE, "name": "y"},
                "update/convert": {"vid": here, "creatorID": ALICE, "format": "qcow2"},
                "locations": {},
                "health": {},
                "bin": {},
            }.items():
                started = time.monotonic()
                response = server.post(path, body)
                assert response.status_code == 200, f"{path}: {response.text}"
                assert time.monotonic() - started < 1.5, path
            assert server.http.get("metrics").status_code == 200
            gone = server.post("info", {"volume_id": away, "client_uid": ALICE})
            assert (gone.status_code, gone.json()["code"]) == (503, "location-unavailable")
            assert server.post("info", {"volume_id": away, "client_uid": BOB}).status_code == 404
            assert str(tmp_path) not in gone.text
            assert "nas" in " ".join(server.call("health")["problems"])
            # Signs of life go on where they can: a second server does not take us for dead.
            (sign,) = (server.root / "disk" / ".elemento" / "servers").iterdir()
            assert time.time() - sign.stat().st_mtime < 2
        finally:
            hangable.go_on()
        deadline = time.monotonic() + 20
        while server.post("info", {"volume_id": away}).status_code != 200:
            assert time.monotonic() < deadline
            time.sleep(0.2)
        assert here in server.listed()
        assert away in server.listed()
        assert_clean(server, "disk")
        assert_clean(server, "nas")


def test_an_operation_in_the_hung_location_keeps_its_volume(tmp_path: Path, hangable: Hangable) -> None:
    """The caller is told to look again; nobody else gets at the volume until the operation has really ended."""
    with live_server(tmp_path, "--disk-timeout", "1.5") as server:
        vid = server.create(name="one")
        assert server.info(vid)["location"] == "nas"
        hangable.hang()
        answers = []
        body = {"vid": vid, "creatorID": ALICE}

        def update(name: str) -> None:
            answers.append(server.post("update", {**body, "name": name}).status_code)

        threads = [threading.Thread(target=update, args=(name,)) for name in ("two", "three")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
        assert answers == [503, 503]
        hangable.go_on()
        deadline = time.monotonic() + 20
        while server.post("info", {"volume_id": vid}).status_code != 200:
            assert time.monotonic() < deadline
            time.sleep(0.2)
        time.sleep(1.5)
        assert server.info(vid)["name"] in ("one", "two", "three")
        assert server.call("update", {**body, "name": "four"})["name"] == "four"
        assert server.info(vid)["name"] == "four"
        assert_clean(server, "nas")


def test_start_and_stop_do_not_wait_for_it(tmp_path: Path, hangable: Hangable) -> None:
    with live_server(tmp_path, "--disk-timeout", "3") as server:
        server.create(name="on the nas")
        hangable.hang()
        try:
            assert duration(server.stop) < 20
            assert duration(server.start) < 10
            assert server.info(server.create(name="here"))["location"] == "disk"
        finally:
            hangable.go_on()
        deadline = time.monotonic() + 20
        while len(server.listed()) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.2)


def test_a_paused_server_does_not_hold_up_another(tmp_path: Path) -> None:
    """SIGSTOP under the guard: the other server starts, lists, and answers for the one volume that it cannot have."""
    with live_server(tmp_path, "--disk-timeout", "6") as one:
        vid, other_vid = one.create(), one.create()
        paused = LiveServer(tmp_path / "mnt", tmp_path / "state2")
        third = LiveServer(tmp_path / "mnt", tmp_path / "state3", "--disk-timeout", "6")
        try:
            paused.start({"ELEMENTO_STORAGE_FAULTPOINT": "stop:update.durable"})
            thread = threading.Thread(
                target=lambda: paused.http.post(
                    "update", json={"vid": vid, "creatorID": ALICE, "name": "x"}, timeout=30
                )
            )
            thread.start()
            time.sleep(1)
            held = one.post("update", {"vid": vid, "creatorID": ALICE, "name": "y"})
            assert held.status_code == 503
            assert one.call("update", {"vid": other_vid, "creatorID": ALICE, "name": "y"})["name"] == "y"
            assert len(one.listed()) == 2
            assert duration(third.start) < 10
            assert len(third.listed()) == 2
            assert paused.process is not None
            paused.process.send_signal(signal.SIGCONT)
            thread.join(30)
            deadline = time.monotonic() + 20
            while one.post("update", {"vid": vid, "creatorID": ALICE, "name": "z"}).status_code != 200:
                assert time.monotonic() < deadline
                time.sleep(0.2)
        finally:
            if paused.process is not None:
                paused.process.send_signal(signal.SIGCONT)
                paused.stop()
            if third.process is not None:
                third.stop()
            for server in (paused, third):
                server.http.close()
        time.sleep(1.1)
        assert one.info(vid)["name"] == "z"


@pytest.mark.parametrize("protocol", ["iscsi", "nbd"])
def test_exports_in_other_locations_do_not_notice(tmp_path: Path, hangable: Hangable, protocol: str) -> None:
    """Neither do the server nor the daemons that serve them; what is exported from there is well again afterwards."""
    with live_server(tmp_path, "--disk-timeout", "3", "--heartbeat", "0.5", "--lease", "3") as server:
        away = {server.create(name="on the nas", format=one) for one in ("raw", "qcow2")}
        assert {server.info(vid)["location"] for vid in away} == {"nas"}
        (tmp_path / "mnt" / "nas" / "settings.json").write_text('{"max-volumes": 2}')
        server.call("rescan")
        here = server.create(name="here")
        assert server.info(here)["location"] == "disk"
        for vid in {*away, here}:
            export(server, vid, protocol=protocol)
        wait_healthy(server, *away, here)
        with client_of(export(server, here)) as client:
            hangable.hang()
            try:
                for _ in range(10):
                    client.write(0, 65536, 1)
                    assert duration(lambda: server.call("version")) < 2
                    assert time.time() - marker(server, here).stat().st_mtime < 3
                    time.sleep(0.5)
            finally:
                hangable.go_on()
            wait_healthy(server, *away, here, timeout_s=60)
