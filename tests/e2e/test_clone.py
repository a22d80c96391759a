"""clone, linked clones, overlay/compact and reset, through the API of the launched server."""

import json
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.invariants import assert_clean, read_pattern, write_pattern
from tests.live import ALICE, BOB, LiveServer, live_server, make_location

COPIES = ["cp", "rsync", "rclone"]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """One server with two locations for all tests here; the second has more quota left, so new volumes go there."""
    root = tmp_path_factory.mktemp("shared")
    make_location(root / "mnt", "disk", max_total_size="40G")
    make_location(root / "mnt", "other", max_total_size="1G")
    with live_server(root, "--longest-chain", "2", "--overcommit", "0") as one:
        yield one


def source(server: LiveServer, seed: int = 3, **more: Any) -> tuple[str, bytes]:
    vid = server.create(name="golden", **more)
    return vid, write_pattern(server, vid, seed)


def clone(server: LiveServer, vid: str, owner: str = ALICE, **more: Any) -> str:
    answer: dict[str, Any] = server.call("clone", {"volume_id": vid, "creatorID": owner, **more})
    return str(answer["vid"])


def refused(server: LiveServer, path: str, body: dict[str, Any]) -> tuple[int, str]:
    response = server.post(path, body)
    return response.status_code, response.json()["code"]


def backing_of(server: LiveServer, vid: str) -> str | None:
    (data,) = server.directory(vid).glob("data.*")
    told: dict[str, str] = json.loads(
        subprocess.run(
            ["qemu-img", "info", "-U", "-f", "qcow2", "--output=json", data], check=True, capture_output=True
        ).stdout
    )
    return told.get("backing-filename")


# -- whole copies ------------------------------------------------------------------------------------------


def test_the_answer_is_that_of_create(running: LiveServer) -> None:
    made = running.call(
        "create", {"creatorID": ALICE, "name": "golden", "size": 0.001, "bus": "scsi", "bootable": True}
    )
    told = running.call("clone", {"volume_id": made["vid"], "creatorID": BOB, "name": "mine"})
    assert set(told) == set(made)
    expected = {**made, "creatorID": BOB, "name": "mine", "vid": told["vid"], "size": told["size"]}
    assert told == expected
    assert round(told["size"] * 10**9) == running.info(told["vid"])["size"]


@pytest.mark.parametrize("alg", COPIES)
def test_a_clone_holds_what_its_source_did(running: LiveServer, alg: str, tmp_path: Path) -> None:
    vid, pattern = source(running, alg=alg)
    copy = clone(running, vid)
    write_pattern(running, vid, 9)
    assert read_pattern(running, copy, tmp_path) == pattern
    assert running.info(copy)["alg"] == alg
    assert_clean(running)


@pytest.mark.parametrize(("first", "second"), [("raw", "qcow2"), ("qcow2", "raw"), ("qcow2", "qcow2")])
def test_between_formats_and_locations(running: LiveServer, first: str, second: str, tmp_path: Path) -> None:
    vid, pattern = source(running)
    if first == "qcow2":
        running.call("update/convert", {"vid": vid, "creatorID": ALICE, "format": "qcow2"})
    for location in ("disk", "other"):
        copy = clone(running, vid, format=second, location=location)
        info = running.info(copy)
        assert (info["format"], info["location"]) == (second, location)
        assert read_pattern(running, copy, tmp_path, location) == pattern
        running.call("destroy", {"volume_id": copy})


def test_what_a_clone_has_from_its_source_and_what_not(running: LiveServer) -> None:
    vid = running.create(name="golden", shareable=True, readonly=True, bus="ide", private=True)
    copy = running.info(clone(running, vid))
    assert {key: copy[key] for key in ("name", "bus", "private", "readonly", "shareable", "clonable")} == {
        "name": "golden",
        "bus": "ide",
        "private": True,
        "readonly": False,
        "shareable": False,
        "clonable": True,
    }
    assert running.info(clone(running, vid, private=False))["private"] is False


def test_an_iso_is_cloned_with_what_is_known_of_it(running: LiveServer) -> None:
    vid = running.create(name="installer")
    directory = running.directory(vid)
    meta = json.loads((directory / "meta.json").read_text())
    (directory / "data.img").rename(directory / "data.iso")
    (directory / "isoinfo.json").write_text(json.dumps({"isotype": "tool", "os_family": "windows"}))
    (directory / "data.iso").write_bytes(b"\0" * 32768 + b"\x01CD001" + b"x" * 200000)
    (directory / "meta.json").write_text(
        json.dumps({**meta, "format": "iso", "size": 232774, "readonly": True, "bus": "sata"})
    )
    copy = clone(running, vid)
    info = running.info(copy)
    assert (info["format"], info["readonly"], info["iso_type"], info["bus"]) == ("iso", True, "tool", "sata")
    assert (running.directory(copy) / "data.iso").read_bytes() == (directory / "data.iso").read_bytes()
    assert refused(running, "clone", {"volume_id": vid, "creatorID": ALICE, "format": "raw"}) == (
        409,
        "format-unsupported",
    )
    assert refused(running, "clone", {"volume_id": vid, "creatorID": ALICE, "linked": True}) == (409, "not-linkable")
    for one in (vid, copy):
        running.call("destroy", {"volume_id": one})


def test_the_same_key_makes_one_clone(running: LiveServer) -> None:
    vid, _ = source(running)
    body = {"volume_id": vid, "creatorID": ALICE}
    first = running.post("clone", body, Idempotency_Key="clone-once")
    again = running.post("clone", body, Idempotency_Key="clone-once")
    assert (first.status_code, again.status_code) == (200, 200)
    assert first.json() == again.json()
    assert again.headers["Idempotency-Replayed"] == "true"


# -- who may -----------------------------------------------------------------------------------------------


def test_a_private_volume_is_cloned_by_its_owner_only(running: LiveServer) -> None:
    vid = running.create(private=True)
    absent = "0123456789abcdef" * 2
    hidden = running.post("clone", {"volume_id": vid, "creatorID": BOB}).json()
    missing = running.post("clone", {"volume_id": absent, "creatorID": BOB}).json()
    assert json.loads(json.dumps(hidden).replace(vid, absent)) == missing
    clone(running, vid)
    for path in ("overlay/compact", "reset"):
        assert running.post(path, {"vid": vid, "creatorID": BOB}).status_code == 404
    public = running.create()
    for path in ("overlay/compact", "reset"):
        assert refused(running, path, {"vid": public, "creatorID": BOB}) == (403, "not-owner")


def test_what_is_not_clonable_is_not_cloned(running: LiveServer) -> None:
    vid = running.create(clonable=False)
    assert refused(running, "clone", {"volume_id": vid, "creatorID": ALICE}) == (409, "not-clonable")


def test_a_location_that_does_not_exist(running: LiveServer) -> None:
    vid = running.create()
    body = {"volume_id": vid, "creatorID": ALICE, "location": "nowhere"}
    assert refused(running, "clone", body) == (404, "location-not-found")


def test_quotas_hold(running: LiveServer) -> None:
    vid = running.create(size=2)
    body = {"volume_id": vid, "creatorID": ALICE, "location": "other"}
    assert refused(running, "clone", body) == (507, "no-room")
    assert_clean(running, "other")


# -- meanwhile ---------------------------------------------------------------------------------------------


def test_several_read_while_nobody_changes(running: LiveServer) -> None:
    vid = running.create(size=0.6, alg="rclone")
    with (running.directory(vid) / "data.img").open("r+b") as file:
        file.write(os.urandom(1 << 20) * 400)
    begun = [
        running.post("clone", {"volume_id": vid, "creatorID": owner}, Prefer="respond-async").json()["job"]
        for owner in (ALICE, BOB)
    ]
    locked: dict[str, Any] = {}
    while any(job(running, one)["state"] == "running" for one in begun):
        told = running.info(vid)
        if "locked" in told:
            locked = told["locked"]
            response = running.post("destroy", {"volume_id": vid})
            assert response.status_code == 423
            assert response.json()["locked"]["shared"] is True
            break
    assert locked["shared"] is True
    assert locked["purpose"] == "clone"
    for one in begun:
        ended(running, one)
        assert job(running, one)["state"] == "done"
    assert running.post("destroy", {"volume_id": vid}).status_code == 200


def job(server: LiveServer, job_id: str) -> dict[str, Any]:
    told: dict[str, Any] = server.http.get(f"jobs/{job_id}").json()
    return told


def ended(server: LiveServer, job_id: str) -> None:
    deadline = time.monotonic() + 30
    while job(server, job_id)["ended"] is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("alg", COPIES)
def test_a_clone_can_be_cancelled(running: LiveServer, alg: str) -> None:
    vid = running.create(size=0.6, alg=alg)
    with (running.directory(vid) / "data.img").open("r+b") as file:
        file.write(os.urandom(1 << 20) * 500)
    before = set(running.listed())
    begun = running.post("clone", {"volume_id": vid, "creatorID": ALICE}, Prefer="respond-async").json()["job"]
    staging = running.root / "disk" / ".elemento" / "staging"
    while not list(staging.glob("*/data.img")):
        assert job(running, begun)["ended"] is None
    cancelled = running.http.delete(f"jobs/{begun}")
    if cancelled.status_code == 409:
        pytest.fail("it was too quick to be cancelled: give it more to copy")
    ended(running, begun)
    assert job(running, begun)["state"] == "cancelled"
    assert set(running.listed()) == before
    assert_clean(running)
    running.call("destroy", {"volume_id": vid})


def test_an_exported_volume_is_cloned_as_it_is_then(running: LiveServer, tmp_path: Path) -> None:
    """By anybody who may see it; into other formats and locations too."""
    vid, pattern = source(running)
    for readonly in (False, True):
        running.call("update", {"vid": vid, "creatorID": ALICE, "readonly": readonly})
        for image_format in ("raw", "qcow2"):
            running.call("export", {"volume_id": vid, "client_uid": ALICE, "protocol": "local"})
            for location in ("disk", "other"):
                copy = clone(running, vid, BOB, format=image_format, location=location)
                assert read_pattern(running, copy, tmp_path, location) == pattern
            running.call("unexport", {"volume_id": vid, "client_uid": ALICE})
    assert running.info(vid)["snapshots"] == 0
    assert_clean(running)
    assert_clean(running, "other")


# -- linked clones -----------------------------------------------------------------------------------------


def test_a_linked_clone_takes_no_room_and_has_its_own_data(running: LiveServer, tmp_path: Path) -> None:
    vid, pattern = source(running)
    copy = clone(running, vid, linked=True)
    info = running.info(copy)
    assert (info["format"], info["linked"], info["location"]) == ("qcow2", True, "disk")
    assert "linked" not in running.info(vid)
    assert backing_of(running, copy) == f"../vid.{vid}.elimg/data.img"
    assert info["sizeOnDisk"] < 1 << 20
    data = running.directory(copy) / "data.qcow2"
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", "write -P 1 131072 512", data], check=True, capture_output=True)
    assert read_pattern(running, copy, tmp_path)[512:] == pattern[512:]
    assert read_pattern(running, copy, tmp_path)[:512] == b"\x01" * 512
    assert read_pattern(running, vid, tmp_path) == pattern
    assert_clean(running)


PROTECTED: list[tuple[str, dict[str, Any]]] = [
    ("destroy", {}),
    ("update/convert", {"creatorID": ALICE, "format": "qcow2"}),
    ("update/resize", {"creatorID": ALICE, "size": 0.5}),
    ("transfer", {"creatorID": ALICE, "newCreatorID": BOB}),
    ("reset", {"creatorID": ALICE}),
    ("export", {"client_uid": ALICE, "protocol": "local"}),
]


def test_a_parent_is_protected_until_its_last_clone_is_gone(running: LiveServer) -> None:
    vid, _ = source(running)
    copies = [clone(running, vid, owner=owner, linked=True, private=True) for owner in (ALICE, BOB)]
    for path, body in PROTECTED:
        response = running.post(path, {"volume_id": vid, **body})
        assert (response.status_code, response.json()["code"]) == (409, "has-clones"), path
        assert response.json()["clones"] == 2
        assert not any(copy in response.text for copy in copies)
    running.call("update", {"vid": vid, "creatorID": ALICE, "name": "base", "readonly": True})
    assert refused(running, "update", {"vid": vid, "creatorID": ALICE, "readonly": False}) == (409, "has-clones")
    running.call("destroy", {"volume_id": copies[0]})
    running.call("overlay/compact", {"volume_id": copies[1], "creatorID": BOB})
    response = running.post("destroy", {"volume_id": vid})
    assert (response.status_code, response.json()["clones"]) == (409, 1), "one is in the bin"
    running.call("restore", {"volume_id": copies[0]})
    running.call("overlay/compact", {"volume_id": copies[0], "creatorID": ALICE})
    running.call("update", {"vid": vid, "creatorID": ALICE, "readonly": False})
    running.call("destroy", {"volume_id": vid})
    assert not (running.directory(vid) / "elemento.has-clones").exists()
    assert_clean(running)


def test_a_parent_is_exported_read_only(running: LiveServer, tmp_path: Path) -> None:
    vid, pattern = source(running, shareable=True)
    copy = clone(running, vid, linked=True)
    parent = running.call("export", {"volume_id": vid, "client_uid": BOB, "protocol": "local", "readonly": True})
    assert parent["readonly"] is True
    child = running.call("export", {"volume_id": copy, "client_uid": ALICE, "protocol": "local"})
    socket, name = child["endpoint"]["socket"], child["endpoint"]["export"]
    target = f"nbd+unix:///{name}?socket={socket}"
    subprocess.run(["qemu-io", "-f", "raw", "-c", "write -P 7 131072 512", target], check=True, capture_output=True)
    out = tmp_path / "seen"
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "raw", target, out], check=True)
    assert out.read_bytes()[131072 : 131072 + 65536] == b"\x07" * 512 + pattern[512:]
    (image,) = running.directory(vid).glob("data.img")
    told = subprocess.run(
        ["qemu-io", "-f", "raw", "-c", "write 0 512", image], check=False, capture_output=True, text=True
    )
    assert "lock" in told.stderr + told.stdout, "the parent of what is served is open to nobody who writes"
    for volume, client in ((copy, ALICE), (vid, BOB)):
        running.call("unexport", {"volume_id": volume, "client_uid": client})
    assert read_pattern(running, vid, tmp_path) == pattern


def test_chains_have_an_end(running: LiveServer, tmp_path: Path) -> None:
    vid, pattern = source(running)
    first = clone(running, vid, linked=True)
    second = clone(running, first, linked=True)
    assert read_pattern(running, second, tmp_path) == pattern
    assert refused(running, "clone", {"volume_id": second, "creatorID": ALICE, "linked": True}) == (
        409,
        "not-linkable",
    )
    whole = clone(running, second)
    assert backing_of(running, whole) is None
    assert read_pattern(running, whole, tmp_path) == pattern
    assert refused(running, "overlay/compact", {"volume_id": first, "creatorID": ALICE}) == (409, "has-clones")
    running.call("overlay/compact", {"volume_id": second, "creatorID": ALICE})
    assert backing_of(running, second) is None
    assert "linked" not in running.info(second)
    assert read_pattern(running, second, tmp_path) == pattern
    running.call("overlay/compact", {"volume_id": second, "creatorID": ALICE})


def test_a_linked_clone_can_be_converted_grown_and_served(running: LiveServer, tmp_path: Path) -> None:
    vid, pattern = source(running)
    copy = clone(running, vid, linked=True)
    running.call("update/resize", {"vid": copy, "creatorID": ALICE, "size": 0.002})
    assert read_pattern(running, copy, tmp_path) == pattern
    running.call("update/convert", {"vid": copy, "creatorID": ALICE, "format": "raw"})
    assert read_pattern(running, copy, tmp_path) == pattern
    assert running.info(copy)["size"] == 2_000_384
    running.call("destroy", {"volume_id": vid})


def test_linked_clones_stay_where_and_what_they_are(running: LiveServer) -> None:
    vid, _ = source(running)
    for key, value in (("location", "other"), ("format", "raw")):
        body = {"volume_id": vid, "creatorID": ALICE, "linked": True, key: value}
        assert refused(running, "clone", body) == (409, "not-linkable")
    clone(running, vid, linked=True, location="disk", format="qcow2")


def test_who_stands_on_whom_is_read_from_disk(running: LiveServer, tmp_path: Path) -> None:
    """After a restart, without the file that says that there are clones, and when the parent goes missing."""
    vid, pattern = source(running)
    copy = clone(running, vid, linked=True)
    (running.directory(vid) / "elemento.has-clones").unlink()
    running.stop()
    running.start()
    assert running.info(copy)["linked"] is True
    assert refused(running, "destroy", {"volume_id": vid}) == (409, "has-clones")
    away = tmp_path / "away"
    running.directory(vid).rename(away)
    report = running.call("rescan")
    assert [(one["directory"], vid in one["reason"]) for one in report["odd"]] == [(f"vid.{copy}.elimg", True)]
    assert running.post("info", {"volume_id": copy}).status_code == 404
    away.rename(running.directory(vid))
    assert running.call("rescan")["odd"] == []
    assert read_pattern(running, copy, tmp_path) == pattern


@pytest.mark.parametrize(
    ("backing", "backing_format"),
    [
        ("/etc/shadow", "raw"),
        ("../vid.{vid}.elimg/../vid.{vid}.elimg/data.img", "raw"),
        ("../vid.{vid}.elimg/meta.json", "raw"),
        ("../vid.{vid}.elimg/data.img", "qcow2"),
        ('json:{{"driver":"raw","file":{{"driver":"file","filename":"/etc/shadow"}}}}', "raw"),
        ("nbd://localhost/x", "raw"),
    ],
)
def test_no_other_backing_file_is_let_in(running: LiveServer, backing: str, backing_format: str) -> None:
    vid, _ = source(running)
    victim = running.create(format="qcow2")
    data = running.directory(victim) / "data.qcow2"
    named = backing.format(vid=vid)
    subprocess.run(
        ["qemu-img", "create", "-q", "-u", "-f", "qcow2", "-b", named, "-F", backing_format, data, "1M"], check=True
    )
    assert running.call("rescan")["odd"][0]["directory"] == f"vid.{victim}.elimg"
    for path, body in (("info", {}), ("clone", {"creatorID": ALICE}), ("export", {"client_uid": ALICE})):
        assert running.post(path, {"volume_id": victim, **body}).status_code == 404
    data.unlink()
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", data, "1M"], check=True)
    running.call("rescan")
    running.call("destroy", {"volume_id": victim})


# -- reset -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
def test_reset_empties_a_volume(running: LiveServer, image_format: str, tmp_path: Path) -> None:
    vid, _ = source(running)
    running.call("update/convert", {"vid": vid, "creatorID": ALICE, "format": image_format})
    before = running.info(vid)
    assert running.call("reset", {"vid": vid, "creatorID": ALICE}) == {"vid": vid, "creatorID": ALICE}
    after = running.info(vid)
    assert {**before, "lastUpdated": 0, "sizeOnDisk": 0} == {**after, "lastUpdated": 0, "sizeOnDisk": 0}
    assert read_pattern(running, vid, tmp_path) == bytes(65536)
    assert_clean(running)


def test_reset_gives_a_linked_clone_its_parents_content_back(running: LiveServer, tmp_path: Path) -> None:
    vid, pattern = source(running)
    copy = clone(running, vid, linked=True)
    data = running.directory(copy) / "data.qcow2"
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", "write 131072 4k", data], check=True, capture_output=True)
    running.call("update/resize", {"vid": copy, "creatorID": ALICE, "size": 0.002})
    running.call("reset", {"vid": copy, "creatorID": ALICE})
    assert read_pattern(running, copy, tmp_path) == pattern
    assert running.info(copy)["linked"] is True
    assert running.info(copy)["size"] == 2_000_384


def test_what_cannot_be_reset(running: LiveServer) -> None:
    vid = running.create()
    running.call("export", {"volume_id": vid, "client_uid": ALICE, "protocol": "local"})
    assert refused(running, "reset", {"vid": vid, "creatorID": ALICE}) == (409, "volume-exported")
    running.call("unexport", {"volume_id": vid, "client_uid": ALICE})
    meta = running.directory(vid) / "meta.json"
    meta.write_text(json.dumps({**json.loads(meta.read_text()), "cloudinit": True}))
    running.call("rescan")
    assert refused(running, "reset", {"vid": vid, "creatorID": ALICE}) == (409, "no-first-state")
