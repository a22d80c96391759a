import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elemento_storage.catalog.placement import (
    Space,
    Usage,
    creation_problem,
    free_quota,
    quota_problem,
    read_space,
    space_problem,
)
from elemento_storage.catalog.settings import FileSystemKind, LocationSettings
from tests.unit.support import small_file_system

PLENTY = Space(total_bytes=10**15, free_bytes=10**15, is_mount_point=True)
EMPTY = Usage(0, 0)


def problem(
    settings: LocationSettings,
    usage: Usage = EMPTY,
    space: Space = PLENTY,
    *,
    size: int = 1000,
    more_bytes: int | None = None,
    more_volumes: int = 1,
    overcommit: float = 1.0,
) -> str | None:
    more_bytes = size if more_bytes is None else more_bytes
    return quota_problem(
        settings,
        usage,
        space,
        unique=settings.file_system is FileSystemKind.UNIQUE,
        more_bytes=more_bytes,
        more_volumes=more_volumes,
        largest_bytes=size,
    ) or space_problem(space, overcommit=overcommit, more_bytes=more_bytes)


def test_without_limits_only_the_file_system_counts() -> None:
    assert problem(LocationSettings(), Usage(10**6, 10**18)) is None


def test_max_volumes() -> None:
    settings = LocationSettings(max_volumes=2)
    assert problem(settings, Usage(1, 0)) is None
    assert "max-volumes is 2" in str(problem(settings, Usage(2, 0)))
    assert problem(settings, Usage(2, 0), more_volumes=0) is None, "growing adds no volume"
    assert problem(LocationSettings(max_volumes=0)) is not None


def test_max_volume_size() -> None:
    settings = LocationSettings(max_volume_bytes=1000)
    assert problem(settings, size=1000) is None
    assert "max-volume-size" in str(problem(settings, size=1001))
    assert problem(settings, size=1001, more_bytes=1, more_volumes=0) is not None, "growing past it"


def test_max_total_size() -> None:
    settings = LocationSettings(max_total_bytes=3000)
    assert problem(settings, Usage(2, 2000)) is None
    assert "leaves 999 bytes" in str(problem(settings, Usage(2, 2001)))
    assert "leaves 0 bytes" in str(problem(settings, Usage(2, 9000)))
    assert problem(settings, Usage(2, 2500), size=2000, more_bytes=500, more_volumes=0) is None


def test_a_unique_location_is_as_large_as_its_file_system() -> None:
    space = Space(total_bytes=3000, free_bytes=3000, is_mount_point=True)
    assert problem(LocationSettings(), Usage(3, 3000), space) is None
    unique = LocationSettings(file_system=FileSystemKind.UNIQUE)
    assert problem(unique, Usage(2, 2000), space) is None
    assert "file system's size" in str(problem(unique, Usage(2, 2001), space))


def test_overcommit() -> None:
    space = Space(total_bytes=10_000, free_bytes=1000, is_mount_point=False)
    assert problem(LocationSettings(), space=space) is None
    assert "1000 bytes free" in str(problem(LocationSettings(), space=space, size=1001))
    assert problem(LocationSettings(), space=space, size=2000, overcommit=2) is None
    assert problem(LocationSettings(), space=space, size=2001, overcommit=2) is not None
    assert problem(LocationSettings(), space=space, size=10**12, overcommit=0) is None
    assert space_problem(space, overcommit=1, more_bytes=1000) is None


sizes = st.integers(1, 50)
limits = st.none() | st.integers(0, 200)


@given(st.builds(LocationSettings, limits, limits, limits), st.lists(sizes, max_size=20))
def test_volumes_that_were_let_in_never_pass_a_limit(settings: LocationSettings, asked: list[int]) -> None:
    inside: list[int] = []
    for size in asked:
        if problem(settings, Usage(len(inside), sum(inside)), size=size) is None:
            inside.append(size)
    assert settings.max_volumes is None or len(inside) <= settings.max_volumes
    assert settings.max_total_bytes is None or sum(inside) <= settings.max_total_bytes
    assert settings.max_volume_bytes is None or max(inside, default=0) <= settings.max_volume_bytes
    if settings == LocationSettings():
        assert inside == asked


@given(st.builds(LocationSettings, limits, limits, limits), st.builds(Usage, st.integers(0, 9), sizes), sizes)
def test_less_used_never_means_less_room(settings: LocationSettings, usage: Usage, size: int) -> None:
    if problem(settings, usage, size=size) is None:
        assert problem(settings, EMPTY, size=size) is None
        assert problem(settings, usage, size=1) is None


def test_free_quota_is_what_the_limit_leaves_or_what_is_free() -> None:
    space = Space(total_bytes=500, free_bytes=400, is_mount_point=False)
    assert free_quota(LocationSettings(), Usage(1, 100), space) == 400
    assert free_quota(LocationSettings(max_total_bytes=1000), Usage(1, 100), space) == 900
    assert free_quota(LocationSettings(max_total_bytes=50), Usage(1, 100), space) < 0


def test_a_unique_location_has_to_be_mounted() -> None:
    here = Space(1, 1, is_mount_point=True)
    not_here = Space(1, 1, is_mount_point=False)
    assert creation_problem(unique=True, space=here) is None
    assert "not mounted" in str(creation_problem(unique=True, space=not_here))
    assert creation_problem(unique=False, space=not_here) is None


def test_what_the_file_system_says(tmp_path: Path) -> None:
    plain = read_space(str(tmp_path))
    assert not plain.is_mount_point
    assert 0 < plain.free_bytes <= plain.total_bytes
    with small_file_system(tmp_path / "m", 4) as mounted:
        space = read_space(str(mounted))
        assert (space.total_bytes, space.is_mount_point) == (4 * 2**20, True)
        (mounted / "file").write_bytes(b"x" * 2**20)
        assert read_space(str(mounted)).free_bytes == 3 * 2**20
    assert not read_space(str(tmp_path / "m")).is_mount_point
    with pytest.raises(FileNotFoundError):
        read_space(str(tmp_path / "absent"))


@pytest.mark.parametrize("name", ["plain", "with space", "back\\slash", "tab\there", "ünï"])
def test_a_bind_mount_of_the_same_file_system_is_a_mount(tmp_path: Path, name: str) -> None:
    source, target = tmp_path / "source", tmp_path / name
    source.mkdir()
    target.mkdir()
    subprocess.run(["mount", "--bind", str(source), str(target)], check=True)
    try:
        assert read_space(str(target)).is_mount_point
    finally:
        subprocess.run(["umount", str(target)], check=True)
