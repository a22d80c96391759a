import hashlib
import os
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from elemento_storage.images.sparse import SparseWriter, hash_piece

PART = st.tuples(st.booleans(), st.integers(0, 200_000))


@settings(max_examples=60, deadline=None)
@given(parts=st.lists(PART, max_size=8), piece=st.sampled_from([1000, 65536, 100_000, 1 << 20]))
def test_whatever_the_pieces_are_the_file_is_the_same(
    parts: list[tuple[bool, int]], piece: int, tmp_path_factory: object
) -> None:
    content = b"".join((b"x" if is_data else b"\0") * length for is_data, length in parts)
    descriptor = os.memfd_create("sparse")
    try:
        hasher = hashlib.sha256()
        writer = SparseWriter(descriptor, hasher)
        for start in range(0, len(content), piece):
            writer.write(content[start : start + piece])
        writer.finish()
        assert writer.position == len(content)
        assert os.pread(descriptor, len(content) + 1, 0) == content
        assert hasher.hexdigest() == hashlib.sha256(content).hexdigest()
        again = hashlib.sha256()
        assert hash_piece(descriptor, again, 0, len(content) + 1) == len(content)
        assert again.hexdigest() == hasher.hexdigest()
    finally:
        os.close(descriptor)


def test_zeros_take_no_room(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with path.open("wb", buffering=0) as file:
        writer = SparseWriter(file.fileno())
        for _ in range(64):
            writer.write(bytes(50_000))
        writer.write(b"x")
        writer.write(bytes(1 << 20))
        writer.finish()
    assert path.stat().st_size == 64 * 50_000 + 1 + (1 << 20)
    assert path.stat().st_blocks * 512 <= 2 * 65536
