"""New volumes of snapshots and of what clients write to; and SIGKILL at every step of making them."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.clients import QemuIo, eventually
from tests.e2e.invariants import assert_clean
from tests.e2e.killing import armed, die_at, start_armed
from tests.e2e.test_snapshots import assert_sound, delete, each_format, listed, reads, restore, take, write
from tests.exporting import MIB, client_of, export, new_volume, refusal, unexport, wait_healthy
from tests.live import ALICE, BOB, LiveServer, live_server, make_location

FORMATS = ("raw", "qcow2")


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """One server for all of it; its fault point is what the file says."""
    root = tmp_path_factory.mktemp("clones")
    make_location(root / "mnt", "disk")
    make_location(root / "mnt", "other", max_total_size="1G", max_volume_size="32Mi")
    (root / "mnt" / "disk" / "settings.json").write_text('{"max-total-size": "100G"}')
    flags = ("--heartbeat", "0.3", "--lease", "2", "--sweep-interval", "0.5")
    with live_server(root, *flags, env=armed(root)) as one:
        yield one


@pytest.fixture
def server(running: LiveServer) -> LiveServer:
    return running


def clone_of(server: LiveServer, vid: str, snapshot: str, owner: str = ALICE, **more: Any) -> str:
    body = {"vid": vid, "creatorID": owner, "snapshot": snapshot, **more}
    return str(server.call("snapshots/clone", body)["vid"])


def holds(server: LiveServer, vid: str, offset: int, pattern: int, length: int = 65536) -> bool:
    """The same as ``reads``, in whatever location it is."""
    [data] = server.directory(vid, server.info(vid)["location"]).glob("data.*")
    with QemuIo.on_file(data, "raw" if data.suffix == ".img" else "qcow2") as one:
        return one.reads(offset, length, pattern)


def kept_inside(server: LiveServer, vid: str) -> bool:
    """Whether an image has snapshots in it, as QEMU sees it."""
    [data] = server.directory(vid, server.info(vid)["location"]).glob("data.*")
    argv = ["qemu-img", "info", "-U", "--output=json", str(data)]
    return "snapshots" in json.loads(subprocess.run(argv, check=True, capture_output=True).stdout)


# -- of a snapshot -------------------------------------------------------------------------------------------------


@each_format
def test_a_clone_of_a_snapshot_is_what_the_volume_was(server: LiveServer, image_format: str) -> None:
    vid = new_volume(server, format=image_format, alg="rsync", bus="scsi")
    write(server, vid, 0, 1)
    write(server, vid, 8 * MIB - 65536, 1)
    old = take(server, vid)
    server.call("update/resize", {"vid": vid, "creatorID": ALICE, "size": 16 * MIB / 1e9})
    write(server, vid, 0, 2)
    write(server, vid, 8 * MIB, 2, MIB)
    large = take(server, vid)
    for target in FORMATS:
        for location in ("disk", "other"):
            clone = clone_of(server, vid, old, name="then", format=target, location=location)
            info = server.info(clone)
            told = {key: info[key] for key in ("size", "name", "format", "location", "bus", "alg", "snapshots")}
            assert told == {
                "size": 8 * MIB,
                "name": "then",
                "format": target,
                "location": location,
                "bus": "scsi",
                "alg": "rsync",
                "snapshots": 0,
            }
            assert holds(server, clone, 0, 1)
            assert holds(server, clone, 8 * MIB - 65536, 1)
            assert not kept_inside(server, clone)
            server.call("destroy", {"volume_id": clone})
    clone = clone_of(server, vid, large)
    assert server.info(clone)["size"] == 16 * MIB
    assert holds(server, clone, 8 * MIB, 2, MIB)
    # A clone that grows has nothing of its source where it grew.
    small = clone_of(server, vid, old)
    server.call("update/resize", {"vid": small, "creatorID": ALICE, "size": 16 * MIB / 1e9})
    assert holds(server, small, 8 * MIB, 0, 8 * MIB)
    assert_sound(server, vid)
    assert_clean(server)
    assert_clean(server, "other")


def test_one_that_is_larger_than_the_volume_is_now(server: LiveServer) -> None:
    """QEMU shows what is inside an image no longer than the image is: refused, and never cut short."""
    for image_format in FORMATS:
        vid = new_volume(server, 4, format=image_format)
        small = take(server, vid)
        server.call("update/resize", {"vid": vid, "creatorID": ALICE, "size": 8 * MIB / 1e9})
        write(server, vid, 7 * MIB, 3)
        large = take(server, vid)
        restore(server, vid, small)
        asked = {"vid": vid, "creatorID": ALICE, "snapshot": large}
        if image_format == "qcow2":
            status, code, told = refusal(server, "snapshots/clone", asked)
            assert (status, code) == (409, "conflict")
            assert str(8 * MIB) in told
            server.call("update/resize", {"vid": vid, "creatorID": ALICE, "size": 8 * MIB / 1e9})
        clone = clone_of(server, vid, large)
        assert server.info(clone)["size"] == 8 * MIB
        assert holds(server, clone, 7 * MIB, 3)
        assert_clean(server)


def test_who_may_and_what_is_refused(server: LiveServer) -> None:
    vid, hidden = new_volume(server), new_volume(server, private=True)
    snapshot, secret = take(server, vid), take(server, hidden)
    asked = {"creatorID": BOB, "snapshot": snapshot}
    assert refusal(server, "snapshots/clone", {"vid": vid, **asked})[:2] == (403, "not-owner")
    mine = refusal(server, "snapshots/clone", {"vid": hidden, "creatorID": BOB, "snapshot": secret})
    nothing = refusal(server, "snapshots/clone", {"vid": "9" * 32, "creatorID": BOB, "snapshot": secret})
    assert mine[:2] == nothing[:2] == (404, "volume-not-found")
    assert mine[2].replace(hidden, "") == nothing[2].replace("9" * 32, "")
    mine_of = {"vid": vid, "creatorID": ALICE, "snapshot": snapshot}
    for changed, expected in (
        ({"snapshot": "9" * 32}, (404, "snapshot-not-found")),
        ({"snapshot": "../x"}, (400, "invalid-value")),
        ({"location": "nowhere"}, (404, "location-not-found")),
        ({"format": "iso"}, (409, "format-unsupported")),
    ):
        assert refusal(server, "snapshots/clone", {**mine_of, **changed})[:2] == expected
    large = new_volume(server, 64)
    too_large = {"vid": large, "creatorID": ALICE, "snapshot": take(server, large), "location": "other"}
    assert refusal(server, "snapshots/clone", too_large)[:2] == (507, "no-room")
    server.call("update", {"vid": vid, "creatorID": ALICE, "clonable": False})
    assert refusal(server, "snapshots/clone", mine_of)[:2] == (409, "not-clonable")
    of_private = clone_of(server, hidden, secret)
    assert server.info(of_private)["private"] is True
    assert_clean(server)
    assert_clean(server, "other")


def test_the_same_key_makes_one_clone(server: LiveServer) -> None:
    vid = new_volume(server)
    body = {"vid": vid, "creatorID": ALICE, "snapshot": take(server, vid)}
    before = set(server.listed())
    answers = [server.call("snapshots/clone", body, Idempotency_Key="clone of a snapshot") for _ in range(2)]
    assert answers[0] == answers[1]
    assert set(server.listed()) - before == {answers[0]["vid"]}


# -- of what clients write to --------------------------------------------------------------------------------------


def test_what_cannot_be_cloned_while_it_is_written_to_is_left_alone(server: LiveServer) -> None:
    raw, qcow2 = new_volume(server), new_volume(server, format="qcow2", shareable=True)
    export(server, raw, protocol="nbd")
    linked = {"volume_id": raw, "creatorID": ALICE, "linked": True}
    assert refusal(server, "clone", linked)[:2] == (409, "volume-exported")
    for client in (ALICE, BOB):
        export(server, qcow2, client, protocol="nbd")
    status, code, told = refusal(server, "clone", {"volume_id": qcow2, "creatorID": ALICE})
    assert (status, code) == (409, "volume-exported")
    assert "convert it to raw" in told
    assert listed(server, qcow2) == []
    for vid, client in ((raw, ALICE), (qcow2, ALICE), (qcow2, BOB)):
        unexport(server, vid, client)
    assert_clean(server)


# -- SIGKILL -------------------------------------------------------------------------------------------------------

OF_SNAPSHOT = ("clone.locked", "clone.reserved", "clone.copied", "create.renamed")
KEPT = ("clone.moment-kept", "clone.moment-read", "clone.moment-dropped")
OF_WRITTEN = [
    ("raw", ("clone.locked", "clone.reserved", "snapshot.copying", *KEPT, "clone.copied", "create.renamed")),
    ("qcow2", ("clone.reserved", *KEPT, "create.renamed")),
]


@each_format
def test_killed_at_each_step_of_cloning_a_snapshot(server: LiveServer, image_format: str) -> None:
    vid = new_volume(server, format=image_format)
    write(server, vid, 0, 1)
    snapshot = take(server, vid)
    write(server, vid, 0, 2)
    body = {"vid": vid, "creatorID": ALICE, "snapshot": snapshot}
    for step in OF_SNAPSHOT:
        before = set(server.listed())
        die_at(server, step, "snapshots/clone", body)
        start_armed(server)
        made = set(server.listed(include_locked=True)) - before
        assert len(made) == (1 if step == "create.renamed" else 0), step
        eventually(lambda: "locked" not in server.info(vid))
        assert_clean(server)
        assert all(holds(server, one, 0, 1) for one in made)
        assert [one["snapshot"] for one in listed(server, vid)] == [snapshot]
    assert_sound(server, vid)
    assert holds(server, clone_of(server, vid, snapshot), 0, 1)
    assert reads(server, vid, 0, 2)


@pytest.mark.parametrize(("image_format", "steps"), OF_WRITTEN)
def test_killed_at_each_step_of_cloning_what_is_written_to(
    server: LiveServer, image_format: str, steps: tuple[str, ...]
) -> None:
    vid = new_volume(server, 16, format=image_format)
    user_made = take(server, vid)
    body = {"volume_id": vid, "creatorID": ALICE}
    with client_of(export(server, vid, protocol="iscsi")) as client:
        for number, step in enumerate(steps, 1):
            before = set(server.listed(include_locked=True))
            client.write(0, 65536, number)
            die_at(server, step, "clone", body)
            client.write(65536, 65536, number)
            start_armed(server)
            eventually(lambda: "locked" not in server.info(vid))
            made = set(server.listed()) - before
            assert len(made) == (1 if step == "create.renamed" else 0), step
            for one in made:
                assert holds(server, one, 0, number)
                assert not kept_inside(server, one)
                server.call("destroy", {"volume_id": one})
            # Nothing of the moment is left, of what the owner has kept all.
            assert [one["snapshot"] for one in listed(server, vid)] == [user_made]
            names = {item.name.partition(".")[0] for item in (server.directory(vid) / "snapshots").iterdir()}
            assert names == {user_made}, step
            assert client.reads(0, 131072, number)
        wait_healthy(server, vid)
        clone = str(server.call("clone", body)["vid"])
        client.write(0, 65536, 99)
        assert holds(server, clone, 65536, len(steps))
    unexport(server, vid)
    assert_clean(server)
    assert_sound(server, vid)
    delete(server, vid, user_made)
    assert reads(server, vid, 0, 99)


def test_every_step_is_killed(server: LiveServer, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    server.stop()
    server.start({"ELEMENTO_STORAGE_FAULTPOINT": f"trace:{trace}"})
    vid = new_volume(server)
    export(server, vid, protocol="nbd")
    server.call("clone", {"volume_id": vid, "creatorID": ALICE})
    unexport(server, vid)
    clone_of(server, vid, take(server, vid))
    reached = {step for step in trace.read_text().split() if step.startswith("clone.")}
    assert reached == {step for step in (*OF_SNAPSHOT, *OF_WRITTEN[0][1]) if step.startswith("clone.")}
    server.stop()
    start_armed(server)
