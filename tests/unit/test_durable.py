import os
import stat
import threading
from pathlib import Path

import pytest

from elemento_storage.durable import create, fsync_directory, fsync_file, replace, write_all
from tests.unit.support import small_file_system


def test_replace_creates_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for content in (b"first", b"", b"second" * 100_000):
        replace(str(path), content)
        assert path.read_bytes() == content
        assert os.listdir(tmp_path) == ["file"]


def test_replace_gives_the_mode_it_was_told(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    replace(str(path), b"x", mode=0o600)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_reader_sees_the_old_bytes_or_the_new_ones(tmp_path: Path) -> None:
    path = tmp_path / "file"
    contents = {letter * 70_000 for letter in (b"a", b"b", b"c")}
    replace(str(path), next(iter(contents)))
    stop = threading.Event()
    seen: set[bytes] = set()

    def read() -> None:
        while not stop.is_set():
            seen.add(path.read_bytes())

    reader = threading.Thread(target=read)
    reader.start()
    for _ in range(20):
        for content in contents:
            replace(str(path), content)
    stop.set()
    reader.join()
    assert seen
    assert seen <= contents


def test_replace_of_a_link_replaces_the_link_not_its_target(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_bytes(b"precious")
    link = tmp_path / "link"
    link.symlink_to(target)
    replace(str(link), b"new")
    assert target.read_bytes() == b"precious"
    assert not link.is_symlink()
    assert link.read_bytes() == b"new"


def test_a_replace_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    occupied = tmp_path / "occupied"
    occupied.mkdir()
    (occupied / "inside").write_bytes(b"x")
    with pytest.raises(OSError, match="directory"):
        replace(str(occupied), b"new")
    assert os.listdir(tmp_path) == ["occupied"]
    with pytest.raises(FileNotFoundError):
        replace(str(tmp_path / "absent" / "file"), b"new")


def test_create_never_touches_what_is_there(tmp_path: Path) -> None:
    path = tmp_path / "file"
    create(str(path), b"one")
    with pytest.raises(FileExistsError):
        create(str(path), b"two")
    assert path.read_bytes() == b"one"
    dangling = tmp_path / "dangling"
    dangling.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileExistsError):
        create(str(dangling), b"two")
    assert not (tmp_path / "elsewhere").exists()


def test_a_write_that_the_kernel_cuts_short_is_never_taken_for_whole(tmp_path: Path) -> None:
    """On a file system that runs full in the middle, write(2) says how much it took and no more."""
    with small_file_system(tmp_path / "small", 1) as mounted:
        for write in (create, replace):
            with pytest.raises(OSError, match="No space left"):
                write(str(mounted / "file"), b"x" * (2 << 20))
            (mounted / "file").unlink(missing_ok=True)
        descriptor = os.open(mounted / "file", os.O_WRONLY | os.O_CREAT)
        with pytest.raises(OSError, match="No space left"):
            write_all(descriptor, b"x" * (2 << 20))
        os.close(descriptor)


def test_fsync_insists_on_the_right_kind(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x")
    fsync_file(str(path))
    fsync_directory(str(tmp_path))
    with pytest.raises(NotADirectoryError):
        fsync_directory(str(path))
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(OSError, match="symbolic links"):
        fsync_file(str(tmp_path / "link"))
    with pytest.raises(FileNotFoundError):
        fsync_file(str(tmp_path / "absent"))
