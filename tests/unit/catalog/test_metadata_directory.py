import os
from pathlib import Path

import pytest

from elemento_storage.catalog.metadata_directory import (
    MetadataFiles,
    expected_file,
    is_file_name,
    list_files,
    put_files,
    read_files,
)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "cloud-init-metadata").mkdir()
    return tmp_path


@pytest.mark.parametrize("name", ["user-data", "meta-data", "a", "script_a.sh", "-", "_", "A.B", "a" * 64, "a.."])
def test_names_of_files(name: str) -> None:
    assert is_file_name(name)


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        ".hidden",
        "a" * 65,
        "a/b",
        "../user-data",
        "a b",
        "a\n",
        "a\0",
        "é",
        "a\\b",
        "elemento.3.expected",
    ],
)
def test_names_of_no_files(name: str) -> None:
    assert not is_file_name(name)


def test_what_is_there(directory: Path) -> None:
    inside = directory / "cloud-init-metadata"
    assert list_files(str(directory)) == MetadataFiles({}, None)
    (directory / expected_file(3)).touch()
    (inside / "user-data").write_bytes(b"12345")
    (inside / "elemento.lock").touch()
    (inside / ".user-data.swp").touch()
    (inside / "user-data~").touch()
    (inside / "scripts").mkdir()
    (inside / "link").symlink_to("/etc/hostname")
    assert list_files(str(directory)) == MetadataFiles({"user-data": 5}, 3, ("link", "scripts", "user-data~"))


def test_a_volume_without_the_directory(tmp_path: Path) -> None:
    assert list_files(str(tmp_path)) is None
    (tmp_path / "cloud-init-metadata").touch()
    assert list_files(str(tmp_path)) is None


def test_files_are_put_and_replaced(directory: Path) -> None:
    put_files(str(directory), {"user-data": b"old", "meta-data": b"x"})
    path = directory / "cloud-init-metadata" / "user-data"
    path.chmod(0o600)
    put_files(str(directory), {"user-data": b"new"})
    assert read_files(str(directory), ["meta-data", "user-data"], 100) == {"meta-data": b"x", "user-data": b"new"}
    assert path.stat().st_mode & 0o777 == 0o600
    assert os.listdir(directory) == ["cloud-init-metadata"]


def test_reading_has_a_limit_and_follows_no_links(directory: Path) -> None:
    put_files(str(directory), {"user-data": b"1234567890"})
    assert read_files(str(directory), ["user-data"], 4) == {"user-data": b"1234"}
    (directory / "cloud-init-metadata" / "link").symlink_to("/etc/hostname")
    with pytest.raises(OSError, match="symbolic links"):
        read_files(str(directory), ["link"], 4)
