"""What is done to an exported disk, by the same client on both sides: fio over NBD, qemu-img bench over iSCSI.

Debian's fio has an NBD engine but none for iSCSI; qemu-img has libiscsi's initiator, the one that guests use.
"""

import json
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from bench.context import require_program, words

MIB = 2**20
#: qemu-img bench knows no random offsets. A stride this long, and odd in blocks, comes round to the same block only
#: after all the others, is no sequence that anything reads ahead of, and shares hardly any table with its neighbours.
_STRIDE = 9_767 * 4096


@dataclass(frozen=True)
class Load:
    """One pattern of requests."""

    name: str
    is_write: bool
    is_random: bool
    block: int
    depth: int

    @property
    def unit(self) -> str:
        """Of its figures."""
        return "IOPS" if self.is_random else "MB/s"

    def rate(self, requests_per_s: float) -> float:
        """In ``unit``."""
        return requests_per_s if self.is_random else requests_per_s * self.block / 1e6


LOADS = (
    Load("1 MiB read", False, False, MIB, 8),
    Load("1 MiB write", True, False, MIB, 8),
    Load("4 KiB random read, depth 1", False, True, 4096, 1),
    Load("4 KiB random write, depth 1", True, True, 4096, 1),
    Load("4 KiB random read, depth 32", False, True, 4096, 32),
    Load("4 KiB random write, depth 32", True, True, 4096, 32),
)


class Disk(Protocol):
    """A disk as a client has it."""

    def rate(self, load: Load, seconds: float) -> float:
        """What came out of about so many seconds, in the load's unit."""


@dataclass(frozen=True)
class NbdDisk:
    """fio's engine ``nbd`` (libnbd)."""

    uri: str
    size: int

    def rate(self, load: Load, seconds: float) -> float:
        """See Disk.rate."""
        pattern = f"{'rand' if load.is_random else ''}{'write' if load.is_write else 'read'}"
        options: Mapping[str, object] = {
            "name": "bench",
            "ioengine": "nbd",
            "uri": self.uri,
            "rw": pattern,
            "bs": load.block,
            "iodepth": load.depth,
            "size": self.size,
            "runtime": f"{round(seconds * 1000)}ms",
            "output-format": "json",
        }
        fio = require_program("fio", "fio")
        command = [fio, *(f"--{key}={value}" for key, value in options.items()), "--time_based", "--norandommap"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"fio {self.uri}: {done.stderr}{done.stdout}")
        # The engine prints a line of its own before.
        job = json.loads(done.stdout[done.stdout.index("{\n") :])["jobs"][0]
        return load.rate(float(job["write" if load.is_write else "read"]["iops"]))


class IscsiDisk:
    """``qemu-img bench``, which counts requests and not seconds: how many was learnt by a first, short run."""

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._expected: dict[Load, float] = {}

    def rate(self, load: Load, seconds: float) -> float:
        """See Disk.rate."""
        if load not in self._expected:
            self._expected[load] = self._run(load, 16 * load.depth)
            self._expected[load] = self._run(load, max(16 * load.depth, int(self._expected[load] * seconds / 4)))
        requests_per_s = self._run(load, max(16 * load.depth, int(self._expected[load] * seconds)))
        return load.rate(requests_per_s)

    def _run(self, load: Load, count: int) -> float:
        step = ("-S", _STRIDE) if load.is_random else ()
        flags = ("-c", count, "-d", load.depth, "-s", load.block, *step, *(("-w",) if load.is_write else ()))
        program = require_program("qemu-img", "qemu-utils")
        command = words([program, "bench", "-f", "raw", *flags, self._uri])
        output = subprocess.run(command, capture_output=True, text=True, check=False)
        found = output.stdout.rpartition("Run completed in ")[2].partition(" ")[0]
        if output.returncode or not found:
            raise RuntimeError(f"qemu-img bench: {output.stderr or output.stdout}")
        return count / float(found)
