"""Volumes from create to destroy, as a client sees them."""

import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.invariants import assert_clean, read_pattern, write_pattern
from tests.live import ALICE, BOB, LiveServer, live_server, make_location


def test_sizes(server: LiveServer) -> None:
    for size, size_bytes in ((0.5, 500_000_256), (1, 10**9), (0.000001, 1024), (1e-9, 512), (1.5, 1_500_000_256)):
        answer = server.call("create", {"creatorID": ALICE, "name": "d", "size": size})
        assert answer["size"] == size
        assert server.info(answer["vid"])["size"] == size_bytes
        assert (server.directory(answer["vid"]) / "data.img").stat().st_size == size_bytes


@pytest.mark.parametrize(
    ("image_format", "preallocation", "least", "most"),
    [
        ("raw", "off", 0, 0),
        ("raw", "falloc", 10_000_000, 10_010_000),
        ("raw", "full", 10_000_000, 10_010_000),
        ("qcow2", "off", 0, 200_000),
        ("qcow2", "metadata", 1000, 600_000),
        ("qcow2", "falloc", 10_000_000, 11_000_000),
        ("qcow2", "full", 10_000_000, 11_000_000),
    ],
)
def test_preallocation(server: LiveServer, image_format: str, preallocation: str, least: int, most: int) -> None:
    vid = server.create(size=0.01, format=image_format, preallocation=preallocation)
    assert least <= server.info(vid)["sizeOnDisk"] <= most
    (data,) = server.directory(vid).glob("data.*")
    told = json.loads(subprocess.check_output(["qemu-img", "info", "--output=json", data]))
    assert told["format"] == image_format
    assert told["virtual-size"] == 10_000_384
    assert_clean(server)


def test_bus_alg_and_flags_are_kept(server: LiveServer) -> None:
    flags: dict[str, Any] = {"private": True, "readonly": True, "shareable": True, "bootable": False, "clonable": True}
    vid = server.create(bus="scsi", alg="rsync", **flags)
    shown = server.info(vid)
    assert {key: shown[key] for key in (*flags, "bus", "alg")} == {**flags, "bus": "scsi", "alg": "rsync"}
    meta = json.loads((server.directory(vid) / "meta.json").read_text())
    assert {key: meta[key] for key in (*flags, "bus", "alg")} == {**flags, "bus": "scsi", "alg": "rsync"}
    assert meta["volumeID"] == vid
    assert (server.directory(vid) / "meta.json").read_bytes().count(b"\n") == 0


@pytest.mark.parametrize(
    ("given", "clonable", "alg"),
    [
        ({}, True, "cp"),
        ({"clonable": False}, False, "no"),
        ({"alg": "no"}, False, "no"),
        ({"clonable": False, "alg": "cp"}, False, "no"),
        ({"alg": "rclone"}, True, "rclone"),
    ],
)
def test_clonable_goes_with_alg(server: LiveServer, given: dict[str, Any], clonable: bool, alg: str) -> None:
    answer = server.call("create", {"creatorID": ALICE, "name": "d", "size": 0.001, **given})
    assert (answer["clonable"], answer["alg"]) == (clonable, alg)


def test_private_volumes_do_not_exist_for_others(server: LiveServer) -> None:
    vid = server.create(private=True)
    assert vid in server.listed(ALICE)
    assert vid not in server.listed(BOB)
    stranger = {"creatorID": BOB, "client_uid": BOB}
    missing = "0123456789abcdef" * 2
    calls: dict[str, dict[str, Any]] = {
        "info": {},
        "destroy": {},
        "restore": {},
        "update": {"name": "mine"},
        "update/resize": {"size": 1},
        "update/convert": {"format": "qcow2"},
        "transfer": {"newCreatorID": BOB},
    }
    for call, keys in calls.items():
        answers = [server.post(call, {"volume_id": one, **stranger, **keys}) for one in (vid, missing)]
        assert [answer.status_code for answer in answers] == [404, 404], call
        assert answers[0].text.replace(vid, missing) == answers[1].text, "the answer tells them apart"
    assert server.call("has", {"volume_id": vid, "client_uid": BOB})["has"] is False
    assert server.call("has", {"volume_id": vid, "client_uid": ALICE})["has"] is True
    server.call("destroy", {"volume_id": vid, "creatorID": ALICE})
    assert server.call("bin", {"client_uid": BOB}) == []
    assert server.post("restore", {"volume_id": vid, "client_uid": BOB}).status_code == 404
    assert server.call("restore", {"volume_id": vid, "client_uid": ALICE})["volumeID"] == vid


def test_only_the_owner_changes(server: LiveServer) -> None:
    vid = server.create()
    calls: dict[str, dict[str, Any]] = {
        "destroy": {},
        "update": {"name": "mine"},
        "update/resize": {"size": 1},
        "update/convert": {"format": "qcow2"},
        "transfer": {"newCreatorID": BOB},
    }
    for call, keys in calls.items():
        response = server.post(call, {"vid": vid, "creatorID": BOB, **keys})
        assert (response.status_code, response.json()["code"]) == (403, "not-owner"), call
    assert server.info(vid, client_uid=BOB)["name"] == "disk"


def test_update_keeps_unknown_keys_and_refuses_what_cannot_be_changed(server: LiveServer) -> None:
    vid = server.create()
    meta_path = server.directory(vid) / "meta.json"
    meta = json.loads(meta_path.read_text())
    meta |= {"vendorKey": {"deep": [1, 2.5, None]}, "big": 12345678901234567890123}
    meta_path.write_text(json.dumps(meta))
    response = server.post(
        "update", {"vid": vid, "creatorID": ALICE, "name": "é", "format": "qcow2", "cloudinit": True, "ceph": True}
    )
    assert response.headers["x-ignored-keys"] == "format, cloudinit, ceph"
    after = json.loads(meta_path.read_text())
    assert after == {**meta, "name": "é"}
    response = server.post("update", {"vid": vid, "creatorID": ALICE, "bootable": True, "shareable": True})
    assert response.status_code == 400
    server.call("update", {"vid": vid, "creatorID": ALICE, "bootable": True})
    assert server.post("update", {"vid": vid, "creatorID": ALICE, "shareable": True}).status_code == 400


def test_update_of_clonable_and_alg(server: LiveServer) -> None:
    vid = server.create(alg="rsync")

    def update(**keys: Any) -> Any:
        return server.post("update", {"vid": vid, "creatorID": ALICE, **keys})

    assert update(clonable=False).json()["alg"] == "no"
    assert update(alg="cp").status_code == 400
    assert update(clonable=True).json()["alg"] == "cp"
    assert update(alg="no").json()["clonable"] is False


def test_if_match(server: LiveServer) -> None:
    vid = server.create()
    tag = server.post("info", {"volume_id": vid}).headers["etag"]
    body = {"vid": vid, "creatorID": ALICE, "name": "one"}
    first = server.post("update", body, If_Match=tag)
    assert first.status_code == 200
    second = server.post("update", {**body, "name": "two"}, If_Match=tag)
    assert (second.status_code, second.json()["code"]) == (412, "precondition-failed")
    assert server.post("update", {**body, "name": "two"}, If_Match=first.headers["etag"]).status_code == 200
    assert server.post("update", {**body, "name": "three"}, If_Match="*").status_code == 200


def test_resize(server: LiveServer, tmp_path: Path) -> None:
    for image_format in ("raw", "qcow2"):
        vid = server.create(size=0.002)
        pattern = write_pattern(server, vid, 5)
        server.call("update/convert", {"vid": vid, "creatorID": ALICE, "format": image_format})
        body = {"vid": vid, "creatorID": ALICE, "size": 0.01}
        assert server.call("update/resize", body) == body
        assert server.info(vid)["size"] == 10_000_384
        assert json.loads((server.directory(vid) / "meta.json").read_text())["size"] == 10_000_384
        shrink = server.post("update/resize", {**body, "size": 0.005})
        assert (shrink.status_code, shrink.json()["code"]) == (409, "cannot-shrink")
        assert server.call("update/resize", body) == body, "the same size again is no error"
        assert read_pattern(server, vid, tmp_path) == pattern
    assert_clean(server)


def test_convert_refuses_what_is_not_raw_or_qcow2(server: LiveServer) -> None:
    vid = server.create()
    for target in ("iso", "rbd"):
        response = server.post("update/convert", {"vid": vid, "creatorID": ALICE, "format": target})
        assert (response.status_code, response.json()["code"]) == (409, "format-unsupported")


def test_transfer(server: LiveServer) -> None:
    vid = server.create(private=True)
    answer = server.call("update/transfer", {"vid": vid, "creatorID": ALICE, "newCreatorID": BOB})
    assert answer == {"vid": vid, "creatorID": BOB}
    assert vid not in server.listed(ALICE)
    assert vid in server.listed(BOB)


def test_destroy_restore_and_bin(server: LiveServer, tmp_path: Path) -> None:
    vid = server.create(name="precious")
    pattern = write_pattern(server, vid, 9)
    assert server.call("delete", {"volume_id": vid, "creatorID": ALICE}) == {"vid": vid}
    assert server.listed() == {}
    assert server.post("destroy", {"volume_id": vid}).status_code == 404
    (binned,) = server.call("bin", {"client_uid": ALICE})
    assert (binned["volumeID"], binned["name"]) == (vid, "precious")
    assert binned["purgeAt"] > binned["destroyed"]
    (location,) = server.call("locations")
    assert (location["volumes"], location["virtual_bytes"]) == (0, 0)
    assert server.call("restore", {"volume_id": vid, "client_uid": ALICE})["name"] == "precious"
    assert server.call("bin") == []
    assert read_pattern(server, vid, tmp_path) == pattern
    assert server.post("restore", {"volume_id": vid}).status_code == 404
    assert_clean(server)


def test_bin_is_purged_after_the_retention_time(tmp_path: Path) -> None:
    with live_server(tmp_path, "--bin-retention", "0") as server:
        vid = server.create()
        server.call("destroy", {"volume_id": vid})
        deadline = time.monotonic() + 10
        while server.call("bin") and time.monotonic() < deadline:
            time.sleep(0.05)
        assert server.call("bin") == []
        assert server.post("restore", {"volume_id": vid}).status_code == 404
        assert list((server.root / "disk" / "elemento-bin").iterdir()) == []
        assert_clean(server)


def test_exported_volumes_are_not_destroyed_or_converted(server: LiveServer) -> None:
    """A marker that somebody touches, by the document's name for it, whoever wrote it."""
    vid = server.create()
    xor = f"{int(vid, 16) ^ int(BOB, 16):032x}"
    marker = server.directory(vid) / f"iqn.2004-10.cloud.elemento:01:{xor}.exported"
    marker.write_text("{}\n")
    time.sleep(1.1)  # info may be a second old
    assert server.info(vid)["exported"] is True
    calls: dict[str, dict[str, Any]] = {
        "destroy": {},
        "update/convert": {"format": "qcow2"},
        "update/resize": {"size": 1},
    }
    for call, keys in calls.items():
        response = server.post(call, {"vid": vid, "creatorID": ALICE, **keys})
        assert (response.status_code, response.json()["code"]) == (409, "volume-exported"), call
    long_ago = time.time() - 3600
    os.utime(marker, (long_ago, long_ago))
    time.sleep(1.1)
    assert server.info(vid)["exported"] is False
    assert server.call("destroy", {"volume_id": vid}) == {"vid": vid}


def test_paging_sorting_and_filters(server: LiveServer) -> None:
    sizes = {f"disk-{number:02}": 0.001 * (number % 5 + 1) for number in range(23)}
    server.call("create/multiple", {"volumes": [{"creatorID": ALICE, "name": n, "size": s} for n, s in sizes.items()]})
    for sort in ("volumeID", "name", "-name", "size", "-size", "lastUpdated", "-sizeOnDisk"):
        everything = server.call("accessible", {"client_uid": ALICE, "sort": sort})
        assert len(everything) == 23
        paged: list[Any] = []
        cursor = None
        while True:
            response = server.post("accessible", {"client_uid": ALICE, "sort": sort, "limit": 5, "cursor": cursor})
            assert response.headers["x-total-count"] == "23"
            paged += response.json()
            cursor = response.headers.get("x-next-cursor")
            if cursor is None:
                break
        assert paged == everything
    names = [v["name"] for v in server.call("accessible", {"client_uid": ALICE, "sort": "-name"})]
    assert names == sorted(sizes, reverse=True)
    assert [v["name"] for v in server.call("accessible", {"client_uid": ALICE, "name": "disk-07"})] == ["disk-07"]
    assert len(server.call("accessible", {"client_uid": ALICE, "name": "disk-0*"})) == 10
    assert server.call("accessible", {"client_uid": ALICE, "format": "qcow2"}) == []


def test_create_multiple_is_all_or_nothing(tmp_path: Path) -> None:
    make_location(tmp_path / "mnt", max_volumes=3)
    with live_server(tmp_path) as server:
        volume = {"creatorID": ALICE, "name": "d", "size": 0.001}
        response = server.post("create/multiple", {"volumes": [volume] * 4})
        assert (response.status_code, response.json()["code"]) == (507, "no-room")
        assert_clean(server)
        assert server.listed() == {}
        bad = server.post("create/multiple", {"volumes": [volume, {"creatorID": ALICE, "name": "d"}]})
        assert (bad.status_code, bad.json()["code"]) == (400, "invalid-value")
        assert "volume 1: 'size'" in bad.json()["error"]
        made = server.call("create/multiple", {"volumes": [volume] * 3})
        assert {one["vid"] for one in made} == set(server.listed())
        assert server.call("cancreate/multiple", {"sizes": [1]})["cancreate"] is False


def test_idempotency_key(server: LiveServer) -> None:
    body = {"creatorID": ALICE, "name": "once", "size": 0.001}
    first = server.post("create", body, Idempotency_Key="k1")
    again = server.post("create", body, Idempotency_Key="k1")
    assert (again.status_code, again.json()) == (200, first.json())
    assert again.headers["idempotency-replayed"] == "true"
    other = server.post("create", {**body, "size": 1}, Idempotency_Key="k1")
    assert (other.status_code, other.json()["code"]) == (422, "idempotency-key-reused")
    assert len(server.listed()) == 1
    server.kill()
    server.start()
    assert server.post("create", body, Idempotency_Key="k1").json() == first.json()
    assert server.post("create", body, Idempotency_Key="k2").json()["vid"] != first.json()["vid"]
    failed = server.post("create", {**body, "size": 10**9}, Idempotency_Key="k3")
    assert failed.status_code == 507
    assert server.post("create", body, Idempotency_Key="k3").status_code == 200, "an error is not kept"
