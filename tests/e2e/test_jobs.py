"""Jobs, events and revisions."""

import json
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.invariants import assert_clean
from tests.live import ALICE, BOB, LiveServer


@pytest.fixture
def big(server: LiveServer) -> Iterator[str]:
    """A raw volume with 600 MiB of data: its conversion takes long enough to be watched."""
    vid = server.create(size=0.8, private=True)
    piece = os.urandom(1 << 20)
    with (server.directory(vid) / "data.img").open("r+b") as image:
        for _ in range(600):
            image.write(piece)
    yield vid
    (data,) = server.directory(vid).glob("data.*")
    data.unlink()


def begin(server: LiveServer, vid: str) -> str:
    body = {"vid": vid, "creatorID": ALICE, "format": "qcow2"}
    response = server.post("update/convert", body, Prefer="respond-async")
    assert response.status_code == 202
    job = str(response.json()["job"])
    assert response.headers["location"] == f"/api/v1.0/jobs/{job}"
    return job


def test_a_job_shows_progress_and_its_result(server: LiveServer, big: str) -> None:
    since = server.call("revisions")["revision"]
    job_id = begin(server, big)
    seen = []
    while (job := server.http.get(f"jobs/{job_id}").json())["state"] == "running":
        seen.append(job["progress"])
        time.sleep(0.02)
        if len(seen) % 5 != 1:
            continue
        locked = server.post("update", {"vid": big, "creatorID": ALICE, "name": "x"})
        if locked.status_code == 423:
            assert locked.json()["locked"]["job"] == job_id
            assert locked.json()["locked"]["progress"] is not None
            assert big not in server.listed()
            shown = server.listed(include_locked=True)[big]["locked"]
            assert (shown["purpose"], shown["job"]) == ("convert", job_id)
    assert job["state"] == "done", job
    assert job["result"] == {"vid": big, "creatorID": ALICE, "format": "qcow2"}
    assert seen == sorted(seen)
    told = [event["progress"] for event in stream(server, f"jobs/{job_id}/events", since=since)]
    assert told == sorted(told)
    assert len({*seen, *told}) >= 3, (seen, told)  # a quick one is hardly told of, a slow one may hold up who asks
    assert server.listed()[big]["format"] == "qcow2"
    assert_clean(server)


def test_a_cancelled_conversion_leaves_the_volume_as_it_was(server: LiveServer, big: str) -> None:
    before = server.info(big)
    job_id = begin(server, big)
    time.sleep(0.2)
    cancelled = server.http.delete(f"jobs/{job_id}")
    assert (cancelled.status_code, cancelled.json()["state"]) == (200, "cancelling")
    deadline = time.monotonic() + 10
    while (job := server.http.get(f"jobs/{job_id}").json())["state"] == "cancelling":
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert job["state"] == "cancelled"
    assert job["error"]["code"] == "job-cancelled"
    time.sleep(1.1)
    after = server.info(big)
    assert {k: after[k] for k in ("format", "size", "name")} == {k: before[k] for k in ("format", "size", "name")}
    assert_clean(server)
    assert server.http.delete(f"jobs/{job_id}").json()["code"] == "job-ended"


def test_a_caller_who_hangs_up_does_not_end_the_work(server: LiveServer, big: str) -> None:
    with pytest.raises(httpx.ReadTimeout):
        server.http.post("update/convert", json={"vid": big, "creatorID": ALICE, "format": "qcow2"}, timeout=0.1)
    deadline = time.monotonic() + 60
    while big not in server.listed():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert server.info(big)["format"] == "qcow2"


def test_a_server_that_is_stopped_rolls_back_what_runs(server: LiveServer, big: str) -> None:
    begin(server, big)
    time.sleep(0.2)
    assert server.stop() == 0
    names = {item.name for item in server.directory(big).iterdir()}
    assert names == {"meta.json", "data.img"}
    server.start()
    assert_clean(server)


def test_the_conversion_dies_with_its_server(server: LiveServer, big: str) -> None:
    begin(server, big)
    time.sleep(0.2)
    server.kill()
    deadline = time.monotonic() + 5
    while subprocess.run(["pgrep", "-f", f"qemu-img convert.*{big}"], check=False).returncode == 0:
        assert time.monotonic() < deadline, "qemu-img goes on writing without its server"
        time.sleep(0.05)
    server.start()
    assert_clean(server)


def test_jobs_of_others_do_not_exist(server: LiveServer, big: str) -> None:
    job_id = begin(server, big)
    assert server.http.get(f"jobs/{job_id}", params={"client_uid": ALICE}).status_code == 200
    for method, path in (("GET", f"jobs/{job_id}"), ("DELETE", f"jobs/{job_id}"), ("GET", f"jobs/{job_id}/events")):
        response = server.http.request(method, path, params={"client_uid": BOB})
        assert (response.status_code, response.json()["code"]) == (404, "job-not-found")
    assert server.call("jobs", {"client_uid": BOB}) == []
    assert server.http.get("jobs/nonsense").status_code == 404
    server.http.delete(f"jobs/{job_id}")


def test_create_as_a_job(server: LiveServer) -> None:
    body = {"creatorID": ALICE, "name": "x", "size": 0.05, "preallocation": "full"}
    response = server.post("create", body, Prefer="respond-async", Idempotency_Key="k")
    assert response.status_code == 202
    job_id = response.json()["job"]
    events = list(stream(server, f"jobs/{job_id}/events", since=0))
    assert events[-1]["state"] == "done"
    result = server.http.get(f"jobs/{job_id}").json()["result"]
    assert result["vid"] in server.listed()
    assert server.post("create", body, Idempotency_Key="k").json() == result


def stream(server: LiveServer, path: str, stop: Any = None, **params: Any) -> Iterator[dict[str, Any]]:
    """The events of a server-sent stream, each with its kind and id."""
    with httpx.Client(base_url=server.address, timeout=20) as http, http.stream("GET", path, params=params) as response:
        assert response.status_code == 200, response.read()
        assert response.headers["content-type"].startswith("text/event-stream")
        event: dict[str, Any] = {}
        for line in response.iter_lines():
            if not line:
                if "data" in event:
                    told = {"kind": event["event"], "id": event.get("id"), **json.loads(event["data"])}
                    if told["kind"] != "hello":
                        yield told
                    if stop is not None and stop(told):
                        return
                event = {}
            elif not line.startswith(":"):
                name, _, value = line.partition(": ")
                event[name] = value


def test_events_are_replayed_and_kept_from_strangers(server: LiveServer) -> None:
    start = server.call("revisions")["revision"]
    public = server.create(name="public")
    private = server.create(name="private", private=True)
    server.call("update", {"vid": public, "creatorID": ALICE, "private": True})
    server.call("destroy", {"volume_id": private, "creatorID": ALICE})
    last = server.create(name="last")

    def is_last(event: dict[str, Any]) -> bool:
        return bool(event["kind"] != "hello" and event["subject"] == last)

    def seen(client: str) -> list[tuple[str, str]]:
        events = stream(server, "revisions/stream", is_last, since=start, client_uid=client)
        return [(event["kind"], event["subject"]) for event in events]

    assert seen(ALICE) == [
        ("volume.created", public),
        ("volume.created", private),
        ("volume.changed", public),
        ("volume.removed", private),
        ("volume.created", last),
    ]
    assert seen(BOB) == [("volume.created", public), ("volume.removed", public), ("volume.created", last)]
    changes = server.call("revisions", {"since": start, "client_uid": BOB})
    assert (changes["complete"], changes["changed"], changes["removed"]) == (True, [last], [public])
    changes = server.call("revisions", {"since": start, "client_uid": ALICE})
    assert (set(changes["changed"]), changes["removed"]) == ({public, last}, [private])
    assert server.call("revisions", {"since": changes["revision"]})["changed"] == []


def test_last_event_id_and_live_events(server: LiveServer) -> None:
    first = server.create()
    since = server.call("revisions")["revision"]
    got: list[dict[str, Any]] = []

    def follow() -> None:
        got.extend(stream(server, "events", lambda event: event["kind"] == "volume.removed", since=since))

    thread = threading.Thread(target=follow)
    thread.start()
    time.sleep(0.3)
    server.call("update", {"vid": first, "creatorID": ALICE, "name": "live"})
    server.call("destroy", {"volume_id": first})
    thread.join(10)
    assert [event["kind"] for event in got] == ["volume.changed", "volume.removed"]
    assert all(int(event["id"]) == event["revision"] for event in got)
    bad = server.http.get("events", headers={"Last-Event-ID": "x"})
    assert bad.status_code == 400


def test_revisions_grow_over_a_restart_and_say_when_they_do_not_know(server: LiveServer) -> None:
    before = server.call("revisions")["revision"]
    time.sleep(1.1)
    server.kill()
    server.start()
    after = server.call("revisions", {"since": before})
    assert after["revision"] > before
    assert after["complete"] is False


def test_changes_made_behind_the_servers_back_are_events_too(server: LiveServer) -> None:
    vid = server.create()
    since = server.call("revisions")["revision"]
    meta_path = Path(server.directory(vid) / "meta.json")
    meta_path.write_text(meta_path.read_text().replace('"disk"', '"edited"'))
    events = stream(server, "revisions/stream", lambda e: e["kind"] == "volume.changed", since=since)
    assert [event["subject"] for event in events] == [vid]


def test_progress_is_told_at_least_every_second(server: LiveServer, big: str) -> None:
    since = server.call("revisions")["revision"]
    job_id = begin(server, big)
    moments = []
    for event in stream(server, f"jobs/{job_id}/events", since=since):
        moments.append((time.monotonic(), event["progress"], event["state"]))
    assert moments[-1][2] == "done"
    assert all(later[0] - earlier[0] < 1 for earlier, later in pairwise(moments))
    assert [progress for _, progress, _ in moments] == sorted(progress for _, progress, _ in moments)
