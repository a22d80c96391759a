"""Exports after daemons, the server or all of the machine died; and what is healthy meanwhile."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.clients import QemuIo, cannot_write, eventually
from tests.exporting import (
    MIB,
    PROTOCOLS,
    client_of,
    export,
    foreign_marker,
    identity,
    is_healthy,
    listed_exports,
    marker,
    new_volume,
    orphans,
    refusal,
    refused_export,
    state,
    tgtd_pids,
    unexport,
    volume_pids,
    wait_healthy,
)
from tests.live import ALICE, BOB, LiveServer, free_port, live_server

QUICK = ("--heartbeat", "0.3", "--lease", "2", "--sweep-interval", "0.5")


@pytest.fixture
def quick(tmp_path: Path) -> Iterator[LiveServer]:
    """A server that looks after its exports all the time."""
    with live_server(tmp_path, *QUICK) as running:
        yield running


class Worker:
    """A guest that never rests: it writes, flushes and reads back, and remembers what went wrong."""

    def __init__(self, client: QemuIo) -> None:
        self.client = client
        self.rounds = 0
        self.slowest_s = 0.0
        self.trouble: BaseException | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work)

    def _work(self) -> None:
        try:
            while not self._stop.is_set():
                started = time.monotonic()
                offset, pattern = self.rounds % 16 * 65536, self.rounds % 255 + 1
                self.client.write(offset, 65536, pattern)
                assert self.client.reads(offset, 65536, pattern)
                self.rounds += 1
                self.slowest_s = max(self.slowest_s, time.monotonic() - started)
        except BaseException as error:
            self.trouble = error

    def __enter__(self) -> "Worker":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(60)
        if self.trouble is not None:
            raise self.trouble
        assert self.rounds > 10


# -- death -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("victims", "protocol", "image_format"),
    [
        *(("storage daemon", protocol, one) for protocol in PROTOCOLS for one in ("raw", "qcow2")),
        *((victims, protocol, "qcow2") for victims in ("daemons", "server", "all") for protocol in ("iscsi", "nbd")),
        *(("machine", protocol, one) for protocol in PROTOCOLS for one in ("raw", "qcow2")),
    ],
)
def test_everything_comes_back(quick: LiveServer, protocol: str, image_format: str, victims: str) -> None:
    """Under the same name, with the same credentials, and with every byte that was flushed."""
    server = quick
    vid = new_volume(server, format=image_format)
    answer = export(server, vid, protocol=protocol)
    with client_of(answer) as client:
        client.write(65536, 65536, 1)
        if victims in ("server", "all", "machine"):
            server.kill()
        if victims == "storage daemon":
            assert server.kill_daemons(f"/v/{vid}/")
        elif victims != "server":
            assert server.kill_daemons()
        if victims == "machine":
            server.clean_exports()
        if server.process is None:
            server.start()
        wait_healthy(server, vid)
        eventually(lambda: client.reads(65536, 65536, 1))
        client.write(131072, 65536, 2)
        assert identity(export(server, vid)) == identity(answer)
        with client_of(answer) as another:
            assert another.reads(65536, 65536, 1)
            assert another.reads(131072, 65536, 2)
    assert server.info(vid)["exported"] is True
    unexport(server, vid)
    assert not volume_pids(server, vid)


def test_restarting_the_server_drops_no_connection(quick: LiveServer) -> None:
    server = quick
    vids = [new_volume(server, format=one) for _ in PROTOCOLS for one in ("raw", "qcow2")]
    answers = [export(server, vid, protocol=PROTOCOLS[number // 2]) for number, vid in enumerate(vids)]
    before = server.daemons()
    with contextlib.ExitStack() as stack:
        workers = [stack.enter_context(Worker(stack.enter_context(client_of(one)))) for one in answers]
        for end in (server.stop, server.kill):
            end()
            time.sleep(0.3)
            server.start()
            wait_healthy(server, *vids)
            assert server.daemons() == before
        assert all(one["repairs"] == 0 for one in listed_exports(server).values())
    assert max(one.slowest_s for one in workers) < 5


def test_nothing_healthy_is_touched_while_something_is_mended(quick: LiveServer) -> None:
    server = quick
    kept = {protocol: new_volume(server, format="qcow2") for protocol in PROTOCOLS}
    killed = {protocol: new_volume(server, format="qcow2") for protocol in PROTOCOLS}
    answers = {vid: export(server, vid, protocol=one) for group in (kept, killed) for one, vid in group.items()}
    pids = {vid: volume_pids(server, vid) for vid in kept.values()}
    tgtd = tgtd_pids(server)
    with contextlib.ExitStack() as stack:
        for vid in kept.values():
            stack.enter_context(Worker(stack.enter_context(client_of(answers[vid]))))
        for vid in killed.values():
            assert server.kill_daemons(f"/v/{vid}/")
            wait_healthy(server, vid)
    assert {vid: volume_pids(server, vid) for vid in kept.values()} == pids
    assert tgtd_pids(server) == tgtd
    assert all(state(server, vid)["repairs"] == 0 for vid in kept.values())
    assert all(state(server, vid)["repairs"] > 0 for vid in killed.values())


def test_a_volume_whose_mount_is_dead_is_mounted_again(quick: LiveServer) -> None:
    """The path is a file without a server behind it until then, and tgtd has it open."""
    server = quick
    vid = new_volume(server, format="qcow2")
    with client_of(export(server, vid)) as client:
        client.write(0, 65536, 1)
        for number in range(2, 5):
            server.kill_daemons(f"/v/{vid}/")
            wait_healthy(server, vid)
            assert client.reads(0, 65536, number - 1)
            client.write(0, 65536, number)
        mounts = [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if vid in line]
        assert len(mounts) <= 1, "dead mounts pile up"  # none where tgtd needs no FUSE


def test_many_exports_are_back_soon_after_a_start(tmp_path: Path) -> None:
    with live_server(tmp_path, *QUICK) as server:
        vids = [new_volume(server, 1, format="qcow2" if number % 2 else "raw") for number in range(30)]
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda one: export(server, one[1], protocol=PROTOCOLS[one[0] % 3]), enumerate(vids)))
        server.kill()
        server.clean_exports()
        server.start()
        assert server.call("version")
        wait_healthy(server, *vids, timeout_s=60)
        eventually(lambda: all(server.info(vid)["exported"] for vid in vids))


# -- what nobody asked for -------------------------------------------------------------------------------------


def tgtadm(server: LiveServer, *arguments: str) -> str:
    environment = {**os.environ, "TGT_IPC_SOCKET": f"{server.run_dir}/tgt/ipc"}
    argv = ["tgtadm", "-C", "1", "--lld", "iscsi", *arguments]
    return subprocess.run(argv, env=environment, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("name", ["iqn.2004-10.cloud.elemento:01:" + "e" * 32, "iqn.2001-04.com.example:by-hand"])
def test_a_target_made_by_hand_is_withdrawn(quick: LiveServer, tmp_path: Path, name: str) -> None:
    server = quick
    vid = new_volume(server)
    (tmp_path / "lun").write_bytes(bytes(MIB))
    with client_of(export(server, vid)) as client:
        tgtadm(server, "--op", "new", "--mode", "target", "--tid", "77", "--targetname", name)
        lun = ("--op", "new", "--mode", "logicalunit", "--tid", "77", "--lun", "1", "--backing-store")
        tgtadm(server, *lun, str(tmp_path / "lun"))
        tgtadm(server, "--op", "bind", "--mode", "target", "--tid", "77", "--initiator-address", "ALL")
        eventually(lambda: name not in tgtadm(server, "--op", "show", "--mode", "target"))
        eventually(lambda: orphans(server) == [])
        client.write(0, 4096, 1)
    assert f"iscsi serves {name.rpartition(':')[2] if 'elemento' in name else name}" in server.log()
    assert is_healthy(server, vid)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_what_is_served_without_a_marker_is_withdrawn(quick: LiveServer, protocol: str) -> None:
    server = quick
    vid, other = new_volume(server), new_volume(server)
    export(server, other, protocol=protocol)
    with client_of(export(server, vid, protocol=protocol)) as client:
        marker(server, vid).unlink()
        eventually(lambda: not volume_pids(server, vid))
        assert cannot_write(client, 0, 4096, 1, timeout_s=0.5)
    assert f"volume {vid} is served and no marker asks for it" in server.log()
    eventually(lambda: orphans(server) == [])
    assert set(listed_exports(server)) == {(other, ALICE)}
    assert is_healthy(server, other)


def test_a_run_directory_that_says_nothing_is_withdrawn(quick: LiveServer) -> None:
    server = quick
    vid = new_volume(server)
    export(server, vid, protocol="local")
    marker(server, vid).unlink()
    (server.run_dir / "v" / vid / "engine.json").unlink()
    eventually(lambda: not volume_pids(server, vid))
    eventually(lambda: not (server.run_dir / "v" / vid).exists())


# -- how an export is told to be -------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", ["iscsi", "nbd"])
def test_a_daemon_that_hangs(quick: LiveServer, protocol: str) -> None:
    """It is told, its marker goes stale, nothing else suffers; and when it goes on, all is well."""
    server = quick
    vid, other = new_volume(server, format="qcow2"), new_volume(server, format="qcow2")
    export(server, other, protocol="nbd")
    with client_of(export(server, vid, protocol=protocol)) as client:
        client.write(0, 65536, 1)
        pids = volume_pids(server, vid)
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        try:
            failing = eventually(lambda: one if (one := state(server, vid))["state"] == "failing" else None)
            assert "does not answer" in failing["reason"]
            eventually(lambda: time.time() - marker(server, vid).stat().st_mtime > 2)
            eventually(lambda: server.info(vid)["exported"] is False)
            for _ in range(10):
                assert time.time() - marker(server, other).stat().st_mtime < 2, "a healthy export's marker is stale"
                assert is_healthy(server, other)
                time.sleep(0.1)
        finally:
            for pid in pids:
                os.kill(pid, signal.SIGCONT)
        wait_healthy(server, vid)
        assert volume_pids(server, vid) == pids
        assert client.reads(0, 65536, 1)
        client.write(0, 65536, 2)
    assert state(server, other)["repairs"] == 0


def test_a_tgtd_that_hangs(quick: LiveServer) -> None:
    server = quick
    vid, other = new_volume(server), new_volume(server)
    export(server, other, protocol="nbd")
    with client_of(export(server, vid)) as client:
        client.write(0, 65536, 1)
        (pid,) = tgtd_pids(server)
        os.kill(pid, signal.SIGSTOP)
        try:
            eventually(lambda: state(server, vid)["state"] == "failing")
            eventually(lambda: time.time() - marker(server, vid).stat().st_mtime > 2)
            assert is_healthy(server, other)
            eventually(lambda: time.time() - marker(server, other).stat().st_mtime < 2)
        finally:
            os.kill(pid, signal.SIGCONT)
        wait_healthy(server, vid)
        assert tgtd_pids(server) == {pid}
        assert client.reads(0, 65536, 1)


def test_a_port_that_somebody_took_meanwhile(quick: LiveServer) -> None:
    server = quick
    vid = new_volume(server)
    answer = export(server, vid, protocol="nbd")
    server.kill()
    server.clean_exports()
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(("127.0.0.1", answer["endpoint"]["port"]))
        taken.listen()
        server.start()
        failing = eventually(lambda: one if (one := state(server, vid))["state"] == "failing" else None)
        assert failing["reason"]
    wait_healthy(server, vid)
    assert identity(export(server, vid)) == identity(answer)


def test_a_new_export_does_not_take_the_port_of_one_that_comes_back(tmp_path: Path) -> None:
    port = free_port()
    with live_server(tmp_path, *QUICK, "--nbd-ports", f"{port}-{port + 50}") as server:
        old = [new_volume(server) for _ in range(3)]
        for vid in old:
            export(server, vid, protocol="nbd")
        new = [new_volume(server) for _ in range(3)]
        server.kill()
        server.clean_exports()
        server.start()
        for vid in new:
            export(server, vid, protocol="nbd")
        wait_healthy(server, *old, *new)


# -- locations and markers -------------------------------------------------------------------------------------


def test_a_location_that_is_away_does_not_end_its_exports(quick: LiveServer) -> None:
    server = quick
    vid = new_volume(server)
    with client_of(export(server, vid, protocol="nbd")) as client, Worker(client):
        pids = volume_pids(server, vid)
        away = server.root.parent / "away"
        (server.root / "disk").rename(away)
        time.sleep(2)
        assert volume_pids(server, vid) == pids
        away.rename(server.root / "disk")
        wait_healthy(server, vid)
        assert volume_pids(server, vid) == pids


def test_markers_of_other_servers(quick: LiveServer) -> None:
    server = quick
    fresh, stale = new_volume(server), new_volume(server)
    path = foreign_marker(server, fresh, BOB)
    foreign_marker(server, stale, BOB, age_s=100)
    server.call("rescan")
    assert server.info(fresh)["exported"] is True
    assert server.info(stale)["exported"] is False
    states = {vid: one["state"] for (vid, _), one in listed_exports(server).items()}
    assert states == {fresh: "elsewhere", stale: "stale"}
    assert refused_export(server, fresh)[:2] == (409, "not-exportable")
    assert refused_export(server, fresh, BOB)[:2] == (409, "export-differs")
    assert refusal(server, "unexport", {"volume_id": fresh, "client_uid": BOB})[:2] == (409, "volume-exported")
    assert refusal(server, "destroy", {"volume_id": fresh})[:2] == (409, "volume-exported")
    resize = {"vid": fresh, "creatorID": ALICE, "size": 0.02}
    assert refusal(server, "update/resize", resize)[:2] == (409, "volume-exported")
    export(server, stale, BOB, protocol="local")
    unexport(server, stale, BOB)
    foreign_marker(server, stale, BOB, age_s=100)
    server.call("destroy", {"volume_id": stale})
    path.unlink()
    export(server, fresh, protocol="local")
    assert not server.daemons("/tgt/")


def test_markers_that_mean_nothing_hold_up_nothing(quick: LiveServer) -> None:
    """Empty ones, as the vendor's server leaves them, rubbish, and names that are no files."""
    server = quick
    vid, good = new_volume(server), new_volume(server)
    answer = export(server, good, protocol="nbd")
    directory = server.directory(vid)
    prefix = "iqn.2004-10.cloud.elemento:01:"
    (directory / f"{prefix}{'1' * 32}.exported").mkdir()
    (directory / f"{prefix}{'2' * 32}.exported").symlink_to("/etc/passwd")
    os.mkfifo(directory / f"{prefix}{'3' * 32}.exported")
    (directory / f"{prefix}.exported").write_text("")
    for number, content in enumerate((b"", b"\0" * 70_000, b"[" * 50_000, b'{"server":1}')):
        path = directory / f"{prefix}{number:032x}.exported"
        path.write_bytes(content)
        os.utime(path, (0, 0))
    server.kill()
    server.clean_exports()
    server.start()
    wait_healthy(server, good)
    assert identity(export(server, good)) == identity(answer)
    assert server.info(vid)["volumeID"] == vid
    for path in directory.glob("iqn*"):
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
    export(server, vid, protocol="local")


def test_a_volume_that_moved_to_another_server_with_its_markers(quick: LiveServer, tmp_path: Path) -> None:
    """A copied volume, or one of a server whose state was lost: served by nobody until somebody asks."""
    server = quick
    vid = new_volume(server)
    export(server, vid, protocol="nbd")
    server.kill()
    server.clean_exports()
    shutil.rmtree(server.state_dir)
    server.start()
    eventually(lambda: server.info(vid)["exported"] is False)
    assert not server.daemons()
    unexport(server, vid)
    export(server, vid, protocol="nbd")
