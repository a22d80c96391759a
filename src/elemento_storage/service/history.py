"""What the charts of the web page show: capacity and traffic of the last day, in memory.

It begins anew with the server's process. Who wants to keep it longer has Prometheus read ``metrics``; this is for
whoever opens the page and asks what went on before.
"""

import asyncio
import contextlib
import os
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from elemento_storage.catalog.location import Location
from elemento_storage.catalog.placement import Space, read_space
from elemento_storage.disk import within
from elemento_storage.service.core import Core

SAMPLE_S: Final = 30.0
_FIRST_WAIT_S: Final = 1.0  #: doubled until it is SAMPLE_S: the page shows something soon after a start
KEPT_S: Final = 86_400.0
POINTS: Final = 240  #: of an answer, at the most


@dataclass(frozen=True)
class Fill:
    """One location at one time; None is what its file system did not tell."""

    used_bytes: int | None
    virtual_bytes: int


@dataclass(frozen=True)
class Sample:
    """One look. Rates are bytes per second since the look before."""

    time_s: float
    read_rate: float
    write_rate: float
    running_jobs: int
    locations: Mapping[str, Fill] = field(default_factory=dict)


class History:
    """Looks every ``SAMPLE_S`` seconds, oftener after a start. ``daemons``: the processes that serve exports now."""

    def __init__(self, core: Core, daemons: Callable[[], Collection[int]]) -> None:
        self._core = core
        self._daemons = daemons
        self._samples: deque[Sample] = deque(maxlen=int(KEPT_S / SAMPLE_S))
        self._traffic = Traffic()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to look."""
        self._task = asyncio.create_task(self._run(), name="history")

    async def stop(self) -> None:
        """Look no more."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def _run(self) -> None:
        wait_s = _FIRST_WAIT_S
        while True:
            await self.look()
            await asyncio.sleep(wait_s)
            wait_s = min(2 * wait_s, SAMPLE_S)

    async def look(self) -> None:
        """Add a sample."""
        pids = [os.getpid(), *self._daemons()]
        read_rate, write_rate = await asyncio.to_thread(self._traffic.rates, pids, time.monotonic())
        locations = self._core.catalog.locations
        spaces = await asyncio.gather(*(self._space(location) for location in locations.answering()))
        found = {location.name: space for location, space in zip(locations.answering(), spaces, strict=False)}
        self._samples.append(
            Sample(
                time_s=time.time(),
                read_rate=read_rate,
                write_rate=write_rate,
                running_jobs=self._core.jobs.running_count(),
                locations={
                    name: Fill(_used(found.get(name)), location.virtual_bytes)
                    for name, location in locations.by_name.items()
                },
            )
        )

    async def _space(self, location: Location) -> Space | None:
        try:
            return await within(self._core.catalog.locations.patience_s, location.disk.run(read_space, location.path))
        except OSError:
            return None

    def of_late(self, seconds: float) -> list[Sample]:
        """The samples of so many seconds up to now, oldest first; several become one where there are too many."""
        since = time.time() - seconds
        return merged([one for one in self._samples if one.time_s >= since], POINTS)


class Traffic:
    """Bytes that processes had from disks and brought there, as the kernel counts them (proc(5), /proc/PID/io)."""

    def __init__(self) -> None:
        self._before: dict[int, tuple[int, int]] | None = None
        self._children: set[int] = set()
        self._at_s = 0.0

    def rates(self, pids: Iterable[int], now_s: float) -> tuple[float, float]:
        """Blocks. Bytes read and written per second since the last call; the first one is 0."""
        parents = set(pids)
        counts = {}
        # What a child had counted is its parent's when it ends: what was seen of it before is not to count again.
        ended, self._children = self._children, {child for parent in parents for child in _children(parent)}
        ended -= self._children
        for pid in parents | self._children:
            with contextlib.suppress(OSError, KeyError, ValueError):
                counts[pid] = _counts(pid)
        before, self._before = self._before, counts
        passed_s, self._at_s = now_s - self._at_s, now_s
        if before is None or passed_s <= 0:
            return 0.0, 0.0
        read, written = (
            sum(now[kind] - before.get(pid, (0, 0))[kind] for pid, now in counts.items())
            - sum(before.get(pid, (0, 0))[kind] for pid in ended)
            for kind in (0, 1)
        )
        return max(0.0, read / passed_s), max(0.0, written / passed_s)


def merged(samples: list[Sample], most: int) -> list[Sample]:
    """At most so many: rates are averaged, of all else the last counts."""
    step = -(-len(samples) // most) or 1
    result = []
    for begin in range(0, len(samples), step):
        some = samples[begin : begin + step]
        last = some[-1]
        result.append(
            Sample(
                time_s=last.time_s,
                read_rate=sum(one.read_rate for one in some) / len(some),
                write_rate=sum(one.write_rate for one in some) / len(some),
                running_jobs=max(one.running_jobs for one in some),
                locations=last.locations,
            )
        )
    return result


def _used(space: Space | None) -> int | None:
    return None if space is None else space.total_bytes - space.free_bytes


def _children(pid: int) -> list[int]:
    """smbd and others serve each connection by a process of its own."""
    try:
        with open(f"/proc/{pid}/task/{pid}/children") as file:
            return [int(child) for child in file.read().split()]
    except (OSError, ValueError):
        return []


def _counts(pid: int) -> tuple[int, int]:
    with open(f"/proc/{pid}/io") as file:
        told = dict(line.split(": ") for line in file.read().splitlines())
    return int(told["read_bytes"]), int(told["write_bytes"])
