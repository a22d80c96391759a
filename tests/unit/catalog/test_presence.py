import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from elemento_storage.catalog.presence import BOOT_ID, Presence, is_alive, remove_dead
from tests.unit.support import age, python_child, uid

HERE = uid(1)
THERE = uid(2)
LIVE = (
    "import sys\n"
    "from elemento_storage.catalog.presence import Presence\n"
    "presence = Presence(*sys.argv[1:])\n"
    "print('here', flush=True)\n"
    "sys.stdin.readline()\n"
)


@pytest.fixture
def presence(tmp_path: Path) -> Iterator[Presence]:
    sign = Presence(str(tmp_path), HERE)
    yield sign
    sign.leave()


def alive(location: Path, server_id: str, lease_s: float = 30) -> bool:
    return is_alive(str(location), server_id, lease_s=lease_s)


def record(location: Path, server_id: str, **changes: object) -> Path:
    """The file of a server that no longer holds its lock."""
    path = location / ".elemento" / "servers" / server_id
    path.parent.mkdir(parents=True, exist_ok=True)
    values = {"server": server_id, "host": "h", "boot": "another boot", "pid": 1, "started": "x", **changes}
    path.write_text(json.dumps(values))
    return path


@pytest.mark.usefixtures("presence")
def test_this_process_is_alive_however_old_its_file(tmp_path: Path) -> None:
    assert alive(tmp_path, HERE)
    age(tmp_path / ".elemento" / "servers")
    assert alive(tmp_path, HERE, lease_s=0)


def test_who_left_or_never_came_is_dead(tmp_path: Path) -> None:
    assert not alive(tmp_path, HERE)
    Presence(str(tmp_path), HERE).leave()
    assert not alive(tmp_path, HERE)
    assert os.listdir(tmp_path / ".elemento" / "servers") == []


def test_another_process_lives_until_it_is_killed(tmp_path: Path) -> None:
    with python_child(LIVE, str(tmp_path), THERE) as child:
        assert alive(tmp_path, THERE, lease_s=0)
        child.kill()
        child.wait(5)
        assert not alive(tmp_path, THERE, lease_s=1e9), "the lock went with the process: no need to wait for the lease"


def test_a_paused_process_is_alive_whatever_the_lease(tmp_path: Path) -> None:
    with python_child(LIVE, str(tmp_path), THERE) as child:
        child.send_signal(signal.SIGSTOP)
        age(tmp_path / ".elemento" / "servers")
        assert alive(tmp_path, THERE, lease_s=0.001)
        child.send_signal(signal.SIGCONT)


def test_asking_takes_no_lock_away(tmp_path: Path) -> None:
    with python_child(LIVE, str(tmp_path), THERE):
        for _ in range(3):
            assert alive(tmp_path, THERE)


def test_a_server_of_another_machine_lives_for_the_lease(tmp_path: Path) -> None:
    path = record(tmp_path, THERE)
    assert alive(tmp_path, THERE)
    age(path)
    assert not alive(tmp_path, THERE)


def test_without_its_lock_a_server_of_this_boot_is_dead_at_once(tmp_path: Path) -> None:
    assert BOOT_ID
    record(tmp_path, THERE, boot=BOOT_ID)
    assert not alive(tmp_path, THERE)


@pytest.mark.parametrize("content", [b"", b"\xff", b"{}", b"[]"])
def test_a_file_that_says_nothing_is_judged_by_its_age(tmp_path: Path, content: bytes) -> None:
    path = record(tmp_path, THERE)
    path.write_bytes(content)
    assert alive(tmp_path, THERE)
    age(path)
    assert not alive(tmp_path, THERE)


def test_touch_is_a_sign_of_life(tmp_path: Path, presence: Presence) -> None:
    path = tmp_path / ".elemento" / "servers" / HERE
    age(path)
    before = path.stat().st_mtime
    presence.touch()
    assert path.stat().st_mtime > before


def test_touch_notices_that_the_file_is_gone(tmp_path: Path, presence: Presence) -> None:
    (tmp_path / ".elemento" / "servers" / HERE).unlink()
    with pytest.raises(FileNotFoundError):
        presence.touch()


@pytest.mark.usefixtures("presence")
def test_the_file_says_who_we_are(tmp_path: Path) -> None:
    told = json.loads((tmp_path / ".elemento" / "servers" / HERE).read_text())
    assert (told["server"], told["pid"], told["boot"]) == (HERE, os.getpid(), BOOT_ID)


@pytest.mark.usefixtures("presence")
def test_only_the_files_of_the_dead_are_removed(tmp_path: Path) -> None:
    with python_child(LIVE, str(tmp_path), uid(3)):
        record(tmp_path, uid(4))
        age(record(tmp_path, uid(5)))
        record(tmp_path, uid(6), boot=BOOT_ID)
        age(record(tmp_path, f".{uid(7)}"))
        assert sorted(remove_dead(str(tmp_path), lease_s=30)) == [uid(5), uid(6), uid(7)]
        assert sorted(os.listdir(tmp_path / ".elemento" / "servers")) == [HERE, uid(3), uid(4)]
