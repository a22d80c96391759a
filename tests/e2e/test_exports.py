"""Exports over HTTP: who may, what is answered, who gets in, and what an exported volume does not allow."""

import contextlib
import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.clients import Attach, ClientFailed, NoAnswer, QemuIo, cannot_write, discovered, eventually
from tests.e2e.test_auth import bearer, make_token
from tests.exporting import (
    MIB,
    PROTOCOLS,
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
    unexport_everything,
    volume_pids,
)
from tests.live import ALICE, BOB, CAROL, LiveServer, free_port, live_server, make_location

each_protocol = pytest.mark.parametrize("protocol", PROTOCOLS)
each_format = pytest.mark.parametrize("image_format", ["raw", "qcow2"])


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    with live_server(tmp_path_factory.mktemp("exports")) as one:
        yield one


@pytest.fixture
def server(running: LiveServer) -> Iterator[LiveServer]:
    """A server without exports; tests share it, to start one takes longer than most of them."""
    yield running
    unexport_everything(running)


@pytest.fixture
def quick(tmp_path: Path) -> Iterator[LiveServer]:
    """A server that looks after its exports all the time."""
    with live_server(tmp_path, "--heartbeat", "0.2", "--lease", "5") as one:
        yield one


# -- from export to unexport -----------------------------------------------------------------------------------


@each_protocol
@each_format
def test_from_export_to_unexport(server: LiveServer, protocol: str, image_format: str) -> None:
    vid = new_volume(server, format=image_format)
    assert server.info(vid)["exported"] is False
    answer = export(server, vid, protocol=protocol)
    name = f"iqn.2004-10.cloud.elemento:01:{int(ALICE, 16) ^ int(vid, 16):032x}"
    assert (answer["vid"], answer["client_uid"], answer["protocol"]) == (vid, ALICE, protocol)
    assert (answer["iqn"], answer["size"], answer["readonly"]) == (name, 8 * MIB, False)
    assert bool(answer["credentials"]) == (protocol == "iscsi")
    assert server.info(vid)["exported"] is True
    assert marker(server, vid).name == f"{name}.exported"
    assert marker(server, vid).stat().st_mode & 0o777 == 0o600
    assert is_healthy(server, vid)
    with client_of(answer) as client:
        client.write(4096, 65536, 7)
        assert client.reads(4096, 65536, 7)
        for _ in range(2):
            again = export(server, vid, protocol=protocol)
            assert identity(again) == identity(answer)
        assert identity(export(server, vid)) == identity(answer), "what is not said is as it is"
        assert client.reads(4096, 65536, 7)
        for _ in range(2):
            unexport(server, vid)
            assert server.info(vid)["exported"] is False
            assert cannot_write(client, 4096, 65536, 8, timeout_s=0.5)
    assert not marker(server, vid).exists()
    assert listed_exports(server) == {}
    assert volume_pids(server, vid) == set()
    with QemuIo.on_file(
        server.directory(vid) / f"data.{'img' if image_format == 'raw' else 'qcow2'}", image_format
    ) as past:
        assert past.reads(4096, 65536, 7)
    other = export(server, vid, protocol=protocol)
    assert other["credentials"] != answer["credentials"] or protocol != "iscsi"


def test_iscsi_is_what_is_meant_when_nothing_is_said(server: LiveServer) -> None:
    assert export(server, new_volume(server))["protocol"] == "iscsi"


def test_unexporting_what_never_was(server: LiveServer) -> None:
    vid = new_volume(server)
    unexport(server, vid)
    unexport(server, vid, BOB)
    missing = {"volume_id": "0" * 32, "client_uid": ALICE}
    assert refusal(server, "unexport", missing)[:2] == (404, "volume-not-found")
    assert refusal(server, "export", missing)[:2] == (404, "volume-not-found")


@each_protocol
def test_many_at_the_same_time(server: LiveServer, protocol: str) -> None:
    """No two get the same port, the same target number, or fail because of each other."""
    vids = [new_volume(server, 1) for _ in range(12)]
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda vid: export(server, vid, protocol=protocol), vids))
        assert len({str(answer["endpoint"]) for answer in answers}) == 12
        for number, answer in enumerate(answers):
            with client_of(answer) as client:
                client.write(0, 4096, number + 1)
        list(pool.map(lambda vid: unexport(server, vid), vids))
    for number, vid in enumerate(vids):
        assert (server.directory(vid) / "data.img").read_bytes()[:4096] == bytes([number + 1]) * 4096
    assert not server.daemons("/v/")


def test_the_same_export_asked_for_by_many(server: LiveServer) -> None:
    vid = new_volume(server)
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: export(server, vid, protocol="nbd"), range(8)))
    assert len({str(identity(answer)) for answer in answers}) == 1


# -- who may ---------------------------------------------------------------------------------------------------


def test_a_volume_that_is_not_shareable_is_exported_once(server: LiveServer) -> None:
    vid = new_volume(server)
    export(server, vid, protocol="nbd")
    assert refused_export(server, vid, BOB, protocol="nbd")[:2] == (409, "not-exportable")
    assert server.call("exports", {"client_uid": BOB})["exports"] == []
    unexport(server, vid)
    export(server, vid, BOB, protocol="nbd")


@pytest.mark.parametrize("protocols", [("iscsi", "iscsi"), ("nbd", "nbd"), ("nbd", "local"), ("local", "nbd")])
@each_format
def test_clients_of_a_shareable_volume_see_each_other(
    server: LiveServer, protocols: tuple[str, str], image_format: str
) -> None:
    vid = new_volume(server, shareable=True, format=image_format)
    answers = [export(server, vid, who, protocol=one) for who, one in zip((ALICE, BOB), protocols, strict=True)]
    with client_of(answers[0]) as first, client_of(answers[1]) as second:
        for one, other, pattern in ((first, second, 1), (second, first, 2), (first, second, 3)):
            one.write(0, 65536, pattern)
            assert other.reads(0, 65536, pattern)
        unexport(server, vid, ALICE)
        assert cannot_write(first, 0, 65536, 9, timeout_s=0.5)
        assert second.reads(0, 65536, 3)
        second.write(0, 65536, 4)
        assert server.info(vid)["exported"] is True


def test_paths_exclude_each_other(server: LiveServer) -> None:
    vid = new_volume(server, shareable=True)
    for first, second in (("iscsi", "nbd"), ("iscsi", "local"), ("nbd", "iscsi"), ("local", "iscsi")):
        export(server, vid, protocol=first)
        status, code, said = refused_export(server, vid, BOB, protocol=second)
        assert (status, code) == (409, "protocols-exclude")
        assert first in said
        assert refused_export(server, vid, protocol=second)[:2] == (409, "export-differs")
        unexport(server, vid)


def test_what_cannot_be_served_does_not_keep_the_other_from_going(quick: LiveServer) -> None:
    server = quick
    vid = new_volume(server, shareable=True)
    answers = [export(server, vid, who, protocol="nbd") for who in (ALICE, BOB)]
    data = server.directory(vid) / "data.img"
    with client_of(answers[1]) as client:
        # Nothing can serve Alice now: somebody else has the image.
        os.kill(server.process.pid if server.process else 0, signal.SIGSTOP)
        server.kill_daemons(f"/v/{vid}/")
        with QemuIo.on_file(data, "raw"):
            os.kill(server.process.pid if server.process else 0, signal.SIGCONT)
            unexport(server, vid, BOB)
            assert set(listed_exports(server)) == {(vid, ALICE)}
            one = eventually(lambda: found if (found := state(server, vid))["state"] == "failing" else None)
            assert "another program has the image open" in one["reason"]
        eventually(lambda: is_healthy(server, vid))
        assert cannot_write(client, 0, 4096, 1, timeout_s=0.5)


def test_a_private_volume_does_not_exist_for_others(server: LiveServer) -> None:
    vid = new_volume(server, private=True)
    unknown = refused_export(server, "0" * 32, BOB)
    status, code, said = refused_export(server, vid, BOB)
    assert (status, code, said.replace(vid, "0" * 32)) == unknown
    assert refusal(server, "unexport", {"volume_id": vid, "client_uid": BOB})[0] == 404
    export(server, vid, ALICE)


def test_an_export_can_be_taken_away_after_the_volume_became_private(server: LiveServer) -> None:
    vid = new_volume(server)
    answer = export(server, vid, BOB, protocol="nbd")
    server.call("update", {"vid": vid, "creatorID": ALICE, "private": True})
    with client_of(answer) as client:
        unexport(server, vid, BOB)
        assert cannot_write(client, 0, 4096, 1, timeout_s=0.5)
    assert server.info(vid)["exported"] is False


# -- what an exported volume does not allow --------------------------------------------------------------------


def test_what_is_refused_while_exported(server: LiveServer) -> None:
    vid = new_volume(server)
    export(server, vid, protocol="local")
    change = {"vid": vid, "creatorID": ALICE}
    refused: dict[str, dict[str, Any]] = {
        "destroy": {"volume_id": vid},
        "update/convert": {**change, "format": "qcow2"},
        "transfer": {**change, "newCreatorID": BOB},
        "update": {**change, "readonly": True},
    }
    for path, body in refused.items():
        assert refusal(server, path, body)[:2] == (409, "volume-exported"), path
    server.call("update", {**change, "name": "other", "bus": "scsi"})
    assert "scsi-hd" in str(export(server, vid)["qemu"])
    unexport(server, vid)
    server.call("update/convert", {**change, "format": "qcow2"})
    server.call("destroy", {"volume_id": vid})


@each_protocol
@each_format
def test_growth_reaches_a_connected_client(server: LiveServer, protocol: str, image_format: str) -> None:
    vid = new_volume(server, format=image_format)
    answer = export(server, vid, protocol=protocol)
    with client_of(answer) as client:
        client.write(0, 65536, 5)
        grown = {"vid": vid, "creatorID": ALICE, "size": 20 * MIB / 1e9}
        server.call("update/resize", grown)
        assert server.info(vid)["size"] == 20 * MIB
        assert client.reads(0, 65536, 5)
        client.succeed(f"truncate {20 * MIB}")
        client.write(20 * MIB - 4096, 4096, 6)
        with client_of(export(server, vid)) as new:
            assert new.length() == 20 * MIB
            assert new.reads(20 * MIB - 4096, 4096, 6)
        server.call("update/resize", grown)
        assert refusal(server, "update/resize", {**grown, "size": 0.001})[:2] == (409, "cannot-shrink")
    assert is_healthy(server, vid)


@each_protocol
def test_what_is_read_only_stays_so(server: LiveServer, protocol: str) -> None:
    iso = new_volume(server, bus="sata")
    path = server.directory(iso)
    (path / "data.img").rename(path / "data.iso")
    meta = path / "meta.json"
    meta.write_text(meta.read_text().replace('"raw"', '"iso"'))
    volumes: list[tuple[str, dict[str, Any]]] = [(new_volume(server, readonly=True), {}), (iso, {})]
    for vid, more in [*volumes, (new_volume(server), {"readonly": True})]:
        answer = export(server, vid, protocol=protocol, **more)
        assert answer["readonly"] is True
        with client_of(answer) as client:
            assert client.reads(0, 4096, 0)
            assert cannot_write(client, 0, 4096, 1)
        assert "<readonly/>" in answer["libvirt"]
        assert ("device='cdrom'" in answer["libvirt"]) == (vid == iso)
    writable = new_volume(server)
    export(server, writable, protocol=protocol)
    assert refused_export(server, writable, readonly=True)[:2] == (409, "export-differs")


# -- volumes that cannot be exported now -----------------------------------------------------------------------


def test_a_locked_volume(server: LiveServer) -> None:
    vid = new_volume(server)
    lock = server.directory(vid) / f"elemento.polish.{'1' * 32}.ignore"
    lock.write_text("{}")
    for path in ("export", "unexport"):
        assert refusal(server, path, {"volume_id": vid, "client_uid": ALICE})[:2] == (423, "volume-locked")
    lock.unlink()
    export(server, vid)


@each_format
def test_an_image_that_another_program_writes_to(server: LiveServer, image_format: str) -> None:
    vid = new_volume(server, format=image_format)
    data = server.directory(vid) / ("data.img" if image_format == "raw" else "data.qcow2")
    with QemuIo.on_file(data, image_format):
        for protocol in PROTOCOLS:
            assert refused_export(server, vid, protocol=protocol)[:2] == (409, "image-in-use")
        assert server.info(vid)["exported"] is False
        assert not marker(server, vid).exists()
    export(server, vid)


def test_an_image_that_is_gone(server: LiveServer) -> None:
    vid = new_volume(server)
    (server.directory(vid) / "data.img").unlink()
    status, _, said = refused_export(server, vid)
    assert status in (404, 409, 503)
    assert str(server.root) not in said
    assert not marker(server, vid).exists()


@pytest.mark.parametrize("location", ["disk", "blocks"])
@pytest.mark.parametrize("offset", [0x10000, 0x30000], ids=["refcounts", "mapping"])
def test_an_image_whose_tables_are_damaged(tmp_path: Path, location: str, offset: int) -> None:
    make_location(tmp_path / "mnt", location)
    with live_server(tmp_path) as server:
        vid = new_volume(server, format="qcow2")
        data = server.directory(vid, location) / "data.qcow2"
        with QemuIo.on_file(data, "qcow2") as past:
            past.write(0, MIB, 1)
        with data.open("r+b") as image:
            image.seek(offset)
            image.write(b"\x7f" * 64)
        before = data.read_bytes()
        response = server.post("export", {"volume_id": vid, "client_uid": ALICE})
        answer = response.json()
        assert (response.status_code, answer["code"]) == (409, "image-damaged"), answer
        assert "findings" in answer
        assert str(tmp_path) not in str(answer)
        assert data.read_bytes() == before, "looking repairs nothing"
        assert server.info(vid)["exported"] is False
        assert not server.daemons("/v/")


def test_an_image_of_odd_length(server: LiveServer) -> None:
    """A raw image that no sector ends: QEMU rounds up, and what is served is whole."""
    vid = new_volume(server)
    with (server.directory(vid) / "data.img").open("r+b") as image:
        image.truncate(3 * MIB + 100)
    server.call("rescan")
    for protocol in PROTOCOLS:
        with client_of(export(server, vid, protocol=protocol)) as client:
            client.write(3 * MIB - 4096, 4096, 3)
        eventually(lambda: is_healthy(server, vid))
        unexport(server, vid)


def test_a_location_whose_name_is_no_text(tmp_path: Path) -> None:
    name = os.fsdecode(b"lo\xffc")
    make_location(tmp_path / "mnt", name)
    with live_server(tmp_path) as server:
        vid = new_volume(server)
        for protocol in PROTOCOLS:
            response = server.post("export", {"volume_id": vid, "client_uid": ALICE, "protocol": protocol})
            assert response.status_code in (200, 503), response.text
            assert response.status_code == 200 or "UTF-8" in response.json()["error"]
            if response.status_code == 200:
                unexport(server, vid)
        assert server.info(vid)["exported"] is False


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
