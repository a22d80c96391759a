"""SIGKILL of the real server at every named step of a backup, its end, its deletion, its restoring."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.backing_up import (
    KIB,
    Copy,
    Guest,
    assert_nothing_left,
    backups_of,
    bitmaps,
    store_of,
    volume_content,
)
from tests.clients import eventually
from tests.e2e.invariants import assert_clean
from tests.exporting import MIB, volume_pids, wait_healthy
from tests.live import ALICE, LiveServer, live_server

QUICK = ("--heartbeat", "0.3", "--lease", "2", "--sweep-interval", "0.5", "--bin-retention", "0")
CREATE = (
    "backup.locked",
    "backup.kept-open",
    "backup.filter-made",
    "backup.frozen",
    "backup.directory-made",
    "backup.copied",
    "backup.synced",
    "backup.published",
    "backup.thawed",
)
DELETE = (
    "backup.deleted",
    "backup.merged",
    "backup.merge-recorded",
    "backup.image-taken",
    "backup.removed",
)
RESTORE_NEW = ("backup-restore.reserved", "backup-restore.copied")
RESTORE_OVER = (
    "backup-restore.locked",
    "backup-restore.copied",
    "backup-restore.renamed-over",
    "backup-restore.recorded",
)
SESSION = ("backup-session.locked", "backup-session.served", "backup-session.said-saved")
# Without an export the recovery finds the daemon gone; where that makes no difference, one of the two is enough.
OFF = ("backup.kept-open", "backup.frozen", "backup.copied", "backup.published")
CREATED = (*((step, "on") for step in CREATE), *((step, "off") for step in OFF))
# After these the recovery is cut off too, at its own step, and is begun once more.
AGAIN = {
    "backup.copied": "backup.resolved",
    "backup-restore.copied": "backup-restore.resolved",
    "backup-session.served": "backup-session.resolved",
}
ELSEWHERE = ("replace.", "lock.", "export.", "create.", "destroy.", "purge.")


Death = tuple[str, str, dict[str, Any]]  #: at which step, of which call, with what


@dataclass
class Crashed:
    """A server that died at one step after the other, each time at work on another volume."""

    server: LiveServer
    guests: dict[str, Guest] = field(default_factory=dict)
    copies: dict[str, list[Copy]] = field(default_factory=dict)  #: what there was before
    sessions: dict[str, str] = field(default_factory=dict)  #: the last one that was closed as saved

    def new(self, key: str) -> Guest:
        self.guests[key] = guest = Guest(self.server, format="qcow2").write(0, 2 * MIB, 1)
        return guest

    def of(self, key: str) -> tuple[LiveServer, Guest, list[Copy]]:
        return self.server, self.guests[key], self.copies.get(key, [])


@pytest.fixture(scope="module")
def crashed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Crashed]:
    """All volumes are made, then one crash follows the other: each start is the recovery from the one before."""
    with live_server(tmp_path_factory.mktemp("crashed"), *QUICK) as server:
        one = Crashed(server)
        for step, call, body in [*_creates(one), *_restores(one), *_sessions(one)]:
            if step == "backup.thawed" and server.process is None:  # recovery from the one before reaches it as well
                server.start()
                eventually(lambda: not any(server.root.glob("*/*/*.ignore")))
            opened = die_at(server, step, call, body).get("session")
            if opened:
                one.sessions[body["vid"]] = opened
            if step in AGAIN and list(server.directory(body.get("vid", "")).glob("*.ignore")):
                server.start({"ELEMENTO_STORAGE_FAULTPOINT": f"kill:{AGAIN[step]}"}, wait=False)
                server.wait_dead()
        server.start()
        yield one
        for guest in one.guests.values():
            guest.let_go()


def _creates(one: Crashed) -> Iterator[Death]:
    for step, state in CREATED:
        guest = one.new(f"{step} {state}")
        one.copies[f"{step} {state}"] = [guest.back_up()]
        if state == "on":
            guest.power_on()
        guest.write(0, 64 * KIB, 2)
        yield step, "backups/create", {"vid": guest.vid, "creatorID": ALICE}


def _restores(one: Crashed) -> Iterator[Death]:
    for step in RESTORE_NEW:
        copy = one.new(f"{step} new").back_up()
        one.copies[f"{step} new"] = [copy]
        yield step, "backups/restore", {"backup": copy.uid, "creatorID": ALICE}
    for step in RESTORE_OVER:
        guest = one.new(f"{step} over")
        copy = guest.back_up()
        one.copies[f"{step} over"] = [copy]
        guest.server.call("update/resize", {"vid": guest.vid, "creatorID": ALICE, "size": 9 * MIB / 1e9})
        guest.believes += bytes(MIB)
        guest.write(0, 2 * MIB, 2)
        yield step, "backups/restore", {"backup": copy.uid, "creatorID": ALICE, "vid": guest.vid}


def _sessions(one: Crashed) -> Iterator[Death]:
    for step in SESSION:
        guest = one.new(step).power_on()
        body = {"vid": guest.vid, "creatorID": ALICE}
        first = guest.server.call("backups/open", body)["session"]
        guest.server.call("backups/close", {"session": first, "creatorID": ALICE, "saved": True})
        guest.write(MIB, 64 * KIB, 2)
        one.sessions[guest.vid] = first
        yield step, "backups/open", {**body, "since": first}


def die_at(server: LiveServer, step: str, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """Restart the server so that it dies at the step, and make the call; what it answered, if it did."""
    answer: dict[str, Any] = {}
    if server.process is not None:
        server.stop()
    server.start({"ELEMENTO_STORAGE_FAULTPOINT": f"kill:{step}"})
    with contextlib.suppress(httpx.HTTPError):
        # What goes on after the answer, or needs another call, is the last step of some.
        answer = server.http.post(path, json=body).json()
        if step == "backup-session.said-saved":
            server.http.post("backups/close", json={**answer, "creatorID": ALICE, "saved": True})
        elif step not in DELETE:
            pytest.fail(f"{step} was not reached: {answer}")
    server.wait_dead()
    return answer


def made(server: LiveServer, guest: Guest, holds: bytes, known: list[Copy]) -> list[Copy]:
    """Whatever there is by now: what was made without an answer counts as well."""
    uids = {copy.uid for copy in known}
    new = [one for one in backups_of(server, guest.vid) if one["backup"] not in uids]
    assert len(new) <= 1
    return [*known, *(Copy(guest, one, holds) for one in new)]


@pytest.mark.parametrize(("step", "state"), CREATED)
def test_kill_while_backing_up(crashed: Crashed, tmp_path: Path, step: str, state: str) -> None:
    server, guest, copies = crashed.of(f"{step} {state}")
    if state == "on":
        wait_healthy(server, guest.vid)
        assert guest.client.reads(0, 64 * KIB, 2)
    assert_nothing_left(server, guest.vid)
    copies = made(server, guest, bytes(guest.believes), copies)
    guest.write(64 * KIB, 64 * KIB, 3)
    copies.append(guest.back_up())
    # The storage daemon lived on, or ended in good order: nothing that was recorded is lost.
    assert copies[-1].answer["mode"] == "incremental"
    if state == "on":
        guest.power_off()
    assert len(bitmaps(server, guest.vid)) == 1
    assert volume_content(server, guest.vid, tmp_path) == guest.believes
    for copy in copies:
        copy.assert_holds(tmp_path)
    eventually(lambda: not volume_pids(server, guest.vid))


@pytest.mark.parametrize("step", RESTORE_NEW)
def test_kill_while_restoring(crashed: Crashed, tmp_path: Path, step: str) -> None:
    server, guest, [copy] = crashed.of(f"{step} new")
    assert set(server.listed()) == {one.vid for one in crashed.guests.values()}
    eventually(lambda: not any((server.root / "disk" / ".elemento" / "staging").iterdir()))
    assert volume_content(server, guest.vid, tmp_path) == guest.believes
    copy.assert_right(tmp_path)


@pytest.mark.parametrize("step", RESTORE_OVER)
def test_kill_while_restoring_over(crashed: Crashed, tmp_path: Path, step: str) -> None:
    server, guest, [copy] = crashed.of(f"{step} over")
    eventually(lambda: "locked" not in server.info(guest.vid))
    is_restored = step in ("backup-restore.renamed-over", "backup-restore.recorded")
    assert volume_content(server, guest.vid, tmp_path) == (copy.holds if is_restored else guest.believes)
    assert_nothing_left(server, guest.vid)
    server.call("backups/restore", {"backup": copy.uid, "creatorID": ALICE, "vid": guest.vid})
    assert volume_content(server, guest.vid, tmp_path) == copy.holds


@pytest.mark.parametrize("step", SESSION)
def test_kill_of_a_session(crashed: Crashed, tmp_path: Path, step: str) -> None:
    server, guest, _ = crashed.of(step)
    assert_nothing_left(server, guest.vid)
    guest.write(2 * MIB, 64 * KIB, 3)
    since = crashed.sessions[guest.vid]
    again = server.call("backups/open", {"vid": guest.vid, "creatorID": ALICE, "since": since})
    assert again["context"] == f"qemu:dirty-bitmap:pull-{since}"
    server.call("backups/close", {"session": again["session"], "creatorID": ALICE})
    guest.power_off()
    assert volume_content(server, guest.vid, tmp_path) == guest.believes


@pytest.mark.parametrize("step", DELETE)
def test_kill_while_deleting(crashed: Crashed, tmp_path: Path, step: str) -> None:
    """These reach their steps in the background, and recovery does again: so each has the server to itself."""
    server, guest = crashed.server, crashed.new(step)
    copies = [guest.back_up()]
    for number in (2, 3):
        guest.write(number * MIB, 256 * KIB, number)
        copies.append(guest.back_up())
    gone = copies.pop(0)
    directory = gone.directory
    die_at(server, step, "backups/delete", {"backup": gone.uid, "creatorID": ALICE})
    server.start()
    for copy in copies:
        copy.assert_holds(tmp_path)
    eventually(lambda: not directory.exists())
    for copy in copies:
        copy.assert_holds(tmp_path)
        server.call("backups/verify", {"backup": copy.uid, "creatorID": ALICE})
    assert [one["mode"] for one in backups_of(server, guest.vid)] == ["full", "incremental"]
    assert sorted(one.name for one in store_of(server, guest.vid).iterdir()) == sorted(
        ["lock", *(copy.uid for copy in copies)]
    )


def test_nothing_is_left_of_any_of_them(crashed: Crashed) -> None:
    assert_clean(crashed.server)


def test_every_step_is_killed(tmp_path: Path) -> None:
    """The tables above name every step that is reached: a new one without a case fails here."""
    trace = tmp_path / "trace"
    with live_server(tmp_path, *QUICK, env={"ELEMENTO_STORAGE_FAULTPOINT": f"trace:{trace}"}) as server:
        guest = Guest(server, format="qcow2")
        trace.write_text("")
        copies = [guest.write(0, MIB, number).back_up() for number in (1, 2)]
        server.call("backups/delete", {"backup": copies[0].uid, "creatorID": ALICE})
        eventually(lambda: [one["mode"] for one in backups_of(server, guest.vid)] == ["full"])
        copies[1].assert_right(tmp_path)
        body = {"backup": copies[1].uid, "creatorID": ALICE, "vid": guest.vid}
        server.call("backups/restore", body)
        session = server.call("backups/open", {"vid": guest.vid, "creatorID": ALICE})["session"]
        server.call("backups/close", {"session": session, "creatorID": ALICE, "saved": True})
        eventually(lambda: "backup.removed" in trace.read_text())
    reached = {one for one in trace.read_text().split() if not one.startswith(ELSEWHERE)}
    assert reached == {*CREATE, *DELETE, *RESTORE_NEW, *RESTORE_OVER, *SESSION}
