import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from elemento_storage.catalog import reservations
from elemento_storage.catalog.locks import LockRecord, write_lock
from elemento_storage.catalog.presence import Presence
from tests.unit.support import python_child, uid

HERE, THERE, DEAD = uid(1), uid(2), uid(3)
LIVE = (
    "import sys\n"
    "from elemento_storage.catalog.presence import Presence\n"
    "presence = Presence(*sys.argv[1:])\n"
    "print('here', flush=True)\n"
    "sys.stdin.readline()\n"
)


@pytest.fixture
def location(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / ".elemento" / "staging").mkdir(parents=True)
    sign = Presence(str(tmp_path), HERE)
    yield tmp_path
    sign.leave()


def reserve(location: Path, volume_id: str, size: int, server: str, *, directory: bool = False) -> Path:
    path = reservations.staging_path(str(location), volume_id, size, server)
    reservations.make(path, directory=directory)
    return Path(path)


def staged(location: Path) -> list[str]:
    return sorted(os.listdir(location / ".elemento" / "staging"))


def test_make_reserves_once(location: Path) -> None:
    for directory in (True, False):
        path = reserve(location, uid(9), 1, HERE, directory=directory)
        assert path.is_dir() is directory
        with pytest.raises(FileExistsError):
            reserve(location, uid(9), 1, HERE, directory=directory)
        reservations.remove(str(path))
        assert staged(location) == []


def test_remove_takes_half_made_data_along_and_is_idempotent(location: Path) -> None:
    path = reserve(location, uid(9), 1, HERE, directory=True)
    (path / "data.img").write_bytes(b"half")
    (path / "deeper").mkdir()
    for _ in range(2):
        reservations.remove(str(path))
    assert staged(location) == []


def test_remove_does_not_follow_a_link(location: Path) -> None:
    precious = location / "precious"
    precious.mkdir()
    (precious / "file").write_text("x")
    path = Path(reservations.staging_path(str(location), uid(9), 1, HERE))
    path.symlink_to(precious)
    reservations.remove(str(path))
    assert (precious / "file").exists()
    assert staged(location) == []


def test_what_others_reserved_is_counted_once_per_volume(location: Path) -> None:
    reserve(location, uid(10), 100, HERE)
    reserve(location, uid(11), 200, THERE, directory=True)
    reserve(location, uid(12), 300, THERE)
    reserve(location, uid(12), 700, DEAD)
    reserve(location, uid(12), 500, uid(4))
    assert reservations.foreign(str(location), HERE) == {uid(11): 200, uid(12): 700}
    assert uid(10) in reservations.foreign(str(location), THERE)


def test_other_things_in_there_count_nothing(location: Path) -> None:
    for name in ("junk", "a.b", f"{uid(9)}.minus.{THERE}", f"{uid(9)}.-5.{THERE}", f"{uid(9)}.\u0665.{THERE}"):
        (location / ".elemento" / "staging" / name).write_text("")
    assert reservations.foreign(str(location), HERE) == {}


def test_only_what_the_dead_left_is_found_and_the_locks_in_it(location: Path) -> None:
    ours = reserve(location, uid(10), 1, HERE, directory=True)
    dead = reserve(location, uid(11), 1, DEAD, directory=True)
    (dead / "data.img").write_bytes(b"half")
    with python_child(LIVE, str(location), THERE) as child:
        theirs = reserve(location, uid(12), 1, THERE)
        assert reservations.dead(str(location), HERE, lease_s=0) == [(str(dead), [])]
        lock = LockRecord(purpose="download", operation=uid(20), server=DEAD)
        write_lock(str(dead), lock)
        write_lock(str(dead), LockRecord(purpose="download", operation=uid(21), server=THERE))
        assert reservations.dead(str(location), HERE, lease_s=0) == [(str(dead), [lock])]
        reservations.remove(str(dead))
        assert staged(location) == sorted([ours.name, theirs.name])
        child.kill()
        child.wait(5)
        assert reservations.dead(str(location), HERE, lease_s=30) == [(str(theirs), [])]
        reservations.remove(str(theirs))
    assert staged(location) == [ours.name]
