"""Several servers on one pool, each with a directory of its own."""

import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import rados
import rbd

from tests.ceph import CephCluster
from tests.clients import eventually
from tests.exporting import client_of, export, refusal, refused_export, unexport
from tests.live import ALICE, BOB, LiveServer, make_location

MIB = 1 << 20
SIZE_GB = 4 * MIB / 1e9
FLAGS = ("--heartbeat", "0.5", "--lease", "3", "--sweep-interval", "1")
RANDOM_S = float(os.environ.get("ELEMENTO_TEST_CEPH_S", "4"))


class Servers:
    """Two servers that share a pool and nothing else."""

    def __init__(self, directory: Path, settings: dict[str, str]) -> None:
        self.all = []
        for name in ("one", "two"):
            root = directory / name / "mnt"
            make_location(root, "pool", ceph=settings)
            self.all.append(LiveServer(root, directory / name / "state", *FLAGS).start())
        self.one, self.two = self.all

    def close(self) -> None:
        for server in self.all:
            if server.process is not None:
                server.process.send_signal(signal.SIGCONT)
                server.stop()
            server.clean_exports()
            server.http.close()


@pytest.fixture(scope="module")
def servers(ceph: CephCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    ceph.make_pool("shared")
    both = Servers(tmp_path_factory.mktemp("servers"), {**ceph.settings, "pool": "shared"})
    yield both
    both.close()


def create(server: LiveServer, **more: object) -> str:
    body = {"creatorID": ALICE, "name": "disk", "size": SIZE_GB, **more}
    return str(server.call("ceph/create", body)["vid"])


def test_what_one_server_does_the_other_sees_within_a_second(servers: Servers) -> None:
    vid = create(servers.one, private=True)
    assert servers.two.info(vid) | {"lastUpdated": ""} == servers.one.info(vid) | {"lastUpdated": ""}
    servers.two.call("update", {"vid": vid, "creatorID": ALICE, "name": "renamed"})
    eventually(lambda: servers.one.info(vid)["name"] == "renamed", 1.0)
    servers.one.call("destroy", {"volume_id": vid})
    eventually(lambda: vid not in servers.two.listed(), 1.0)
    assert vid in {one["volumeID"] for one in servers.two.call("bin")}
    servers.two.call("restore", {"volume_id": vid})
    eventually(lambda: vid in servers.one.listed(), 1.0)
    servers.one.call("update/resize", {"vid": vid, "creatorID": ALICE, "size": 2 * SIZE_GB})
    servers.two.call("transfer", {"vid": vid, "creatorID": ALICE, "newCreatorID": BOB})
    assert servers.two.info(vid)["size"] == 8 * MIB


def test_a_volume_is_exported_by_one_server_only(servers: Servers) -> None:
    vid = create(servers.one, shareable=True)
    export(servers.one, vid, protocol="nbd")
    assert refused_export(servers.two, vid, BOB, protocol="nbd")[:2] == (423, "volume-locked")
    assert refusal(servers.two, "destroy", {"volume_id": vid})[:2] == (423, "volume-locked")
    unexport(servers.one, vid)
    export(servers.two, vid, BOB, protocol="nbd")
    assert refused_export(servers.one, vid, protocol="nbd")[:2] == (423, "volume-locked")
    unexport(servers.two, vid, BOB)


def test_a_server_that_was_killed_is_taken_over_from_unless_its_daemons_still_serve(servers: Servers) -> None:
    one, two = servers.one, servers.two
    vid, served = create(one), create(one)
    answer = export(one, vid, protocol="nbd")
    export(one, served, protocol="nbd")
    with client_of(answer) as client:
        client.write(0, 4096, 1)
    one.kill()
    assert refused_export(two, vid, BOB, protocol="nbd")[:2] == (423, "volume-locked"), "its lease is not over"
    eventually(lambda: refused_export(two, served, BOB, protocol="nbd")[:2] == (409, "image-in-use"))
    one.kill_daemons(f"/v/{vid}/")
    with client_of(eventually_exported(two, vid)) as client:
        assert client.reads(0, 4096, 1)
        one.start()
        eventually(lambda: not [x for x in one.call("exports")["exports"] if x["vid"] == vid])
        client.write(0, 4096, 2)
    assert refused_export(one, vid, protocol="nbd")[:2] == (423, "volume-locked")
    unexport(two, vid, BOB)
    unexport(one, served)


def eventually_exported(server: LiveServer, vid: str) -> dict[str, object]:
    """The cluster forgets a client that was killed after a while (half a minute at most)."""
    deadline = time.monotonic() + 45
    while (response := server.post("export", {"volume_id": vid, "client_uid": BOB, "protocol": "nbd"})).is_error:
        assert time.monotonic() < deadline, response.text
        time.sleep(0.5)
    answer: dict[str, object] = response.json()
    return answer


def test_a_server_that_was_paused_past_its_lease_cannot_write_any_more(servers: Servers, ceph: CephCluster) -> None:
    one, two = servers.one, servers.two
    vid = create(one)
    one.stop()
    one.start(env={"ELEMENTO_STORAGE_FAULTPOINT": "stop:resize.locked"})
    assert one.process is not None
    paused = threading.Thread(target=lambda: ask(one, "update/resize", {"vid": vid, "creatorID": ALICE, "size": 1}))
    paused.start()
    pid = one.process.pid
    eventually(lambda: Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] == "T")
    assert refusal(two, "update", {"vid": vid, "creatorID": ALICE, "name": "theirs"})[:2] == (423, "volume-locked")
    eventually(lambda: two.post("update", {"vid": vid, "creatorID": ALICE, "name": "theirs"}).is_success)
    one.process.send_signal(signal.SIGCONT)
    paused.join(60)
    with ceph.pool("shared") as ioctx, rbd.Image(ioctx, vid, read_only=True) as image:
        assert image.size() == 4 * MIB, "what it still sent was refused"
    eventually(lambda: one.info(vid)["name"] == "theirs")
    assert two.info(vid)["size"] == 4 * MIB
    eventually(lambda: not one.post("update", {"vid": vid, "creatorID": ALICE, "name": "again"}).is_error)
    assert "shut this one out" in one.log()


def ask(server: LiveServer, path: str, body: dict[str, object]) -> httpx.Response:
    with httpx.Client(base_url=server.address, timeout=60) as http:
        return http.post(path, json=body)


def test_two_servers_at_random_agree_in_the_end(servers: Servers, ceph: CephCluster) -> None:
    """Every answer is checked against what may be: one server at a time, nothing acknowledged is lost."""
    vids = [create(servers.one) for _ in range(4)]
    owners: dict[str, str] = {}
    names: dict[str, str] = dict.fromkeys(vids, "disk")
    gone: set[str] = set()
    lock = threading.Lock()
    wrong: list[str] = []
    deadline = time.monotonic() + RANDOM_S

    def play(server: LiveServer, me: str, seed: int) -> None:
        chance = random.Random(seed)
        with httpx.Client(base_url=server.address, timeout=60) as http:

            def post(path: str, **body: object) -> httpx.Response:
                return http.post(path, json=body)

            while time.monotonic() < deadline:
                vid = chance.choice(vids)
                what = chance.random()
                if what < 0.35:
                    name = f"{me}-{chance.random()}"
                    with lock:
                        if post("update", vid=vid, creatorID=ALICE, name=name).is_success:
                            names[vid] = name
                elif what < 0.7:
                    done = post("export", volume_id=vid, client_uid=ALICE, protocol="nbd")
                    if done.is_success:
                        with lock:
                            if owners.get(vid, me) != me:
                                wrong.append(f"{vid} is exported by both")
                            owners[vid] = me
                        time.sleep(chance.random() / 20)
                        with lock:
                            owners.pop(vid, None)
                            if post("unexport", volume_id=vid, client_uid=ALICE).is_error:
                                wrong.append(f"{vid} is not unexported by its server")
                elif what < 0.8:
                    with lock:
                        if post("destroy", volume_id=vid).is_success:
                            if vid in owners:
                                wrong.append(f"{vid} is destroyed while it is exported")
                            gone.add(vid)
                elif what < 0.95:
                    with lock:
                        if post("restore", volume_id=vid).is_success:
                            gone.discard(vid)
                else:
                    done = post("ceph/create", creatorID=ALICE, name="disk", size=SIZE_GB)
                    with lock:
                        if done.is_success:
                            vids.append(done.json()["vid"])
                            names[vids[-1]] = "disk"

    players = [
        threading.Thread(target=play, args=(server, f"{number}", number)) for number, server in enumerate(servers.all)
    ]
    for player in players:
        player.start()
    for player in players:
        player.join()
    assert not wrong
    time.sleep(1)
    for server in servers.all:
        listed = {vid: one["name"] for vid, one in server.listed().items() if vid in vids}
        assert listed == {vid: name for vid, name in names.items() if vid not in gone}
    with ceph.pool("shared") as ioctx:
        assert set(vids) <= set(rbd.RBD().list(ioctx))
        for vid in vids:
            with pytest.raises(rados.ObjectNotFound):
                ioctx.read(f"elemento.claim.{vid}")
