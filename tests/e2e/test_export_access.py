"""Exports over HTTP: who gets in, ports and daemons that are not there, what is listed, bad input."""

import contextlib
import os
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.clients import Attach, ClientFailed, NoAnswer, QemuIo, discovered, eventually
from tests.e2e.test_auth import bearer, make_token
from tests.exporting import (
    MIB,
    STRANGER,
    client_of,
    export,
    identity,
    is_healthy,
    listed_exports,
    marker,
    new_volume,
    orphans,
    refusal,
    refused_export,
    state,
    unexport,
)
from tests.live import ALICE, BOB, CAROL, LiveServer, free_port, live_server


@pytest.fixture
def server(shared: LiveServer) -> LiveServer:
    """All tests here leave it as they found it."""
    return shared


@pytest.fixture
def quick(tmp_path: Path) -> Iterator[LiveServer]:
    """A server that looks after its exports all the time."""
    with live_server(tmp_path, "--heartbeat", "0.2", "--lease", "5") as one:
        yield one


# -- who gets in -----------------------------------------------------------------------------------------------


def gets_in(attach: Attach) -> bool:
    try:
        with QemuIo(attach, timeout_s=5) as client:
            client.write(0, 4096, 1)
    except (ClientFailed, NoAnswer):
        return False
    return True


def test_chap_is_asked_of_everybody(server: LiveServer) -> None:
    answer = export(server, new_volume(server))
    good = Attach.of(answer["qemu"])
    assert gets_in(good)
    with_another = good.changed(**{"password-secret": "s"}).blockdev
    assert not gets_in(Attach(("qom-type=secret,id=s,data=wrongwrongwrong",), with_another, ()))
    assert not gets_in(good.changed(user="somebody"))
    assert not gets_in(good.changed(user=None, **{"password-secret": None}))
    assert gets_in(good)


def test_only_the_initiator_that_was_named(server: LiveServer) -> None:
    mine, vid = "iqn.1993-08.org.debian:01:mine", new_volume(server)
    answer = export(server, vid, initiator=mine)
    portal = answer["endpoint"]["portal"]
    assert answer["endpoint"]["initiator"] == mine
    assert gets_in(Attach.of(answer["qemu"]))
    assert not gets_in(Attach.of(answer["qemu"]).changed(**{"initiator-name": STRANGER}))
    assert discovered(portal, mine) == [answer["iqn"]]
    assert discovered(portal, STRANGER) == []
    everybodys = export(server, new_volume(server))
    assert discovered(portal, STRANGER) == [everybodys["iqn"]]
    assert is_healthy(server, vid), "our own look is let in"
    assert refused_export(server, vid, initiator=STRANGER)[:2] == (409, "export-differs")


@pytest.mark.parametrize(
    ("addresses", "let_in"),
    [
        (["127.0.0.1"], True),
        (["127.0.0.0/8"], True),
        (["127.0.0.0/255.0.0.0"], True),
        (["10.9.9.9", "127.0.0.1/32"], True),
        (["127.0.0.2"], False),
        (["10.0.0.0/8"], False),
        (["127.0.0.2/31", "::1"], False),
    ],
)
def test_only_the_addresses_that_were_named(server: LiveServer, addresses: list[str], let_in: bool) -> None:
    vid = new_volume(server)
    answer = export(server, vid, addresses=addresses)
    assert gets_in(Attach.of(answer["qemu"])) is let_in
    assert (discovered(answer["endpoint"]["portal"], STRANGER) == [answer["iqn"]]) is let_in
    assert is_healthy(server, vid)
    assert identity(export(server, vid, addresses=addresses)) == identity(answer)


def test_an_export_is_reached_by_its_own_name_only(server: LiveServer) -> None:
    answer = export(server, new_volume(server), protocol="nbd")
    for name in ("", "volume", "export-1", f"{answer['iqn'][:-1]}g"):
        assert not gets_in(Attach.of(answer["qemu"]).changed(export=name))
    endpoint = answer["endpoint"]
    listing = subprocess.run(
        ["nbdinfo", "--json", f"nbd://{endpoint['host']}:{endpoint['port']}/{answer['iqn']}"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert '"can_multi_conn": true' in listing


# -- daemons and ports -----------------------------------------------------------------------------------------


@pytest.fixture
def taken() -> Iterator[socket.socket]:
    """A port that another program listens on; the next one is free."""
    for port in range(20000 + os.getpid() % 5000, 30000, 2):
        with socket.socket() as one, socket.socket() as following, contextlib.suppress(OSError):
            one.bind(("127.0.0.1", port))
            following.bind(("127.0.0.1", port + 1))
            following.close()
            one.listen()
            yield one
            return


def test_the_iscsi_port_is_taken(tmp_path: Path, taken: socket.socket) -> None:
    port = taken.getsockname()[1]
    with live_server(tmp_path, "--iscsi-port", str(port)) as server:
        vid = new_volume(server)
        status, code, said = refused_export(server, vid)
        assert (status, code) == (503, "export-failed")
        assert str(port) in said
        assert server.info(vid)["exported"] is False
        assert not marker(server, vid).exists()
        export(server, vid, protocol="nbd")
        unexport(server, vid)
        taken.close()
        export(server, vid)


def test_nbd_ports_are_taken(tmp_path: Path, taken: socket.socket) -> None:
    port = taken.getsockname()[1]
    with live_server(tmp_path, "--nbd-ports", f"{port}-{port + 1}") as server:
        assert export(server, new_volume(server), protocol="nbd")["endpoint"]["port"] == port + 1
        second = new_volume(server)
        status, code, said = refused_export(server, second, protocol="nbd")
        assert (status, code) == (503, "export-failed")
        assert "nbd-ports" in said
        assert not marker(server, second).exists()
        export(server, second, protocol="local")


def test_tgtd_is_not_installed(tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for directory in ("/usr/bin", "/usr/sbin"):
        for one in Path(directory).iterdir():
            if one.name != "tgtd" and not (tools / one.name).exists():
                (tools / one.name).symlink_to(one)
    with live_server(tmp_path, env={"PATH": str(tools)}) as server:
        vid = new_volume(server)
        status, _, said = refused_export(server, vid)
        assert status in (500, 503)
        assert "tgtd is not installed" in said
        assert not marker(server, vid).exists()
        export(server, vid, protocol="nbd")


# -- what is listed --------------------------------------------------------------------------------------------


def test_traffic_and_sessions_are_told(quick: LiveServer) -> None:
    vid = new_volume(quick)
    with client_of(export(quick, vid)) as client:
        client.write(0, MIB, 1)
        one = eventually(lambda: found if (found := state(quick, vid))["written_bytes"] else None)
        assert (one["sessions"], one["written_bytes"], one["reason"]) == (1, MIB, None)
        assert one["latency_ms"] > 0
    eventually(lambda: state(quick, vid)["sessions"] == 0)


def test_clients_see_their_own_exports(server: LiveServer) -> None:
    alices, bobs = new_volume(server), new_volume(server, owner=BOB)
    export(server, alices, CAROL, protocol="nbd")
    export(server, bobs, BOB, protocol="nbd")
    for who, seen in ((ALICE, {(alices, CAROL)}), (BOB, {(bobs, BOB)}), (CAROL, {(alices, CAROL)}), ("d" * 32, set())):
        assert set(listed_exports(server, client_uid=who)) == seen
    assert set(listed_exports(server)) == {(alices, CAROL), (bobs, BOB)}
    assert set(listed_exports(server, volume_id=bobs)) == {(bobs, BOB)}
    assert "credentials" not in str(server.call("exports"))
    assert orphans(server) == []


def test_tenants_do_not_see_or_take_each_others_exports(tmp_path: Path) -> None:
    with live_server(tmp_path, "--auth", "tokens") as server:
        alice, bob, carol = (bearer(make_token(server.state_dir, who)) for who in (ALICE, BOB, CAROL))
        admin = bearer(make_token(server.state_dir, "d" * 32, "--admin"))
        vid = server.call("create", {"name": "shared", "size": 0.001, "shareable": True}, **alice)["vid"]
        private = server.call("create", {"name": "mine", "size": 0.001, "private": True}, **alice)["vid"]

        def seen(headers: dict[str, str], **body: str) -> set[tuple[str, str]]:
            return {(one["vid"], one["client_uid"]) for one in server.call("exports", body, **headers)["exports"]}

        for who, headers in ((ALICE, alice), (BOB, bob)):
            server.call("export", {"volume_id": vid, "client_uid": who, "protocol": "nbd"}, **headers)
        server.call("export", {"volume_id": private, "client_uid": ALICE, "protocol": "nbd"}, **alice)
        assert seen(alice) == {(vid, ALICE), (vid, BOB), (private, ALICE)}
        assert seen(bob) == {(vid, BOB)}
        assert seen(carol) == set()
        assert seen(carol, volume_id=private) == set()
        assert seen(admin) == seen(alice)
        for path, body, headers, status in (
            ("exports", {"client_uid": ALICE}, bob, 403),
            ("export", {"volume_id": vid, "client_uid": ALICE, "protocol": "nbd"}, bob, 403),
            ("export", {"volume_id": private, "client_uid": BOB, "protocol": "nbd"}, bob, 404),
            ("unexport", {"volume_id": vid, "client_uid": ALICE}, carol, 403),
            ("unexport", {"volume_id": vid, "client_uid": BOB}, carol, 403),
            ("unexport", {"volume_id": private, "client_uid": ALICE}, carol, 404),
        ):
            assert server.post(path, body, **headers).status_code == status, (path, body)
        assert seen(admin) == {(vid, ALICE), (vid, BOB), (private, ALICE)}
        server.call("unexport", {"volume_id": vid, "client_uid": BOB}, **alice)
        assert seen(bob) == set()
        for one in (vid, private):
            server.call("unexport", {"volume_id": one, "client_uid": ALICE}, **admin)
        assert seen(admin) == set()


# -- bad input -------------------------------------------------------------------------------------------------


MINE = "iqn.1993-08.org.debian:a"
BAD: dict[str, tuple[Any, ...]] = {
    "volume_id": (None, 1, "", "x", "0" * 31, ["0" * 32], "../../etc/passwd", "１" * 32),
    "client_uid": (None, 1, "", "x", {}, "a" * 33),
    "protocol": ("floppy", "", "ISCSI", 1, ["nbd"], {}, "iscsi\n"),
    "readonly": ("yes", 1, [], "false"),
    "initiator": (
        *("", "x", "ALL", 1, [], f"{MINE},initiator-address=ALL", f"{MINE}\nb", f"{MINE}\0", f"{MINE} b"),
        MINE * 20,
    ),
    "addresses": (
        *("10.0.0.1", ["x"], ["10.0.0.1\n"], [1], [None], {}, ["10.0.0.1,x"], ["ALL"], ["10.0.0.1/8"], [""]),
        [f"10.0.{n // 250}.{n % 250}" for n in range(1000)],
    ),
}
TOGETHER: list[dict[str, Any]] = [
    {"initiator": MINE, "addresses": ["10.0.0.1"]},
    {"protocol": "nbd", "initiator": MINE},
    {"protocol": "local", "addresses": ["10.0.0.1"]},
]


def test_bad_input_is_refused_and_changes_nothing(server: LiveServer) -> None:
    vid = new_volume(server)
    for bad in [*({key: value} for key, values in BAD.items() for value in values), *TOGETHER]:
        status, code, said = refusal(server, "export", {"volume_id": vid, "client_uid": ALICE, **bad})
        assert status == 400, (bad, said)
        assert said.startswith("request was badly formatted"), said
        assert len(said) < 500
        assert code
    for missing in ({"volume_id": vid}, {"client_uid": ALICE}, {}):
        assert refusal(server, "export", missing)[0] == 400
        assert refusal(server, "unexport", missing)[0] == 400
    assert server.info(vid)["exported"] is False
    assert listed_exports(server) == {}
    assert not server.daemons("/v/")


def test_ids_in_other_forms(server: LiveServer) -> None:
    vid = new_volume(server)
    dashed = f"{vid[:8]}-{vid[8:12]}-{vid[12:16]}-{vid[16:20]}-{vid[20:]}".upper()
    answer = export(server, dashed, ALICE.upper(), protocol="local", something="more")
    assert answer["vid"] == vid
    assert identity(export(server, vid)) == identity(answer)
    unexport(server, dashed)
    assert server.info(vid)["exported"] is False
    assert free_port()
