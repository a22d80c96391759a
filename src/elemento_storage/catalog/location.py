"""One location at run time: its index, its totals, and the sweep that keeps both true to the disk.

The index is changed in the event loop only. A sweep reads the disk in a thread and hands back what differs; a volume
that an operation of ours touched in the meantime is left out of the result, because the operation knows better.
"""

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from elemento_storage.catalog.discovery import FoundLocation
from elemento_storage.catalog.guard import WORK_DIRECTORY
from elemento_storage.catalog.placement import Space, read_space
from elemento_storage.catalog.pool_mirror import PoolMirror
from elemento_storage.catalog.presence import Presence
from elemento_storage.catalog.settings import BrokenSettings, FileSystemKind, LocationSettings, read_settings
from elemento_storage.catalog.volume_directory import (
    Entry,
    OddDirectory,
    VolumeVanished,
    believable,
    read_entry,
    refresh_entry,
)
from elemento_storage.ceph.pool import Pool, Pools
from elemento_storage.disk import Disk, Place, within
from elemento_storage.errors import CephUnavailable, LocationUnavailable
from elemento_storage.model import VOLUME_SUFFIX, Volume, printable, volume_directory_name, volume_id_of_directory

log = logging.getLogger(__name__)

STAGING_DIRECTORY: Final = f"{WORK_DIRECTORY}/staging"
NOT_READ_YET: Final = "it was not read yet"
TRASH_DIRECTORY: Final = f"{WORK_DIRECTORY}/trash"
_GOODBYE_S: Final = 1.0
_STREAM_THREADS: Final = 8
_STILL_FRESH_S: Final = 1.0
_SWEEP_SHARE: Final = 20  # sweeping takes at most 1/20 of the time


@dataclass
class SweepResult:
    """How the disk differs from the index."""

    changed: dict[str, Entry] = field(default_factory=dict)
    removed: list[str] = field(default_factory=list)
    odd: dict[str, str] = field(default_factory=dict)
    names_mtime_ns: int = 0
    names: dict[str, str | None] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass
class SweepReport:
    """What a sweep changed in the index: volume ids."""

    added: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)


@dataclass
class SweepSteps:
    """Counts on while a sweep gets on."""

    count: int = 0


OnChange = Callable[[Volume | None, Volume | None], None]


class Location:
    """A directory with a ``settings.json`` and the volumes in it."""

    def __init__(self, found: FoundLocation, *, lease_s: float, on_change: OnChange, pools: Pools) -> None:
        self.name = found.name
        self.path = found.path
        self.identity = found.identity
        self.settings = LocationSettings()
        self.settings_problem: str | None = None
        self.missing: str | None = NOT_READ_YET  #: why the location does not answer; its volumes are kept, not shown
        self.read_only: str | None = None  #: why nothing can be written here
        self.mirror: PoolMirror | None = None  #: of the pool that the location stands for
        self.entries: dict[str, Entry] = {}
        self.children: dict[str, set[str]] = {}  #: volume id → linked clones of it
        self.odd: dict[str, str] = {}  #: directory name → why it is not a volume
        self.own_reservations: dict[str, int] = {}  #: volume id → bytes, of operations under way here
        self.foreign_reservations: dict[str, int] = {}  #: the same of other servers, as last read
        self.own_allocations: dict[str, int] = {}  #: volume id → bytes being preallocated
        self.no_presence: str | None = None  #: why no sign of life could be left
        self.presence: Presence | None = None
        self.entering = asyncio.Lock()
        self.placement = asyncio.Lock()
        self.disk = Disk(found.name)
        self.pulse = Disk(f"{found.name}-pulse", threads=1)  #: signs of life, however busy the others are
        self.streams = Disk(f"{found.name}-streams", threads=_STREAM_THREADS)  #: what reads or writes images at length
        self.dustman = Disk(f"{found.name}-dustman", threads=1)  #: deleting may take long
        self.emptying: set[str] = set()  #: paths in the trash that are being deleted
        self.tending: asyncio.Task[SweepReport] | None = None
        self.steps = SweepSteps()
        self._lease_s = lease_s
        self._on_change = on_change
        self._pools = pools
        self._virtual_bytes = 0
        self._names: dict[str, str | None] = {}
        self._names_mtime_ns = 0
        self._touched: set[str] | None = None
        self._swept_at = float("-inf")
        self._sweep_s = 0.0
        self._sweeping: asyncio.Task[SweepReport] | None = None
        self._checked: dict[str, float] = {}

    # -- facts ---------------------------------------------------------------------------------------------

    @property
    def is_unique(self) -> bool:
        """Whether the location is a file system of its own, maybe shared with other servers."""
        return self.settings.file_system is FileSystemKind.UNIQUE

    @property
    def pool(self) -> Pool | None:
        """The pool that holds its images, if it stands for one."""
        return None if self.mirror is None else self.mirror.pool

    def read_space(self) -> Space:
        """What the file system says, or the pool. Blocks. Raises OSError."""
        space = read_space(self.path, look_for_mount=self.is_unique)
        if self.pool is None:
            return space
        in_pool = self.pool.space()
        return replace(space, total_bytes=in_pool.total_bytes, free_bytes=in_pool.free_bytes)

    def unavailable(self, reason: str) -> LocationUnavailable:
        """The error of a location that does not do what it should."""
        kind = LocationUnavailable if self.mirror is None else CephUnavailable
        return kind(f"location {self.name} does not answer: {reason}", location=self.name)

    @property
    def problem(self) -> str | None:
        """Why nothing new can be created here, as far as is known without asking the file system."""
        return self.missing or self.settings_problem or self.read_only or self.no_presence

    @property
    def virtual_bytes(self) -> int:
        """Virtual size of all volumes, locked and half-made ones and reservations included."""
        total = self._virtual_bytes
        for reservations in (self.own_reservations, self.foreign_reservations):
            for volume_id, reserved in reservations.items():
                entry = self.entries.get(volume_id)
                total += max(0, reserved - (entry.volume.size_bytes if entry else 0))
        return total

    @property
    def volume_count(self) -> int:
        """Number of volumes, half-made ones included."""
        half_made = (*self.own_reservations, *self.foreign_reservations)
        return len(self.entries) + sum(volume_id not in self.entries for volume_id in half_made)

    def place(self, volume_id: str) -> Place:
        """Where a volume's directory is."""
        return Place(self.volume_path(volume_id), self.disk, volume_id)

    def volume_path(self, volume_id: str) -> str:
        """The path of a volume's directory."""
        return f"{self.path}/{volume_directory_name(volume_id)}"

    # -- the index, event loop only ------------------------------------------------------------------------

    def record(self, entry: Entry) -> None:
        """Enter what an operation of ours has just made of a volume."""
        self.touch(entry.volume.volume_id)
        self._put(entry)

    def forget(self, volume_id: str) -> None:
        """An operation of ours has taken the volume away."""
        self.touch(volume_id)
        self._drop(volume_id)

    def forget_all(self) -> None:
        """The location is none any more."""
        for volume_id in list(self.entries):
            self.forget(volume_id)

    def touch(self, volume_id: str) -> None:
        """An operation changes this volume now: a sweep under way must not overwrite what it finds."""
        if self._touched is not None:
            self._touched.add(volume_id)

    def _put(self, entry: Entry) -> None:
        volume = entry.volume
        before = self.entries.get(volume.volume_id)
        self.entries[volume.volume_id] = entry
        self._virtual_bytes += volume.size_bytes - (before.volume.size_bytes if before else 0)
        self._relate(volume.volume_id, before.volume.parent if before else None, volume.parent)
        self.odd.pop(volume.directory_name, None)
        if before is not entry:
            self._on_change(before.volume if before else None, volume)

    def _drop(self, volume_id: str) -> None:
        before = self.entries.pop(volume_id, None)
        self._checked.pop(volume_id, None)
        if before is not None:
            self._virtual_bytes -= before.volume.size_bytes
            self._relate(volume_id, before.volume.parent, None)
            self._on_change(before.volume, None)

    def _relate(self, volume_id: str, before: str | None, now: str | None) -> None:
        if before == now:
            return
        if before is not None and (siblings := self.children.get(before)) is not None:
            siblings.discard(volume_id)
            if not siblings:
                del self.children[before]
        if now is not None:
            self.children.setdefault(now, set()).add(volume_id)

    # -- keeping the index true ----------------------------------------------------------------------------

    async def reload(self, volume_id: str) -> Volume | None:
        """Read one volume again; None when it is not there or not a volume."""
        try:
            entry = await self.disk.run(self._read_or_refresh, volume_id)
        except (OddDirectory, VolumeVanished) as error:
            if isinstance(error, OddDirectory):
                self.odd[volume_directory_name(volume_id)] = str(error)
            self.forget(volume_id)
            return None
        self.record(entry)
        self._checked[volume_id] = time.monotonic()
        return entry.volume

    def _read_or_refresh(self, volume_id: str) -> Entry:
        known = self.entries.get(volume_id)
        if known is not None:
            return refresh_entry(known, self.path, lease_s=self._lease_s)
        return read_entry(self.path, self.name, volume_id, lease_s=self._lease_s)

    async def fresh(self, volume_id: str) -> Volume | None:
        """The volume, looked at on disk within the last second (``unique``: just now)."""
        entry = self.entries.get(volume_id)
        checked = max(self._swept_at, self._checked.get(volume_id, float("-inf")))
        if entry is None or self.is_unique or time.monotonic() - checked > _STILL_FRESH_S:
            return await self.reload(volume_id)
        return entry.volume

    async def sweep(self, *, max_age_s: float | None = None) -> SweepReport:
        """Compare the whole location with the index; callers at the same time share one sweep.

        ``max_age_s`` None: a second, or twenty times as long as a sweep takes; 0: one that begins now. Raises OSError.
        """
        if max_age_s is None:
            max_age_s = 0.0 if self.is_unique else max(_STILL_FRESH_S, self._sweep_s * _SWEEP_SHARE)
        if time.monotonic() - self._swept_at < max_age_s:
            return SweepReport()
        if self._sweeping is not None and max_age_s == 0.0:
            # It began before we were asked, so it may have passed what we have to see.
            await asyncio.wait([self._sweeping])
        if self._sweeping is None or self._sweeping.done():
            self._sweeping = asyncio.create_task(self._sweep(), name=f"sweep-{self.name}")
        return await asyncio.shield(self._sweeping)

    async def _sweep(self) -> SweepReport:
        self._touched = set()
        started = time.monotonic()
        try:
            if self.mirror is not None:
                await self.disk.run(self.mirror.sync)
            result = await self.disk.run(
                _sweep_directory,
                self.path,
                self.name,
                dict(self.entries),
                self._names,
                self._names_mtime_ns,
                self._lease_s,
                self.steps,
            )
            touched, self._touched = self._touched, None
        finally:
            self._touched = None
        report = SweepReport()
        for volume_id, entry in result.changed.items():
            if volume_id in touched:
                continue
            before = self.entries.get(volume_id)
            if before is None:
                report.added.append(volume_id)
            elif differs(before.volume, entry.volume):
                report.changed.append(volume_id)
            self._put(entry)
        for volume_id in result.removed:
            if volume_id not in touched and volume_id in self.entries:
                report.removed.append(volume_id)
                self._drop(volume_id)
        for name, reason in result.odd.items():
            if self.odd.get(name) != reason:
                log.warning("location %s: %s is not a volume: %s", self.name, name, reason)
        self.odd = result.odd
        self._names, self._names_mtime_ns = result.names, result.names_mtime_ns
        self._sweep_s = result.seconds
        self._swept_at = started
        self._checked.clear()
        return report

    async def follow_pool(self) -> None:
        """See what other servers have changed in the pool, if anything. Raises OSError."""
        if self.mirror is not None and await self.disk.run(self.mirror.sync):
            await self.sweep(max_age_s=0.0)

    async def load_settings(self) -> None:
        """Read settings.json again; what is wrong with it goes into ``settings_problem``. Raises OSError."""
        try:
            self.settings = await self.disk.run(read_settings, self.path)
            self.settings_problem = None
            ceph = self.settings.ceph
            if ceph is None:
                self.mirror = None
            elif self.pool is None or self.pool.settings != ceph:
                self.mirror = PoolMirror(self._pools.get(ceph), self.path, self.own_reservations)
        except BrokenSettings as error:
            if self.settings_problem != str(error):
                log.error("location %s cannot take new volumes: %s", self.name, error)
            self.settings_problem = str(error)

    async def close(self) -> None:
        """Say goodbye, if the location answers, and end the threads."""
        if self.presence is not None:
            with contextlib.suppress(OSError):
                await within(_GOODBYE_S, self.pulse.run(self.presence.leave))
            self.presence = None
        for disk in (self.disk, self.pulse, self.streams, self.dustman):
            disk.close()


def differs(before: Volume | None, after: Volume | None) -> bool:
    """Whether clients should hear of it: writes by a guest (allocation, mtime) are no change of the volume."""
    if before is None or after is None:
        return before is not after
    return (
        before.meta_digest != after.meta_digest
        or before.size_bytes != after.size_bytes
        or before.locks != after.locks
        or before.exported != after.exported
        or before.location != after.location
        or before.iso != after.iso
        or before.waiting != after.waiting
        or before.snapshots != after.snapshots
    )


def _sweep_directory(
    path: str,
    name: str,
    entries: Mapping[str, Entry],
    names: dict[str, str | None],
    names_mtime_ns: int,
    lease_s: float,
    steps: SweepSteps,
) -> SweepResult:
    started = time.monotonic()
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        result = _compare(path, descriptor, name, entries, names, names_mtime_ns, lease_s, steps)
    finally:
        os.close(descriptor)
    result.seconds = time.monotonic() - started
    return result


def _compare(
    path: str,
    descriptor: int,
    name: str,
    entries: Mapping[str, Entry],
    names: dict[str, str | None],
    names_mtime_ns: int,
    lease_s: float,
    steps: SweepSteps,
) -> SweepResult:
    mtime_ns = os.fstat(descriptor).st_mtime_ns
    if mtime_ns != names_mtime_ns:
        names = {entry: volume_id_of_directory(entry) for entry in os.listdir(path) if _looks_like_a_volume(entry)}
    result = SweepResult(names=names, names_mtime_ns=believable(mtime_ns))
    seen = 0
    for directory_name, volume_id in names.items():
        steps.count += 1
        if volume_id is None:
            result.odd[printable(directory_name)] = "the name is not vid.<32 lower-case hex digits>.elimg"
            continue
        known = entries.get(volume_id)
        try:
            if known is None:
                result.changed[volume_id] = read_entry(path, name, volume_id, lease_s=lease_s)
            else:
                seen += 1
                entry = refresh_entry(known, path, lease_s=lease_s, location_descriptor=descriptor)
                if entry is not known:
                    result.changed[volume_id] = entry
        except VolumeVanished:
            if known is not None:
                result.removed.append(volume_id)
        except OddDirectory as error:
            result.odd[directory_name] = str(error)
            if known is not None:
                result.removed.append(volume_id)
    if seen != len(entries):
        present = set(names.values())
        result.removed.extend(volume_id for volume_id in entries if volume_id not in present)
    return result


def _looks_like_a_volume(name: str) -> bool:
    return name.endswith(VOLUME_SUFFIX)
