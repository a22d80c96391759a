"""The same start for both sides of a measurement, and an image to measure with."""

import os
from pathlib import Path

STRIPE = 4 * 2**20
_TOUCHED = 3 * 2**30


def settle(source: Path) -> None:
    """Nothing waits to be written, free memory is at hand, and the source is in the page cache."""
    os.sync()
    # Memory that lay free was seen to cost seconds at its next use: probably a host that takes it back.
    touched = bytearray(b"1") * min(_TOUCHED, _available() // 2)
    del touched
    with source.open("rb", buffering=0) as file:
        buffer = bytearray(STRIPE)
        while file.readinto(buffer):
            pass


def _available() -> int:
    words_of_line = next(line for line in Path("/proc/meminfo").read_text().splitlines() if "MemAvailable" in line)
    return int(words_of_line.split()[1]) * 1024


def write_striped(path: Path, size: int, one_of: int) -> None:
    """Random bytes in one stripe of 4 MiB of so many, holes between; on disk. A file that is there stays."""
    with path.open("r+b" if path.exists() else "wb") as file:
        for offset in range(0, size, one_of * STRIPE):
            file.seek(offset)
            file.write(os.urandom(STRIPE))
        file.truncate(size)
        file.flush()
        os.fsync(file.fileno())
