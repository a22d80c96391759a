"""Backups beside what else goes on with a volume: load, a daemon that dies, many clients, snapshots, linked clones."""

import contextlib
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.backing_up import (
    KIB,
    Guest,
    assert_nothing_left,
    assert_right,
    backups_of,
    bitmaps,
    content,
    store_of,
    volume_content,
)
from tests.clients import eventually
from tests.e2e import test_snapshots as snapshots
from tests.e2e.test_snapshots_live import writing
from tests.exporting import MIB, client_of, export, new_volume, refusal, refused_export, unexport, volume_pids
from tests.live import ALICE, LiveServer, live_server, make_location
from tests.prefix import reader_of

CLIENTS = tuple(f"{number:032x}" for number in range(1, 10))


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """One server with a second location, where backups go."""
    path = tmp_path_factory.mktemp("company")
    make_location(path / "mnt")
    make_location(path / "mnt", "vault")
    with live_server(path, "--bin-retention", "0", "--heartbeat", "0.1", "--lease", "2") as one:
        yield one


@pytest.mark.parametrize(("protocol", "image_format"), [("nbd", "qcow2"), ("iscsi", "qcow2"), ("iscsi", "raw")])
def test_each_backup_under_load_is_one_moment(
    shared: LiveServer, tmp_path: Path, protocol: str, image_format: str
) -> None:
    """It holds all that was acknowledged before the call, and nothing that was begun after it."""
    vid = new_volume(shared, 16, format=image_format)
    made = []
    with writing(export(shared, vid, protocol=protocol)) as writers:
        for _ in range(3):
            before = [one.acknowledged for one in writers]
            made.append(shared.call("backups/create", {"vid": vid, "creatorID": ALICE}))
            after = [one.acknowledged + 1 for one in writers]
            image = store_of(shared, vid, "vault") / made[-1]["backup"] / "data.qcow2"
            raw = tmp_path / "moment.raw"
            raw.write_bytes(content(image, tmp_path))
            held = [one.records_in(reader_of(raw)) for one in writers]
            assert all(low <= has <= high for low, has, high in zip(before, held, after, strict=True))
        so_far = [one.acknowledged for one in writers]
        eventually(lambda: all(one.acknowledged > some for one, some in zip(writers, so_far, strict=True)))
    assert {one["mode"] for one in made[1:]} == {"incremental" if image_format == "qcow2" else "full"}
    unexport(shared, vid)
    raw.write_bytes(volume_content(shared, vid, tmp_path))
    assert [one.records_in(reader_of(raw)) for one in writers] == [one.acknowledged for one in writers]
    assert_nothing_left(shared, vid)


@contextlib.contextmanager
def load(guest: Guest, base: int) -> Iterator[None]:
    """The guest writes on meanwhile; whatever it was told is written is in ``believes`` afterwards."""
    stop = threading.Event()
    failures: list[BaseException] = []

    def work() -> None:
        number = 0
        try:
            while not stop.is_set():
                guest.write(base + number % 16 * 64 * KIB, 64 * KIB, 3 + number % 250)
                number += 1
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(60)
    assert failures == []


def test_daemon_that_dies_while_it_copies_under_load(shared: LiveServer, tmp_path: Path) -> None:
    guest = Guest(shared, 98, format="qcow2").power_on().write(0, MIB, 1)
    first = guest.back_up()
    area = 96 * MIB
    guest.write(0, area, 2)
    with load(guest, area):
        asked = shared.post("backups/create", {"vid": guest.vid, "creatorID": ALICE}, Prefer="respond-async")
        image = store_of(shared, guest.vid, "vault") / asked.json()["job"] / "data.qcow2"
        eventually(lambda: image.exists() and image.stat().st_blocks * 512 > MIB, every_s=0.001)
        shared.kill_daemons(guest.vid)
        job = eventually(lambda: (found := shared.http.get(f"jobs/{asked.json()['job']}").json())["ended"] and found)
        assert (job["state"], job["error"]["code"]) == ("failed", "export-failed"), job
        second = shared.call("backups/create", {"vid": guest.vid, "creatorID": ALICE})
    assert (second["mode"], second["reason"]) == ("full", "nothing recorded what was written since the last backup")
    held = content(store_of(shared, guest.vid, "vault") / second["backup"] / "data.qcow2", tmp_path)
    assert held[:area] == bytes([2]) * area
    third = guest.back_up()
    assert third.answer["mode"] == "incremental"
    assert [one["backup"] for one in backups_of(shared, guest.vid)] == [first.uid, second["backup"], third.uid]
    guest.power_off()
    for copy in (first, third):
        assert content(copy.image, tmp_path) == copy.holds
    assert volume_content(shared, guest.vid, tmp_path) == guest.believes
    assert_nothing_left(shared, guest.vid)


def test_more_clients_than_a_moment_can_be_kept_from(shared: LiveServer) -> None:
    """Those that the daemon serves past the nodes below which the filter goes: no moment, and no wrong one."""
    vid = new_volume(shared, format="qcow2", shareable=True)
    for client in CLIENTS:
        export(shared, vid, client, protocol="nbd")
    status, code, told = refusal(shared, "backups/create", {"vid": vid, "creatorID": ALICE})
    assert (status, code) == (409, "volume-exported")
    assert "more than 8" in told
    unexport(shared, vid, CLIENTS[-1])
    assert_nothing_left(shared, vid)
    session = shared.call("backups/open", {"vid": vid, "creatorID": ALICE})
    assert refused_export(shared, vid, CLIENTS[-1], protocol="nbd")[1] == "export-failed"
    shared.call("backups/close", {"session": session["session"], "creatorID": ALICE})
    export(shared, vid, CLIENTS[-1], protocol="nbd")


def test_snapshots_and_increments_of_one_volume(shared: LiveServer, tmp_path: Path) -> None:
    guest = Guest(shared, format="qcow2").write(0, MIB, 1)
    copies = [guest.back_up()]
    guest.power_on().write(MIB, MIB, 2)
    before = snapshots.take(shared, guest.vid)
    then = bytes(guest.believes)
    guest.write(0, 64 * KIB, 3)
    copies.append(guest.back_up())
    guest.write(2 * MIB, 64 * KIB, 4).power_off()
    other = snapshots.take(shared, guest.vid)
    guest.write(3 * MIB, 64 * KIB, 5)
    copies.append(guest.back_up())
    snapshots.delete(shared, guest.vid, other)
    guest.write(4 * MIB, 64 * KIB, 6)
    copies.append(guest.back_up())
    # What a backup is put over is lost, so it must not take snapshots along.
    over = {"backup": copies[0].uid, "creatorID": ALICE, "vid": guest.vid}
    assert refusal(shared, "backups/restore", over)[:2] == (409, "has-snapshots")
    assert volume_content(shared, guest.vid, tmp_path) == guest.believes
    # What is gone back to was written without any bitmap.
    snapshots.restore(shared, guest.vid, before)
    guest.believes[:] = then
    assert bitmaps(shared, guest.vid) == []
    guest.write(5 * MIB, 64 * KIB, 7)
    copies.append(guest.back_up())
    guest.write(6 * MIB, 64 * KIB, 8)
    copies.append(guest.back_up())
    modes = ["full", "incremental", "incremental", "incremental", "full", "incremental"]
    assert [copy.answer["mode"] for copy in copies] == modes
    assert_right(copies, tmp_path)
    snapshots.delete(shared, guest.vid, before)
    shared.call("backups/restore", over)
    assert volume_content(shared, guest.vid, tmp_path) == copies[0].holds
    snapshots.assert_sound(shared, guest.vid)


def test_snapshots_and_backups_of_a_raw_lun(shared: LiveServer, tmp_path: Path) -> None:
    """Both lead the LUN to the daemon; a backup leads it back, and snapshots in files survive what is put over."""
    guest = Guest(shared).power_on("iscsi").write(0, MIB, 1)
    copies = []
    for number in (2, 3):
        before = snapshots.take(shared, guest.vid)
        then = bytes(guest.believes)
        guest.write(number * MIB, MIB, number)
        copies.append(guest.back_up())
        guest.write(0, 64 * KIB, number + 10)
    guest.power_off()
    assert volume_content(shared, guest.vid, tmp_path) == guest.believes
    assert_right(copies, tmp_path)
    shared.call("backups/restore", {"backup": copies[0].uid, "creatorID": ALICE, "vid": guest.vid})
    assert volume_content(shared, guest.vid, tmp_path) == copies[0].holds
    snapshots.restore(shared, guest.vid, before)
    assert volume_content(shared, guest.vid, tmp_path) == then
    assert not volume_pids(shared, guest.vid)


def test_a_place_that_can_only_be_read(tmp_path: Path) -> None:
    """A disk of backups that is mounted read-only: they are restored from there, and new ones go elsewhere."""
    vault = make_location(tmp_path / "mnt", "vault")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", str(vault)], check=True)
    try:
        make_location(tmp_path / "mnt", "vault")
        make_location(tmp_path / "mnt")
        with live_server(tmp_path, "--bin-retention", "0") as server:
            guest = Guest(server, format="qcow2").write(0, MIB, 1)
            copies = [guest.back_up(), guest.write(0, 64 * KIB, 2).back_up()]
            assert {copy.answer["location"] for copy in copies} == {"vault"}
            server.stop()
            subprocess.run(["mount", "-o", "remount,ro", str(vault)], check=True)
            server.start()
            assert_right(copies, tmp_path)
            server.call("backups/verify", {"backup": copies[1].uid, "creatorID": ALICE})
            body = {"backup": copies[1].uid, "creatorID": ALICE}
            assert refusal(server, "backups/delete", body)[:2] == (503, "location-unavailable")
            guest.write(MIB, 64 * KIB, 3)
            last = guest.back_up()
            assert (last.answer["mode"], last.answer["location"]) == ("full", "disk")
            assert "nothing can be written in location vault" in last.answer["reason"]
            last.assert_right(tmp_path)
            assert "not tidied" not in server.log()
    finally:
        subprocess.run(["umount", "-l", str(vault)], check=True)


def test_linked_clones(shared: LiveServer, tmp_path: Path) -> None:
    parent = Guest(shared, format="qcow2").write(0, MIB, 1)
    of_parent = parent.back_up()
    clone = Guest.of(shared.call("clone", {"volume_id": parent.vid, "creatorID": ALICE, "linked": True}), parent)
    # What clones stand on stays what it is.
    over = {"backup": of_parent.uid, "creatorID": ALICE, "vid": parent.vid}
    assert refusal(shared, "backups/restore", over)[:2] == (409, "has-clones")
    assert parent.back_up().answer["mode"] == "full", "its image is open read-only, and records nothing"
    # A backup of a clone stands on nothing but backups.
    clone.power_on().write(MIB, MIB, 2)
    copies = [clone.back_up()]
    clone.write(0, 64 * KIB, 3)
    copies.append(clone.back_up())
    clone.power_off()
    assert [copy.answer["mode"] for copy in copies] == ["full", "incremental"]
    assert_right(copies, tmp_path)
    assert shared.info(clone.vid)["linked"]
    shared.call("backups/restore", {"backup": copies[1].uid, "creatorID": ALICE, "vid": clone.vid})
    assert "linked" not in shared.info(clone.vid)
    shared.call("backups/restore", over)
    for guest in (parent, clone):
        assert volume_content(shared, guest.vid, tmp_path) == guest.believes
        image = shared.directory(guest.vid) / "data.qcow2"
        said = subprocess.run(["qemu-img", "info", str(image)], check=True, capture_output=True, text=True).stdout
        assert "backing file" not in said
    with client_of(export(shared, clone.vid, protocol="local")) as client:
        assert client.reads(0, 64 * KIB, 3)
