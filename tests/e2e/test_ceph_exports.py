"""Exports of volumes in a Ceph pool, and what a cluster that fails does to them."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import rbd

from tests.ceph import CephCluster
from tests.clients import eventually
from tests.exporting import client_of, export, refusal, refused_export, unexport, volume_pids, wait_healthy
from tests.live import ALICE, BOB, LiveServer, live_server, make_location

MIB = 1 << 20


@pytest.fixture(scope="module")
def server(ceph: CephCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    directory = tmp_path_factory.mktemp("ceph")
    make_location(directory / "mnt")
    make_location(directory / "mnt", "pool", ceph=ceph.settings)
    with live_server(directory, "--heartbeat", "1", "--lease", "6") as one:
        yield one


def create(server: LiveServer, **more: Any) -> str:
    return server.create(size=8 * MIB / 1e9, ceph=True, **more)


def image_reads(ceph: CephCluster, vid: str, offset: int, length: int) -> bytes:
    with ceph.pool() as ioctx, rbd.Image(ioctx, vid, read_only=True) as image:
        return image.read(offset, length)


@pytest.mark.parametrize("protocol", ["iscsi", "nbd", "local"])
def test_what_a_client_writes_is_in_the_image(server: LiveServer, ceph: CephCluster, protocol: str) -> None:
    vid = create(server)
    with client_of(export(server, vid, protocol=protocol)) as client:
        assert client.length() == 8 * MIB
        client.write(0, 65536, 0xAB)
        client.write(8 * MIB - 4096, 4096, 0xCD)
    assert image_reads(ceph, vid, 0, 65536) == b"\xab" * 65536
    assert image_reads(ceph, vid, 8 * MIB - 4096, 4096) == b"\xcd" * 4096
    assert refusal(server, "destroy", {"volume_id": vid})[:2] == (409, "volume-exported")
    assert refused_export(server, vid, BOB, protocol=protocol)[:2] == (409, "not-exportable")
    unexport(server, vid)
    assert not volume_pids(server, vid)
    server.call("destroy", {"volume_id": vid})


def test_two_protocols_see_the_same_data_and_grow_together(server: LiveServer) -> None:
    vid = create(server, shareable=True)
    answers = [export(server, vid, protocol="nbd"), export(server, vid, BOB, protocol="local")]
    with client_of(answers[0]) as one, client_of(answers[1]) as other:
        one.write(4096, 4096, 7)
        assert other.reads(4096, 4096, 7)
    server.call("update/resize", {"vid": vid, "creatorID": ALICE, "size": 16 * MIB / 1e9})
    assert server.info(vid)["size"] == 16 * MIB
    with client_of(answers[0]) as one, client_of(answers[1]) as other:
        other.write(16 * MIB - 4096, 4096, 9)
        assert one.reads(16 * MIB - 4096, 4096, 9)
    unexport(server, vid)
    unexport(server, vid, BOB)


def test_an_export_comes_back_after_its_daemon_and_the_server_were_killed(server: LiveServer) -> None:
    vid = create(server)
    answer = export(server, vid, protocol="nbd")
    with client_of(answer) as client:
        client.succeed("write -P 3 0 4096")  # not flushed, and acknowledged
        server.kill_daemons(f"/v/{vid}/")
    wait_healthy(server, vid)
    with client_of(answer) as client:
        assert client.reads(0, 4096, 3)
        daemon = volume_pids(server, vid)
        server.kill()
        server.start()
        wait_healthy(server, vid)
        assert volume_pids(server, vid) == daemon, "a server that restarts drops no connection"
        assert client.reads(0, 4096, 3)
    unexport(server, vid)


def test_a_live_migration_moves_the_volume(server: LiveServer) -> None:
    vid = create(server)
    with client_of(export(server, vid, protocol="nbd")) as source:
        source.write(0, 4096, 5)
        server.call("livemigration/prepare", {"volume_id": vid, "source": ALICE, "destination": BOB})
        server.call("livemigration/conclude", {"volume_id": vid})
    with client_of(export(server, vid, BOB)) as destination:
        assert destination.reads(0, 4096, 5)
    unexport(server, vid, BOB)


def test_an_osd_that_dies_loses_nothing(server: LiveServer, ceph: CephCluster) -> None:
    vid = create(server)
    with client_of(export(server, vid, protocol="nbd")) as client:
        client.write(0, MIB, 1)
        ceph.kill_osd(0)
        try:
            client.write(MIB, MIB, 2)
            assert client.reads(0, MIB, 1)
            create(server)
        finally:
            ceph.start_osd(0)
        assert client.reads(0, MIB, 1)
        assert client.reads(MIB, MIB, 2)
    unexport(server, vid)


def test_a_cluster_that_does_not_answer_keeps_nobody_else_waiting(server: LiveServer, ceph: CephCluster) -> None:
    vid, other = create(server), server.create()
    with client_of(export(server, vid, protocol="nbd")) as client:
        ceph.pause(paused=True)
        try:
            client.send("write -P 6 0 4096")
            status, code, sentence = refusal(server, "update", {"vid": vid, "creatorID": ALICE, "name": "x"})
            assert (status, code) == (503, "ceph-unavailable"), sentence
            began = time.monotonic()
            server.call("update", {"vid": other, "creatorID": ALICE, "name": "y"})
            assert other in server.listed()
            assert time.monotonic() - began < 2
            assert server.call("health")["status"] != "ok"
        finally:
            ceph.pause(paused=False)
        client.wait()
        eventually(lambda: server.post("info", {"volume_id": vid}).status_code == 200)
        client.flush()
        assert client.reads(0, 4096, 6)
    server.call("update", {"vid": vid, "creatorID": ALICE, "name": "back"})
    wait_healthy(server, vid)
    unexport(server, vid)


def test_a_monitor_that_dies_and_comes_back(server: LiveServer, ceph: CephCluster) -> None:
    vid = create(server)
    ceph.kill_mon()
    try:
        server.call("update", {"vid": vid, "creatorID": ALICE, "name": "meanwhile"})
    finally:
        ceph.start_mon()
    assert server.info(vid)["name"] == "meanwhile"
    create(server)


def test_a_key_without_rights_and_a_pool_that_is_not_there_are_said(server: LiveServer, ceph: CephCluster) -> None:
    keyring = ceph.make_user("weak", mon="allow r", osd="allow r pool=elemento")
    conf = Path(ceph.conf).with_name("weak.conf")
    conf.write_text(Path(ceph.conf).read_text() + f"\n[client.weak]\nkeyring = {keyring}\n")
    weak = {"pool": "elemento", "user": "weak", "conf": str(conf)}
    gone = {**ceph.settings, "pool": "no-such-pool"}
    for name, settings, code in (("weak", weak, "ceph-denied"), ("gone", gone, "ceph-unavailable")):
        make_location(server.root, name, ceph=settings)
        try:
            [location] = [one for one in server.call("locations") if one["name"] == name]
            assert not location["usable"]
            assert ("profile rbd" if name == "weak" else "no such pool") in location["reason"], code
            vid = create(server)
            assert server.info(vid)["location"] == "pool"
        finally:
            (server.root / name / "settings.json").unlink()
            server.call("locations")
