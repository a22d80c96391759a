"""Backups by schedule: begun by themselves, caught up once, let go, told of when they fail, never made twice."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from elemento_storage.catalog import backup_directory as store
from tests.backing_up import KIB, Copy, Guest, backups_of, store_of
from tests.clients import eventually
from tests.exporting import MIB
from tests.live import ALICE, BOB, LiveServer, live_server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    with live_server(tmp_path_factory.mktemp("schedules"), "--bin-retention", "0", "--sweep-interval", "0.5") as one:
        yield one


def schedule(guest: Guest, **more: Any) -> dict[str, Any]:
    body = {"vid": guest.vid, "creatorID": ALICE, "every": "1h", **more}
    answer: dict[str, Any] = guest.server.call("backups/schedule", body)
    return answer


def states(server: LiveServer, vid: str, **more: Any) -> list[dict[str, Any]]:
    """How the volume's schedule gets on; none, if it has none."""
    return [one for one in server.call("backups/schedules", more) if one["vid"] == vid]


def scheduled(server: LiveServer, vid: str) -> list[dict[str, Any]]:
    return [one for one in backups_of(server, vid) if one["scheduled"]]


def wait_for(server: LiveServer, vid: str, count: int) -> list[dict[str, Any]]:
    """Until there are so many, and nothing is under way."""
    eventually(lambda: len(scheduled(server, vid)) == count and "locked" not in server.info(vid))
    return scheduled(server, vid)


def turn_back(server: LiveServer, vid: str, hours: float) -> None:
    """As if all that was made had been made earlier."""
    for record in store_of(server, vid).glob(f"*/{store.RECORD_FILE}"):
        values = json.loads(record.read_text())
        values["moment"] -= hours * 3600
        record.write_text(json.dumps(values))


def later(server: LiveServer, vid: str, hours: float) -> None:
    """The server was off for so long."""
    server.stop()
    turn_back(server, vid, hours)
    server.start()


def test_schedule(server: LiveServer, tmp_path: Path) -> None:
    guest = Guest(server, format="qcow2").write(0, MIB, 1)
    by_hand = guest.back_up()
    assert schedule(guest, keep=2)["failures"] == 0
    wait_for(server, guest.vid, 1)
    holds = [bytes(guest.believes)]
    # What was missed while the server was off is made up for by one.
    for number in (2, 3):
        guest.write(number * MIB, 64 * KIB, number)
        holds.append(bytes(guest.believes))
        later(server, guest.vid, 5)
        eventually(lambda number=number: len(backups_of(server, guest.vid)) >= min(number, 2) + 1)  # type: ignore[misc]
        eventually(
            lambda: (
                [one["running"] for one in states(server, guest.vid)] == [False]
                and "locked" not in server.info(guest.vid)
            )
        )
    made = wait_for(server, guest.vid, 2)
    [state] = eventually(lambda: states(server, guest.vid, client_uid=ALICE))
    assert state["last"]
    assert state["next"] > state["last"]
    assert [one["mode"] for one in made] == ["incremental", "incremental"]
    for one, held in zip(made, holds[1:], strict=True):
        Copy(guest, one, held).assert_right(tmp_path)
    assert backups_of(server, guest.vid)[0]["backup"] == by_hand.uid, "what was made by hand stays"
    assert states(server, guest.vid, client_uid=BOB) == []
    metrics = server.http.get("metrics").text
    assert f'elemento_storage_backup_failures{{volume="{guest.vid}"}} 0' in metrics
    assert schedule(guest, every="off")["every"] == "off"
    assert states(server, guest.vid) == []
    later(server, guest.vid, 5)
    assert states(server, guest.vid) == []
    assert len(scheduled(server, guest.vid)) == 2


def test_full_ones_in_between(server: LiveServer) -> None:
    guest = Guest(server, format="qcow2").write(0, MIB, 1)
    schedule(guest, full_every=2)
    for count in (1, 2):
        wait_for(server, guest.vid, count)
        later(server, guest.vid, 2)
    modes = [one["mode"] for one in wait_for(server, guest.vid, 3)]
    assert modes == ["full", "incremental", "full"]


def test_failure_is_told_and_the_next_try_succeeds(tmp_path: Path) -> None:
    with live_server(tmp_path, "--backup-location", "vault") as server:
        guest = Guest(server, format="qcow2").write(0, MIB, 1)
        schedule(guest)
        eventually(lambda: server.call("backups/schedules")[0]["failures"])
        [state] = server.call("backups/schedules")
        assert "vault" in state["reason"]
        assert any(guest.vid in problem and "vault" in problem for problem in server.call("health")["problems"])
        assert scheduled(server, guest.vid) == []


def test_two_servers_make_one(server: LiveServer, tmp_path: Path) -> None:
    other = LiveServer(server.root, tmp_path / "other", "--sweep-interval", "0.5")
    other.start()
    try:
        guest = Guest(server, format="qcow2").write(0, MIB, 1)
        schedule(guest)
        wait_for(server, guest.vid, 1)
        eventually(lambda: len(states(other, guest.vid)) == 1, 40)
        time.sleep(1)
        assert len(scheduled(other, guest.vid)) == 1
    finally:
        other.stop()
        other.clean_exports()


def test_schedule_of_a_former_owner_means_nothing(server: LiveServer) -> None:
    guest = Guest(server, format="qcow2").write(0, MIB, 1)
    schedule(guest)
    wait_for(server, guest.vid, 1)
    server.call("transfer", {"vid": guest.vid, "creatorID": ALICE, "newCreatorID": BOB})
    later(server, guest.vid, 5)
    time.sleep(0.5)
    assert states(server, guest.vid) == []
    assert len(scheduled(server, guest.vid)) == 1
