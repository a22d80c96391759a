"""Things on the disk and in requests that once stopped the server, or could have."""

import json
import os
import socket
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx

from tests.e2e.invariants import assert_clean
from tests.live import ALICE, BINARY, BOB, LiveServer, live_server, make_location


def lock_file(server: LiveServer, vid: str, purpose: str, content: str | bytes) -> Path:
    path = server.directory(vid) / f"elemento.{purpose}.{'1' * 32}.ignore"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_locks_of_other_making_stay_and_are_reported(server: LiveServer) -> None:
    vid = server.create()
    record = {"purpose": "convert", "operation": "1" * 32, "server": "2" * 32}
    for content in (
        "",
        "rubbish",
        os.urandom(50),
        json.dumps({**record, "server": "../../etc"}),
        json.dumps({**record, "server": "."}),
        json.dumps({**record, "server": "a\0b"}),
        json.dumps({**record, "journal": {}}),
        json.dumps({**record, "journal": {"from": "raw", "to": "qcow2", "copy": "data.img"}}),
        json.dumps({**record, "journal": {"from": "raw", "to": "iso", "copy": f".elemento-convert-{'1' * 32}"}}),
    ):
        path = lock_file(server, vid, "convert", content)
        server.stop()
        server.start()
        held = server.post("update", {"vid": vid, "creatorID": ALICE, "name": "x"})
        assert held.status_code in (423, 500), held.text
        assert path.exists()
        assert (server.directory(vid) / "data.img").exists()
        assert vid not in server.listed()
        path.unlink()
    path = lock_file(server, vid, "polish", json.dumps({**record, "purpose": "polish"}))
    report = server.call("rescan")
    assert report["foreign_locks"] == [{"vid": vid, "lock": path.name}]
    assert server.post("destroy", {"volume_id": vid}).json()["locked"]["purpose"] == "polish"
    path.unlink()
    assert server.call("update", {"vid": vid, "creatorID": ALICE, "name": "free"})["name"] == "free"
    assert_clean(server)


def test_names_that_are_not_utf_8(server: LiveServer) -> None:
    vid = server.create()
    os.mkdir(os.fsencode(server.root / "disk") + b"/x\xff.elimg")
    os.mkdir(os.fsencode(server.root) + b"/lo\xffc")
    Path(os.fsdecode(os.fsencode(server.root) + b"/lo\xffc/settings.json")).write_text("{}")
    Path(os.fsdecode(os.fsencode(server.directory(vid)) + b"/elemento.x\xff.1.ignore")).touch()
    report = server.call("rescan")
    assert report["odd"][0]["directory"] == "x\\xff.elimg"
    assert report["foreign_locks"] == [{"vid": vid, "lock": "elemento.x\\xff.1.ignore"}]
    assert {one["name"] for one in server.call("locations")} == {"disk", "lo\\xffc"}
    assert server.info(vid)["locked"]["purpose"] == "x\\xff"
    assert server.listed() == {}
    assert server.call("accessible", {"client_uid": ALICE, "include_locked": True})


def test_values_in_meta_json_that_no_float_holds(server: LiveServer) -> None:
    vid = server.create()
    path = server.directory(vid) / "meta.json"
    odd = '"vendor":1e999,"pi":3.14159265358979323846264338327950288,"n":123456789012345678901234567890'
    path.write_text(path.read_text().replace("{", "{" + odd + ",", 1))
    path.chmod(0o600)
    os.chown(path, 1234, 1235)
    assert server.call("update", {"vid": vid, "creatorID": ALICE, "name": "new"})["name"] == "new"
    assert odd in path.read_text()
    status = path.stat()
    assert (status.st_mode & 0o777, status.st_uid, status.st_gid) == (0o600, 1234, 1235)


def test_settings_with_a_number_that_has_no_end(server: LiveServer) -> None:
    settings = server.root / "disk" / "settings.json"
    for size in ('"' + "9" * 100_000 + 'P"', "9" * 5000, '"1e5"', "-1", "true", "[]", '""'):
        settings.write_text(f'{{"max-total-size": {size}}}')
        server.stop()
        server.start()
        (shown,) = server.call("locations")
        assert shown["usable"] is False, size


def test_limits_that_cannot_be_read_forbid_growth(server: LiveServer) -> None:
    vid = server.create()
    server.call("destroy", {"volume_id": server.create(name="binned")})
    (server.root / "disk" / "settings.json").write_text('{"max-total-size": "1M",}')
    server.stop()
    server.start()
    assert server.post("update/resize", {"vid": vid, "creatorID": ALICE, "size": 1}).status_code == 507
    (binned,) = server.call("bin")
    assert server.post("restore", {"volume_id": binned["volumeID"]}).status_code == 507


def test_nobody_empties_the_bin_with_a_size_that_fits_nowhere(server: LiveServer) -> None:
    vids = [server.create(size=0.01, preallocation="full") for _ in range(3)]
    for vid in vids:
        server.call("destroy", {"volume_id": vid})
    huge = server.post("create", {"creatorID": BOB, "name": "x", "size": 9_000_000})
    assert huge.status_code == 507
    assert len(server.call("bin")) == 3


def test_a_full_disk_at_start_can_still_be_emptied(tmp_path: Path) -> None:
    mount = tmp_path / "mnt" / "small"
    mount.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", mount], check=True)
    try:
        make_location(tmp_path / "mnt", "small")
        with live_server(tmp_path, "--overcommit", "0", "--bin-retention", "0", "--heartbeat", "0.2") as server:
            vid = server.create(size=0.004, preallocation="full")
            server.stop()
            with (mount / "ballast").open("wb") as ballast, os.fdopen(os.dup(ballast.fileno()), "wb") as file:
                try:
                    while True:
                        os.write(file.fileno(), b"\1" * 4096)
                except OSError:
                    pass
            server.start()
            assert server.post("create", {"creatorID": ALICE, "name": "x", "size": 0.001}).status_code == 507
            assert server.process is not None
            descriptors = Path(f"/proc/{server.process.pid}/fd")
            time.sleep(1)
            before = len(list(descriptors.iterdir()))
            time.sleep(2)
            assert len(list(descriptors.iterdir())) <= before + 1
            assert server.call("destroy", {"volume_id": vid}) == {"vid": vid}
            deadline = time.monotonic() + 15
            while server.post("create", {"creatorID": ALICE, "name": "x", "size": 0.001}).status_code != 200:
                assert time.monotonic() < deadline
                time.sleep(0.2)
    finally:
        subprocess.run(["umount", "-l", mount], check=False)


def test_a_volume_that_lives_elsewhere_is_not_restored_twice(server: LiveServer) -> None:
    make_location(server.root, "second")
    vid = server.create()
    home = server.info(vid)["location"]
    other = {"disk": "second", "second": "disk"}[home]
    server.call("rescan")
    subprocess.run(["cp", "-a", server.directory(vid, home), server.root / other], check=True)
    server.call("destroy", {"volume_id": vid})
    response = server.post("restore", {"volume_id": vid})
    assert (response.status_code, response.json()["code"]) == (409, "volume-exists")


def test_the_same_volume_in_two_locations_is_reported(server: LiveServer) -> None:
    make_location(server.root, "second")
    server.call("rescan")
    vid = server.create()
    home = server.info(vid)["location"]
    other = {"disk": "second", "second": "disk"}[home]
    subprocess.run(["cp", "-a", server.directory(vid, home), server.root / other], check=True)
    report = server.call("rescan")
    assert {one["location"] for one in report["odd"]} == {"disk", "second"}
    assert [v["volumeID"] for v in server.call("accessible", {"client_uid": ALICE})] == [vid]
    assert vid in " ".join(server.call("health")["problems"])


def test_a_stray_file_is_not_overwritten_by_a_conversion(server: LiveServer) -> None:
    vid = server.create()
    stray = server.directory(vid) / "data.qcow2"
    stray.write_text("somebody's backup")
    response = server.post("update/convert", {"vid": vid, "creatorID": ALICE, "format": "qcow2"})
    assert (response.status_code, response.json()["code"]) == (409, "conflict")
    assert stray.read_text() == "somebody's backup"


def test_concurrent_restores(server: LiveServer) -> None:
    vid = server.create()
    for _ in range(10):
        server.call("destroy", {"volume_id": vid})
        with ThreadPoolExecutor(4) as pool:
            answers = sorted(pool.map(lambda _: server.post("restore", {"volume_id": vid}).status_code, range(4)))
        assert answers[0] == 200
        assert set(answers[1:]) <= {404, 409}
    assert_clean(server)


def test_parallel_preallocated_creates_do_not_spoil_each_other(tmp_path: Path) -> None:
    mount = tmp_path / "mnt" / "small"
    mount.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=60m", "tmpfs", mount], check=True)
    try:
        make_location(tmp_path / "mnt", "small")
        with live_server(tmp_path) as server, ThreadPoolExecutor(2) as pool:
            body = {"creatorID": ALICE, "name": "x", "size": 0.04, "preallocation": "full"}
            answers = sorted(pool.map(lambda _: server.post("create", body).status_code, range(2)))
            assert answers == [200, 507]
            assert_clean(server, "small")
    finally:
        subprocess.run(["umount", "-l", mount], check=False)


def test_create_multiple_with_preallocation_is_a_job(server: LiveServer) -> None:
    volume = {"creatorID": ALICE, "name": "x", "size": 0.01, "preallocation": "full", "unknown": 1}
    response = server.post("create/multiple", {"volumes": [volume] * 2})
    assert (response.status_code, len(response.json())) == (200, 2)
    assert response.headers["x-ignored-keys"] == "unknown"
    assert [job["purpose"] for job in server.call("jobs")] == ["create/multiple"]


def test_a_pattern_of_any_length_stops_nobody(server: LiveServer) -> None:
    server.create(name="a" * 200)
    started = time.monotonic()
    for pattern in ("[a" * 100_000, "*a" * 100, "?" * 100_000, "a" * 200):
        found = server.call("accessible", {"client_uid": ALICE, "name": pattern})
        assert len(found) == (1 if pattern in ("*a" * 100, "a" * 200) else 0)
    assert time.monotonic() - started < 3


def test_headers_without_end_are_hung_up_on(server: LiveServer) -> None:
    assert server.process is not None

    def resident_mb() -> int:
        status = Path(f"/proc/{server.process.pid}/status").read_text() if server.process else ""
        return int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1]) // 1024

    before = resident_mb()
    with socket.create_connection((server.listen_host, server.port), 10) as connection:
        connection.sendall(b"GET /api/v1.0/version HTTP/1.1\r\nX: ")
        try:
            for _ in range(1000):
                connection.sendall(b"a" * 100_000)
        except OSError:
            pass
        else:
            raise AssertionError("100 MB of header were taken")
    assert resident_mb() - before < 20
    large = server.http.get("version", headers={"X-Padding": "a" * 30_000})
    assert large.status_code == 200


def test_a_client_named_by_either_name_is_believed(server: LiveServer) -> None:
    vid = server.create(private=True)
    assert server.post("destroy", {"volume_id": vid, "client_uid": BOB}).status_code == 404
    assert server.post("info", {"volume_id": vid, "creatorID": BOB}).status_code == 404
    assert server.info(vid)["name"] == "disk"


def test_get_with_a_name_that_looks_like_a_flag(server: LiveServer) -> None:
    vid = server.create(name="true")
    found = server.http.get("accessible", params={"client_uid": ALICE, "name": "true"}).json()
    assert [volume["volumeID"] for volume in found] == [vid]


def test_tokens_made_at_once_are_all_kept(tmp_path: Path) -> None:
    def make(_: int) -> int:
        words = [str(BINARY), "token", "create", ALICE, "--state-dir", str(tmp_path / "s")]
        return subprocess.run(words, capture_output=True, check=False).returncode

    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(make, range(8))) == {0}
    listed = subprocess.check_output([BINARY, "token", "list", "--json", "--state-dir", tmp_path / "s"])
    assert len(json.loads(listed)) == 8


def test_dead_servers_leave_no_files(server: LiveServer) -> None:
    for _ in range(3):
        server.kill()
        server.start()
    deadline = time.monotonic() + 10
    while len(list((server.root / "disk" / ".elemento" / "servers").iterdir())) > 1:
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_events_of_a_job_that_is_over_say_so(server: LiveServer) -> None:
    body = {"creatorID": ALICE, "name": "x", "size": 0.001, "preallocation": "full"}
    job = server.post("create", body, Prefer="respond-async").json()["job"]
    while server.http.get(f"jobs/{job}").json()["state"] == "running":
        time.sleep(0.02)
    told: Any = httpx.get(f"{server.address}jobs/{job}/events", timeout=5).text
    assert '"state":"done"' in told


def test_restoring_needs_no_second_room_for_the_data(tmp_path: Path) -> None:
    mount = tmp_path / "mnt" / "small"
    mount.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=50m", "tmpfs", mount], check=True)
    try:
        make_location(tmp_path / "mnt", "small")
        with live_server(tmp_path) as server:
            vid = server.create(size=0.03, preallocation="full")
            server.call("destroy", {"volume_id": vid})
            started = time.monotonic()
            assert server.call("restore", {"volume_id": vid})["volumeID"] == vid
            assert time.monotonic() - started < 5
            assert_clean(server, "small")
    finally:
        subprocess.run(["umount", "-l", mount], check=False)


def test_a_read_only_location_is_shown_as_such_and_others_take_over(tmp_path: Path) -> None:
    mount = tmp_path / "mnt" / "first"
    mount.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=50m", "tmpfs", mount], check=True)
    try:
        make_location(tmp_path / "mnt", "first", max_total_size="900T")
        make_location(tmp_path / "mnt", "second", max_total_size="1T")
        with live_server(tmp_path, "--heartbeat", "0.3", "--sweep-interval", "0.3") as server:
            vid = server.create()
            assert server.info(vid)["location"] == "first"
            subprocess.run(["mount", "-o", "remount,ro", mount], check=True)
            for _ in range(30):
                assert server.info(server.create())["location"] == "second"
                assert server.info(vid)["name"] == "disk"
                time.sleep(0.05)
            shown = {one["name"]: one for one in server.call("locations")}
            assert "ead-only" in shown["first"]["reason"]
            assert server.log().count("first does not answer") == 0
            read = server.http.get(f"volumes/{vid}/data")
            assert (read.status_code, read.content) == (200, bytes(1_000_448))
            assert server.http.get(f"volumes/{vid}/checksum").status_code == 200
            copy = server.call("clone", {"volume_id": vid, "creatorID": ALICE})["vid"]
            assert server.info(copy)["location"] == "second"
            subprocess.run(["mount", "-o", "remount,rw", mount], check=True)
            deadline = time.monotonic() + 10
            while server.info(server.create())["location"] != "first":
                assert time.monotonic() < deadline
                time.sleep(0.1)
    finally:
        subprocess.run(["umount", "-l", mount], check=False)


def test_nobody_else_on_the_machine_can_read_an_image(server: LiveServer) -> None:
    vid = server.create(preallocation="falloc")
    server.call("update/convert", {"vid": vid, "creatorID": ALICE, "format": "qcow2"})
    for path in (server.directory(vid), *server.directory(vid).iterdir()):
        assert path.stat().st_mode & 0o077 == 0, path
