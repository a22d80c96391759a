import io
import time
from collections.abc import Iterator

import pycdlib
import pytest

from elemento_storage.engine.seed_iso import build_seed

FILES = {
    "user-data": b"#cloud-config\n",
    "meta-data": b"instance-id: x\n",
    "a" * 64: b"#!/bin/sh\nexit\n",
    "empty": b"",
}


@pytest.fixture
def time_zone(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    yield monkeypatch
    monkeypatch.undo()
    time.tzset()


def read_back(image: bytes, **path: str) -> bytes:
    reader, content = pycdlib.PyCdlib(), io.BytesIO()
    reader.open_fp(io.BytesIO(image))
    try:
        reader.get_file_from_iso_fp(content, **path)
    finally:
        reader.close()
    return content.getvalue()


def test_every_file_is_there_by_its_name() -> None:
    image = build_seed(FILES)
    for name, content in FILES.items():
        assert read_back(image, rr_path=f"/{name}") == content
        assert read_back(image, joliet_path=f"/{name}") == content


def test_it_has_the_label_that_cloud_init_looks_for() -> None:
    image = build_seed(FILES)
    assert image[32769:32774] == b"CD001"
    assert image[32808:32840] == b"cidata".ljust(32)
    assert len(image) % 2048 == 0


def test_the_same_files_give_the_same_image(time_zone: pytest.MonkeyPatch) -> None:
    first = build_seed(FILES)
    time_zone.setenv("TZ", "Asia/Kathmandu")
    time.tzset()
    time_zone.setattr(time, "time", lambda: 2_000_000_000.0)
    assert build_seed(dict(reversed(FILES.items()))) == first
    assert build_seed({**FILES, "empty": b"no more"}) != first


def test_a_seed_of_no_files_is_an_image_too() -> None:
    assert build_seed({})[32769:32774] == b"CD001"
