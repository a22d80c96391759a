"""The client library against the launched server, in both kinds."""

import asyncio
import contextlib
import re
import socket
import threading
from collections.abc import Iterator

import pytest

from elemento_storage.client import (
    AsyncClient,
    Client,
    Conflict,
    InvalidRequest,
    NotFound,
    OutcomeUnknown,
    Retries,
    StillRunning,
    Unreachable,
)
from elemento_storage.client.types import Event, Job, Volume
from tests.live import ALICE, BOB, LiveServer, free_port


def address(server: LiveServer) -> str:
    return server.address.removesuffix("/api/v1.0/")


@pytest.fixture
def client(running: LiveServer) -> Iterator[Client]:
    with Client(address(running), client=ALICE) as one:
        yield one


def test_a_volumes_life(client: Client) -> None:
    made = client.volumes.create("disk", "10M", format="qcow2", private=True)
    assert made.size_gb == 0.01
    volume: Volume = client.volumes.get(made.volume_id)
    assert (volume.name, volume.size, volume.owner, volume.locked) == ("disk", 10_000_384, ALICE, None)
    assert client.volumes.update(volume.volume_id, name="other").name == "other"
    assert client.volumes.resize(volume.volume_id, "20M").size_gb == 0.02
    assert client.volumes.convert(volume.volume_id, "raw").format == "raw"
    assert client.volumes.checksum(volume.volume_id).size == 20_000_256
    assert sum(one.length for one in client.volumes.extents(volume.volume_id).extents) == 20_000_256
    assert client.on_behalf_of(BOB).volumes.exists(volume.volume_id) is False
    assert client.volumes.transfer(volume.volume_id, BOB).owner == BOB
    bob = client.on_behalf_of(BOB)
    clone = bob.volumes.clone(volume.volume_id, name="copy")
    assert bob.volumes.reset(clone.volume_id).volume_id == clone.volume_id
    assert bob.volumes.compact(clone.volume_id).owner == BOB
    bob.volumes.destroy(volume.volume_id)
    assert [one.volume_id for one in bob.volumes.binned()] == [volume.volume_id]
    assert bob.volumes.restore(volume.volume_id).name == "other"
    assert bob.volumes.room("1G", "2G").cancreate
    assert bob.volumes.room("1000000T").cancreate is False


def test_pages_come_as_one_list(client: Client) -> None:
    made = client.volumes.create_many([{"name": f"many-{n}", "size": "1M"} for n in range(7)])
    listed = list(client.volumes.list(name="many-*", sort="name", page=3))
    assert [one.volume_id for one in listed] == [one.volume_id for one in made]


def test_errors_have_the_servers_codes(client: Client) -> None:
    with pytest.raises(NotFound) as unknown:
        client.volumes.get("1" * 32)
    assert (unknown.value.code, unknown.value.details["volume_id"]) == ("volume-not-found", "1" * 32)
    assert len(unknown.value.request_id) == 16
    with pytest.raises(InvalidRequest, match="bootable"):
        client.volumes.create("x", "1M", bootable=True, shareable=True)
    grown = client.volumes.create("x", "2M")
    with pytest.raises(Conflict) as shrunk:
        client.volumes.resize(grown.volume_id, "1M")
    assert shrunk.value.code == "cannot-shrink"


def test_isos_seeds_exports_and_what_the_server_says(client: Client, running: LiveServer) -> None:
    iso = client.isos.create("tools", "tool", "windows", tool_scope="drivers", size="1M")
    assert client.volumes.get(iso.volume_id).waiting
    assert client.volumes.get(iso.volume_id).tool_scope == "drivers"
    seed = client.cloudinit.create_seed("seed", {"user-data": b"#cloud-config\n"})
    assert (seed.received, seed.expected) == (1, 1)
    later = client.cloudinit.create_metadata("later", 2)
    assert client.cloudinit.add_files(later.volume_id, {"meta-data": b"x: y\n"}).files == ["meta-data"]
    disk = client.volumes.create("exported", "1M").volume_id
    exported = client.exports.create(disk, to=BOB, protocol="nbd")
    assert exported.endpoint["uri"].startswith("nbd://")
    (seen,) = client.exports.list(disk).exports
    assert (seen.client, seen.state) == (BOB, "healthy")
    infrastructure = client.on_behalf_of(None)
    prepared = infrastructure.migrations.prepare([disk], BOB, ALICE)
    assert [one.migration for one in infrastructure.migrations.list()] == [prepared.migration]
    assert infrastructure.migrations.revert(migration=prepared.migration).state == "reverted"
    client.exports.delete(disk, to=BOB)
    assert client.server.health().status == "ok"
    assert client.server.version().api == "v1.0"
    assert [one.name for one in client.server.locations()] == ["disk"]
    assert client.server.rescan().volumes >= 3
    assert "elemento_storage" in client.server.metrics()
    assert disk in client.server.revisions().changed or client.server.revisions().complete is False
    assert client.call("version", safe=True)["api"] == "v1.0"


def test_jobs_are_started_waited_for_followed_and_cancelled(client: Client) -> None:
    vid = client.volumes.create("big", "30M").volume_id
    job: Job = client.volumes.checksum.start(vid, method="plain")
    assert client.jobs.wait(job.job).state == "done"
    assert client.jobs.get(job.job).result["size"] == 30_000_128
    assert job.job in [one.job for one in client.jobs.list()]
    assert [one.data["state"] for one in client.jobs.events(job.job) if one.kind == "job"][-1] == "done"
    with pytest.raises(Conflict) as ended:
        client.jobs.cancel(job.job)
    assert ended.value.code == "job-ended"
    assert client.jobs.wait(client.volumes.create.start("at-once", "1M").job).result["name"] == "at-once"
    slow = client.volumes.create("slow", "20G").volume_id
    running = client.volumes.checksum.start(slow, method="plain")
    with pytest.raises(StillRunning):
        client.jobs.wait(running.job, timeout_s=0.05)
    client.jobs.cancel(running.job)
    with pytest.raises(Conflict) as cancelled:
        client.jobs.wait(running.job)
    assert cancelled.value.code == "job-cancelled"


def test_events_as_they_happen(client: Client) -> None:
    since = client.server.revisions().revision
    vid = client.volumes.create("seen", "1M").volume_id
    seen: list[Event] = []
    for event in client.server.events(since):
        seen.append(event)
        if event.subject == vid:
            break
    assert seen[0].kind == "hello"
    assert seen[0].data == {"complete": True}
    assert seen[-1].kind == "volume.created"


async def test_the_same_without_waiting(running: LiveServer) -> None:
    async with AsyncClient(address(running), client=ALICE) as client:
        made = await asyncio.gather(*(client.volumes.create(f"async-{n}", "1M") for n in range(20)))
        listed = [one.volume_id async for one in client.volumes.list(name="async-*", page=6)]
        assert set(listed) == {one.volume_id for one in made}
        volume: Volume = await client.volumes.get(listed[0])
        assert volume.name.startswith("async-")
        started: Job = await client.volumes.checksum.start(listed[0])
        assert (await client.jobs.wait(started.job)).state == "done"
        assert (await client.volumes.convert(listed[0], "qcow2")).format == "qcow2"
        since = (await client.server.revisions()).revision
        await client.volumes.destroy(listed[0])
        async for event in client.server.events(since):
            if event.subject == listed[0]:
                assert event.kind == "volume.removed"
                break
        with pytest.raises(NotFound):
            await client.volumes.get(listed[0])


def test_nobody_is_there() -> None:
    with (
        Client(f"http://127.0.0.1:{free_port()}", retries=Retries(attempts=2, first_pause_s=0.01)) as client,
        pytest.raises(Unreachable, match="cannot be reached"),
    ):
        client.server.version()


def message(connection: socket.socket) -> bytes:
    """One HTTP message, with its body; nothing at the end."""
    data = b""
    while b"\r\n\r\n" not in data:
        if not (more := connection.recv(65536)):
            return b""
        data += more
    head, _, body = data.partition(b"\r\n\r\n")
    length = int(re.search(rb"content-length: (\d+)", head.lower() + b" content-length: 0")[1])  # type: ignore[index]
    while len(body) < length:
        body += connection.recv(65536)
    return head + b"\r\n\r\n" + body


@contextlib.contextmanager
def cutting(server: LiveServer, calls: list[bytes], *, cuts: int) -> Iterator[str]:
    """A way to the server that takes the first requests there, and cuts the connection instead of answering."""
    listening = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            with connection, socket.create_connection((server.listen_host, server.port)) as onward:
                while request := message(connection):
                    calls.append(request)
                    onward.sendall(request)
                    answer = message(onward)
                    if len(calls) <= cuts:
                        break
                    connection.sendall(answer)

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        listening.close()


def test_an_answer_that_is_lost_makes_one_volume_and_no_two(running: LiveServer) -> None:
    calls: list[bytes] = []
    with (
        cutting(running, calls, cuts=2) as way,
        Client(way, client=ALICE, retries=Retries(first_pause_s=0.01)) as client,
    ):
        made = client.volumes.create("once", "1M")
    assert len(calls) == 3
    found = running.listed(name="once")
    assert list(found) == [made.volume_id]


def test_a_change_whose_answer_is_lost_is_sent_once(running: LiveServer) -> None:
    vid = running.create("grown")
    calls: list[bytes] = []
    with cutting(running, calls, cuts=1) as way, Client(way, client=ALICE) as client, pytest.raises(OutcomeUnknown):
        client.volumes.resize(vid, "5M")
    assert len(calls) == 1
    assert running.info(vid)["size"] == 5_000_192, "it was carried out, and the caller was told to look"
