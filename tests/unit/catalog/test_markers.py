import contextlib
import os
import socket
from pathlib import Path

import pytest

from elemento_storage.catalog.markers import marker_names, read_marker, remove_marker, touch_markers, write_marker
from elemento_storage.model import marker_name
from tests.unit.support import ALICE, BOB, LONG_AGO_S, age, uid

NAME = marker_name(ALICE, uid(1))


def test_a_marker_is_written_read_and_removed(tmp_path: Path) -> None:
    write_marker(str(tmp_path), NAME, b"content\n")
    assert (tmp_path / NAME).stat().st_mode & 0o777 == 0o600
    assert marker_names(str(tmp_path)) == [NAME]
    found = read_marker(str(tmp_path), NAME)
    assert found is not None
    assert found[0] == b"content\n"
    remove_marker(str(tmp_path), NAME)
    remove_marker(str(tmp_path), NAME)
    assert marker_names(str(tmp_path)) == []
    assert read_marker(str(tmp_path), NAME) is None


def test_touching_is_no_change_of_the_directory(tmp_path: Path) -> None:
    write_marker(str(tmp_path), NAME, b"")
    for path in (tmp_path / NAME, tmp_path):
        os.utime(path, (LONG_AGO_S, LONG_AGO_S))
    touch_markers([str(tmp_path / NAME), str(tmp_path / "gone")])
    assert (tmp_path / NAME).stat().st_mtime > LONG_AGO_S
    assert tmp_path.stat().st_mtime == LONG_AGO_S
    age(tmp_path / NAME)
    assert read_marker(str(tmp_path), NAME) == (b"", LONG_AGO_S)


def test_only_so_much_is_read(tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(b"x" * 10_000_000)
    found = read_marker(str(tmp_path), NAME)
    assert found is not None
    assert len(found[0]) <= 65536


@pytest.mark.parametrize("kind", ["link", "dangling link", "directory", "pipe", "socket"])
def test_what_is_no_file_is_no_marker(tmp_path: Path, kind: str) -> None:
    """Somebody's mistake in one volume does not keep the others of the location from being served."""
    path = tmp_path / NAME
    match kind:
        case "link":
            (tmp_path / "elsewhere").write_text("secret")
            path.symlink_to("elsewhere")
        case "dangling link":
            path.symlink_to("nowhere")
        case "directory":
            path.mkdir()
        case "pipe":
            os.mkfifo(path)
        case _:
            # names of sockets are short
            with contextlib.chdir(tmp_path), socket.socket(socket.AF_UNIX) as one:
                one.bind(NAME)
    assert read_marker(str(tmp_path), NAME) is None


def test_other_names_are_no_markers(tmp_path: Path) -> None:
    for name in ("iqn.exported", f"{NAME}.new", f"x{NAME}", "data.img"):
        (tmp_path / name).touch()
    write_marker(str(tmp_path), marker_name(BOB, uid(1)), b"")
    assert marker_names(str(tmp_path)) == [marker_name(BOB, uid(1))]
