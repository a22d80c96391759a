"""Snapshots of volumes that nobody has open: made, listed, restored, deleted, refused."""

import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.clients import QemuIo, eventually
from tests.e2e.invariants import assert_clean
from tests.exporting import MIB, export, new_volume, refusal
from tests.live import ALICE, BOB, LiveServer, make_location

FORMATS = ("raw", "qcow2")
each_format = pytest.mark.parametrize("image_format", FORMATS)
Json = dict[str, Any]


@pytest.fixture
def server(shared: LiveServer) -> LiveServer:
    return shared


def take(server: LiveServer, vid: str, name: str = "", **more: Any) -> str:
    """A snapshot; its id."""
    return str(server.call("snapshots/create", {"vid": vid, "creatorID": ALICE, "name": name, **more})["snapshot"])


def restore(server: LiveServer, vid: str, snapshot: str, **more: Any) -> Json:
    answer: Json = server.call("snapshots/restore", {"vid": vid, "creatorID": ALICE, "snapshot": snapshot, **more})
    return answer


def delete(server: LiveServer, vid: str, snapshot: str) -> None:
    server.call("snapshots/delete", {"vid": vid, "creatorID": ALICE, "snapshot": snapshot})


def listed(server: LiveServer, vid: str, **more: Any) -> list[Json]:
    found: list[Json] = server.call("snapshots", {"vid": vid, **more})
    return found


def names(server: LiveServer, vid: str) -> list[str]:
    return [one["name"] for one in listed(server, vid)]


def data_file(server: LiveServer, vid: str) -> Path:
    (found,) = server.directory(vid).glob("data.*")
    return found


def guest(server: LiveServer, vid: str) -> QemuIo:
    """Somebody who has the volume's image open, past the server."""
    path = data_file(server, vid)
    return QemuIo.on_file(path, "raw" if path.suffix == ".img" else "qcow2")


def write(server: LiveServer, vid: str, offset: int, pattern: int, length: int = 65536) -> None:
    with guest(server, vid) as one:
        one.write(offset, length, pattern)


def reads(server: LiveServer, vid: str, offset: int, pattern: int, length: int = 65536) -> bool:
    with guest(server, vid) as one:
        return one.reads(offset, length, pattern)


def assert_sound(server: LiveServer, vid: str) -> None:
    path = data_file(server, vid)
    if path.suffix == ".qcow2":
        checked = subprocess.run(["qemu-img", "check", "-q", path], capture_output=True, text=True, check=False)
        assert checked.returncode == 0, checked.stdout


@each_format
def test_each_snapshot_brings_back_what_was_there(server: LiveServer, image_format: str) -> None:
    vid = new_volume(server, format=image_format)
    made = []
    for number in (1, 2, 3):
        write(server, vid, 0, number)
        write(server, vid, number * MIB, number)
        made.append(take(server, vid, f"number {number}", description="as it was"))
    write(server, vid, 0, 9)
    found = listed(server, vid)
    assert [one["snapshot"] for one in found] == made
    assert names(server, vid) == ["number 1", "number 2", "number 3"]
    assert {one["description"] for one in found} == {"as it was"}
    assert {one["size"] for one in found} == {8 * MIB}
    assert [one["created"] for one in found] == sorted(one["created"] for one in found)
    assert all((one["sizeOnDisk"] is None) == (image_format == "qcow2") for one in found)
    for number in (2, 1, 3):
        assert restore(server, vid, made[number - 1]) == {
            "vid": vid,
            "snapshot": made[number - 1],
            "size": 8 * MIB,
            "kept": None,
        }
        assert reads(server, vid, 0, number)
        for other in (1, 2, 3):
            assert reads(server, vid, other * MIB, other if other <= number else 0)
    delete(server, vid, made[1])
    assert names(server, vid) == ["number 1", "number 3"]
    restore(server, vid, made[0])
    delete(server, vid, made[0])
    assert reads(server, vid, 0, 1)
    restore(server, vid, made[2])
    delete(server, vid, made[2])
    assert reads(server, vid, 0, 3)
    assert listed(server, vid) == []
    assert server.info(vid)["snapshots"] == 0
    assert_sound(server, vid)
    assert_clean(server)
    assert list((server.directory(vid) / "snapshots").iterdir()) == []


@each_format
def test_what_is_there_can_be_kept_first(server: LiveServer, image_format: str) -> None:
    vid = new_volume(server, format=image_format)
    write(server, vid, 0, 1)
    old = take(server, vid, "old")
    write(server, vid, 0, 2)
    kept = restore(server, vid, old, keep=True)["kept"]
    assert reads(server, vid, 0, 1)
    assert names(server, vid) == ["old", "before a restore"]
    write(server, vid, 0, 3)
    restore(server, vid, kept)
    assert reads(server, vid, 0, 2)
    assert_sound(server, vid)
    assert_clean(server)


@each_format
def test_a_snapshot_of_another_size_brings_its_size(server: LiveServer, image_format: str) -> None:
    vid = new_volume(server, format=image_format)
    write(server, vid, 0, 1)
    small = take(server, vid)
    server.call("update/resize", {"vid": vid, "creatorID": ALICE, "size": 16 * MIB / 1e9})
    write(server, vid, 15 * MIB, 2)
    large = take(server, vid)
    assert [one["size"] for one in listed(server, vid)] == [8 * MIB, 16 * MIB]
    assert restore(server, vid, small)["size"] == server.info(vid)["size"] == 8 * MIB
    assert_clean(server)
    assert restore(server, vid, large)["size"] == server.info(vid)["size"] == 16 * MIB
    assert reads(server, vid, 15 * MIB, 2)
    assert_sound(server, vid)
    assert_clean(server)


def test_what_is_shown_of_a_volume(server: LiveServer) -> None:
    raw, qcow2 = new_volume(server), new_volume(server, format="qcow2")
    for vid in (raw, qcow2):
        write(server, vid, 0, 1, MIB)
        for _ in range(2):
            take(server, vid)
        assert server.info(vid)["snapshots"] == server.listed()[vid]["snapshots"] == 2
    assert server.info(raw)["snapshotsOnDisk"] == 2 * MIB
    assert server.info(qcow2)["snapshotsOnDisk"] == 0
    assert server.http.get("snapshots", params={"vid": raw}).json() == listed(server, raw)


def test_those_of_other_tools_are_there_too(server: LiveServer) -> None:
    vid = new_volume(server, format="qcow2")
    write(server, vid, 0, 1)
    for tag in ("by hand", "twice", "twice"):
        subprocess.run(["qemu-img", "snapshot", "-c", tag, data_file(server, vid)], check=True)
    write(server, vid, 0, 2)
    assert names(server, vid) == ["by hand", "twice", "twice"]
    by_hand, first, second = (one["snapshot"] for one in listed(server, vid))
    eventually(lambda: server.info(vid)["snapshots"] == 3)
    restore(server, vid, second)
    assert reads(server, vid, 0, 1)
    delete(server, vid, by_hand)
    assert refusal(server, "snapshots/delete", {"vid": vid, "creatorID": ALICE, "snapshot": first})[:2] == (
        409,
        "snapshot-unclear",
    )
    assert [one["snapshot"] for one in listed(server, vid)] == [first, second]


def test_a_volume_takes_its_snapshots_along(server: LiveServer) -> None:
    """Into the bin and back, to another owner, to another location or server: the directory has it all."""
    made = {}
    for image_format in FORMATS:
        vid = new_volume(server, format=image_format)
        write(server, vid, 0, 1)
        made[vid] = take(server, vid, "first")
        write(server, vid, 0, 2)
        server.call("destroy", {"volume_id": vid})
        assert refusal(server, "snapshots", {"vid": vid})[0] == 404
        server.call("restore", {"volume_id": vid})
        server.call("transfer", {"vid": vid, "creatorID": ALICE, "newCreatorID": BOB})
    other = make_location(server.root, "other")
    for vid in made:
        server.directory(vid).rename(other / server.directory(vid).name)
    server.call("rescan")
    for vid, snapshot in made.items():
        assert names(server, vid) == ["first"]
        server.call("snapshots/restore", {"vid": vid, "creatorID": BOB, "snapshot": snapshot})
        (data,) = server.directory(vid, "other").glob("data.*")
        with QemuIo.on_file(data, "raw" if data.suffix == ".img" else "qcow2") as one:
            assert one.reads(0, 65536, 1)
        server.call("destroy", {"volume_id": vid})


# -- refusals --------------------------------------------------------------------------------------------------


CHANGES = ("snapshots/create", "snapshots/restore", "snapshots/delete")


def test_only_the_owner_changes_and_a_stranger_sees_nothing(server: LiveServer) -> None:
    vid, hidden = new_volume(server), new_volume(server, private=True)
    snapshot, secret = take(server, vid), take(server, hidden, "secret")
    for path in CHANGES:
        asked = {"creatorID": BOB, "snapshot": snapshot}
        assert refusal(server, path, {"vid": vid, **asked})[:2] == (403, "not-owner")
        mine = refusal(server, path, {"vid": hidden, **asked, "snapshot": secret})
        nothing = refusal(server, path, {"vid": "9" * 32, **asked})
        assert mine[:2] == nothing[:2] == (404, "volume-not-found")
        assert mine[2].replace(hidden, "") == nothing[2].replace("9" * 32, "")
    assert len(listed(server, vid, client_uid=BOB)) == 1
    assert refusal(server, "snapshots", {"vid": hidden, "client_uid": BOB})[:2] == (404, "volume-not-found")
    assert [one["name"] for one in listed(server, hidden, client_uid=ALICE)] == ["secret"]


def test_what_is_not_there_cannot_be_restored_or_deleted(server: LiveServer) -> None:
    vid = new_volume(server)
    for path in ("snapshots/restore", "snapshots/delete"):
        asked = {"vid": vid, "creatorID": ALICE, "snapshot": "9" * 32}
        assert refusal(server, path, asked)[:2] == (404, "snapshot-not-found")
        assert refusal(server, path, {**asked, "snapshot": "../../etc"})[:2] == (400, "invalid-value")
        assert refusal(server, path, {"vid": vid, "creatorID": ALICE})[:2] == (400, "missing-key")
    assert refusal(server, "snapshots/create", {"vid": vid, "creatorID": ALICE, "name": "x" * 5000})[0] == 400
    assert refusal(server, "snapshots/create", {"vid": vid, "creatorID": ALICE, "description": "a\0"})[0] == 400


def test_an_iso_has_none(server: LiveServer) -> None:
    body = {"creatorID": ALICE, "name": "iso", "isotype": "tool", "os_family": "linux", "size": 0.001}
    vid = server.call("iso/create", {**body, "tool_scope": "drivers", "tool_version": "1"})["vid"]
    asked = {"vid": vid, "creatorID": ALICE}
    assert refusal(server, "snapshots/create", asked)[:2] == (409, "format-unsupported")
    assert listed(server, vid) == []


@each_format
def test_what_needs_the_volume_for_itself_is_refused_while_it_is_exported(
    server: LiveServer, image_format: str
) -> None:
    vid = new_volume(server, format=image_format)
    snapshot = take(server, vid)
    export(server, vid, protocol="local")
    asked = {"vid": vid, "creatorID": ALICE, "snapshot": snapshot}
    assert refusal(server, "snapshots/restore", asked)[:2] == (409, "volume-exported")
    assert names(server, vid) == [snapshot] or names(server, vid) == [""]


def test_an_image_that_somebody_else_has_open_is_left_alone(server: LiveServer) -> None:
    for image_format in FORMATS:
        vid = new_volume(server, format=image_format)
        snapshot = take(server, vid)
        with guest(server, vid) as one:
            one.write(0, 65536, 1)
            asked = {"vid": vid, "creatorID": ALICE, "snapshot": snapshot}
            assert refusal(server, "snapshots/create", asked)[:2] == (409, "image-in-use")
            if image_format == "qcow2":
                assert refusal(server, "snapshots/delete", asked)[:2] == (409, "image-in-use")
        assert len(listed(server, vid)) == 1
        assert_clean(server)


def test_a_conversion_would_lose_them(server: LiveServer) -> None:
    for image_format, other in (("raw", "qcow2"), ("qcow2", "raw")):
        vid = new_volume(server, format=image_format)
        snapshot = take(server, vid)
        asked = {"vid": vid, "creatorID": ALICE, "format": other}
        assert refusal(server, "update/convert", asked)[:2] == (409, "has-snapshots")
        delete(server, vid, snapshot)
        server.call("update/convert", asked)
        assert_clean(server)


def test_what_others_stand_on_stays_as_it_is(server: LiveServer) -> None:
    """Linked clones read their parent's image: nothing in it moves. What is beside it may."""
    for image_format in FORMATS:
        vid = new_volume(server, format=image_format)
        snapshot = take(server, vid)
        clone = server.call("clone", {"vid": vid, "creatorID": ALICE, "linked": True})["vid"]
        asked = {"vid": vid, "creatorID": ALICE, "snapshot": snapshot}
        assert refusal(server, "snapshots/restore", asked)[:2] == (409, "has-clones")
        if image_format == "qcow2":
            for path in ("snapshots/create", "snapshots/delete"):
                assert refusal(server, path, asked)[:2] == (409, "has-clones")
        else:
            delete(server, vid, take(server, vid))
        of_clone = take(server, clone)
        write(server, clone, 0, 1)
        restore(server, clone, of_clone)
        assert reads(server, clone, 0, 0)
        assert refusal(server, "overlay/compact", {"vid": clone, "creatorID": ALICE})[:2] == (409, "has-snapshots")
        delete(server, clone, of_clone)
        server.call("overlay/compact", {"vid": clone, "creatorID": ALICE})


def test_a_reset_keeps_what_is_beside_the_image_and_loses_nothing_inside(server: LiveServer) -> None:
    raw, qcow2 = new_volume(server), new_volume(server, format="qcow2")
    write(server, raw, 0, 1)
    snapshot = take(server, raw)
    server.call("reset", {"vid": raw, "creatorID": ALICE})
    assert reads(server, raw, 0, 0)
    restore(server, raw, snapshot)
    assert reads(server, raw, 0, 1)
    take(server, qcow2)
    assert refusal(server, "reset", {"vid": qcow2, "creatorID": ALICE})[:2] == (409, "has-snapshots")


def test_a_clone_has_no_snapshots(server: LiveServer) -> None:
    for image_format in FORMATS:
        vid = new_volume(server, format=image_format)
        write(server, vid, 0, 1)
        take(server, vid)
        clone = server.call("clone", {"vid": vid, "creatorID": BOB})["vid"]
        assert listed(server, clone) == []
        assert server.info(clone)["snapshots"] == 0
        assert reads(server, clone, 0, 1)


def test_the_same_key_makes_one(server: LiveServer) -> None:
    vid = new_volume(server)
    body = {"vid": vid, "creatorID": ALICE, "name": "once"}
    answers = [server.call("snapshots/create", body, Idempotency_Key="the key of a snapshot") for _ in range(2)]
    assert answers[0] == answers[1]
    assert names(server, vid) == ["once"]
