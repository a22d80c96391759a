"""Exports over HTTP: who may, what is answered, who gets in, and what an exported volume does not allow."""

import json
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.clients import QemuIo, cannot_write, eventually
from tests.exporting import (
    MIB,
    PROTOCOLS,
    client_of,
    export,
    identity,
    is_healthy,
    listed_exports,
    marker,
    new_volume,
    refusal,
    refused_export,
    state,
    unexport,
    volume_pids,
)
from tests.live import ALICE, BOB, LiveServer, live_server, make_location

each_protocol = pytest.mark.parametrize("protocol", PROTOCOLS)
each_format = pytest.mark.parametrize("image_format", ["raw", "qcow2"])


@pytest.fixture
def server(shared: LiveServer) -> LiveServer:
    """All tests here leave it as they found it."""
    return shared


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


def test_what_others_have_does_not_become_private(server: LiveServer) -> None:
    vid = new_volume(server)
    export(server, vid, BOB)
    change = {"vid": vid, "creatorID": ALICE, "private": True}
    assert refusal(server, "update", change)[:2] == (409, "volume-exported")
    unexport(server, vid, BOB)
    export(server, vid, ALICE)
    server.call("update", change)


def test_an_export_can_be_taken_away_after_the_volume_became_private(server: LiveServer) -> None:
    vid = new_volume(server)
    answer = export(server, vid, BOB, protocol="nbd")
    path = server.directory(vid) / "meta.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "private": True}))
    with client_of(answer) as client:
        unexport(server, vid, BOB)
        assert cannot_write(client, 0, 4096, 1, timeout_s=0.5)
    assert server.info(vid)["exported"] is False


@each_protocol
def test_an_unexport_closes_what_the_run_directory_has_forgotten(server: LiveServer, protocol: str) -> None:
    vid = new_volume(server)
    with client_of(export(server, vid, protocol=protocol)) as client:
        client.write(0, 4096, 1)
        (server.run_dir / "v" / vid / "engine.json").unlink()
        unexport(server, vid)
        assert cannot_write(client, 0, 4096, 2, timeout_s=0.5)


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
    with (path / "data.iso").open("r+b") as content:
        content.write(bytes(4096))  # zeros, but no hole: with nothing written it would still wait for its content
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
