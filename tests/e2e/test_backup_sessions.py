"""Other backup programs: a moment and its dirty bitmap over NBD, as nbdinfo, nbdcopy and qemu-img see them."""

import contextlib
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.backing_up import KIB, Guest, assert_nothing_left, assert_right, volume_content
from tests.clients import ClientFailed, QemuIo, eventually
from tests.exporting import MIB, refusal, volume_pids
from tests.live import ALICE, BOB, LiveServer, live_server, make_location


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    with live_server(tmp_path_factory.mktemp("sessions"), "--sweep-interval", "0.5") as one:
        yield one


def open_session(guest: Guest, **more: Any) -> dict[str, Any]:
    body = {"vid": guest.vid, "creatorID": ALICE, **more}
    answer: dict[str, Any] = guest.server.call("backups/open", body)
    return answer


def close(guest: Guest, session: dict[str, Any], *, saved: bool) -> None:
    body = {"session": session["session"], "creatorID": ALICE, "saved": saved}
    guest.server.call("backups/close", body)


def pull(session: dict[str, Any], scratch: Path) -> bytes:
    """All of it, by libnbd's own program."""
    target = scratch / "pulled"
    subprocess.run(["nbdcopy", session["uri"], str(target)], check=True, timeout=60)
    return target.read_bytes()


def changed(session: dict[str, Any]) -> list[tuple[int, int]]:
    """Ranges that changed, by libnbd's own program."""
    argv = ["nbdinfo", "--json", f"--map={session['context']}", session["uri"]]
    said = subprocess.run(argv, check=True, capture_output=True, timeout=60).stdout
    return [(one["offset"], one["length"]) for one in json.loads(said) if one["type"] == 1]


def pull_changes(session: dict[str, Any], before: bytes, scratch: Path) -> bytes:
    """What an incremental backup makes of the one before."""
    after, now = bytearray(before), pull(session, scratch)
    for offset, length in changed(session):
        after[offset : offset + length] = now[offset : offset + length]
    return bytes(after)


@pytest.mark.parametrize("protocol", ["local", "nbd", "iscsi"])
def test_chain_of_sessions(shared: LiveServer, tmp_path: Path, protocol: str) -> None:
    guest = Guest(shared, format="qcow2").power_on(protocol).write(0, 2 * MIB, 1)
    first = open_session(guest)
    held = bytes(guest.believes)
    guest.write(0, MIB, 2)
    saved = pull(first, tmp_path)
    assert saved == held, "the moment is that of the call"
    assert first["context"] is None
    close(guest, first, saved=True)
    guest.write(5 * MIB, 10 * KIB, 3)
    second = open_session(guest, since=first["session"])
    held = bytes(guest.believes)
    guest.write(6 * MIB, MIB, 4)
    assert changed(second) == [(0, MIB), (5 * MIB, 64 * KIB)]
    where = urlsplit(second["uri"])
    server = (
        f"server.type=unix,server.path={where.query.removeprefix('socket=')}"
        if where.scheme == "nbd+unix"
        else f"server.type=inet,server.host={where.hostname},server.port={where.port}"
    )
    node = f"driver=nbd,export={second['session']},x-dirty-bitmap={second['context']},{server}"
    argv = ["qemu-img", "map", "--output=json", "--image-opts", node]
    mapped = json.loads(subprocess.run(argv, check=True, capture_output=True).stdout)
    dirty = [(one["start"], one["length"]) for one in mapped if not one["data"]]
    assert dirty == changed(second)
    saved = pull_changes(second, saved, tmp_path)
    assert saved == held
    # It was not saved, says the program: the next one has it all once more.
    close(guest, second, saved=False)
    third = open_session(guest, since=first["session"])
    assert changed(third) == [(0, MIB), (5 * MIB, 64 * KIB), (6 * MIB, MIB)]
    assert pull_changes(third, saved, tmp_path) == guest.believes
    close(guest, third, saved=True)
    # The one before is forgotten then.
    body = {"vid": guest.vid, "creatorID": ALICE, "since": first["session"]}
    assert refusal(shared, "backups/open", body)[:2] == (409, "no-increment")
    guest.power_off()
    assert_nothing_left(shared, guest.vid)
    assert not volume_pids(shared, guest.vid)


def test_sessions_and_backups_do_not_disturb_each_other(shared: LiveServer, tmp_path: Path) -> None:
    guest = Guest(shared, format="qcow2").power_on().write(0, MIB, 1)
    copies = [guest.back_up()]
    session = open_session(guest)
    saved = pull(session, tmp_path)
    close(guest, session, saved=True)
    guest.write(0, 64 * KIB, 2)
    copies.append(guest.back_up())
    guest.write(MIB, 64 * KIB, 3)
    later = open_session(guest, since=session["session"])
    assert pull_changes(later, saved, tmp_path) == guest.believes
    close(guest, later, saved=True)
    copies.append(guest.back_up())
    guest.power_off()
    assert [copy.answer["mode"] for copy in copies] == ["full", "incremental", "incremental"]
    assert_right(copies, tmp_path)


def test_nothing_can_be_written(shared: LiveServer) -> None:
    guest = Guest(shared, format="qcow2").write(0, MIB, 1)
    session = open_session(guest)
    argv = ["qemu-io", "-f", "raw", "-c", "write 0 4k", session["uri"]]
    assert subprocess.run(argv, check=False, capture_output=True).returncode
    close(guest, session, saved=False)


@pytest.mark.parametrize(("before", "after"), [("nbd", "iscsi"), ("iscsi", "local"), ("local", "iscsi")])
def test_exports_change_threads_during_a_session(shared: LiveServer, tmp_path: Path, before: str, after: str) -> None:
    """The monitor's thread serves LUNs, another one NBD, and QEMU hangs where a LUN is in the wrong one."""
    guest = Guest(shared, format="qcow2").power_on(before).write(0, MIB, 1)
    session = open_session(guest)
    moment = bytes(guest.believes)
    with QemuIo.on_nbd(session["uri"]) if before != "nbd" else contextlib.nullcontext():
        guest.write(0, 64 * KIB, 2).power_off()
        guest.power_on(after).write(MIB, MIB, 3)
        if before != "nbd":
            assert pull(session, tmp_path) == moment
        close(guest, session, saved=before != "nbd")
    guest.write(2 * MIB, MIB, 4)
    copies = [guest.back_up()]
    guest.write(3 * MIB, 64 * KIB, 5)
    copies.append(guest.back_up())
    guest.write(4 * MIB, MIB, 6).power_off()
    assert volume_content(shared, guest.vid, tmp_path) == guest.believes
    assert_right(copies, tmp_path)
    assert_nothing_left(shared, guest.vid)


def test_dead_daemon_ends_a_session(shared: LiveServer) -> None:
    guest = Guest(shared, format="qcow2").power_on().write(0, MIB, 1)
    first = open_session(guest)
    close(guest, first, saved=True)
    second = open_session(guest, since=first["session"])
    shared.kill_daemons(guest.vid)
    eventually(lambda: guest.client.reads(0, KIB, 1))
    body = {"session": second["session"], "creatorID": ALICE, "saved": True}
    assert refusal(shared, "backups/close", body)[:2] == (409, "backup-session-lost")
    body = {"vid": guest.vid, "creatorID": ALICE, "since": first["session"]}
    assert refusal(shared, "backups/open", body)[:2] == (409, "no-increment")
    guest.power_off()
    assert_nothing_left(shared, guest.vid)


def test_restart_ends_a_session_and_loses_nothing(running: LiveServer, tmp_path: Path) -> None:
    guest = Guest(running, format="qcow2").power_on().write(0, MIB, 1)
    first = open_session(guest)
    saved = pull(first, tmp_path)
    close(guest, first, saved=True)
    guest.write(0, 64 * KIB, 2)
    open_session(guest, since=first["session"])
    guest.write(64 * KIB, 64 * KIB, 3)
    running.kill()
    guest.write(128 * KIB, 64 * KIB, 4)
    running.start()
    eventually(lambda: "locked" not in running.info(guest.vid))
    second = open_session(guest, since=first["session"])
    assert pull_changes(second, saved, tmp_path) == guest.believes
    running.stop()
    running.start()
    assert running.call("backups/sessions") == []
    guest.power_off()
    assert_nothing_left(running, guest.vid)


def test_lease(shared: LiveServer) -> None:
    guest = Guest(shared, format="qcow2").write(0, MIB, 1)
    session = open_session(guest, lease=10)
    of_bob = {"session": session["session"], "creatorID": BOB}
    assert refusal(shared, "backups/renew", of_bob)[:2] == (404, "backup-not-found")
    assert refusal(shared, "backups/close", of_bob)[:2] == (404, "backup-not-found")
    assert shared.call("backups/sessions", {"client_uid": BOB}) == []
    [listed] = shared.call("backups/sessions", {"client_uid": ALICE})
    renewed = shared.call("backups/renew", {"session": session["session"], "creatorID": ALICE, "lease": 100})
    assert renewed["ends"] > listed["ends"]
    close(guest, session, saved=True)
    assert_nothing_left(shared, guest.vid)


def test_lease_that_is_over(shared: LiveServer, tmp_path: Path) -> None:
    """A program that died without a word: its session ends by itself, as one that was not saved."""
    guest = Guest(shared, format="qcow2").power_on().write(0, MIB, 1)
    first = open_session(guest)
    saved = pull(first, tmp_path)
    close(guest, first, saved=True)
    guest.write(0, 64 * KIB, 2)
    forgotten = open_session(guest, since=first["session"], lease=1)
    guest.write(MIB, 64 * KIB, 3)
    with QemuIo.on_nbd(forgotten["uri"]) as reader:
        eventually(lambda: shared.call("backups/sessions") == [])
        assert_nothing_left(shared, guest.vid)
        with pytest.raises(ClientFailed):
            reader.reads(4 * MIB, KIB, 0)
    for path in ("backups/renew", "backups/close"):
        body = {"session": forgotten["session"], "creatorID": ALICE}
        assert refusal(shared, path, body)[:2] == (404, "backup-not-found")
    second = open_session(guest, since=first["session"])
    assert pull_changes(second, saved, tmp_path) == guest.believes
    close(guest, second, saved=True)
    guest.power_off()
    assert not volume_pids(shared, guest.vid)


@pytest.fixture
def small(tmp_path: Path) -> Iterator[LiveServer]:
    """A server whose only location is a file system of 48 MiB."""
    location = make_location(tmp_path / "mnt")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", str(location)], check=True)
    try:
        make_location(tmp_path / "mnt")
        with live_server(tmp_path, "--bin-retention", "0") as one:
            yield one
    finally:
        subprocess.run(["umount", "-l", str(location)], check=True)


def test_full_disk_breaks_the_moment_and_no_guest(small: LiveServer, tmp_path: Path) -> None:
    guest = Guest(small, 24, format="qcow2").power_on().write(0, 24 * MIB, 1)
    session = open_session(guest)
    (small.root / "disk" / "filler").write_bytes(bytes(16 * MIB))
    for offset in range(0, 24 * MIB, MIB):
        guest.write(offset, MIB, 2)
    assert guest.client.reads(0, 24 * MIB, 2)
    argv = ["nbdcopy", session["uri"], str(tmp_path / "pulled")]
    assert subprocess.run(argv, check=False, capture_output=True, timeout=60).returncode
    close(guest, session, saved=False)
    (small.root / "disk" / "filler").unlink()
    status, code, said = refusal(small, "backups/create", {"vid": guest.vid, "creatorID": ALICE})
    assert (status, code) == (507, "no-room"), said
    guest.power_off()
    assert_nothing_left(small, guest.vid)
    assert volume_content(small, guest.vid, tmp_path) == guest.believes
