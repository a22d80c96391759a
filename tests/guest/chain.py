"""What a guest's workloads must have left on a disk, computed again from nothing and compared with the volume's bytes.

The last hash that a guest prints proves nothing: the guest carries it in its memory. Only the volume tells.
"""

import hashlib
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

BLOCK = 4096
EXTENT = 65536


@dataclass(frozen=True)
class ChainReport:
    """Which records of a hash chain a volume holds, whole and in their place."""

    records: int
    wrong: tuple[int, ...]

    @property
    def intact(self) -> int:
        """How many records are whole."""
        return self.records - len(self.wrong)

    @property
    def leading(self) -> int:
        """How many records there are before the first wrong one: after a crash, no fewer than the guest told."""
        return self.wrong[0] - 1 if self.wrong else self.records


def chain_hashes(records: int, seed: str = "seed") -> Iterator[str]:
    """The hash of record 1, 2, ..."""
    previous = seed
    for number in range(1, records + 1):
        previous = hashlib.sha256(f"{number} {previous}\n".encode()).hexdigest()
        yield previous


def verify_chain(
    volume: Path, records: int, *, base: int = 0, seed: str = "seed", image_format: str = "raw"
) -> ChainReport:
    """Compare what the workload ``count`` should have written; nobody may be writing to the volume."""
    content = read_volume(volume, base, (records + 1) * BLOCK, image_format)
    wrong = [
        number
        for number, wanted in enumerate(chain_hashes(records, seed), 1)
        if content[number * BLOCK : (number + 1) * BLOCK] != _record(number, wanted)
    ]
    return ChainReport(records, tuple(wrong))


def _record(number: int, digest: str) -> bytes:
    line = f"REC {number} {digest}\n".encode()
    return (line * (BLOCK // len(line) + 1))[:BLOCK]


def pattern(offset: int, length: int, seed: str = "seed") -> bytes:
    """What the workload ``rw`` writes at an offset of the disk; both numbers are multiples of 4096."""
    return b"".join(
        hashlib.sha256(f"{seed} {at}\n".encode()).digest() * (BLOCK // 32)
        for at in range(offset, offset + length, BLOCK)
    )


def verify_pattern(
    volume: Path,
    *,
    base: int = 0,
    extents: int = 32,
    stride: int = EXTENT,
    seed: str = "seed",
    image_format: str = "raw",
) -> list[int]:
    """The offsets of the extents that are not as the workload ``rw`` with the same orders writes them."""
    content = read_volume(volume, base, (extents - 1) * stride + EXTENT, image_format)
    return [
        base + at
        for at in range(0, extents * stride, stride)
        if content[at : at + EXTENT] != pattern(base + at, EXTENT, seed)
    ]


def read_volume(volume: Path, offset: int, length: int, image_format: str = "raw") -> bytes:
    """Bytes as a guest sees them; fewer at the end of the volume."""
    if image_format != "raw":
        with tempfile.TemporaryDirectory(dir=volume.parent) as directory:
            raw = Path(directory) / "raw"
            subprocess.run(["qemu-img", "convert", "-f", image_format, "-O", "raw", volume, raw], check=True)
            return read_volume(raw, offset, length)
    with volume.open("rb") as file:
        file.seek(offset)
        return file.read(length)
