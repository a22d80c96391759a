"""The rules of live migration over HTTP: what is allowed when, by whom, and what is left when it is not."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.clients import SLOW_S, QemuIo, cannot_write, eventually
from tests.e2e.moving import (
    ROUTES,
    clients,
    data_file,
    end,
    export,
    exported,
    locks,
    marker_path,
    markers,
    move,
    prepare,
)
from tests.e2e.test_auth import bearer, make_token
from tests.live import ALICE, BOB, CAROL, LiveServer, live_server

DAVE = "d" * 32


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """One server for all tests that leave it as they found it; it looks after everything twice a second."""
    with live_server(tmp_path_factory.mktemp("migration"), "--heartbeat", "0.5") as server:
        yield server


def refused(response: httpx.Response) -> tuple[int, str]:
    """Status and code of an error."""
    return response.status_code, response.json()["code"]


def test_the_destination_gets_a_second_export(shared: LiveServer) -> None:
    vid = exported(shared)
    source = export(shared, vid)
    answer = prepare(shared, vid, deadline=100)
    assert (answer["state"], answer["volumes"]) == ("prepared", [vid])
    assert (answer["source"], answer["destination"], answer["overdue"]) == (BOB, CAROL, False)
    (made,) = answer["exports"]
    assert (made["client_uid"], made["migration"]) == (CAROL, answer["migration"])
    assert made["credentials"] != source["credentials"]
    assert {who: one["migration"] for who, one in clients(shared, vid).items()} == {
        BOB: None,
        CAROL: answer["migration"],
    }
    assert shared.info(vid)["locked"]["purpose"] == "livemigration"
    assert shared.call("livemigration") == [{**answer, "exports": []}]
    assert prepare(shared, vid, deadline=7) == answer, "again"
    assert shared.call("migration/prepare", move(vid, destination="C" * 32)) == answer, "the published name"
    assert refused(shared.post("livemigration/prepare", move(vid, protocol="nbd"))) == (409, "migration-conflict")
    end(shared, "revert", vid)
    assert shared.call("livemigration") == []


def test_revert_leaves_the_source_as_it_was(shared: LiveServer) -> None:
    vid = exported(shared)
    before, marker = export(shared, vid), marker_path(shared, vid, BOB).read_bytes()
    with QemuIo(before["qemu"]) as guest, QemuIo(prepare(shared, vid)["exports"][0]["qemu"]):
        answer = end(shared, "revert", vid)
        assert answer["state"] == "reverted"
        guest.write(0, 4096, 0x21)
    assert export(shared, vid) == before
    assert marker_path(shared, vid, BOB).read_bytes() == marker
    assert (list(markers(shared, vid)), locks(shared, vid)) == ([BOB], [])
    assert end(shared, "revert", vid) == answer
    assert shared.call("livemigration/revert", {"migration": answer["migration"]}) == answer
    conflict = shared.post("livemigration/conclude", {"migration": answer["migration"]})
    assert refused(conflict) == (409, "migration-conflict")
    assert list(clients(shared, vid)) == [BOB]
    # And it may be tried again.
    assert prepare(shared, vid)["migration"] != answer["migration"]
    end(shared, "conclude", vid)
    assert refused(shared.post("livemigration/conclude", {"migration": answer["migration"]}))[0] == 409


def test_conclude_leaves_an_ordinary_export(shared: LiveServer) -> None:
    vid = exported(shared)
    made = prepare(shared, vid)["exports"][0]
    answer = end(shared, "conclude", vid)
    assert answer["state"] == "concluded"
    assert {who: one["migration"] for who, one in clients(shared, vid).items()} == {CAROL: None}
    assert export(shared, vid, CAROL) == {**made, "migration": None}
    assert locks(shared, vid) == []
    assert end(shared, "conclude", vid) == answer
    assert shared.call("livemigration/conclude", {"migration": answer["migration"]}) == answer
    assert refused(shared.post("livemigration/revert", {"volume_id": vid})) == (409, "migration-conflict")
    # Onward, from the host where it is now.
    prepare(shared, vid, source=CAROL, destination=DAVE)
    end(shared, "conclude", vid)
    shared.call("unexport", {"volume_id": vid, "client_uid": DAVE})
    assert (clients(shared, vid), shared.info(vid)["exported"]) == ({}, False)
    shared.call("destroy", {"volume_id": vid})


@pytest.mark.parametrize("how", ["revert", "conclude"])
def test_what_is_not_there(shared: LiveServer, how: str) -> None:
    vid = exported(shared)
    for body, code in (
        ({"migration": DAVE}, "migration-not-found"),
        ({"volume_id": vid}, "migration-not-found"),
        ({"volume_id": DAVE}, "volume-not-found"),
    ):
        assert refused(shared.post(f"livemigration/{how}", body)) == (404, code)
    answer = prepare(shared, vid)
    another = shared.post(f"livemigration/{how}", {"volume_id": vid, "migration": DAVE})
    assert refused(another) == (404, "migration-not-found")
    assert end(shared, how, vid)["migration"] == answer["migration"]


@pytest.mark.parametrize(
    ("call", "body", "error"),
    [
        ("prepare", {}, "'source'"),
        ("prepare", {"volume_id": DAVE}, "'source'"),
        ("prepare", {"source": BOB, "volume_id": DAVE}, "'destination'"),
        ("prepare", {"source": BOB, "destination": CAROL}, "'volume_id'"),
        ("prepare", {"source": BOB, "destination": CAROL, "volume_ids": []}, None),
        ("prepare", {"source": BOB, "destination": BOB, "volume_id": DAVE}, None),
        ("prepare", {"source": BOB, "destination": BOB.upper(), "volume_id": DAVE}, None),
        ("prepare", {"source": BOB, "destination": "nobody", "volume_id": DAVE}, None),
        ("prepare", {"source": BOB, "destination": CAROL, "volume_id": DAVE, "protocol": "ftp"}, None),
        ("prepare", {"source": BOB, "destination": CAROL, "volume_id": DAVE, "deadline": -1}, None),
        ("revert", {}, "'migration'"),
        ("conclude", {}, "'migration'"),
    ],
)
def test_bad_requests(shared: LiveServer, call: str, body: dict[str, Any], error: str | None) -> None:
    response = shared.post(f"livemigration/{call}", body)
    assert response.status_code == 400, response.text
    said = response.json()["error"]
    assert said.startswith("request was badly formatted. ")
    assert error is None or said == f"request was badly formatted. {error}"


def test_nothing_else_touches_the_volume(shared: LiveServer) -> None:
    vid = exported(shared)
    migration = prepare(shared, vid)["migration"]
    before = {path.name: path.read_bytes() for path in shared.directory(vid).iterdir() if path.suffix != ".img"}
    for call, body in (
        ("destroy", {"volume_id": vid}),
        ("update", {"vid": vid, "creatorID": ALICE, "name": "other"}),
        ("update/resize", {"vid": vid, "creatorID": ALICE, "size": 1}),
        ("update/convert", {"vid": vid, "creatorID": ALICE, "format": "qcow2"}),
        ("transfer", {"vid": vid, "creatorID": ALICE, "newCreatorID": DAVE}),
        ("export", {"volume_id": vid, "client_uid": DAVE}),
        ("export", {"volume_id": vid, "client_uid": CAROL}),
        ("unexport", {"volume_id": vid, "client_uid": BOB}),
        ("unexport", {"volume_id": vid, "client_uid": CAROL}),
    ):
        response = shared.post(call, body)
        assert refused(response) == (423, "volume-locked"), call
        assert response.json()["locked"]["job"] == migration
    for body in (move(vid, destination=DAVE), move(vid, source=DAVE), move(vid, shared.create())):
        assert refused(shared.post("livemigration/prepare", body))[0] in (409, 423), body
    assert vid not in shared.listed()
    assert shared.listed(include_locked=True)[vid]["locked"]["purpose"] == "livemigration"
    assert before == {path.name: path.read_bytes() for path in shared.directory(vid).iterdir() if path.suffix != ".img"}
    end(shared, "revert", vid)


def test_what_cannot_be_prepared(shared: LiveServer) -> None:
    unexported = shared.create()
    assert refused(shared.post("livemigration/prepare", move(unexported))) == (409, "migration-conflict")
    both = exported(shared, shareable=True)
    export(shared, both, CAROL)
    assert refused(shared.post("livemigration/prepare", move(both))) == (409, "migration-conflict")
    assert refused(shared.post("livemigration/prepare", move(DAVE))) == (404, "volume-not-found")
    over_nbd = exported(shared, protocol="nbd")
    initiator = move(over_nbd, initiator="iqn.2020-01.org.example:host")
    assert refused(shared.post("livemigration/prepare", initiator)) == (400, "invalid-value")
    for vid in (unexported, both, over_nbd):
        assert locks(shared, vid) == []
    assert set(clients(shared, both)) == {BOB, CAROL}
    assert list(clients(shared, over_nbd)) == [BOB]


# -- several volumes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["revert", "conclude"])
def test_several_volumes_move_together(shared: LiveServer, how: str) -> None:
    vids = [exported(shared, *route) for route in ROUTES[:3]]
    answer = prepare(shared, *vids)
    assert answer["volumes"] == sorted(vids)
    assert [one["vid"] for one in answer["exports"]] == sorted(vids)
    assert prepare(shared, *reversed(vids)) == answer
    assert refused(shared.post("livemigration/prepare", move(vids[0]))) == (409, "migration-conflict")
    for one in vids:
        assert len(locks(shared, one)) == 1
    # By any of them.
    end(shared, how, max(vids))
    for one in vids:
        assert list(clients(shared, one)) == [CAROL if how == "conclude" else BOB]
        assert locks(shared, one) == []
        assert end(shared, how, one)["migration"] == answer["migration"]


@pytest.mark.parametrize("fault", ["not exported", "locked", "damaged"])
def test_all_of_them_or_none(shared: LiveServer, fault: str) -> None:
    vids = sorted(exported(shared, "qcow2", "nbd") for _ in range(3))
    last = vids[-1]  # the others are prepared by then
    before = [markers(shared, one) for one in vids[:2]]
    lock = shared.directory(last) / f"elemento.backup.{DAVE}.ignore"
    if fault == "not exported":
        shared.call("unexport", {"volume_id": last, "client_uid": BOB})
    elif fault == "locked":
        lock.write_text("by something else\n")
    else:
        with data_file(shared, last).open("r+b") as image:
            image.seek(72)
            image.write(b"\x80")  # a feature that nobody knows
        shared.kill_daemons(last)
    expected = {
        "not exported": (409, "migration-conflict"),
        "locked": (423, "volume-locked"),
        "damaged": (409, "image-damaged"),
    }
    assert refused(shared.post("livemigration/prepare", move(*vids))) == expected[fault]
    lock.unlink(missing_ok=True)
    assert [markers(shared, one) for one in vids[:2]] == before
    assert set(markers(shared, last)) <= {BOB}
    for one in vids:
        assert locks(shared, one) == []
        assert set(clients(shared, one)) <= {BOB}
    assert shared.call("livemigration") == []
    if fault == "damaged":
        with data_file(shared, last).open("r+b") as image:
            image.seek(72)
            image.write(b"\0")
    export(shared, last, protocol="nbd")
    prepare(shared, *vids)
    end(shared, "conclude", last)


# -- ways to the bytes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("image_format", "before", "after"), [("qcow2", "nbd", "local"), ("raw", "local", "nbd")])
def test_the_protocol_may_change_on_the_way(shared: LiveServer, image_format: str, before: str, after: str) -> None:
    vid = exported(shared, image_format, before)
    with QemuIo(export(shared, vid)["qemu"]) as source:
        source.write(0, 65536, 0x31)
        (made,) = prepare(shared, vid, protocol=after)["exports"]
        assert made["protocol"] == after
        with QemuIo(made["qemu"]) as destination:
            assert destination.reads(0, 65536, 0x31)
            source.write(65536, 65536, 0x32)
            assert destination.reads(65536, 65536, 0x32)
            end(shared, "conclude", vid)
            destination.write(131072, 65536, 0x33)
            assert destination.reads(131072, 65536, 0x33)
    assert clients(shared, vid)[CAROL]["protocol"] == after


@pytest.mark.parametrize(("before", "after"), [("nbd", "iscsi"), ("iscsi", "nbd"), ("local", "iscsi")])
def test_the_path_may_not_change_on_the_way(shared: LiveServer, before: str, after: str) -> None:
    vid = exported(shared, protocol=before)
    assert refused(shared.post("livemigration/prepare", move(vid, protocol=after))) == (409, "protocols-exclude")
    assert (locks(shared, vid), list(clients(shared, vid))) == ([], [BOB])


@pytest.mark.parametrize("protocol", ["iscsi", "nbd"])
def test_a_volume_that_is_only_read_stays_so(shared: LiveServer, protocol: str) -> None:
    vid = exported(shared, protocol=protocol, readonly=True)
    (made,) = prepare(shared, vid)["exports"]
    assert made["readonly"]
    with QemuIo(made["qemu"]) as destination:
        assert destination.reads(0, 65536, 0)
    end(shared, "conclude", vid)
    assert clients(shared, vid)[CAROL]["readonly"]


def test_the_destination_may_be_kept_from_writing(shared: LiveServer) -> None:
    vid = exported(shared)
    (made,) = prepare(shared, vid, readonly=True)["exports"]
    assert made["readonly"]
    end(shared, "revert", vid)
    assert not clients(shared, vid)[BOB]["readonly"]


# -- who may ---------------------------------------------------------------------------------------------------


def test_only_the_owner_and_admins_move_a_private_volume(tmp_path: Path) -> None:
    with live_server(tmp_path, "--auth", "tokens") as server:
        alice, bob = (bearer(make_token(server.state_dir, who)) for who in (ALICE, BOB))
        admin = bearer(make_token(server.state_dir, DAVE, "--admin"))
        body = {"name": "disk", "size": 0.001}
        private = server.call("create", {**body, "private": True}, **alice)["vid"]
        public = server.call("create", body, **alice)["vid"]
        for vid in (private, public):
            server.call("export", {"volume_id": vid, "client_uid": ALICE}, **alice)
        answers: dict[str, dict[str, Any]] = {}

        def strangers_cannot() -> None:
            for vid, said in ((private, (404, "volume-not-found")), (public, (403, "not-owner"))):
                named = {"volume_id": vid}
                calls = [("prepare", move(vid, source=ALICE)), ("revert", named), ("conclude", named)]
                if vid in answers:
                    known = {"migration": answers[vid]["migration"]}
                    calls += [("revert", known), ("conclude", known)]
                for call, asked in calls:
                    assert refused(server.post(f"livemigration/{call}", asked, **bob)) == said, call

        strangers_cannot()
        for vid in (private, public):
            answers[vid] = server.call("livemigration/prepare", move(vid, source=ALICE), **alice)
        strangers_cannot()
        assert refused(server.post("livemigration", **bob))[0] == 403
        assert len(server.call("livemigration", **admin)) == 2
        assert server.call("livemigration/conclude", {"volume_id": private}, **admin)["state"] == "concluded"
        assert server.call("livemigration/revert", {"volume_id": public}, **alice)["state"] == "reverted"
        strangers_cannot()


def test_a_server_leaves_the_migrations_of_others_alone(tmp_path: Path) -> None:
    """Two servers on one location: what the other one serves cannot be taken away from here."""
    often = ("--heartbeat", "0.3", "--sweep-interval", "0.3")
    with live_server(tmp_path / "one", *often) as server:
        vids = [exported(server) for _ in range(2)]
        other = LiveServer(server.root, tmp_path / "other", *often).start()
        try:
            prepare(server, vids[0])
            eventually(lambda: len(other.call("livemigration")) == 1)
            for call in ("revert", "conclude", "prepare"):
                assert refused(other.post(f"livemigration/{call}", move(vids[0]))) == (409, "migration-conflict"), call
            server.stop()
            server.start({"ELEMENTO_STORAGE_FAULTPOINT": "kill:livemigration.added"})
            with contextlib.suppress(httpx.HTTPError):
                prepare(server, vids[1])
            server.wait_dead()
            eventually(lambda: "overdue" in other.call("livemigration")[0])
            with pytest.raises(AssertionError):
                eventually(lambda: locks(server, vids[1]) == [], 1.5)
            server.start()
            eventually(lambda: locks(server, vids[1]) == [])
            assert [len(markers(server, one)) for one in vids] == [2, 1]
            end(server, "conclude", vids[0])
        finally:
            other.stop()
            other.clean_exports()
            other.http.close()


# -- time and faults -------------------------------------------------------------------------------------------


def test_nobody_guesses_when_the_deadline_has_passed(shared: LiveServer) -> None:
    vid = exported(shared)
    migration = prepare(shared, vid, deadline=1)["migration"]
    assert not [one for one in shared.call("health")["problems"] if migration in one]
    eventually(lambda: shared.call("livemigration")[0]["overdue"])
    eventually(lambda: f"live migration {migration} is overdue" in shared.log())
    assert [one for one in shared.call("health")["problems"] if migration in one and "overdue" in one]
    (now,) = shared.call("livemigration")
    assert (now["state"], set(clients(shared, vid))) == ("prepared", {BOB, CAROL})
    assert end(shared, "conclude", vid)["state"] == "concluded"
    assert not [one for one in shared.call("health")["problems"] if migration in one]


@pytest.mark.parametrize(("image_format", "protocol"), ROUTES[:2])
def test_a_restart_drops_nobody(tmp_path: Path, image_format: str, protocol: str) -> None:
    with live_server(tmp_path) as server:
        vid = exported(server, image_format, protocol)
        with QemuIo(export(server, vid)["qemu"]) as source:
            answer = prepare(server, vid)
            with QemuIo(answer["exports"][0]["qemu"]) as destination:
                daemons = server.daemons()
                server.kill()
                source.write(0, 65536, 0x41)
                assert destination.reads(0, 65536, 0x41)
                server.start()
                assert prepare(server, vid) == answer
                source.write(65536, 65536, 0x42)
                assert destination.reads(65536, 65536, 0x42)
                assert server.daemons() == daemons
                end(server, "conclude", vid)
                destination.write(131072, 65536, 0x43)


@pytest.mark.parametrize(("protocol", "name"), [("nbd", "/v/"), ("iscsi", "/v/"), ("iscsi", "/tgt/")])
def test_both_exports_come_back_when_a_daemon_dies(shared: LiveServer, protocol: str, name: str) -> None:
    vid = exported(shared, "qcow2", protocol)
    with QemuIo(export(shared, vid)["qemu"]) as source:
        source.write(0, 65536, 0x51)
        answer = prepare(shared, vid)
        with QemuIo(answer["exports"][0]["qemu"]) as destination:
            assert shared.kill_daemons(vid if name == "/v/" else name)
            # A guest over iSCSI is told of an error while the engine is away, and tries again.
            eventually(lambda: not cannot_write(source, 65536, 65536, 0x52, SLOW_S))
            assert destination.reads(0, 65536, 0x51)
            assert destination.reads(65536, 65536, 0x52)
            assert prepare(shared, vid) == answer
            end(shared, "conclude", vid)
            assert list(clients(shared, vid)) == [CAROL]
