"""SIGKILL at random moments under load, again and again on the same disk, against a model of what was acknowledged."""

import contextlib
import os
import random
import threading
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import httpx

from tests.e2e.invariants import assert_clean, read_pattern, write_pattern
from tests.live import LiveServer, make_location

KILLS = int(os.environ.get("ELEMENTO_TEST_KILLS", "200"))
CLIENTS = 4
MOST_VOLUMES = 6


@dataclass(frozen=True)
class State:
    """What was acknowledged of a volume."""

    name: str
    size_gb: float
    format: str
    binned: bool = False


@dataclass
class Client:
    """One tenant: its volumes as acknowledged, and the one change whose answer never came."""

    uid: str
    chance: random.Random
    volumes: dict[str, State] = field(default_factory=dict)
    patterns: dict[str, bytes] = field(default_factory=dict)
    in_flight: tuple[str, State] | None = None
    creating: tuple[str, State] | None = None  #: Idempotency-Key and what was asked for
    creations: int = 0
    done: int = 0

    def work(self, server: LiveServer, address: str) -> None:
        with httpx.Client(base_url=address, timeout=30) as http, contextlib.suppress(httpx.TransportError):
            while True:
                self.step(server, http)
                self.done += 1

    def step(self, server: LiveServer, http: httpx.Client) -> None:
        live = [vid for vid, state in self.volumes.items() if not state.binned]
        if len(live) < 2 or (len(self.volumes) < MOST_VOLUMES and self.chance.random() < 0.3):
            self.create(server, http)
            return
        vid = self.chance.choice(list(self.volumes))
        state = self.volumes[vid]
        if state.binned:
            self.change(http, "restore", vid, replace(state, binned=False))
            return
        kind = self.chance.choice(["update", "resize", "convert", "convert", "destroy"])
        if kind == "update":
            name = f"name {self.chance.random()}"
            self.change(http, "update", vid, replace(state, name=name), name=name)
        elif kind == "resize":
            size = round(state.size_gb + 0.000512, 6)
            self.change(http, "update/resize", vid, replace(state, size_gb=size), size=size)
        elif kind == "convert":
            target = "raw" if state.format == "qcow2" else "qcow2"
            self.change(http, "update/convert", vid, replace(state, format=target), format=target)
        else:
            self.change(http, "destroy", vid, replace(state, binned=True))

    def change(self, http: httpx.Client, path: str, vid: str, after: State, **keys: object) -> None:
        self.in_flight = (vid, after)
        response = http.post(path, json={"vid": vid, "creatorID": self.uid, **keys})
        assert response.status_code == 200, f"{path} {vid}: {response.status_code} {response.text}"
        self.volumes[vid] = after
        self.in_flight = None

    def create(self, server: LiveServer, http: httpx.Client) -> None:
        if self.creating is None:
            self.creations += 1
            self.creating = (f"{self.uid}-{self.creations}", State(f"new {self.creations}", 0.001024, "raw"))
        key, state = self.creating
        response = http.post(
            "create",
            json={"creatorID": self.uid, "name": state.name, "size": state.size_gb, "private": True},
            headers={"Idempotency-Key": key},
        )
        assert response.status_code == 200, response.text
        vid = response.json()["vid"]
        assert vid not in self.volumes
        self.patterns[vid] = write_pattern(server, vid, self.creations)
        self.volumes[vid] = state
        self.creating = None

    def verify(self, server: LiveServer, scratch: Path) -> None:
        """Every acknowledged change is there; the one in flight happened as a whole or not at all."""
        listed = {v["volumeID"]: v for v in server.call("accessible", {"client_uid": self.uid})}
        binned = {v["volumeID"]: v for v in server.call("bin", {"client_uid": self.uid})}
        for vid, acknowledged in self.volumes.items():
            found = listed.get(vid) or binned.get(vid)
            assert found, f"{vid} is lost"
            assert not (vid in listed and vid in binned)
            now = State(found["name"], found["size"] / 1e9, found["format"], vid in binned)
            if self.in_flight and self.in_flight[0] == vid:
                assert now in (acknowledged, self.in_flight[1])
                self.volumes[vid] = now
            else:
                assert now == acknowledged
            if vid in listed and self.chance.random() < 0.2:
                assert read_pattern(server, vid, scratch) == self.patterns[vid]
        self.in_flight = None
        strangers = set(listed) - set(self.volumes)
        assert len(strangers) <= (1 if self.creating else 0), "a volume appeared that nobody was told of"


def test_random_kills(tmp_path: Path) -> None:
    seed = int(os.environ.get("ELEMENTO_TEST_SEED", time.time_ns() % 2**32))
    print(f"ELEMENTO_TEST_SEED={seed}")
    chance = random.Random(seed)
    root = tmp_path / "mnt"
    make_location(root)
    server = LiveServer(root, tmp_path / "state")
    clients = [Client(f"{number:032x}", random.Random(chance.random())) for number in range(1, CLIENTS + 1)]
    server.start()
    try:
        run_and_kill(server, clients, chance, tmp_path)
    finally:
        if server.process is not None:
            server.kill()
        server.http.close()


def run_and_kill(server: LiveServer, clients: list[Client], chance: random.Random, tmp_path: Path) -> None:
    for kill in range(KILLS):
        failures: list[BaseException] = []

        def run(client: Client, failures: list[BaseException] = failures) -> None:
            try:
                client.work(server, server.address)
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=run, args=(client,)) for client in clients]
        for thread in threads:
            thread.start()
        time.sleep(chance.uniform(0.01, 0.25))
        server.kill()
        for thread in threads:
            thread.join()
        server.start()
        assert not failures, (kill, failures, server.log()[-4000:])
        if kill % 10 == 9 or kill == KILLS - 1:
            assert_clean(server)
        for client in clients:
            client.verify(server, tmp_path)
    print(f"{KILLS} kills, {sum(client.done for client in clients)} operations acknowledged")
    for client in clients:
        for vid, state in client.volumes.items():
            if not state.binned:
                assert read_pattern(server, vid, tmp_path) == client.patterns[vid]
