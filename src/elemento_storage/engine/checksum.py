"""Checksums of what a guest sees: the same whatever the format, and whatever is allocated.

The *block checksum* is the hash of the hashes of all blocks of 4 MiB, the last of which may be shorter:

    H( H(block 0) + H(block 1) + … )

A block of zeros has a known hash, so holes cost next to nothing, and blocks are hashed by several threads. It is what
ovirt-imageio computes by default (``blkhash.py``; blake2b with 32 bytes), so that its tools can verify ours. A plain
hash of all bytes has to go through every zero.
"""

import hashlib
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from enum import StrEnum
from typing import Any, Final

from elemento_storage.engine.content import Content, FileRange, Zeros, coarse, read_file, read_into

BLOCK_BYTES: Final = 4 * 2**20
_DIGEST_BYTES: Final = 32
_ZERO_DIGESTS: Final = 32768  #: of how many zero blocks the digests are put together at once
_PIECE_BYTES: Final = 2**20
_MOST_THREADS: Final = 4

OnBytes = Callable[[int], None]


class Algorithm(StrEnum):
    """How blocks, and their hashes, are hashed."""

    SHA256 = "sha256"
    BLAKE2B = "blake2b"


def new_hash(algorithm: Algorithm, data: bytes | memoryview = b"") -> Any:
    """A hash of 32 bytes, as hashlib has it."""
    if algorithm is Algorithm.BLAKE2B:
        return hashlib.blake2b(data, digest_size=_DIGEST_BYTES)
    return hashlib.sha256(data)


def block_checksum(content: Content, algorithm: Algorithm, on_bytes: OnBytes) -> str:
    """The block checksum in hex digits. Blocks. ``on_bytes`` hears how far it is and may raise. Raises OSError."""
    zeros = bytes(BLOCK_BYTES)
    zero_digest = new_hash(algorithm, zeros).digest()
    outer = new_hash(algorithm)
    local = threading.local()

    def digest(start: int, stop: int) -> bytes:
        if not hasattr(local, "buffer"):
            local.buffer = memoryview(bytearray(BLOCK_BYTES))
        view = local.buffer[: stop - start]
        read_into(content, start, view)
        if len(view) == BLOCK_BYTES and zeros.startswith(view):  # memcmp, which comparing views is not
            return bytes(zero_digest)
        return bytes(new_hash(algorithm, view).digest())

    threads = min(_MOST_THREADS, len(os.sched_getaffinity(0)))
    under_way: deque[Future[bytes]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="checksum") as pool:
        try:
            for start, stop, is_zero in _blocks(content):
                if is_zero:
                    while under_way:
                        outer.update(under_way.popleft().result())
                    _add_zero_blocks(outer, zero_digest, (stop - start) // BLOCK_BYTES)
                else:
                    if len(under_way) > 2 * threads:
                        outer.update(under_way.popleft().result())
                    under_way.append(pool.submit(digest, start, stop))
                on_bytes(stop)
            while under_way:
                outer.update(under_way.popleft().result())
        finally:
            for future in under_way:
                future.cancel()
    return str(outer.hexdigest())


def plain_checksum(content: Content, algorithm: Algorithm, on_bytes: OnBytes) -> str:
    """The hash of all bytes in hex digits. Blocks. Raises OSError, and what ``on_bytes`` raises."""
    hashed = new_hash(algorithm)
    buffer = memoryview(bytearray(_PIECE_BYTES))
    zeros = bytes(_PIECE_BYTES)
    done = 0
    for part in content.parts(0, content.size_bytes):
        if not isinstance(part, FileRange | Zeros):
            hashed.update(part)
            done += len(part)
            on_bytes(done)
            continue
        for position in range(0, part.length, _PIECE_BYTES):
            length = min(_PIECE_BYTES, part.length - position)
            if isinstance(part, Zeros):
                hashed.update(zeros[:length])
            else:
                read_file(FileRange(part.descriptor, part.offset + position, length), buffer[:length])
                hashed.update(buffer[:length])
            done += length
            on_bytes(done)
    return str(hashed.hexdigest())


CHECKSUMS: Final[dict[str, Callable[[Content, Algorithm, OnBytes], str]]] = {
    "blocks": block_checksum,
    "plain": plain_checksum,
}


def _blocks(content: Content) -> Iterator[tuple[int, int, bool]]:
    """Start, stop and whether it is zero: single blocks, and whole runs of zero ones."""
    size_bytes = content.size_bytes
    done = 0
    for extent in coarse(content.extents(0, size_bytes)):
        if extent.zero:
            first = max(done, -(-extent.start // BLOCK_BYTES) * BLOCK_BYTES)
            last = extent.stop // BLOCK_BYTES * BLOCK_BYTES
            if first < last:
                yield from _data_blocks(done, first)
                yield first, last, True
                done = last
    yield from _data_blocks(done, size_bytes)


def _data_blocks(start: int, stop: int) -> Iterator[tuple[int, int, bool]]:
    for position in range(start, stop, BLOCK_BYTES):
        yield position, min(position + BLOCK_BYTES, stop), False


def _add_zero_blocks(outer: Any, digest: bytes, count: int) -> None:
    for done in range(0, count, _ZERO_DIGESTS):
        outer.update(digest * min(_ZERO_DIGESTS, count - done))
