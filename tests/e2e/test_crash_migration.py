"""SIGKILL of the real server at every named step of a live migration, then a restart, then a look at who has what.

A prepare that nobody was told of is taken back, or completed by asking again; what was decided is carried on with. No
volume is ever without a client, and once a conclude is acknowledged the old host is out.
"""

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.clients import eventually
from tests.e2e.invariants import assert_clean
from tests.e2e.moving import end, export, exported, locks, marker_path, markers, move, prepare, reachable
from tests.live import BOB, CAROL, LiveServer, live_server

OFTEN = ("--heartbeat", "0.5")
KINDS = (("raw", "iscsi"), ("qcow2", "nbd"))
ENDS = {"revert": ("revert", "reverted", BOB), "conclude": ("conclude", "concluded", CAROL)}


@dataclass(frozen=True)
class Case:
    """Where the server dies: at the ``nth`` arrival at a step, moving so many volumes."""

    step: str
    nth: int = 1
    volumes: int = 1

    @property
    def fault(self) -> dict[str, str]:
        """The environment of a server that dies there."""
        return {"ELEMENTO_STORAGE_FAULTPOINT": f"kill:{self.step}:{self.nth}"}

    def __str__(self) -> str:
        return f"{self.step}-{self.nth}-of-{self.volumes}"


# The source's exports and the prepare before an end have passed some of the steps too.
UNDECIDED = (
    Case("lock.written"),
    Case("livemigration.locked"),
    Case("export.recorded", 2),
    Case("export.served", 2),
    Case("livemigration.added"),
    Case("livemigration.locked", 1, 2),
    Case("livemigration.added", 1, 2),
    Case("livemigration.locked", 2, 2),
    Case("export.recorded", 4, 2),
    Case("livemigration.added", 2, 2),
)
PREPARED = (Case("lock.rewritten"), Case("livemigration.said-prepared"), Case("livemigration.said-prepared", 1, 2))
PER_VOLUME = ("export.erased", "livemigration.removed", "lock.removed", "livemigration.unlocked")
DECIDED = {
    how: (
        Case("lock.rewritten", 2),
        Case(f"livemigration.said-{doing}"),
        *(Case(step) for step in PER_VOLUME),
        Case(f"livemigration.said-{doing}", 1, 2),
        *(Case(step, nth, 2) for nth in (1, 2) for step in ("livemigration.removed", "livemigration.unlocked")),
    )
    for how, doing in (("revert", "reverting"), ("conclude", "concluding"))
}
ORDINARY = (Case("export.recorded", 3), Case("export.recorded", 6, 2))  # the destination's export after a conclude
ENDED = [(how, case) for how, cases in DECIDED.items() for case in cases] + [("conclude", case) for case in ORDINARY]


def crash(server: LiveServer, call: str, body: dict[str, Any]) -> None:
    """A call that its server dies of."""
    with contextlib.suppress(httpx.HTTPError):
        response = server.post(f"livemigration/{call}", body)
        pytest.fail(f"the step was not reached: {response.status_code} {response.text}")
    server.wait_dead()


def sources(server: LiveServer, count: int) -> list[str]:
    """Volumes that BOB's host has, in the order in which they are prepared."""
    return sorted(exported(server, *kind) for kind in KINDS[:count])


def is_settled(server: LiveServer, vids: list[str]) -> bool:
    """Whether the migration is over; at no time anybody may have lost a volume."""
    for vid in vids:
        assert markers(server, vid), "nobody is to have the volume"
    return not any(locks(server, vid) for vid in vids)


def require_clients(server: LiveServer, vids: list[str], *clients: str) -> None:
    """These and nobody else have the volumes: on disk, as the API tells, and for who tries."""
    told = [(one["vid"], one["client_uid"]) for one in server.call("exports")["exports"]]
    assert sorted(told) == sorted((vid, client) for vid in vids for client in clients)
    for vid in vids:
        assert set(markers(server, vid)) == set(clients)


@pytest.mark.parametrize("case", UNDECIDED, ids=str)
def test_a_prepare_that_nobody_was_told_of_is_taken_back(tmp_path: Path, case: Case) -> None:
    with live_server(tmp_path, *OFTEN, env=case.fault) as server:
        vids = sources(server, case.volumes)
        before = [marker_path(server, vid, BOB).read_bytes() for vid in vids]
        answers = [export(server, vid) for vid in vids]
        crash(server, "prepare", move(*vids))
        server.start()
        eventually(lambda: is_settled(server, vids))
        require_clients(server, vids, BOB)
        assert [marker_path(server, vid, BOB).read_bytes() for vid in vids] == before
        assert_clean(server)
        assert [export(server, vid) for vid in vids] == answers
        assert all(reachable(one) for one in answers)
        made = prepare(server, *vids)["exports"]
        assert all(reachable(one) for one in (*answers, *made))


@pytest.mark.parametrize("case", [UNDECIDED[4], UNDECIDED[6], UNDECIDED[9], *PREPARED], ids=str)
def test_a_prepare_is_completed_by_asking_again(tmp_path: Path, case: Case) -> None:
    with live_server(tmp_path, *OFTEN, env=case.fault) as server:
        vids = sources(server, case.volumes)
        answers = [export(server, vid) for vid in vids]
        crash(server, "prepare", move(*vids))
        server.start()
        if case in PREPARED:
            (found,) = server.call("livemigration")
            assert found["state"] == "prepared"
        answer = prepare(server, *vids)
        require_clients(server, vids, BOB, CAROL)
        assert all(reachable(one) for one in (*answers, *answer["exports"]))
        assert prepare(server, *vids) == answer
        end(server, "conclude", vids[0])
        require_clients(server, vids, CAROL)
        assert not any(reachable(one) for one in answers)
        assert_clean(server)


@pytest.mark.parametrize(("how", "case"), ENDED, ids=str)
def test_what_was_decided_is_carried_on_with(tmp_path: Path, how: str, case: Case) -> None:
    call, state, stays = ENDS[how]
    other = {"revert": "conclude", "conclude": "revert"}[how]
    with live_server(tmp_path, *OFTEN, env=case.fault) as server:
        vids = sources(server, case.volumes)
        before = [marker_path(server, vid, BOB).read_bytes() for vid in vids]
        old = [export(server, vid) for vid in vids]
        new = prepare(server, *vids)["exports"]
        crash(server, call, {"volume_id": vids[-1]})
        server.start()
        if case.volumes == 1:  # else the call comes again, by the volume that may be done already
            eventually(lambda: is_settled(server, vids))
        assert end(server, call, vids[-1])["state"] == state
        assert is_settled(server, vids)
        require_clients(server, vids, stays)
        assert [reachable(one) for one in (*old, *new)] == [stays == BOB] * len(old) + [stays == CAROL] * len(new)
        assert server.post(f"livemigration/{other}", {"volume_id": vids[0]}).status_code == 409
        if how == "revert":
            assert [marker_path(server, vid, BOB).read_bytes() for vid in vids] == before
        else:
            assert [markers(server, vid)[CAROL]["migration"] for vid in vids] == [None] * len(vids)
        assert_clean(server)


@pytest.mark.parametrize(
    ("call", "case", "again"),
    [
        ("prepare", Case("livemigration.locked", 2, 2), "livemigration.removed"),
        ("prepare", Case("livemigration.added", 2, 2), "export.erased"),
        ("prepare", Case("livemigration.added", 2, 2), "livemigration.unlocked"),
        ("revert", Case("livemigration.said-reverting", 1, 2), "lock.removed"),
        ("conclude", Case("livemigration.said-concluding", 1, 2), "export.erased"),
        ("conclude", Case("livemigration.removed", 1, 2), "livemigration.removed"),
        ("conclude", Case("livemigration.unlocked", 1, 2), "livemigration.unlocked"),
    ],
    ids=str,
)
def test_killed_again_while_carrying_on(tmp_path: Path, call: str, case: Case, again: str) -> None:
    with live_server(tmp_path, *OFTEN, env=case.fault) as server:
        vids = sources(server, case.volumes)
        if call != "prepare":
            prepare(server, *vids)
        crash(server, call, move(*vids) if call == "prepare" else {"volume_id": vids[0]})
        server.start(Case(again).fault, wait=False)
        server.wait_dead()
        server.start()
        eventually(lambda: is_settled(server, vids))
        require_clients(server, vids, CAROL if call == "conclude" else BOB)
        assert_clean(server)


def test_every_step_is_killed(tmp_path: Path) -> None:
    """The tables above name every step of a migration: a new one without a case fails here."""
    trace = tmp_path / "trace"
    with live_server(tmp_path, env={"ELEMENTO_STORAGE_FAULTPOINT": f"trace:{trace}"}) as server:
        vids = sources(server, 2)
        trace.write_text("")
        for how in ENDS:
            prepare(server, *vids)
            end(server, how, vids[0])
    killed = {case.step for case in (*UNDECIDED, *PREPARED, *(case for _, case in ENDED))}
    # Of every export and of every small file.
    elsewhere = {"export.attached", "export.target-made", "export.withdrawn", "replace.written", "replace.renamed"}
    assert set(trace.read_text().split()) - killed - elsewhere == set()
