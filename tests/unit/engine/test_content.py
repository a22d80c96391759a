"""Files as content: where they have holes, what their parts are, and that they stay what they were."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from elemento_storage.engine.content import (
    LEAST_HOLE_BYTES,
    Content,
    Extent,
    FileContent,
    FileRange,
    OpenFile,
    Part,
    Zeros,
    coarse,
    merged,
    read_into,
)
from elemento_storage.errors import ImageChanged

MIB = 2**20


def sparse(path: Path, size: int, *data: tuple[int, bytes]) -> Path:
    """A file with holes around its data."""
    with path.open("wb") as file:
        for offset, content in data:
            file.seek(offset)
            file.write(content)
        file.truncate(size)
        os.fsync(file.fileno())
    return path


def spans(content: Content, start: int, stop: int) -> list[tuple[int, int, bool]]:
    return [(one.start, one.length, one.zero) for one in content.extents(start, stop)]


def test_extents_cover_a_file_with_holes(tmp_path: Path) -> None:
    path = sparse(tmp_path / "a", 8 * MIB, (MIB, b"x" * MIB), (5 * MIB, b"y" * 4096))
    content = FileContent(OpenFile(str(path)))
    assert spans(content, 0, 8 * MIB) == [
        (0, MIB, True),
        (MIB, MIB, False),
        (2 * MIB, 3 * MIB, True),
        (5 * MIB, 4096, False),
        (5 * MIB + 4096, 3 * MIB - 4096, True),
    ]
    assert spans(content, MIB + 10, MIB + 20) == [(MIB + 10, 10, False)]
    assert spans(content, 7 * MIB, 7 * MIB) == []


def test_an_empty_file_has_nothing(tmp_path: Path) -> None:
    content = FileContent(OpenFile(str(sparse(tmp_path / "a", 0))))
    assert not list(content.extents(0, 0))
    assert not list(content.parts(0, 0))


def test_parts_are_stretches_of_the_file_and_long_zeros(tmp_path: Path) -> None:
    file = OpenFile(str(sparse(tmp_path / "a", 4 * MIB, (0, b"x" * MIB), (MIB + 8192, b"y" * MIB))))
    first, second = FileContent(file).parts(100, 4 * MIB)
    assert first == FileRange(file.descriptor, 100, 2 * MIB + 8192 - 100)  # the small hole is read
    assert second == Zeros(2 * MIB - 8192)


def test_reading_gives_the_bytes(tmp_path: Path) -> None:
    path = sparse(tmp_path / "a", 3 * MIB, (MIB, os.urandom(MIB)))
    buffer = bytearray(2 * MIB)
    read_into(FileContent(OpenFile(str(path))), MIB // 2, memoryview(buffer))
    assert buffer == path.read_bytes()[MIB // 2 : MIB // 2 + 2 * MIB]


def test_a_file_that_was_cut_off_is_noticed(tmp_path: Path) -> None:
    path = sparse(tmp_path / "a", MIB, (0, b"x" * MIB))
    content = FileContent(OpenFile(str(path)))
    parts = list(content.parts(0, MIB))
    os.truncate(path, 10)
    assert parts
    with pytest.raises(OSError, match="shorter"):
        read_into(_Fixed(parts), 0, memoryview(bytearray(MIB)))


class _Fixed:
    size_bytes = MIB

    def __init__(self, parts: list[Part]) -> None:
        self._parts = parts

    def parts(self, start: int, stop: int) -> Iterator[Part]:
        assert (start, stop) == (0, MIB)
        return iter(self._parts)


@pytest.mark.parametrize("change", ["write", "truncate", "touch"])
def test_a_file_that_was_changed_is_noticed(tmp_path: Path, change: str) -> None:
    path = sparse(tmp_path / "a", 4096)
    file = OpenFile(str(path))
    file.require_unchanged()
    if change == "write":
        os.utime(path, ns=(1, 1))
        with path.open("r+b") as other:
            other.write(b"x")
    elif change == "truncate":
        os.truncate(path, 8192)
    else:
        os.utime(path, (1, 1))
    with pytest.raises(ImageChanged):
        file.require_unchanged()
    file.close()


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to("/etc/passwd")
    for name in ("fifo", "link", "."):
        with pytest.raises(OSError):
            OpenFile(str(tmp_path / name))


def test_neighbours_are_joined() -> None:
    one = Extent(0, 10, zero=True, hole=True)
    two = Extent(10, 10, zero=True, hole=True)
    three = Extent(20, 10, zero=True, hole=False)
    assert list(merged([one, two, three])) == [Extent(0, 20, zero=True, hole=True), three]
    assert list(merged([])) == []


def test_short_zeros_become_data() -> None:
    data = Extent(0, 4096, zero=False, hole=False)
    short = Extent(4096, LEAST_HOLE_BYTES - 1, zero=True, hole=True)
    long = Extent(short.stop, LEAST_HOLE_BYTES, zero=True, hole=False)
    last = Extent(short.stop, 512, zero=False, hole=False)
    assert [(one.length, one.zero) for one in coarse([data, short, last])] == [(last.stop, False)]
    # Together with more zeros it is long enough.
    assert [(one.length, one.zero) for one in coarse([data, short, long])] == [
        (4096, False),
        (2 * LEAST_HOLE_BYTES - 1, True),
    ]
