"""Uploads and downloads, by the library and by command, over ways that break."""

import os
import signal
from pathlib import Path

import pytest

from elemento_storage.client import AsyncClient, Client, FileChanged, Progress, Retries
from elemento_storage.client.downloads import checksum_of
from tests.commands import Commands
from tests.live import ALICE, LiveServer
from tests.tus import places
from tests.ways import way_to

MIB = 2**20
QUICK = Retries(first_pause_s=0.05)


def address(server: LiveServer) -> str:
    return server.address.removesuffix("/api/v1.0/")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """12 MiB: data, a hole, data, a hole at the end."""
    path = tmp_path / "disk.img"
    with path.open("wb") as file:
        file.write(os.urandom(3 * MIB))
        file.seek(7 * MIB)
        file.write(os.urandom(2 * MIB))
        file.truncate(12 * MIB)
    return path


def test_there_and_back_with_holes(running: LiveServer, image: Path, tmp_path: Path) -> None:
    seen: list[Progress] = []
    with way_to(running) as way, Client(way.address, client=ALICE) as client:
        made = client.volumes.upload(str(image), "disk", verify=True, on_progress=seen.append)
        assert (made.size, made.name, made.format) == (12 * MIB, "disk", "raw")
        assert 5 * MIB < way.up < 6 * MIB, "holes are not sent"
        back = tmp_path / "back.img"
        got = client.volumes.download(made.volume_id, str(back), verify=True)
        assert got.checksum == checksum_of(str(image))
        assert 5 * MIB < way.down < 6 * MIB, "nor fetched"
    assert back.read_bytes() == image.read_bytes()
    assert back.stat().st_blocks * 512 < 6 * MIB
    assert [one.name for one in tmp_path.iterdir() if "part" in one.name] == []
    assert {one.phase for one in seen} >= {"reading", "sending"}
    sending = [one for one in seen if one.phase == "sending"]
    assert (sending[-1].done, sending[-1].total) == (12 * MIB, 12 * MIB)


async def test_there_and_back_without_waiting(running: LiveServer, image: Path, tmp_path: Path) -> None:
    async with AsyncClient(address(running), client=ALICE) as client:
        made = await client.volumes.upload(str(image), "async", format="qcow2")
        back = tmp_path / "back.qcow2"
        await client.volumes.download(made.volume_id, str(back), format="qcow2")
        again = await client.volumes.upload(str(back), "again", source_format="qcow2")
        sums = [(await client.volumes.checksum(one.volume_id)).checksum for one in (made, again)]
        assert sums == [checksum_of(str(image))] * 2


def test_connections_that_break_are_followed_by_others(running: LiveServer, image: Path, tmp_path: Path) -> None:
    with way_to(running) as way, Client(way.address, client=ALICE, retries=QUICK) as client:
        way.cut_up = 2 * MIB
        made = client.volumes.upload(str(image), "cut")
        assert (way.cuts, way.up < 7 * MIB) == (1, True), "what had arrived was not sent again"
        way.cut_down = way.down + 2 * MIB
        back = tmp_path / "back.img"
        client.volumes.download(made.volume_id, str(back), verify=True)
        assert way.cuts == 2
    assert back.read_bytes() == image.read_bytes()
    assert places(running) == []


def test_a_process_that_is_killed_is_followed_by_another(running: LiveServer, tmp_path: Path) -> None:
    path = tmp_path / "big.img"
    path.write_bytes(os.urandom(16 * MIB))
    with way_to(running) as way:
        commands = Commands(way.address, tmp_path)
        way.hold_up = 10 * MIB
        first = commands.start("upload", path, "resumed")
        assert way.held.wait(20)
        first.send_signal(signal.SIGKILL)
        first.communicate()
        way.released.set()
        way.hold_up = None
        before = way.up
        vid = commands.text("upload", path, "resumed")
        assert way.up - before < 9 * MIB, "it went on where the first was killed"
    assert running.info(vid)["size"] == 16 * MIB
    assert list((tmp_path / ".local/state/elemento-storage/uploads").iterdir()) == []
    assert [one["name"] for one in running.listed(name="resumed").values()] == ["resumed"]

    target = tmp_path / "fetched.img"
    got = Commands(running, tmp_path).json("download", "resumed", target, "--verify")
    assert (got["size"], got["checksum"]) == (16 * MIB, checksum_of(str(path)))
    assert target.read_bytes() == path.read_bytes()
    refused = Commands(running, tmp_path).run("download", "resumed", target, check=1)
    assert "is there already" in refused.stderr


def test_a_file_that_changes_meanwhile_becomes_no_volume(running: LiveServer, image: Path) -> None:
    with way_to(running) as way, Client(way.address, client=ALICE, retries=QUICK) as client:
        changed: list[bool] = []

        def change(progress: Progress) -> None:
            if progress.phase == "sending" and not changed:
                changed.append(True)
                os.utime(image, ns=(1, 1))

        with pytest.raises(FileChanged):
            client.volumes.upload(str(image), "changed", on_progress=change)
    assert running.listed(name="changed") == {}
    assert places(running) == []


def test_a_volume_that_changes_meanwhile_becomes_no_file(running: LiveServer, image: Path, tmp_path: Path) -> None:
    with way_to(running) as way, Client(way.address, client=ALICE, retries=QUICK) as client:
        made = client.volumes.upload(str(image), "moving")
        data = running.directory(made.volume_id) / "data.img"

        target = tmp_path / "moving.img"
        seen: list[Progress] = []

        def after_a_while(progress: Progress) -> None:
            if not seen:
                with data.open("r+b") as file:
                    file.write(b"changed")
            seen.append(progress)

        with pytest.raises(FileChanged):
            client.volumes.download(made.volume_id, str(target), on_progress=after_a_while)
    assert not target.exists()


def test_what_is_no_image_is_refused(running: LiveServer, tmp_path: Path) -> None:
    path = tmp_path / "evil.qcow2"
    commands = Commands(running, tmp_path)
    # Small: everything arrives before it is looked at. Large: it is refused while it is sent.
    for length in (4096, 24 * MIB):
        path.write_bytes(b"QFI\xfb" + bytes([0, 0, 0, 3]) + b"\xff" * length)
        refused = commands.run("upload", path, "evil", "--no-verify", check=None)
        assert refused.returncode in (6, 11), refused.stderr
        assert "qcow2" in refused.stderr, "it says why"
    assert running.listed(name="evil") == {}
    assert list((tmp_path / ".local/state/elemento-storage/uploads").iterdir()) == []
    empty = tmp_path / "empty"
    empty.touch()
    assert "is empty" in Commands(running, tmp_path).run("upload", empty, check=1).stderr
