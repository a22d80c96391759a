import subprocess
from pathlib import Path

import pytest

from elemento_storage.catalog.discovery import find_locations


def location(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "settings.json").write_text("{}")
    return path


def names(root: Path, depth: int = 2) -> list[str]:
    return [found.name for found in find_locations(str(root), depth)]


def test_locations_down_to_two_levels_by_name(tmp_path: Path) -> None:
    for name in ("b", "a", "c/one", "c/two"):
        location(tmp_path / name)
    location(tmp_path / "d" / "e" / "too-deep")
    (tmp_path / "plain").mkdir()
    (tmp_path / "file").write_text("x")
    assert names(tmp_path) == ["a", "b", "c/one", "c/two"]


def test_depth_is_counted_from_the_root(tmp_path: Path) -> None:
    location(tmp_path / "one" / "two" / "three")
    assert names(tmp_path, 2) == []
    assert names(tmp_path, 3) == ["one/two/three"]
    location(tmp_path)
    assert names(tmp_path, 0) == ["."]


def test_of_nested_locations_only_the_highest_counts(tmp_path: Path) -> None:
    location(tmp_path / "outer" / "inner")
    location(tmp_path / "outer")
    location(tmp_path / "beside" / "inner")
    assert names(tmp_path) == ["beside/inner", "outer"]
    location(tmp_path)
    assert names(tmp_path) == ["."]


def test_path_and_identity_are_those_of_the_directory(tmp_path: Path) -> None:
    path = location(tmp_path / "disk")
    (found,) = find_locations(str(tmp_path), 2)
    assert found.path == str(path)
    assert found.identity == (path.stat().st_dev, path.stat().st_ino)


def test_volume_directories_are_never_searched(tmp_path: Path) -> None:
    location(tmp_path / "here" / f"vid.{'a' * 32}.elimg")
    location(tmp_path / "odd.elimg")
    assert names(tmp_path) == []


def test_settings_must_be_a_regular_file(tmp_path: Path) -> None:
    (tmp_path / "directory" / "settings.json").mkdir(parents=True)
    (tmp_path / "link").mkdir()
    (tmp_path / "settings-elsewhere").write_text("{}")
    (tmp_path / "link" / "settings.json").symlink_to(tmp_path / "settings-elsewhere")
    assert names(tmp_path) == []


def test_links_out_of_the_root_are_not_followed(tmp_path: Path) -> None:
    outside = location(tmp_path / "outside")
    root = tmp_path / "root"
    root.mkdir()
    (root / "link").symlink_to(outside)
    (root / "up").symlink_to("..")
    location(tmp_path / "root-beside")
    (root / "beside").symlink_to(tmp_path / "root-beside")
    assert names(root) == []


def test_a_link_inside_the_root_finds_each_location_once(tmp_path: Path) -> None:
    location(tmp_path / "disk")
    (tmp_path / "again").symlink_to(tmp_path / "disk")
    (tmp_path / "self").symlink_to(".")
    (tmp_path / "dangling").symlink_to("nowhere")
    assert names(tmp_path) == ["disk"]


def test_a_link_makes_no_location_of_what_lies_inside_one(tmp_path: Path) -> None:
    location(tmp_path / "disk")
    location(tmp_path / "disk" / "inner")
    (tmp_path / "again").symlink_to(tmp_path / "disk" / "inner")
    assert names(tmp_path) == ["disk"]


def test_links_in_a_circle_end(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / "to-b").symlink_to(tmp_path / "b")
    (tmp_path / "b" / "to-a").symlink_to(tmp_path / "a")
    location(tmp_path / "b" / "disk")
    assert names(tmp_path, 6) == ["b/disk"]


def test_the_root_may_be_a_link(tmp_path: Path) -> None:
    location(tmp_path / "real" / "disk")
    (tmp_path / "root").symlink_to(tmp_path / "real")
    assert names(tmp_path / "root") == ["disk"]


def test_a_directory_mounted_twice_counts_once(tmp_path: Path) -> None:
    location(tmp_path / "disk")
    again = tmp_path / "again"
    again.mkdir()
    subprocess.run(["mount", "--bind", str(tmp_path / "disk"), str(again)], check=True)
    try:
        assert len(names(tmp_path)) == 1
    finally:
        subprocess.run(["umount", str(again)], check=True)


def test_a_root_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        find_locations(str(tmp_path / "absent"), 2)
    (tmp_path / "file").write_text("x")
    with pytest.raises(NotADirectoryError):
        find_locations(str(tmp_path / "file"), 2)


def test_an_empty_root_has_none(tmp_path: Path) -> None:
    assert names(tmp_path) == []
