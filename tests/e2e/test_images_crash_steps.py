"""SIGKILL at every step of taking an image in: nothing is left, or the whole volume; and the job's end is known."""

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from tests.e2e.invariants import assert_clean
from tests.images import DISK_BYTES, compressed, disk_bytes, iso_bytes, make_image, sha256
from tests.live import ALICE, LiveServer, live_server
from tests.web import Web, web_server

FLAGS = ("--download-allow", "127.0.0.1")
# step, what is fetched, whether the volume is there afterwards
STEPS = {
    "lock.removed": ("disk.qcow2.xz", True),  # first: finding what others left comes here too
    "intake.reserved": ("disk.qcow2.xz", False),
    "lock.written": ("disk.qcow2.xz", False),
    "download.piece": ("disk.qcow2.xz", False),
    "download.received": ("disk.qcow2.xz", False),
    "intake.verified": ("disk.qcow2.xz", False),
    "intake.unpacked": ("disk.qcow2.xz", False),
    "intake.inspected": ("disk.qcow2.xz", False),
    "intake.sized": ("disk.qcow2.xz", False),
    "intake.converted": ("disk.qcow2.xz", False),
    "intake.adopted": ("disk.qcow2.xz", False),
    "intake.grown": ("disk.qcow2.xz", False),
    "intake.upgraded": ("old.qcow2", False),
    "create.staged": ("disk.qcow2.xz", False),
    "create.renamed": ("disk.qcow2.xz", True),
    "create.durable": ("disk.qcow2.xz", True),
}


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Web]:
    directory = tmp_path_factory.mktemp("images")
    with web_server() as one:
        packed = compressed(make_image(directory, "disk.qcow2", "qcow2"), "xz")
        one.put("/disk.qcow2.xz", packed)
        one.put("/old.qcow2", make_image(directory, "old.qcow2", "qcow2", "-o", "compat=0.10"))
        one.put("/disk.iso", iso_bytes())
        yield one


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    with live_server(tmp_path_factory.mktemp("server"), *FLAGS) as one:
        yield one


def kill_at(server: LiveServer, path: str, body: dict[str, object], following: str | None) -> str:
    """The id of a job whose server dies at the step it was started for; the next one will die at ``following``."""
    begun = server.post(path, body, Prefer="respond-async")
    assert begun.status_code == 202
    server.wait_dead()
    server.start(None if following is None else {"ELEMENTO_STORAGE_FAULTPOINT": f"kill:{following}"})
    return str(begun.json()["job"])


def test_kill_at_each_step(server: LiveServer, web: Web) -> None:
    """One after the other: the server that finds what one crash left is the one that dies next."""
    steps = [*STEPS, None]
    server.stop()
    server.start({"ELEMENTO_STORAGE_FAULTPOINT": f"kill:{steps[0]}"})
    for step, following in pairwise(steps):
        assert step is not None
        name, is_there = STEPS[step]
        target = "qcow2" if name == "old.qcow2" else "raw"
        content = web.pages[f"/{name}"].content
        body = {"creatorID": ALICE, "name": step, "url": f"{web.address}/{name}", "format": target, "size": 0.009}
        before = set(server.listed())
        job_id = kill_at(server, "create/url", {**body, "checksum": sha256(content)}, following)
        new = set(server.listed()) - before
        assert len(new) == is_there, step
        assert_clean(server)
        job = server.http.get(f"jobs/{job_id}")
        if step in ("intake.reserved", "lock.removed"):  # nobody knows the job yet, or any more
            assert job.status_code == 404, step
        elif step != "lock.written":  # the lock file has its name, and maybe not for ever
            state = "done" if is_there else "interrupted"
            assert (job.json()["state"], job.json()["purpose"]) == (state, "create/url"), step
            assert job.json()["volume_id"] in (new or {job.json()["volume_id"]})
        for vid in new:
            image = server.directory(vid) / "data.img"
            assert image.read_bytes()[:DISK_BYTES] == disk_bytes(), step
            assert server.info(vid)["size"] == 9_000_448
            assert {item.name for item in server.directory(vid).iterdir()} == {"meta.json", "data.img"}


def test_kill_while_a_waiting_volume_gets_its_content(server: LiveServer, web: Web) -> None:
    made = {"creatorID": ALICE, "name": "waits", "isotype": "tool", "os_family": "any", "size": 0.01}
    vid = server.call("iso/create", made)["vid"]
    body = {"creatorID": ALICE, "vid": vid, "url": f"{web.address}/disk.iso"}
    steps = ["intake.adopted", "replace.renamed:2", "intake.filled", None]
    server.stop()
    server.start({"ELEMENTO_STORAGE_FAULTPOINT": f"kill:{steps[0]}"})
    for step, following in pairwise(steps):
        job_id = kill_at(server, "iso/create/url", body, following)
        is_filled = step == "intake.filled"
        data = server.directory(vid) / "data.iso"
        assert (data.read_bytes() == iso_bytes()) is is_filled, step
        assert (data.stat().st_blocks == 0) is not is_filled
        assert list((server.root / "disk" / ".elemento" / "staging").iterdir()) == []
        assert server.http.get(f"jobs/{job_id}").json()["state"] == ("done" if is_filled else "interrupted")
    server.call("destroy", {"volume_id": vid})


def test_every_step_is_killed(tmp_path: Path, web: Web) -> None:
    """The table above names every step that is reached: a new one without a case fails here."""
    trace = tmp_path / "trace"
    with live_server(tmp_path, *FLAGS, env={"ELEMENTO_STORAGE_FAULTPOINT": f"trace:{trace}"}) as server:
        for name, target in (("disk.qcow2.xz", "raw"), ("old.qcow2", "qcow2")):
            content = web.pages[f"/{name}"].content
            body = {"creatorID": ALICE, "name": "x", "url": f"{web.address}/{name}", "format": target}
            server.call("create/url", {**body, "checksum": sha256(content), "size": 0.009})
    known = {*STEPS, "replace.written", "replace.renamed", "intake.tidied"}
    assert set(trace.read_text().split()) - known == set()
