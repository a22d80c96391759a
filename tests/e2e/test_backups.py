"""Backups of a launched server: what they hold, when they are increments, and when they must not be."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.backing_up import KIB, Guest, assert_nothing_left, assert_right, backups_of, bitmaps, content, volume_content
from tests.clients import QemuIo, eventually
from tests.exporting import MIB, export, refusal, unexport, volume_pids
from tests.live import ALICE, BOB, LiveServer, live_server, make_location


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """One server with a second location, where backups go."""
    path = tmp_path_factory.mktemp("backups")
    make_location(path / "mnt")
    make_location(path / "mnt", "vault")
    # A short heartbeat: the reconciler talks to the daemons all the time, also while they copy.
    with live_server(path, "--bin-retention", "0", "--heartbeat", "0.1", "--lease", "2") as one:
        yield one


def test_chain_of_a_volume_at_rest(shared: LiveServer, tmp_path: Path) -> None:
    guest = Guest(shared, format="qcow2").write(0, 3 * MIB, 1)
    full = guest.back_up(name="first")
    assert (full.answer["mode"], full.answer["location"], full.answer["name"]) == ("full", "vault", "first")
    assert full.answer["reason"] == "there is no earlier backup"
    guest.write(MIB, 100 * KIB, 2).write(7 * MIB, 512, 3)
    second = guest.back_up()
    third = guest.back_up()
    guest.write(MIB + 64 * KIB, KIB, 4)
    fourth = guest.back_up("incremental")
    assert [one.answer["mode"] for one in (second, third, fourth)] == ["incremental"] * 3
    assert [one.answer["parent"] for one in (second, third, fourth)] == [full.uid, second.uid, third.uid]
    assert fourth.answer["sizeOnDisk"] < MIB
    assert_right([full, second, third, fourth], tmp_path)
    assert [one["backup"] for one in backups_of(shared, guest.vid)] == [
        copy.uid for copy in (full, second, third, fourth)
    ]
    assert bitmaps(shared, guest.vid) == [f"backup-{fourth.uid}"]
    assert not volume_pids(shared, guest.vid)
    assert_nothing_left(shared, guest.vid)
    assert volume_content(shared, guest.vid, tmp_path) == guest.believes


@pytest.mark.parametrize(
    ("protocol", "image_format"),
    [("local", "qcow2"), ("nbd", "qcow2"), ("iscsi", "qcow2"), ("iscsi", "raw"), ("local", "raw"), ("smb", "qcow2")],
)
def test_chain_while_a_guest_writes(shared: LiveServer, tmp_path: Path, protocol: str, image_format: str) -> None:
    guest = Guest(shared, format=image_format).write(0, 2 * MIB, 1)
    if protocol == "smb":
        export(shared, guest.vid, protocol=protocol)
    else:
        guest.power_on(protocol).write(MIB, MIB, 2)
    copies = [guest.back_up()]
    if protocol != "smb":
        guest.write(0, 70 * KIB, 3).discard(MIB, 128 * KIB)
        copies.append(guest.back_up())
        guest.write(6 * MIB, MIB, 4)
    copies.append(guest.back_up())
    modes = [copy.answer["mode"] for copy in copies]
    if image_format == "raw":
        assert set(modes) == {"full"}
        assert "convert the volume to qcow2" in copies[-1].answer["reason"]
    else:
        assert modes == ["full", *["incremental"] * (len(copies) - 1)]
    if protocol != "smb":
        guest.write(5 * MIB, MIB, 5)
        assert guest.client.reads(0, 70 * KIB, 3)
    guest.power_off()
    assert volume_content(shared, guest.vid, tmp_path) == guest.believes
    assert_right(copies, tmp_path)
    assert_nothing_left(shared, guest.vid)


def test_increments_go_on_over_power_cycles_and_restarts(running: LiveServer, tmp_path: Path) -> None:
    guest = Guest(running, format="qcow2").power_on().write(0, MIB, 1)
    copies = [guest.back_up()]
    guest.write(MIB, MIB, 2).power_off()
    copies.append(guest.back_up())
    guest.power_on("nbd").write(0, 64 * KIB, 3)
    running.stop()
    running.start()
    guest.write(64 * KIB, 64 * KIB, 4)
    copies.append(guest.back_up())
    guest.power_off()
    assert [copy.answer["mode"] for copy in copies] == ["full", "incremental", "incremental"]
    assert_right(copies, tmp_path)


def test_dead_daemon_means_a_full_backup(shared: LiveServer, tmp_path: Path) -> None:
    guest = Guest(shared, format="qcow2").power_on().write(0, MIB, 1)
    first = guest.back_up()
    guest.write(MIB, MIB, 2)
    shared.kill_daemons(guest.vid)
    eventually(lambda: guest.client.reads(0, KIB, 1))
    guest.write(2 * MIB, MIB, 3)
    assert refusal(shared, "backups/create", {"vid": guest.vid, "creatorID": ALICE, "mode": "incremental"})[:2] == (
        409,
        "no-increment",
    )
    second = guest.back_up()
    assert (second.answer["mode"], second.answer["reason"]) == (
        "full",
        "nothing recorded what was written since the last backup",
    )
    guest.write(3 * MIB, 64 * KIB, 4)
    third = guest.back_up()
    assert third.answer["mode"] == "incremental"
    guest.power_off()
    assert_right([first, second, third], tmp_path)


def _convert(guest: Guest) -> None:
    for image_format in ("raw", "qcow2"):
        guest.server.call("update/convert", {"vid": guest.vid, "creatorID": ALICE, "format": image_format})


def _resize(guest: Guest) -> None:
    guest.server.call("update/resize", {"vid": guest.vid, "creatorID": ALICE, "size": 9 * MIB / 1e9})
    guest.believes += bytes(MIB)


def _restore_over(guest: Guest) -> None:
    [backup] = backups_of(guest.server, guest.vid)
    guest.server.call("backups/restore", {"backup": backup["backup"], "creatorID": ALICE, "vid": guest.vid})


def _strip_bitmaps(guest: Guest) -> None:
    path = guest.server.directory(guest.vid) / "data.qcow2"
    for name in bitmaps(guest.server, guest.vid):
        subprocess.run(["qemu-img", "bitmap", "--remove", "-f", "qcow2", str(path), name], check=True)


def _lose_backup(guest: Guest) -> None:
    [backup] = backups_of(guest.server, guest.vid)
    image = guest.server.root / "vault" / "elemento-backup" / guest.vid / backup["backup"] / "data.qcow2"
    image.unlink()


@pytest.mark.parametrize("change", [_convert, _resize, _restore_over, _strip_bitmaps, _lose_backup])
def test_every_doubt_means_a_full_backup(shared: LiveServer, tmp_path: Path, change) -> None:  # type: ignore[no-untyped-def]
    guest = Guest(shared, format="qcow2").write(0, MIB, 1)
    guest.back_up()
    change(guest)
    guest.write(MIB, 64 * KIB, 2)
    second = guest.back_up()
    assert second.answer["mode"] == "full"
    assert second.answer["reason"]
    second.assert_holds(tmp_path)
    guest.write(2 * MIB, 64 * KIB, 3)
    third = guest.back_up()
    assert third.answer["mode"] == "incremental"
    third.assert_right(tmp_path)


def test_growing_works_after_a_daemon_died(shared: LiveServer, tmp_path: Path) -> None:
    """QEMU grows no image with bitmaps that were not put away in good order."""
    guest = Guest(shared, format="qcow2").power_on().write(0, MIB, 1)
    guest.back_up()
    guest.power_off().power_on().write(0, MIB, 2)
    guest.let_go()
    shared.kill_daemons(guest.vid)
    eventually(lambda: volume_pids(shared, guest.vid))
    shared.call("update/resize", {"vid": guest.vid, "creatorID": ALICE, "size": 9 * MIB / 1e9})
    guest.power_on().write(0, MIB, 3)
    guest.power_off()
    path = shared.directory(guest.vid) / "data.qcow2"
    subprocess.run(["qemu-img", "bitmap", "--add", "-f", "qcow2", str(path), "backup-1"], check=True)
    with QemuIo.on_file(path, "qcow2") as image:
        image.write(0, KIB, 4)  # killed at the end
    assert bitmaps(shared, guest.vid) == ["backup-1"]
    shared.call("update/resize", {"vid": guest.vid, "creatorID": ALICE, "size": 10 * MIB / 1e9})
    assert bitmaps(shared, guest.vid) == []
    assert shared.info(guest.vid)["size"] == 10 * MIB


@pytest.mark.parametrize("position", [0, 1, 3])
def test_deleting_leaves_the_others_whole(shared: LiveServer, tmp_path: Path, position: int) -> None:
    guest = Guest(shared, format="qcow2").write(0, MIB, 1)
    copies = [guest.back_up()]
    for number in range(1, 4):
        guest.write(number * 300 * KIB, 200 * KIB, number + 1)
        copies.append(guest.back_up())
    gone = copies.pop(position)
    directory = gone.directory
    shared.call("backups/delete", {"backup": gone.uid, "creatorID": ALICE})
    assert refusal(shared, "backups/verify", {"backup": gone.uid, "creatorID": ALICE})[:2] == (404, "backup-not-found")
    eventually(lambda: not directory.exists())
    assert [one["backup"] for one in backups_of(shared, guest.vid)] == [copy.uid for copy in copies]
    assert_right(copies, tmp_path)
    for copy in copies:
        shared.call("backups/verify", {"backup": copy.uid, "creatorID": ALICE})
    assert backups_of(shared, guest.vid)[0]["mode"] == "full"
    guest.write(0, 64 * KIB, 9)
    last = guest.back_up()
    assert last.answer["mode"] == ("full" if position == 3 else "incremental")
    last.assert_holds(tmp_path)
    for copy in copies:
        shared.call("backups/delete", {"backup": copy.uid, "creatorID": ALICE})
    eventually(lambda: [one["mode"] for one in backups_of(shared, guest.vid)] == ["full"])
    last.assert_right(tmp_path)


def test_verify_finds_one_bit(shared: LiveServer) -> None:
    guest = Guest(shared, format="qcow2").write(0, MIB, 1)
    first = guest.back_up()
    guest.write(0, 64 * KIB, 2)
    second = guest.back_up()
    shared.call("backups/verify", {"backup": second.uid, "creatorID": ALICE})
    with first.image.open("r+b") as image:
        image.seek(-1000, 2)
        byte = image.read(1)
        image.seek(-1000, 2)
        image.write(bytes([byte[0] ^ 1]))
    assert refusal(shared, "backups/verify", {"backup": second.uid, "creatorID": ALICE})[:2] == (409, "backup-damaged")
    assert backups_of(shared, guest.vid)[0]["damaged"]
    assert refusal(shared, "backups/restore", {"backup": second.uid, "creatorID": ALICE})[:2] == (409, "backup-damaged")
    third = guest.back_up()
    assert third.answer["mode"] == "full"
    assert "damaged" in third.answer["reason"]


def test_what_a_backup_names_is_not_opened(shared: LiveServer, tmp_path: Path) -> None:
    """An image in the store that names another file below it is no backup."""
    guest = Guest(shared, format="qcow2").write(0, MIB, 1)
    copy = guest.back_up()
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret" * 10000)
    argv = ["qemu-img", "rebase", "-u", "-f", "qcow2", "-F", "raw", "-b", str(secret), str(copy.image)]
    subprocess.run(argv, check=True)
    assert refusal(shared, "backups/restore", {"backup": copy.uid, "creatorID": ALICE})[:2] == (409, "backup-damaged")
    assert guest.back_up().answer["mode"] == "full"


def test_restore(shared: LiveServer, tmp_path: Path) -> None:
    guest = Guest(shared, format="qcow2", name="web", private=True).write(0, MIB, 1)
    copy = guest.back_up()
    guest.write(0, 2 * MIB, 2)
    # Over the volume, when nobody uses it.
    export(shared, guest.vid, protocol="local")
    body = {"backup": copy.uid, "creatorID": ALICE, "vid": guest.vid}
    assert refusal(shared, "backups/restore", body)[:2] == (409, "volume-exported")
    unexport(shared, guest.vid)
    assert shared.call("backups/restore", body)["volumeID"] == guest.vid
    assert volume_content(shared, guest.vid, tmp_path) == copy.holds
    # As a new one, of another name.
    new = shared.call("backups/restore", {"backup": copy.uid, "creatorID": ALICE, "name": "again"})
    assert (new["name"], new["private"], new["format"], new["creatorID"]) == ("again", True, "qcow2", ALICE)
    assert new["volumeID"] != guest.vid
    # Under its old id when it is no more.
    shared.call("destroy", {"volume_id": guest.vid})
    assert backups_of(shared, guest.vid)[0]["backup"] == copy.uid
    back = shared.call("backups/restore", body)
    assert (back["volumeID"], back["name"]) == (guest.vid, "web")
    assert volume_content(shared, guest.vid, tmp_path, back["location"]) == copy.holds
    assert shared.call("backups/create", {"vid": guest.vid, "creatorID": ALICE})["mode"] == "full"
    assert refusal(shared, "backups/restore", {**body, "vid": "9" * 32})[0] == 404


def test_backups_are_their_owners(shared: LiveServer, tmp_path: Path) -> None:
    guest = Guest(shared, format="qcow2", private=True).write(0, MIB, 1)
    copy = guest.back_up()
    assert backups_of(shared, guest.vid, BOB) == []
    assert shared.call("backups", {"client_uid": BOB}) == []
    for path in ("backups/verify", "backups/delete", "backups/restore"):
        status, code, said = refusal(shared, path, {"backup": copy.uid, "creatorID": BOB})
        assert (status, code, said) == (404, "backup-not-found", f"no backup {copy.uid}")
    for path in ("backups/create", "backups/open"):
        assert refusal(shared, path, {"vid": guest.vid, "creatorID": BOB})[:2] == (404, "volume-not-found")
    body = {"vid": guest.vid, "creatorID": BOB, "every": "1d"}
    assert refusal(shared, "backups/schedule", body)[:2] == (404, "volume-not-found")
    # What was backed up stays the former owner's; the new one begins with a backup of its own.
    shared.call("transfer", {"vid": guest.vid, "creatorID": ALICE, "newCreatorID": BOB})
    assert [one["backup"] for one in backups_of(shared, guest.vid)] == [copy.uid]
    theirs = shared.call("backups/create", {"vid": guest.vid, "creatorID": BOB})
    assert (theirs["mode"], theirs["creatorID"]) == ("full", BOB)
    assert [one["backup"] for one in backups_of(shared, guest.vid, BOB)] == [theirs["backup"]]
    assert refusal(shared, "backups/restore", {"backup": copy.uid, "creatorID": ALICE, "vid": guest.vid})[0] == 404


def test_volume_can_be_used_while_it_is_backed_up(shared: LiveServer) -> None:
    guest = Guest(shared, format="qcow2").write(0, MIB, 1)
    session = shared.call("backups/open", {"vid": guest.vid, "creatorID": ALICE})
    try:
        assert guest.vid in shared.listed()
        assert shared.info(guest.vid)["locked"]["purpose"] == "backup-session"
        for protocol in ("local", "nbd", "iscsi"):
            guest.power_on(protocol).write(0, MIB, 2).power_off()
        for path, body in (
            ("update/resize", {"vid": guest.vid, "creatorID": ALICE, "size": 1}),
            ("update/convert", {"vid": guest.vid, "creatorID": ALICE, "format": "raw"}),
            ("destroy", {"volume_id": guest.vid}),
            ("backups/create", {"vid": guest.vid, "creatorID": ALICE}),
            ("snapshots/create", {"vid": guest.vid, "creatorID": ALICE}),
            ("clone", {"volume_id": guest.vid, "creatorID": ALICE, "linked": True}),
        ):
            assert refusal(shared, path, body)[:2] == (423, "volume-locked")
    finally:
        shared.call("backups/close", {"session": session["session"], "creatorID": ALICE})
    assert_nothing_left(shared, guest.vid)
    assert not volume_pids(shared, guest.vid)


def test_cancelled_backup_loses_nothing(shared: LiveServer, tmp_path: Path) -> None:
    guest = Guest(shared, 32, format="qcow2").power_on().write(0, MIB, 1)
    first = guest.back_up()
    guest.write(0, 30 * MIB, 2)
    started = shared.post("backups/create", {"vid": guest.vid, "creatorID": ALICE}, Prefer="respond-async")
    job = started.json()["job"]
    shared.http.delete(f"jobs/{job}")
    ended = eventually(lambda: (found := shared.http.get(f"jobs/{job}").json())["ended"] and found)
    assert ended["state"] in ("cancelled", "done"), ended
    assert_nothing_left(shared, guest.vid)
    second = guest.back_up()
    assert second.answer["mode"] == "incremental"
    guest.power_off()
    for copy in (first, second):
        assert content(copy.image, tmp_path) == copy.holds


def test_bad_input(shared: LiveServer) -> None:
    guest = Guest(shared)
    for path, body in (
        ("backups/create", {"mode": "some"}),
        ("backups/open", {"lease": 0.5}),
        ("backups/open", {"since": "x"}),
        ("backups/schedule", {"every": "often"}),
        ("backups/schedule", {"every": "1m"}),
        ("backups/schedule", {"every": "1d", "at": "25:00"}),
        ("backups/schedule", {"every": "1d", "keep": 0}),
    ):
        assert refusal(shared, path, {"vid": guest.vid, "creatorID": ALICE, **body})[0] == 400
    body = {"vid": guest.vid, "creatorID": ALICE, "since": "8" * 32}
    status, code, said = refusal(shared, "backups/open", body)
    assert (status, code) == (409, "no-increment")
    assert "convert the volume to qcow2" in said
    assert_nothing_left(shared, guest.vid)
