"""Taking the compression off, in a program of its own with little memory, into a file with holes."""

import errno
import os
import select
from collections.abc import Awaitable, Callable
from typing import Final

from elemento_storage import process
from elemento_storage.disk import Disk
from elemento_storage.errors import ImageDamaged, ImageRefused, ToolFailed
from elemento_storage.images.incoming import Compression
from elemento_storage.images.sparse import SparseWriter

_MEMORY_BYTES: Final = 2**30
_WINDOW: Final = "128MiB"  #: what `xz -9` and `zstd --long=27` need; more is a bomb against memory
_PROGRAMS: Final = {
    Compression.GZIP: ("gzip", "-dc"),
    Compression.XZ: ("xz", "-dc", "-T4", "--memlimit-mt-decompress=256MiB", f"--memlimit-decompress={_WINDOW}"),
    Compression.ZSTD: ("zstd", "-dcq", f"--memory={_WINDOW}", "--no-progress"),
}
_MEMORY_WORDS: Final = ("Memory usage limit", "memory limit", "Window size larger", "Frame requires too much memory")
_PIECE_BYTES: Final = 32 << 20  #: between two looks at whether it is cancelled and has room
_READ_BYTES: Final = 1 << 20
_SILENCE_MS: Final = 60_000  #: a program that reads a file and says nothing for so long waits for its file system


async def unpack(
    source: str,
    target: str,
    compression: Compression,
    *,
    disk: Disk,
    timeout_s: float,
    before_more: Callable[[int, float], Awaitable[None]],
) -> None:
    """Write what is inside ``source`` to ``target``, which is made anew. Not yet synced.

    ``before_more(bytes, fraction)`` is called before each piece with the size the target may have after it, and how
    much of the source is read. It stops a bomb, or a job that was cancelled, by raising.

    Raises ImageDamaged, ImageRefused (it needs absurdly much memory), ToolMissing, ToolTimeout, OSError.
    """
    reading, writing = await disk.run(_open, source, target)
    try:
        total_bytes = max(1, os.fstat(reading).st_size)
        writer = SparseWriter(writing)
        argv = _PROGRAMS[compression]
        limits = process.Limits(timeout_s=timeout_s, address_space_bytes=_MEMORY_BYTES)
        try:
            async with process.output_of(argv, limits, standard_input=reading) as output:
                while True:
                    # The program has no other position in the file than this descriptor's.
                    fraction = min(1.0, os.lseek(reading, 0, os.SEEK_CUR) / total_bytes)
                    await before_more(writer.position + _PIECE_BYTES, fraction)
                    if not await disk.run(_pour, output, writer):
                        break
        except ToolFailed as error:
            if any(words in error.stderr for words in _MEMORY_WORDS):
                raise ImageRefused(f"it takes more than {_WINDOW} of memory to decompress what arrived") from error
            raise ImageDamaged(f"what arrived cannot be decompressed: {argv[0]} says it is damaged") from error
        await disk.run(writer.finish)
    finally:
        os.close(reading)
        os.close(writing)


def _open(source: str, target: str) -> tuple[int, int]:
    reading = os.open(source, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
        return reading, os.open(target, flags, 0o600)
    except BaseException:
        os.close(reading)
        raise


def _pour(output: int, writer: SparseWriter) -> bool:
    """Write the next piece; False at the end."""
    buffer = memoryview(bytearray(_READ_BYTES))
    end = writer.position + _PIECE_BYTES
    readable = select.poll()
    readable.register(output, select.POLLIN)
    while writer.position < end:
        if not readable.poll(_SILENCE_MS):
            raise OSError(errno.ETIMEDOUT, "reading the image takes too long")
        count = os.readv(output, [buffer])
        if not count:
            return False
        writer.write(buffer[:count])
    return True
