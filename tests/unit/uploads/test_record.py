import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from elemento_storage.images.incoming import Incoming
from elemento_storage.uploads import record as records
from elemento_storage.uploads.record import Phase, UploadRecord
from elemento_storage.uploads.turn import Busy, Gone, Turn, read_offset
from tests.unit.support import ALICE, age, uid

UPLOAD = uid(7)


def made(**more: object) -> UploadRecord:
    return UploadRecord(upload_id=UPLOAD, owner=ALICE, length=100, created="2026-11-25T02:05:21.261Z", **more)  # type: ignore[arg-type]


@pytest.fixture
def location(tmp_path: Path) -> Iterator[str]:
    (tmp_path / ".elemento" / "trash").mkdir(parents=True)
    yield str(tmp_path)


def test_a_record_is_read_as_it_was_written(location: str) -> None:
    record = made(target=Incoming(volume_id=UPLOAD, creator_id=ALICE, name="disk"), metadata="name ZGlzaw==")
    records.begin(location, record)
    assert records.read(location, UPLOAD) == record
    assert records.ids(location) == [UPLOAD]
    assert not record.is_part
    assert made().is_part


def test_what_is_written_later_takes_its_place(location: str) -> None:
    records.begin(location, made())
    records.write(location, made(phase=Phase.DONE, volume_id=UPLOAD))
    found = records.read(location, UPLOAD)
    assert found is not None
    assert (found.phase, found.volume_id) == (Phase.DONE, UPLOAD)


def test_no_second_upload_of_the_same_id(location: str) -> None:
    records.begin(location, made())
    with pytest.raises(FileExistsError):
        records.begin(location, made())


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"upload_id":"another"}', b"\xff"])
def test_what_is_no_record_is_no_upload(location: str, content: bytes) -> None:
    records.begin(location, made())
    (Path(records.directory_of(location, UPLOAD)) / records.RECORD_FILE).write_bytes(content)
    assert records.read(location, UPLOAD) is None
    assert records.ids(location) == [UPLOAD]


def test_an_upload_that_is_not_there(location: str) -> None:
    assert records.read(location, UPLOAD) is None
    assert records.ids(location) == []
    assert not records.is_old(location, UPLOAD, 1e12, 1)
    for _ in range(2):
        records.remove(location, UPLOAD)
    with pytest.raises(Gone):
        read_offset(location, UPLOAD)
    with pytest.raises(Gone):
        Turn(location, UPLOAD)


def test_removing_leaves_nothing(location: str) -> None:
    records.begin(location, made())
    records.remove(location, UPLOAD)
    assert records.ids(location) == []
    assert os.listdir(f"{location}/.elemento/trash") == []


def test_a_directory_without_a_record_gets_old(location: str) -> None:
    records.begin(location, made())
    directory = Path(records.directory_of(location, UPLOAD))
    assert not records.is_old(location, UPLOAD, directory.stat().st_mtime + 5, 10)
    age(directory)
    assert records.is_old(location, UPLOAD, 2e9, 10)


def test_one_turn_at_a_time_and_the_offset_stays(location: str) -> None:
    records.begin(location, made())
    with Turn(location, UPLOAD) as turn:
        assert turn.offset == 0
        with pytest.raises(Busy):
            Turn(location, UPLOAD, patience_s=0.03)
        turn.advance(12345)
    with Turn(location, UPLOAD) as turn:
        assert turn.offset == 12345
    assert read_offset(location, UPLOAD)[0] == 12345


def test_a_turn_at_an_upload_that_was_removed_meanwhile(location: str) -> None:
    records.begin(location, made())
    directory = records.directory_of(location, UPLOAD)
    os.rename(directory, f"{directory}-aside")
    records.begin(location, made())
    with Turn(location, UPLOAD), pytest.raises(Busy):
        Turn(location, UPLOAD)
    records.remove(location, UPLOAD)
    with pytest.raises(Gone):
        Turn(location, UPLOAD)


@pytest.mark.parametrize("content", [b"", b"-1", b"1e9", b"0" * 21, "٣".encode()])
def test_an_offset_that_is_no_number(location: str, content: bytes) -> None:
    records.begin(location, made())
    (Path(records.directory_of(location, UPLOAD)) / records.OFFSET_FILE).write_bytes(content)
    with pytest.raises(OSError, match="offset"):
        Turn(location, UPLOAD)
    with pytest.raises(OSError, match="offset"):
        read_offset(location, UPLOAD)


def test_the_time_of_the_last_sign_of_life(location: str) -> None:
    records.begin(location, made())
    path = Path(records.directory_of(location, UPLOAD)) / records.OFFSET_FILE
    os.utime(path, (1e9, 1e9))
    assert read_offset(location, UPLOAD)[1] == 1e9
    with Turn(location, UPLOAD) as turn:
        turn.touch()
    assert read_offset(location, UPLOAD)[1] > 1e9
