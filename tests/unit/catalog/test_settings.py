import contextlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elemento_storage.catalog.settings import (
    BrokenSettings,
    FileSystemKind,
    LocationSettings,
    parse_settings,
    read_settings,
)


def parsed(**values: Any) -> LocationSettings:
    return parse_settings(json.dumps({key.replace("_", "-"): value for key, value in values.items()}).encode())


def test_no_keys_means_no_limits() -> None:
    assert parse_settings(b"{}") == LocationSettings(None, None, None, FileSystemKind.DEFAULT)
    assert parsed(max_volumes=None, max_volume_size=None, max_total_size=None) == LocationSettings()
    assert parsed(comment="keys of others", version=[1]) == LocationSettings()


def test_all_keys() -> None:
    settings = parsed(max_volumes=10, max_volume_size="50Gi", max_total_size="200G", file_system="unique")
    assert settings == LocationSettings(10, 50 * 2**30, 200 * 10**9, FileSystemKind.UNIQUE)
    assert parsed(file_system="default").file_system is FileSystemKind.DEFAULT


def test_sizes_may_be_numbers() -> None:
    assert parsed(max_total_size=1000).max_total_bytes == 1000
    assert parsed(max_total_size="1000").max_total_bytes == 1000
    assert parsed(max_total_size=0).max_total_bytes == 0
    assert parsed(max_volumes=0).max_volumes == 0


def test_sizes_too_large_for_any_disk_are_broken_or_a_limit() -> None:
    for digits in (30, 400, 4000, 1_000_000):
        with contextlib.suppress(BrokenSettings):
            limit = parsed(max_total_size=f"1{'0' * digits}P").max_total_bytes
            assert limit is not None
            assert limit >= 10**digits


def test_a_volume_of_exactly_the_largest_size_fits_though_it_is_rounded_up() -> None:
    largest = parsed(max_volume_size="0.1G").max_volume_bytes
    assert largest is not None
    assert largest >= 100_000_256
    assert largest - 100_000_000 < 512


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"max-volumes": -1}, "max-volumes"),
        ({"max-volumes": 1.5}, "max-volumes"),
        ({"max-volumes": "10"}, "max-volumes"),
        ({"max-volumes": True}, "max-volumes"),
        ({"max-volume-size": "big"}, "max-volume-size"),
        ({"max-volume-size": -1}, "max-volume-size"),
        ({"max-total-size": "50X"}, "max-total-size"),
        ({"max-total-size": True}, "max-total-size"),
        ({"max-total-size": ["50G"]}, "max-total-size"),
        ({"max-total-size": {}}, "max-total-size"),
        ({"file-system": "other"}, "default or unique"),
        ({"file-system": ["unique"]}, "default or unique"),
        ({"file-system": True}, "default or unique"),
    ],
)
def test_a_wrong_value_is_named(values: dict[str, Any], told: str) -> None:
    with pytest.raises(BrokenSettings, match=told):
        parse_settings(json.dumps(values).encode())


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"5", b"null", b'"x"', b"{} {}", b"\xff\xfe", b'{"max-volumes": NaN}', b"[" * 100_000],
    ids=lambda content: repr(content[:12]),
)
def test_what_is_not_a_json_object_is_broken(content: bytes) -> None:
    with pytest.raises(BrokenSettings):
        parse_settings(content)


@given(st.binary(max_size=60) | st.text('{}[]":,max-volumestle 0123456789.e+-', max_size=60).map(str.encode))
def test_any_bytes_are_settings_or_broken(content: bytes) -> None:
    with contextlib.suppress(BrokenSettings):
        parse_settings(content)


@given(
    st.dictionaries(
        st.sampled_from(["max-volumes", "max-volume-size", "max-total-size", "file-system"]),
        st.none() | st.booleans() | st.integers(-(2**64), 2**64) | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(max_size=8) | st.lists(st.integers(), max_size=2),
    )
)  # fmt: skip
def test_limits_that_are_believed_make_sense(values: dict[str, Any]) -> None:
    try:
        settings = parse_settings(json.dumps(values).encode())
    except BrokenSettings:
        return
    for limit in (settings.max_volumes, settings.max_volume_bytes, settings.max_total_bytes):
        assert limit is None or limit >= 0


def test_read_from_a_directory(tmp_path: Path) -> None:
    (tmp_path / "settings.json").write_text('{"max-volumes": 3}')
    assert read_settings(str(tmp_path)).max_volumes == 3


def test_what_is_there_but_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_settings(str(tmp_path))
    os.mkfifo(tmp_path / "settings.json")
    with pytest.raises(BrokenSettings, match="not a regular file"):
        read_settings(str(tmp_path))
    (tmp_path / "settings.json").unlink()
    (tmp_path / "elsewhere.json").write_text("{}")
    (tmp_path / "settings.json").symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(OSError, match="symbolic links"):
        read_settings(str(tmp_path))


def test_an_endless_file_is_not_read_to_its_end(tmp_path: Path) -> None:
    with (tmp_path / "settings.json").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(BrokenSettings):
        read_settings(str(tmp_path))
