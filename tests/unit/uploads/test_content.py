import hashlib
import itertools
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elemento_storage.uploads import record as records
from elemento_storage.uploads.content import Content
from elemento_storage.uploads.place import MARK, is_abandoned, prepare
from elemento_storage.uploads.sparse import FRAME, SparseBody
from elemento_storage.uploads.transfer import BrokenOff, Checksum, ChecksumMismatch, TooLong, Transfer
from elemento_storage.uploads.turn import Turn, read_offset
from tests.unit.support import uid
from tests.unit.uploads.test_record import UPLOAD, made

KIB = 1024
BLOCK = 64 * KIB


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "content").touch()
    return tmp_path / "content"


@pytest.fixture
def turn(tmp_path: Path) -> Iterator[Turn]:
    (tmp_path / ".elemento" / "trash").mkdir(parents=True)
    records.begin(str(tmp_path), made())
    with Turn(str(tmp_path), UPLOAD) as one:
        yield one


def pieces(*parts: tuple[int, int]) -> bytes:
    return b"".join(bytes([byte]) * count for byte, count in parts)


def view(data: bytes) -> memoryview:
    return memoryview(bytearray(data))


def written(path: Path, *data: bytes, start: int = 0) -> Content:
    content = Content(str(path), start)
    for one in data:
        content.write(view(one))
    return content


def test_what_is_written_is_there(path: Path) -> None:
    data = os.urandom(3 * BLOCK + 17)
    content = written(path, data[:5], data[5:70_000], data[70_000:])
    assert content.keep() == len(data)
    content.close()
    assert path.read_bytes() == data


@pytest.mark.parametrize("cut", [1, BLOCK - 1, BLOCK, 2 * BLOCK + 5])
def test_runs_of_zeros_are_holes_wherever_the_pieces_are_cut(path: Path, cut: int) -> None:
    data = pieces((1, BLOCK), (0, 4 * BLOCK), (2, BLOCK), (0, 2 * BLOCK))
    content = written(path, data[:cut], data[cut:])
    content.keep()
    content.close()
    assert path.read_bytes() == data
    assert path.stat().st_blocks * 512 <= 4 * BLOCK, "of eight blocks two have data"


def test_zeros_at_the_end_count(path: Path) -> None:
    content = written(path, bytes(10), bytes(5 * BLOCK))
    assert content.keep() == 10 + 5 * BLOCK
    content.close()
    assert path.stat().st_size == 10 + 5 * BLOCK


def test_one_byte_in_a_block_of_zeros_is_kept(path: Path) -> None:
    data = bytearray(3 * BLOCK)
    data[BLOCK + 4097] = 1
    content = written(path, bytes(data))
    content.keep()
    content.close()
    assert path.read_bytes() == data


@given(
    st.lists(st.tuples(st.sampled_from([0, 0, 7]), st.integers(1, 3 * BLOCK)), max_size=6),
    st.lists(st.integers(0, 12 * BLOCK), max_size=4),
)
@settings(max_examples=60, deadline=None)
def test_any_bytes_in_any_pieces(
    tmp_path_factory: pytest.TempPathFactory, parts: list[tuple[int, int]], cuts: list[int]
) -> None:
    path = tmp_path_factory.mktemp("any") / "content"
    data = pieces(*parts)
    digest = hashlib.sha256()
    content = Content(str(path), 0, create=True, digest=digest)
    edges = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    for start, end in itertools.pairwise(edges):
        content.write(view(data[start:end]))
    content.keep()
    content.close()
    assert path.read_bytes() == data
    assert digest.digest() == hashlib.sha256(data).digest()


def test_what_was_not_kept_leaves_no_trace_not_even_in_a_hole(path: Path) -> None:
    content = written(path, pieces((1, BLOCK)), pieces((9, 3 * BLOCK)))  # never kept: its server died
    content.close()
    content = written(path, bytes(3 * BLOCK), start=BLOCK)
    content.keep()
    content.close()
    assert path.read_bytes() == pieces((1, BLOCK), (0, 3 * BLOCK))


def test_a_file_that_is_not_there_or_is_a_link(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Content(str(tmp_path / "none"), 0)
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic"):
        Content(str(tmp_path / "link"), 0, create=True)
    assert not (tmp_path / "elsewhere").exists()


def test_parts_are_appended_with_their_holes(path: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.write_bytes(pieces((1, 100)))
    with second.open("wb") as file:
        file.seek(8 * BLOCK)
        file.write(b"end")
        file.truncate(16 * BLOCK)
    content = Content(str(path), 0)
    content.append(str(first), 100)
    content.append(str(second), 16 * BLOCK)
    content.append(str(second), 4)
    assert content.keep() == 104 + 16 * BLOCK
    content.close()
    assert path.read_bytes() == first.read_bytes() + second.read_bytes() + bytes(4)
    assert path.stat().st_blocks * 512 <= 4 * BLOCK
    content = Content(str(path), 0)
    with pytest.raises(OSError, match="ends at"):
        content.append(str(first), 101)
    content.close()


# -- sparse bodies -----------------------------------------------------------------------------------------


def framed(*frames: tuple[bytes, int]) -> bytes:
    return b"".join(FRAME.pack(len(data), zeros) + data for data, zeros in frames)


@pytest.mark.parametrize("step", [1, 7, 16, 100_000])
def test_a_sparse_body_in_pieces_of_any_size(path: Path, step: int) -> None:
    body = framed((b"abc", 10), (b"", 5), (b"d" * 500, 0), (b"", 0), (b"e", BLOCK))
    content = Content(str(path), 0)
    sparse = SparseBody(content, 10**9)
    for start in range(0, len(body), step):
        sparse.write(view(body[start : start + step]))
    assert sparse.is_whole
    content.keep()
    content.close()
    assert path.read_bytes() == b"abc" + bytes(15) + b"d" * 500 + b"e" + bytes(BLOCK)


@pytest.mark.parametrize("frame", [(b"abcd", 0), (b"", 4), (b"a", 3), (b"", 2**64 - 1)])
def test_a_sparse_body_goes_no_further_than_the_end(path: Path, frame: tuple[bytes, int]) -> None:
    content = Content(str(path), 0)
    with pytest.raises(TooLong):
        SparseBody(content, 3).write(view(framed(frame)))
    assert content.position == 0
    content.close()


def test_a_sparse_body_that_ends_within_a_frame(path: Path, turn: Turn) -> None:
    for cut in (framed((b"abc", 0))[:9], framed((b"abc", 0))[:18]):
        transfer = Transfer(Content(str(path), 0), 100, turn=turn, sparse=True)
        transfer.feed([cut])
        with pytest.raises(BrokenOff):
            transfer.finish()
        transfer.close()
    assert turn.offset == 2, "the bytes that came are kept"


# -- transfers ---------------------------------------------------------------------------------------------


def test_a_transfer_is_told_to_the_turn(path: Path, turn: Turn, tmp_path: Path) -> None:
    transfer = Transfer(Content(str(path), 0), 100, turn=turn)
    transfer.feed([b"abc", b"", b"def"])
    assert read_offset(str(tmp_path), UPLOAD)[0] == 0
    assert transfer.finish() == 6
    assert read_offset(str(tmp_path), UPLOAD)[0] == 6
    with pytest.raises(TooLong):
        transfer.feed([bytes(95)])
    transfer.close()


def test_a_checksum_is_asked_before_anything_is_kept(path: Path, turn: Turn) -> None:
    for expected, kept in ((hashlib.sha1(b"other").digest(), 0), (hashlib.sha1(b"abc").digest(), 3)):
        transfer = Transfer(Content(str(path), 0), 100, turn=turn, checksum=Checksum(hashlib.sha1(), expected))
        transfer.feed([b"abc"])
        if kept:
            assert transfer.finish() == 3
        else:
            with pytest.raises(ChecksumMismatch):
                transfer.finish()
            assert path.read_bytes() == b""
        transfer.close()
        assert turn.offset == kept


def test_what_cannot_be_verified_is_not_kept(path: Path, turn: Turn) -> None:
    transfer = Transfer(Content(str(path), 0), 100, turn=turn, checksum=Checksum(hashlib.sha1(), b"x"))
    transfer.feed([b"abc"])
    assert transfer.break_off() == 0
    transfer.close()
    assert turn.offset == 0


def test_out_of_a_socket(path: Path, turn: Turn) -> None:
    data = os.urandom(3_000_000)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.settimeout(5)
        sender = threading.Thread(target=theirs.sendall, args=(data[1000:] + b"the next request",))
        sender.start()
        transfer = Transfer(Content(str(path), 0), len(data), turn=turn)
        transfer.receive(ours, len(data), data[:1000])
        sender.join()
        assert transfer.finish() == len(data)
        assert transfer.unread == 0
        transfer.close()
        assert ours.recv(100) == b"the next request", "not a byte more was taken"
    assert path.read_bytes() == data


@pytest.mark.parametrize("how", ["closed", "stalled", "stopped"])
def test_a_socket_that_gives_no_more(path: Path, turn: Turn, how: str) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.settimeout(0.05)
        theirs.sendall(b"abc")
        if how == "closed":
            theirs.close()
        elif how == "stopped":
            ours.shutdown(socket.SHUT_RD)
        transfer = Transfer(Content(str(path), 0), 100, turn=turn)
        with pytest.raises(BrokenOff):
            transfer.receive(ours, 10, b"0")
        assert transfer.break_off() == 4
        assert transfer.unread == 6
        transfer.close()
    assert turn.offset == 4
    assert path.read_bytes() == b"0abc"


# -- the place ---------------------------------------------------------------------------------------------


def test_whose_place_it_is(tmp_path: Path) -> None:
    place = tmp_path / uid(1)
    assert not is_abandoned(str(place), -1)
    place.mkdir()
    assert is_abandoned(str(place), -1), "its server died before the mark"
    assert not is_abandoned(str(place), 60)
    prepare(str(place))
    assert is_abandoned(str(place), -1)
    (place / MARK).unlink()
    assert not is_abandoned(str(place), -1), "somebody else's"
