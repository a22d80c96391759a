"""Snapshots of what clients write to: each is what the volume held at one moment of the call."""

import contextlib
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.clients import QemuIo, as_nbd, eventually
from tests.e2e.invariants import assert_clean
from tests.e2e.test_snapshots import assert_sound, delete, listed, restore, take
from tests.exporting import MIB, client_of, export, new_volume, refusal, unexport, volume_pids
from tests.live import ALICE, BOB, LiveServer, make_location
from tests.prefix import Writer, reader_of

WAYS = [("nbd", "raw"), ("nbd", "qcow2"), ("iscsi", "raw"), ("iscsi", "qcow2"), ("local", "raw")]
REGION = 4 * MIB
BLOCKS = (48, 700)  # one writer overwrites the same few blocks again and again, one does not


@pytest.fixture
def server(shared: LiveServer) -> LiveServer:
    return shared


@contextlib.contextmanager
def uri_of(answer: dict[str, Any]) -> Iterator[str]:
    """An NBD URI of an export, through an initiator where it is iSCSI."""
    if answer["protocol"] != "iscsi":
        yield answer["endpoint"]["uri"]
    else:
        with as_nbd(answer["qemu"]) as uri:
            yield uri


@contextlib.contextmanager
def writing(*answers: dict[str, Any]) -> Iterator[list[Writer]]:
    """Two writers on each export, with regions of their own. None of them has seen a failure when this is left."""
    with contextlib.ExitStack() as stack:
        writers: list[Writer] = []
        for answer in answers:
            uri = stack.enter_context(uri_of(answer))
            for blocks in BLOCKS:
                number = len(writers)
                writer = Writer(uri, seed=number + 1, base=number * REGION, blocks=blocks)
                writers.append(stack.enter_context(writer))
        eventually(lambda: all(one.flushed > 20 or one.failure for one in writers))
        yield writers


def assert_moment(server: LiveServer, vid: str, writers: list[Writer], take_one: Any, scratch: Path) -> str:
    """Take a snapshot now; it holds all that was acknowledged before the call, and nothing begun after it."""
    before = [one.acknowledged for one in writers]
    snapshot = take_one()
    after = [one.acknowledged + 1 for one in writers]
    held = [one.records_in(reader_of(as_file(server, vid, snapshot, scratch))) for one in writers]
    assert all(low <= has <= high for low, has, high in zip(before, held, after, strict=True)), (before, held, after)
    return str(snapshot)


def as_file(server: LiveServer, vid: str, snapshot: str, scratch: Path) -> Path:
    """What a snapshot holds, as a raw file."""
    directory = server.directory(vid)
    image = directory / "snapshots" / f"{snapshot}.img"
    if image.exists():
        return image
    copy = scratch / f"{snapshot}.raw"
    argv = ["qemu-img", "convert", "-U", "-f", "qcow2", "-l", f"snapshot.name={snapshot}", "-O", "raw"]
    subprocess.run([*argv, directory / "data.qcow2", copy], check=True)
    return copy


@pytest.mark.parametrize(("protocol", "image_format"), WAYS)
def test_a_snapshot_under_load_is_one_moment(
    server: LiveServer, tmp_path: Path, protocol: str, image_format: str
) -> None:
    vid = new_volume(server, 16, format=image_format)
    answer = export(server, vid, protocol=protocol)
    made = []
    with writing(answer) as writers:
        for _ in range(3):
            made.append(assert_moment(server, vid, writers, lambda: take(server, vid), tmp_path))
        delete(server, vid, made.pop(1))
        so_far = [one.acknowledged for one in writers]
        eventually(lambda: all(one.acknowledged > some for one, some in zip(writers, so_far, strict=True)))
    assert export(server, vid)["iqn"] == answer["iqn"]
    unexport(server, vid)
    assert_sound(server, vid)
    assert [one["snapshot"] for one in listed(server, vid)] == made
    now = [one.records_in(reader_of(whole(server, vid, tmp_path))) for one in writers]
    assert now == [one.acknowledged for one in writers], "a write is lost that was acknowledged"
    held = [one.records_in(reader_of(as_file(server, vid, made[0], tmp_path))) for one in writers]
    restore(server, vid, made[0])
    assert [one.records_in(reader_of(whole(server, vid, tmp_path))) for one in writers] == held
    assert_sound(server, vid)
    assert_clean(server)


@pytest.mark.parametrize(
    ("protocol", "image_format", "target"), [("iscsi", "raw", "raw"), ("nbd", "raw", "qcow2"), ("nbd", "qcow2", "raw")]
)
def test_a_clone_under_load_is_one_moment(
    server: LiveServer, tmp_path: Path, protocol: str, image_format: str, target: str
) -> None:
    """Of the volume that is written to, and of a snapshot of it; nobody but the caller notices either."""
    vid = new_volume(server, 16, format=image_format)
    with writing(export(server, vid, protocol=protocol)) as writers:
        snapshot = take(server, vid)
        of_snapshot = {"vid": vid, "creatorID": ALICE, "snapshot": snapshot, "format": target}
        cloned = str(server.call("snapshots/clone", of_snapshot)["vid"])
        before = [one.acknowledged for one in writers]
        written = str(server.call("clone", {"volume_id": vid, "creatorID": ALICE, "format": target})["vid"])
        after = [one.acknowledged + 1 for one in writers]
        held = [one.records_in(reader_of(whole(server, written, tmp_path))) for one in writers]
        assert all(low <= has <= high for low, has, high in zip(before, held, after, strict=True)), (
            before,
            held,
            after,
        )
        assert [one["snapshot"] for one in listed(server, vid)] == [snapshot]
        then = [one.records_in(reader_of(as_file(server, vid, snapshot, tmp_path))) for one in writers]
        assert [one.records_in(reader_of(whole(server, cloned, tmp_path))) for one in writers] == then
        so_far = [one.acknowledged for one in writers]
        eventually(lambda: all(one.acknowledged > some for one, some in zip(writers, so_far, strict=True)))
    unexport(server, vid)
    now = [one.records_in(reader_of(whole(server, vid, tmp_path))) for one in writers]
    assert now == [one.acknowledged for one in writers], "a write is lost that was acknowledged"
    for one in (vid, cloned, written):
        assert_sound(server, one)
    assert_clean(server)


def whole(server: LiveServer, vid: str, scratch: Path) -> Path:
    """The volume as a raw file."""
    (data,) = server.directory(vid).glob("data.*")
    if data.suffix == ".img":
        return data
    copy = scratch / f"{vid}.raw"
    subprocess.run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", data, copy], check=True)
    return copy


def test_several_clients_on_one_raw_volume(server: LiveServer, tmp_path: Path) -> None:
    vid = new_volume(server, 32, shareable=True)
    answers = [export(server, vid, client, protocol="nbd") for client in (ALICE, BOB)]
    with writing(*answers) as writers:
        assert_moment(server, vid, writers, lambda: take(server, vid), tmp_path)


def test_several_clients_of_a_qcow2_volume_are_refused_with_what_to_do(server: LiveServer) -> None:
    vid = new_volume(server, format="qcow2", shareable=True)
    for client in (ALICE, BOB):
        export(server, vid, client, protocol="nbd")
    status, code, told = refusal(server, "snapshots/create", {"vid": vid, "creatorID": ALICE})
    assert (status, code) == (409, "volume-exported")
    assert "convert it to raw" in told
    assert listed(server, vid) == []
    unexport(server, vid, BOB)
    delete(server, vid, take(server, vid))


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
def test_over_smb(server: LiveServer, image_format: str) -> None:
    """Where FUSE shows the volume; an iSCSI client beside it goes through the same file."""
    vid = new_volume(server, format=image_format, shareable=True)
    export(server, vid, protocol="smb")
    with client_of(export(server, vid, BOB, protocol="iscsi")) as client:
        client.write(0, MIB, 1)
        first = take(server, vid)
        client.write(0, MIB, 2)
        second = take(server, vid)
        client.write(0, MIB, 3)
        assert client.reads(0, MIB, 3)
        delete(server, vid, first)
    for client_uid in (ALICE, BOB):
        unexport(server, vid, client_uid)
    restore(server, vid, second)
    (data,) = server.directory(vid).glob("data.*")
    with QemuIo.on_file(data, "raw" if image_format == "raw" else "qcow2") as guest:
        assert guest.reads(0, MIB, 2)
    assert_sound(server, vid)


def test_limits_hold_and_stay(server: LiveServer) -> None:
    vid = new_volume(server)
    answer = export(server, vid, protocol="iscsi", limits={"iops": 2000})
    with client_of(answer) as client:
        client.write(0, MIB, 1)
        take(server, vid)
        client.write(0, MIB, 2)
    assert export(server, vid, limits={"iops": 2000})["limits"] == answer["limits"]


# -- where extents can be shared -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sharing(running: LiveServer) -> Iterator[str]:
    """A location on XFS."""
    path = make_location(running.root, "xfs")
    container = running.root.parent / "xfs.container"
    with container.open("wb") as file:
        file.truncate(512 * MIB)
    subprocess.run(["mkfs.xfs", "-q", str(container)], check=True)
    subprocess.run(["mount", "-o", "loop", str(container), str(path)], check=True)
    try:
        (path / "settings.json").write_text("{}")
        running.call("rescan")
        yield "xfs"
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)
        container.unlink()


@pytest.mark.parametrize("protocol", ["iscsi", "nbd"])
def test_where_extents_are_shared_it_is_done_at_once(
    server: LiveServer, sharing: str, tmp_path: Path, protocol: str
) -> None:
    vid = in_location(server, sharing, 256)
    answer = export(server, vid, protocol=protocol)
    with writing(answer) as writers:
        for _ in range(5):
            assert_moment_in(server, sharing, vid, writers)
        began = time.monotonic()
        take(server, vid)
        assert time.monotonic() - began < 2
        began = time.monotonic()
        clone = server.call("clone", {"volume_id": vid, "creatorID": ALICE})["vid"]
        assert time.monotonic() - began < 2
        assert server.info(clone)["location"] == sharing
        server.call("destroy", {"volume_id": clone})
    unexport(server, vid)
    restored = listed(server, vid)[2]["snapshot"]
    image = server.directory(vid, sharing) / "snapshots" / f"{restored}.img"
    held = [one.records_in(reader_of(image)) for one in writers]
    restore(server, vid, restored, keep=True)
    now = [one.records_in(reader_of(server.directory(vid, sharing) / "data.img")) for one in writers]
    assert now == held
    server.call("destroy", {"volume_id": vid})


def assert_moment_in(server: LiveServer, location: str, vid: str, writers: list[Writer]) -> None:
    before = [one.acknowledged for one in writers]
    snapshot = take(server, vid)
    after = [one.acknowledged + 1 for one in writers]
    image = server.directory(vid, location) / "snapshots" / f"{snapshot}.img"
    held = [one.records_in(reader_of(image)) for one in writers]
    assert all(low <= has <= high for low, has, high in zip(before, held, after, strict=True)), (before, held, after)


def in_location(server: LiveServer, location: str, mebibytes: int) -> str:
    """A raw volume there, made where there is room and moved."""
    vid = new_volume(server, mebibytes)
    if not server.directory(vid, location).exists():
        subprocess.run(["cp", "-a", "--sparse=always", server.directory(vid), server.root / location], check=True)
        subprocess.run(["rm", "-r", server.directory(vid)], check=True)
        server.call("rescan")
    return vid


# -- faults ----------------------------------------------------------------------------------------------------


def large(server: LiveServer) -> str:
    """A raw volume that takes a moment to copy."""
    vid = new_volume(server, 256)
    with (server.directory(vid) / "data.img").open("r+b") as file:
        for position in range(16, 256, 16):
            file.seek(position * MIB)
            file.write(b"\xab" * (12 * MIB))
    return vid


def test_cancelled_in_the_middle_nothing_is_left_and_nobody_notices(server: LiveServer) -> None:
    vid = large(server)
    before = set(server.listed())
    with writing(export(server, vid, protocol="nbd")) as writers:
        for path in ("clone", "snapshots/create"):
            begun = server.post(path, {"vid": vid, "creatorID": ALICE}, Prefer="respond-async").json()
            eventually(lambda: server.http.get(f"jobs/{begun['job']}").json()["phase"] == "copying", every_s=0.005)  # noqa: B023
            assert server.http.delete(f"jobs/{begun['job']}").status_code == 200
            assert eventually(lambda: ended(server, begun["job"]))["state"] == "cancelled"  # noqa: B023
            so_far = [one.acknowledged for one in writers]
            eventually(lambda: all(one.acknowledged > some for one, some in zip(writers, so_far, strict=True)))  # noqa: B023
            assert listed(server, vid) == []
            assert list((server.directory(vid) / "snapshots").iterdir()) == []
            assert set(server.listed(include_locked=True)) == before
        take(server, vid)
    unexport(server, vid)
    assert_clean(server)
    server.call("destroy", {"volume_id": vid})


def test_a_daemon_that_dies_in_the_middle_leaves_no_snapshot(server: LiveServer) -> None:
    vid = large(server)
    answer = export(server, vid, protocol="iscsi")
    with client_of(answer) as client:
        client.write(0, 65536, 1)
        begun = server.post("snapshots/create", {"vid": vid, "creatorID": ALICE}, Prefer="respond-async").json()
        eventually(lambda: server.http.get(f"jobs/{begun['job']}").json()["phase"] == "copying", every_s=0.005)
        assert server.kill_daemons(f"/v/{vid}/")
        job = eventually(lambda: ended(server, begun["job"]))
        assert job["state"] == "failed", job
        eventually(lambda: volume_pids(server, vid))
        client.write(65536, 65536, 2)
        assert client.reads(0, 65536, 1)
        assert listed(server, vid) == []
        take(server, vid)
    unexport(server, vid)
    assert list((server.directory(vid) / "snapshots").glob(".*")) == []
    assert_clean(server)
    server.call("destroy", {"volume_id": vid})


def ended(server: LiveServer, job_id: str) -> dict[str, Any] | None:
    job: dict[str, Any] = server.http.get(f"jobs/{job_id}").json()
    return None if job["state"] in ("running", "cancelling") else job
