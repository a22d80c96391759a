"""Locations, limits and other people's hands on the disk."""

import json
import os
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.invariants import assert_clean, write_pattern
from tests.live import ALICE, BOB, LiveServer, live_server, make_location


def eventually(check: Any, timeout_s: float = 15) -> None:
    deadline = time.monotonic() + timeout_s
    while not check():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def location(server: LiveServer, name: str) -> dict[str, Any]:
    (found,) = [one for one in server.call("locations") if one["name"] == name]
    return dict(found)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 MiB mounted at ``mnt/small``."""
    image, mount = tmp_path / "small.ext4", tmp_path / "mnt" / "small"
    mount.mkdir(parents=True)
    with image.open("wb") as file:
        file.truncate(64 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-F", image], check=True)
    subprocess.run(["mount", "-o", "loop", image, mount], check=True)
    yield mount
    subprocess.run(["umount", "-l", mount], check=False)


def test_placement_takes_the_most_free_quota(tmp_path: Path) -> None:
    root = tmp_path / "mnt"
    make_location(root, "a", max_total_size="3G")
    make_location(root, "b", max_total_size="5G")
    make_location(root, "deep/c", max_total_size="1G")
    make_location(root, "deep/er/d", max_total_size="900G")
    with live_server(tmp_path) as server:
        names = [server.info(server.create(size=1))["location"] for _ in range(9)]
        assert names == ["b", "b", "a", "b", "a", "b", "a", "b", "deep/c"]
        refused = server.post("create", {"creatorID": ALICE, "name": "x", "size": 1})
        assert refused.status_code == 507
        assert refused.json()["locations"] == {
            "a": "max-total-size leaves 0 bytes, 1000000000 are asked for",
            "b": "max-total-size leaves 0 bytes, 1000000000 are asked for",
            "deep/c": "max-total-size leaves 0 bytes, 1000000000 are asked for",
        }


def test_limits_of_number_and_size(tmp_path: Path) -> None:
    make_location(tmp_path / "mnt", max_volumes=2, max_volume_size="2G")
    with live_server(tmp_path) as server:
        too_large = server.post("create", {"creatorID": ALICE, "name": "x", "size": 2.1})
        assert "max-volume-size is 2000000000 bytes" in too_large.json()["error"]
        vid = server.create(size=2)
        server.create(size=1)
        assert "max-volumes is 2" in server.post("create", {"creatorID": ALICE, "name": "x", "size": 1}).json()["error"]
        assert server.post("update/resize", {"vid": vid, "creatorID": ALICE, "size": 3}).status_code == 507
        assert server.call("cancreate", {"size": "1"})["cancreate"] is False
        assert_clean(server)


def test_200_parallel_creates_against_a_quota_of_50(tmp_path: Path) -> None:
    make_location(tmp_path / "mnt", max_volumes=50, max_total_size="1T")
    with live_server(tmp_path) as server, ThreadPoolExecutor(32) as pool:
        body = {"creatorID": ALICE, "name": "x", "size": 0.001}
        answers = list(pool.map(lambda _: server.post("create", body).status_code, range(200)))
        assert (answers.count(200), answers.count(507)) == (50, 150)
        assert len(server.listed()) == 50
        assert_clean(server)


def test_two_servers_on_one_root_keep_the_quota_together(tmp_path: Path) -> None:
    make_location(tmp_path / "mnt", max_total_size="40M")
    with live_server(tmp_path) as one:
        other = LiveServer(tmp_path / "mnt", tmp_path / "state2")
        other.start()
        try:
            body = {"creatorID": ALICE, "name": "x", "size": 0.001024}
            with ThreadPoolExecutor(16) as pool:
                answers = list(pool.map(lambda n: (one, other)[n % 2].post("create", body).status_code, range(100)))
            assert (answers.count(200), answers.count(507)) == (39, 61)
            (vid, *_) = one.listed()
            # What one did the other knows at once, when it is asked about the volume.
            one.call("update", {"vid": vid, "creatorID": ALICE, "name": "by one"})
            other.call("update", {"vid": vid, "creatorID": ALICE, "bus": "ide"})
            time.sleep(1.1)
            assert (one.info(vid)["name"], one.info(vid)["bus"]) == ("by one", "ide")
            one.call("destroy", {"volume_id": vid})
            assert other.post("destroy", {"volume_id": vid}).status_code == 404
            assert other.post("create", body).status_code == 200, "the room that one gave back is there for the other"
            other.call("rescan")
            one.call("rescan")
            assert one.listed().keys() == other.listed().keys()
        finally:
            other.stop()
            other.http.close()
        one.call("rescan")
        assert_clean(one)


def post(server: LiveServer, path: str, body: dict[str, Any]) -> int:
    return server.post(path, body).status_code


def test_two_servers_race_for_one_volume(tmp_path: Path) -> None:
    with live_server(tmp_path) as one:
        other = LiveServer(tmp_path / "mnt", tmp_path / "state2")
        other.start()
        try:
            for _ in range(20):
                vid = one.create()
                other.info(vid)
                with ThreadPoolExecutor(2) as pool:
                    answers = list(pool.map(post, (one, other), ["destroy"] * 2, [{"volume_id": vid}] * 2))
                assert sorted(answers) == [200, 404]
                with ThreadPoolExecutor(2) as pool:
                    answers = list(pool.map(post, (one, other), ["restore"] * 2, [{"volume_id": vid}] * 2))
                assert sorted(answers) in ([200, 404], [200, 409])
                body = {"vid": vid, "creatorID": ALICE, "format": "qcow2"}
                with ThreadPoolExecutor(2) as pool:
                    answers = list(pool.map(post, (one, other), ["update/convert"] * 2, [body] * 2))
                assert answers in ([200, 200], [200, 423], [423, 200])
        finally:
            other.stop()
            other.http.close()
        one.call("rescan")
        assert_clean(one)


def test_the_locks_of_a_dead_server_are_taken_over_and_those_of_a_living_one_are_not(tmp_path: Path) -> None:
    with live_server(tmp_path) as one:
        vid = one.create()
        write_pattern(one, vid, 1)
        dying = LiveServer(tmp_path / "mnt", tmp_path / "state2")
        body = {"vid": vid, "creatorID": ALICE, "format": "qcow2"}
        try:
            dying.start({"ELEMENTO_STORAGE_FAULTPOINT": "stop:convert.copied"})
            dying.post("update/convert", body, Prefer="respond-async")
            eventually(lambda: one.post("update", {**body, "name": "x"}).status_code == 423)
            time.sleep(6)  # longer than a sweep: a paused server keeps its lock
            held = one.post("update", {**body, "name": "x"})
            assert held.status_code == 423
            assert held.json()["locked"]["purpose"] == "convert"
            assert vid not in one.listed()
            assert one.listed(include_locked=True)[vid]["locked"]["purpose"] == "convert"
            dying.kill()
            assert one.call("update", {"vid": vid, "creatorID": ALICE, "name": "x"})["name"] == "x"
            assert one.info(vid)["format"] == "raw"
            assert_clean(one)
        finally:
            if dying.process is not None:
                dying.kill()
            dying.http.close()


def test_a_tree_made_by_hand(server: LiveServer) -> None:
    """The document's layout, with what the vendor's own server writes, and everything odd beside it."""
    disk = server.root / "disk"
    examples = {
        "1" * 32: ("raw", {"creatorID": "5E96AFA5-2C1A-5334-8ADC-5C5663978058", "name": "no volumeID, no size"}),
        "2" * 32: ("qcow2", {"creatorID": ALICE, "name": "two", "format": "qcow2", "extra": [1]}),
        "3" * 32: ("iso", {"creatorID": ALICE, "name": "debian", "format": "iso", "bus": "sata", "readonly": True}),
    }
    for vid, (image_format, meta) in examples.items():
        directory = disk / f"vid.{vid}.elimg"
        directory.mkdir()
        (directory / "meta.json").write_text(json.dumps(meta))
        if image_format == "qcow2":
            subprocess.run(["qemu-img", "create", "-qf", "qcow2", directory / "data.qcow2", "4G"], check=True)
        else:
            (directory / {"raw": "data.img", "iso": "data.iso"}[image_format]).write_bytes(b"\1" * 4096)
    (disk / f"vid.{'3' * 32}.elimg" / "isoinfo.json").write_text('{"isotype": "os_generic", "os_family": "linux"}')

    def odd(name: str, meta: str | bytes | None, data: str | None = "data.img") -> Path:
        directory = disk / name
        directory.mkdir()
        if meta is not None:
            (directory / "meta.json").write_bytes(meta.encode() if isinstance(meta, str) else meta)
        if data:
            (directory / data).write_bytes(b"")
        return directory

    odd("vid.volume1A_uid.elimg", "{}")
    odd(f"vid.{'A' * 32}.elimg", "{}")
    odd(f"vol.{'4' * 32}.elimg", "{}")
    odd(f"vid.{'5' * 32}.elimg", None)
    odd(f"vid.{'6' * 32}.elimg", "")
    odd(f"vid.{'7' * 32}.elimg", '{"name": "trunc')
    odd(f"vid.{'8' * 32}.elimg", os.urandom(200))
    odd(f"vid.{'9' * 32}.elimg", '{"private": "yes"}')
    odd(f"vid.{'a' * 32}.elimg", "{}", data=None)
    odd(f"vid.{'b' * 32}.elimg", '{"format": "qcow2"}', data="data.qcow2")
    odd(f"vid.{'c' * 32}.elimg", None).joinpath("meta.json").mkdir()
    secret = disk.parent.parent / "secret.json"
    secret.write_text('{"name": "secret"}')
    odd(f"vid.{'d' * 32}.elimg", None).joinpath("meta.json").symlink_to(secret)
    os.mkfifo(odd(f"vid.{'e' * 32}.elimg", None) / "meta.json")
    (disk / f"vid.{'f' * 32}.elimg").write_text("a file")
    linked = odd(f"vid.{'0' * 31}1.elimg", "{}", data=None)
    (linked / "data.img").symlink_to("/etc/passwd")
    backing = odd(f"vid.{'0' * 31}2.elimg", '{"format": "qcow2"}', data=None)
    subprocess.run(
        ["qemu-img", "create", "-qf", "qcow2", "-b", "/etc/shadow", "-F", "raw", backing / "data.qcow2", "1M"],
        check=True,
    )
    odd_before = {path: path.stat().st_mtime_ns for path in disk.glob("v*.elimg")}

    report = server.call("rescan")
    assert sorted(report["added"]) == sorted(examples)
    reasons = {one["directory"]: one["reason"] for one in report["odd"]}
    assert len(reasons) == 16, reasons
    assert "meta.json is missing" in reasons[f"vid.{'5' * 32}.elimg"]
    assert "data.img is missing" in reasons[f"vid.{'a' * 32}.elimg"]
    assert "not a regular file" in reasons[f"vid.{'c' * 32}.elimg"]
    assert "backing file" in reasons[f"vid.{'0' * 31}2.elimg"]
    assert {path: path.stat().st_mtime_ns for path in disk.glob("v*.elimg")} == odd_before, "nothing was touched"

    listed = server.listed()
    assert set(listed) == set(examples)
    assert listed["1" * 32]["creatorID"] == "5e96afa52c1a53348adc5c5663978058"
    assert listed["1" * 32]["size"] == 4096
    assert listed["2" * 32]["size"] == 4 << 30
    assert listed["3" * 32]["iso_type"] == "os_generic"
    assert server.post("update/convert", {"vid": "3" * 32, "creatorID": ALICE, "format": "raw"}).status_code == 409
    assert "16 directories are no volumes" in server.call("health")["problems"][0]


def test_changes_behind_the_servers_back_are_picked_up(server: LiveServer) -> None:
    vid, other = server.create(name="before"), server.create(name="other")
    server.listed()
    meta_path = server.directory(vid) / "meta.json"
    meta = json.loads(meta_path.read_text())
    meta_path.write_text(json.dumps({**meta, "name": "edited in place", "private": True}))
    eventually(lambda: server.info(vid)["name"] == "edited in place")
    eventually(lambda: server.listed()[vid]["name"] == "edited in place")
    assert vid not in server.listed(BOB)
    copy = server.root / "disk" / f"vid.{'4' * 32}.elimg"
    subprocess.run(["cp", "-a", server.directory(other), copy], check=True)
    assert server.info("4" * 32)["name"] == "other", "found at once when it is asked for"
    eventually(lambda: "4" * 32 in server.listed())
    subprocess.run(["rm", "-r", copy], check=True)
    eventually(lambda: "4" * 32 not in server.listed())
    assert server.post("info", {"volume_id": "4" * 32}).status_code == 404
    with (server.directory(other) / "data.img").open("r+b") as image:
        image.truncate(5_000_192)
    eventually(lambda: server.info(other)["size"] == 5_000_192)
    assert server.call("rescan")["differences"] == [{"vid": other, "key": "size", "meta": 1_000_448, "disk": 5_000_192}]


def test_settings_and_locations_change_without_a_restart(server: LiveServer) -> None:
    settings = server.root / "disk" / "settings.json"
    settings.write_text("{ broken")
    eventually(lambda: not location(server, "disk")["usable"])
    refused = server.post("create", {"creatorID": ALICE, "name": "x", "size": 1})
    assert refused.status_code == 507
    assert "settings.json is not JSON" in refused.json()["locations"]["disk"]
    make_location(server.root, "second")
    eventually(lambda: len(server.call("locations")) == 2)
    assert server.info(server.create())["location"] == "second"
    settings.write_text('{"max-volumes": 1}')
    eventually(lambda: location(server, "disk")["max-volumes"] == 1)


def test_broken_settings_keep_existing_volumes_usable(server: LiveServer) -> None:
    vid = server.create()
    (server.root / "disk" / "settings.json").write_text('{"max-total-size": "lots"}')
    eventually(lambda: not location(server, "disk")["usable"])
    assert "lots" in location(server, "disk")["reason"]
    server.call("update", {"vid": vid, "creatorID": ALICE, "name": "still"})
    server.call("update/convert", {"vid": vid, "creatorID": ALICE, "format": "qcow2"})
    assert server.listed()[vid]["name"] == "still"


def test_a_location_that_vanishes_and_comes_back(server: LiveServer) -> None:
    make_location(server.root, "second", max_total_size="900T")
    eventually(lambda: len(server.call("locations")) == 2)
    here = server.create()
    away = server.root.parent / "away"
    (server.root / "disk").rename(away)
    eventually(lambda: location(server, "disk")["reason"] is not None)
    gone = server.post("info", {"volume_id": here})
    if gone.status_code != 503:  # the volume went to the other location
        assert server.info(here)["location"] == "second"
    else:
        assert gone.json()["code"] == "location-unavailable"
    assert "disk" in server.call("health")["problems"][0]
    assert server.info(server.create())["location"] == "second"
    away.rename(server.root / "disk")
    eventually(lambda: location(server, "disk")["reason"] is None)
    assert server.info(here)["volumeID"] == here
    assert server.post("update", {"vid": here, "creatorID": ALICE, "name": "back"}).status_code == 200


def test_a_location_that_becomes_read_only(tmp_path: Path, small_disk: Path) -> None:
    make_location(tmp_path / "mnt", "small")
    with live_server(tmp_path) as server:
        vid = server.create()
        server.listed()
        subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
        calls: dict[str, dict[str, Any]] = {
            "update": {"name": "x"},
            "update/resize": {"size": 0.002},
            "update/convert": {"format": "qcow2"},
            "destroy": {},
        }
        for call, keys in calls.items():
            response = server.post(call, {"vid": vid, "creatorID": ALICE, **keys})
            assert (response.status_code, response.json()["code"]) == (503, "location-unavailable"), call
        refused = server.post("create", {"creatorID": ALICE, "name": "x", "size": 0.001})
        assert refused.status_code in (503, 507)
        assert "ead-only" in refused.json()["error"]
        assert server.info(vid)["volumeID"] == vid
        subprocess.run(["mount", "-o", "remount,rw", small_disk], check=True)
        eventually(lambda: server.post("update", {"vid": vid, "creatorID": ALICE, "name": "y"}).status_code == 200)
        assert_clean(server, "small")


def test_a_location_that_is_full_in_the_middle(tmp_path: Path, small_disk: Path) -> None:
    make_location(tmp_path / "mnt", "small")
    with live_server(tmp_path, "--overcommit", "0") as server:
        vid = server.create(size=0.03)
        write_pattern(server, vid, 1, "small")
        with (server.directory(vid, "small") / "data.img").open("r+b") as image:
            image.write(os.urandom(25_000_000))
        (small_disk / "ballast").write_bytes(b"\1" * 15_000_000)
        server.call("rescan")
        before = server.info(vid)
        convert = server.post("update/convert", {"vid": vid, "creatorID": ALICE, "format": "qcow2"})
        assert (convert.status_code, convert.json()["code"]) == (507, "no-room")
        full = server.post(
            "create", {"creatorID": ALICE, "name": "x", "size": 0.05, "format": "qcow2", "preallocation": "full"}
        )
        assert (full.status_code, full.json()["code"]) == (507, "no-room")
        after = server.info(vid)
        assert {key: after[key] for key in ("format", "size", "name")} == {
            key: before[key] for key in ("format", "size", "name")
        }
        assert_clean(server, "small")


def test_bin_makes_room_for_a_create(tmp_path: Path, small_disk: Path) -> None:
    make_location(tmp_path / "mnt", "small")
    with live_server(tmp_path) as server:
        vid = server.create(size=0.03, preallocation="full")
        server.call("destroy", {"volume_id": vid})
        assert len(server.call("bin")) == 1
        assert server.post("create", {"creatorID": ALICE, "name": "x", "size": 0.04}).status_code == 200
        assert server.call("bin") == []


def test_unique_locations_have_to_be_mounted(tmp_path: Path, small_disk: Path) -> None:
    make_location(tmp_path / "mnt", "small", file_system="unique")
    make_location(tmp_path / "mnt", "bare", file_system="unique")
    with live_server(tmp_path) as server:
        assert server.info(server.create())["location"] == "small"
        refused = server.post("create", {"creatorID": ALICE, "name": "x", "size": 0.08})
        assert "not mounted" in refused.json()["locations"]["bare"]
        assert "the file system's size leaves" in refused.json()["locations"]["small"]
        subprocess.run(["umount", "-l", small_disk], check=True)
        eventually(lambda: location(server, "small")["reason"] is not None)
        assert server.post("create", {"creatorID": ALICE, "name": "x", "size": 0.001}).status_code == 507
        assert list(small_disk.iterdir()) == [], "nothing was written below the mount point"


def test_no_location_at_all(tmp_path: Path) -> None:
    (tmp_path / "mnt").mkdir()
    with live_server(tmp_path) as server:
        refused = server.post("create", {"creatorID": ALICE, "name": "x", "size": 1})
        assert refused.status_code == 507
        assert "settings.json" in refused.json()["error"]
        assert server.call("health")["status"] == "degraded"
