"""clone when the disk runs full, the quota is asked for by several at once, or a location hangs."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.clients import eventually
from tests.e2e.invariants import assert_clean, read_pattern, write_pattern
from tests.e2e.test_hung_location import Hangable, hangable
from tests.live import ALICE, LiveServer, live_server, make_location
from tests.unit.support import small_file_system

__all__ = ["hangable"]

MIB = 1 << 20


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with small_file_system(tmp_path / "mnt" / "small", 48) as path:
        make_location(tmp_path / "mnt", "small")
        yield path


def with_data(server: LiveServer, mebibytes: int, location: str, **more: Any) -> str:
    vid = server.create(size=mebibytes * MIB / 1e9, **more)
    assert server.info(vid)["location"] == location
    with (server.directory(vid, location) / "data.img").open("r+b") as image:
        for _ in range(mebibytes):
            image.write(os.urandom(MIB))
    return vid


def filled_meanwhile(
    server: LiveServer, path: str, body: dict[str, Any], filler: Path, mebibytes: int
) -> httpx.Response:
    """The answer of a call in whose middle the server stands still while somebody fills the disk."""
    answers: list[httpx.Response] = []
    asking = threading.Thread(target=lambda: answers.append(server.post(path, body)))
    asking.start()
    assert server.process is not None
    status = Path(f"/proc/{server.process.pid}/stat")
    eventually(lambda: status.read_text().rpartition(") ")[2][0] == "T")
    filler.write_bytes(bytes(mebibytes * MIB))
    os.kill(server.process.pid, signal.SIGCONT)
    asking.join(30)
    (answer,) = answers
    return answer


@pytest.mark.parametrize("how", ["cp", "rsync", "rclone", "qcow2"])
def test_a_disk_that_runs_full(tmp_path: Path, small_disk: Path, how: str) -> None:
    """The room is there when it is reserved, and taken by somebody else before it is used."""
    make_location(tmp_path / "mnt", "disk", max_total_size="900T")
    env = {"ELEMENTO_STORAGE_FAULTPOINT": "stop:clone.reserved"}
    alg = {} if how == "qcow2" else {"alg": how}
    with live_server(tmp_path, env=env) as server:
        vid = with_data(server, 20, "disk", **alg)
        body = {"volume_id": vid, "creatorID": ALICE, "location": "small"}
        if how == "qcow2":
            body["format"] = "qcow2"
        answer = filled_meanwhile(server, "clone", body, small_disk / "filler", 38)
        assert (answer.status_code, answer.json()["code"]) == (507, "no-room"), answer.text
        assert_clean(server, "small")
        assert_clean(server, "disk")
        (small_disk / "filler").unlink()
        copy = server.call("clone", body)["vid"]
        assert server.info(copy)["location"] == "small"


def test_a_disk_that_runs_full_while_a_linked_clone_is_made_independent(tmp_path: Path, small_disk: Path) -> None:
    with live_server(tmp_path, env={"ELEMENTO_STORAGE_FAULTPOINT": "stop:compact.locked"}) as server:
        vid = with_data(server, 15, "small")
        linked = server.call("clone", {"volume_id": vid, "creatorID": ALICE, "linked": True})["vid"]
        before = server.http.get(f"volumes/{linked}/checksum").json()["checksum"]
        body = {"vid": linked, "creatorID": ALICE}
        answer = filled_meanwhile(server, "overlay/compact", body, small_disk / "filler", 25)
        assert (answer.status_code, answer.json()["code"]) == (507, "no-room"), answer.text
        assert server.info(linked)["linked"] is True
        assert server.http.get(f"volumes/{linked}/checksum").json()["checksum"] == before
        eventually(lambda: not list(server.directory(linked, "small").glob("*.ignore")), 5)
        assert_clean(server, "small")
        (small_disk / "filler").unlink()
        server.call("overlay/compact", body)
        assert server.http.get(f"volumes/{linked}/checksum").json()["checksum"] == before


def test_no_more_than_the_quota_when_all_ask_at_once(tmp_path: Path) -> None:
    make_location(tmp_path / "mnt", "disk", max_total_size="4.1M")
    with live_server(tmp_path) as server:
        vid = server.create(size=0.001)
        write_pattern(server, vid, 3)
        body = {"volume_id": vid, "creatorID": ALICE}
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda _: server.post("clone", body), range(8)))
        assert sorted(answer.status_code for answer in answers) == [200] * 3 + [507] * 5
        assert len(server.listed()) == 4
        assert_clean(server)


def test_a_target_that_hangs(tmp_path: Path, hangable: Hangable) -> None:
    """The source can be read and cloned elsewhere; when it goes on, the clone is whole or there is none."""
    with live_server(tmp_path, "--disk-timeout", "2", "--heartbeat", "0.5", "--lease", "30") as server:
        server.create(name="takes the nas' turn")
        vid = server.create(size=0.3)
        where = server.info(vid)["location"]
        assert where == "nas"
        here = str(server.call("clone", {"volume_id": vid, "creatorID": ALICE, "location": "disk"})["vid"])
        with (server.directory(here) / "data.img").open("r+b") as image:
            image.write(os.urandom(MIB) * 250)
        write_pattern(server, here, 5)
        begun = server.post(
            "clone", {"volume_id": here, "creatorID": ALICE, "location": "nas"}, Prefer="respond-async"
        ).json()["job"]
        staging = tmp_path / "behind" / ".elemento" / "staging"
        eventually(lambda: list(staging.glob("*/data.img")))
        hangable.hang()
        try:
            started = time.monotonic()
            assert server.info(here)["name"] == "disk"
            other = server.call("clone", {"volume_id": here, "creatorID": ALICE, "location": "disk"})["vid"]
            assert time.monotonic() - started < 10
            assert read_pattern(server, other, tmp_path) == read_pattern(server, here, tmp_path)
            locked = server.post("update", {"vid": here, "creatorID": ALICE, "name": "x"})
            assert locked.status_code == 423
        finally:
            hangable.go_on()
        eventually(lambda: server.http.get(f"jobs/{begun}").json()["ended"], 30)
        assert server.http.get(f"jobs/{begun}").json()["state"] in ("done", "failed")
        eventually(lambda: server.post("update", {"vid": here, "creatorID": ALICE, "name": "y"}).status_code == 200, 30)
        eventually(lambda: not list(staging.iterdir()), 30)
        assert_clean(server, "disk")
        assert_clean(server, "nas")
