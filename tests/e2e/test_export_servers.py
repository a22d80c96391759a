"""Servers that would get into each other's way, and what is told of exports to whom."""

import json
from pathlib import Path

import httpx

from tests.exporting import export, is_healthy, new_volume, refusal, refused_export, unexport, volume_pids, wait_healthy
from tests.live import ALICE, BOB, CAROL, LiveServer, live_server, make_location


def beside(first: LiveServer, tmp_path: Path, name: str) -> LiveServer:
    """Another server with the run directory of the first, and a root and state of its own."""
    make_location(tmp_path / f"{name}-mnt")
    other = LiveServer(tmp_path / f"{name}-mnt", tmp_path / f"{name}-state")
    other.run_dir = first.run_dir
    return other.start()


def test_two_servers_do_not_share_a_run_directory(tmp_path: Path) -> None:
    with live_server(tmp_path, "--heartbeat", "0.5", "--lease", "3") as first:
        vid = new_volume(first)
        export(first, vid)
        pids = volume_pids(first, vid)
        second = beside(first, tmp_path, "second")
        try:
            status, code, sentence = refused_export(second, new_volume(second), protocol="nbd")
            assert (status, code) == (503, "export-failed")
            assert "another server works with the run-dir" in sentence
            wait_healthy(first, vid)
            first.stop()
            # Nobody holds it now, and yet what runs in it is somebody's.
            assert "belongs to another server" in refused_export(second, new_volume(second), protocol="nbd")[2]
            assert set(first.daemons(f"/v/{vid}/")) == pids
        finally:
            second.stop()
            second.http.close()
        first.start()
        wait_healthy(first, vid)
        assert volume_pids(first, vid) == pids


def test_a_look_that_began_before_an_export_does_not_forget_it(tmp_path: Path) -> None:
    with live_server(tmp_path, "--heartbeat", "0.05") as server:
        vids = [new_volume(server) for _ in range(4)]
        for _ in range(10):
            for vid in vids:
                export(server, vid, protocol="local")
                assert is_healthy(server, vid)
            for vid in vids:
                unexport(server, vid)


def test_a_conclusion_of_long_ago_is_not_told_again(shared: LiveServer) -> None:
    """Whoever is told "concluded" takes its source for fenced off."""
    vid = new_volume(shared)
    export(shared, vid, ALICE)
    shared.call("livemigration/prepare", {"volume_id": vid, "source": ALICE, "destination": BOB})
    shared.call("livemigration/conclude", {"volume_id": vid})
    assert shared.call("livemigration/conclude", {"volume_id": vid})["state"] == "concluded"
    unexport(shared, vid, BOB)
    export(shared, vid, ALICE)
    assert refusal(shared, "livemigration/conclude", {"volume_id": vid})[:2] == (404, "migration-not-found")
    assert is_healthy(shared, vid, ALICE)


def test_only_the_owner_hears_to_whom_a_volume_is_exported(shared: LiveServer) -> None:
    since = shared.call("revisions", {"since": 0})["revision"]
    vid = new_volume(shared)
    export(shared, vid, BOB)
    assert told(shared, ALICE, since) == {(vid, BOB)}
    assert told(shared, CAROL, since) == set()


def told(server: LiveServer, client: str, since: int) -> set[tuple[str, str]]:
    """Events about exports that a client is sent."""
    found = set()
    address = f"{server.address}events?client_uid={client}&since={since}"
    with httpx.stream("GET", address, timeout=5) as stream:
        kind = ""
        for line in stream.iter_lines():
            if line.startswith("event:"):
                kind = line.partition(":")[2].strip()
            elif line.startswith("data:") and kind == "export":
                data = json.loads(line.partition(":")[2])
                found.add((data["subject"], data["client_uid"]))
            elif line.startswith(":") or (line.startswith("data:") and kind == "volume.changed"):
                break
    return found
