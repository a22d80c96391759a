"""The catalog: every volume this server knows, and the only way to get hold of one.

An operation is written against three calls: ``find`` (look), ``hold`` (short exclusive access under the volume's guard)
and ``room.reserve…`` (room for a new or larger volume). What takes long takes a lock file inside ``hold``.
"""

import asyncio
import contextlib
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass

import msgspec

from elemento_storage.catalog import bin as recycle_bin
from elemento_storage.catalog import locks, presence, reservations
from elemento_storage.catalog.bin import RecycleBin
from elemento_storage.catalog.guard import volume_guard
from elemento_storage.catalog.location import Location, OnChange, SweepReport
from elemento_storage.catalog.locations import Locations, os_errors, require_presence, require_writable
from elemento_storage.catalog.locks import LockRecord, new_lock, write_lock
from elemento_storage.catalog.pool_mirror import PoolMirror, is_in_use
from elemento_storage.catalog.room import Room
from elemento_storage.catalog.volume_directory import changed_meta, rewrite_meta
from elemento_storage.ceph.pool import Pools
from elemento_storage.config import Settings
from elemento_storage.disk import Place, within
from elemento_storage.durable import TEMPORARY_PREFIX
from elemento_storage.errors import ImageChanged, LocationUnavailable, StorageError, VolumeLocked, VolumeNotFound
from elemento_storage.faultpoints import reached
from elemento_storage.keyed_locks import KeyedLocks
from elemento_storage.model import Volume, VolumeMeta, new_uid

log = logging.getLogger(__name__)

_PURGE_INTERVAL_S = 60.0
_FOLLOW_INTERVAL_S = 0.5  # what other servers do in a pool is seen here within a second
_STOP_PATIENCE_S = 5.0

Check = Callable[[Volume], None]
Resolver = Callable[[Place, LockRecord], Awaitable[None]]


@dataclass(frozen=True)
class Held:
    """A volume under its guard, as it is on disk right now."""

    location: Location
    volume: Volume

    @property
    def place(self) -> Place:
        """The volume's directory."""
        return self.location.place(self.volume.volume_id)

    async def reload(self) -> Volume:
        """Enter into the index what the operation has made of the volume."""
        volume = await self.location.reload(self.volume.volume_id)
        assert volume is not None, "the guard is held: nobody can have taken the volume away"
        return volume


class Operation:
    """Something that takes longer than a guard may be held, and works under a lock file instead."""

    def __init__(self, operation_id: str, server_id: str) -> None:
        self.operation_id = operation_id
        self.lock: LockRecord | None = None
        self._server_id = server_id

    async def lock_volume(
        self, held: Held, purpose: str, client: str | None, journal: dict[str, str | int], *, shared: bool = False
    ) -> LockRecord:
        """Take the lock file; durable. ``journal`` is what the purpose's resolver needs after a crash.

        ``shared``: others may read as well; the volume has to be held with ``sharing``.
        """
        require_presence(held.location)
        lock = new_lock(purpose, self.operation_id, self._server_id, client, journal, shared=shared)
        await held.place.disk.run(write_lock, held.place.directory, lock)
        self.lock = lock
        reached(f"{purpose}.locked")
        await held.reload()
        return lock


@dataclass(frozen=True)
class Reading:
    """A volume that stays as it is because somebody reads it.

    Where this server cannot write it leaves no lock file; then it is only found out at the end that somebody who can
    has changed the volume.
    """

    catalog: "Catalog"
    location: Location
    volume: Volume
    lock: LockRecord | None

    @property
    def place(self) -> Place:
        """The volume's directory."""
        return self.location.place(self.volume.volume_id)

    async def confirm(self) -> None:
        """To be asked when all is read, before anybody is told: nobody took the lock away meanwhile.

        Another server does when it takes this one for dead, and may have changed the volume then. Raises VolumeLocked,
        VolumeNotFound, LocationUnavailable, ImageChanged.
        """
        if self.lock is not None:
            async with self.held():
                return
        with os_errors(self.location):
            volume = await self.location.reload(self.volume.volume_id)
        if volume is None:
            raise VolumeNotFound(self.volume.volume_id)
        if (volume.modified_ns, volume.meta.format) != (self.volume.modified_ns, self.volume.meta.format):
            raise ImageChanged("the image was changed while it was read: read it again from the start")

    def held(self) -> contextlib.AbstractAsyncContextManager[Held]:
        """The volume under its guard, with the same errors; what is done to it must be nothing a reader sees."""
        return self.catalog.hold(self.volume.volume_id, lambda _: None, own_lock=self.lock, sharing=True)


class Catalog:
    """Volumes in all locations below one root."""

    def __init__(self, settings: Settings, on_change: OnChange, pools: Pools | None = None) -> None:
        self.server_id = new_uid()
        self.pools = pools or Pools(self.server_id, settings.lease)
        self.locations = Locations(settings, self.server_id, on_change, self.pools)
        self.bin = RecycleBin(settings, self.locations)
        self.room = Room(settings, self.server_id, self.locations, self.bin)
        self.resolvers: dict[str, Resolver] = {}  #: purpose of a lock file → what to do when its server died
        self.abandoned: dict[str, Resolver] = {}  #: the same for one in a staging directory, which is about to go
        self.readers: dict[str, Callable[[], Awaitable[None]]] = {}  #: what hears that a volume which is read is wanted
        self.active_operations: set[str] = set()  #: operations under way here that hold a lock file
        self._settings = settings
        self._one_at_a_time = KeyedLocks()
        self._tasks: list[asyncio.Task[None]] = []
        self._background: set[asyncio.Task[None]] = set()
        self._tidying: set[str] = set()

    # -- life ----------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Find the locations, put right what dead servers left, read every volume."""
        await self.look_around()
        for interval_s, work in (
            (self._settings.heartbeat, self.locations.heartbeat),
            (self._settings.sweep_interval, self.look_around),
            (_FOLLOW_INTERVAL_S, self.locations.follow_pools),
            (_PURGE_INTERVAL_S, self.bin.purge_expired),
        ):
            self._tasks.append(asyncio.create_task(_every(interval_s, work), name=work.__name__))

    async def stop(self) -> None:
        """End the background work and leave every location."""
        for task in (*self._tasks, *self._background):
            task.cancel()
        if tasks := {*self._tasks, *self._background}:
            await asyncio.wait(tasks, timeout=_STOP_PATIENCE_S)
        await self.locations.close()
        with contextlib.suppress(TimeoutError):
            await within(_STOP_PATIENCE_S, asyncio.to_thread(self.pools.close))

    async def look_around(self, *, max_age_s: float | None = None) -> SweepReport:
        """Find new locations, compare the index with the disk, resolve what dead servers left."""
        report = await self.locations.look(max_age_s=max_age_s)
        self.locations.find_duplicates()
        await asyncio.gather(*(self._tidy(location) for location in self.locations.answering()))
        return report

    async def _tidy(self, location: Location) -> None:
        if location.presence is None or location.name in self._tidying:
            return

        async def tidy() -> None:
            self._tidying.add(location.name)
            try:
                await self._resolve_leftovers(location)
            except (StorageError, OSError) as error:
                log.warning("location %s cannot be tidied now: %s", location.name, error)
            finally:
                self._tidying.discard(location.name)

        with contextlib.suppress(TimeoutError):
            await within(self.locations.patience_s, tidy())

    def in_background(self, work: Awaitable[object]) -> None:
        """Do something that nobody waits for; a failure is logged."""

        async def guarded() -> None:
            try:
                await work
            except (StorageError, OSError) as error:
                log.warning("background work failed, the next start or sweep finds what it left: %s", error)

        task = asyncio.create_task(guarded())
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def _resolve_leftovers(self, location: Location) -> None:
        """Locks of dead servers, what they had half made, temporary files, trash."""
        lease_s = self._settings.lease
        if location.pool is not None:
            for volume_id in await location.disk.run(location.pool.half_made):
                if volume_id not in location.own_reservations:
                    log.warning("volume %s was being made, or deleted, by a server that is dead: removed", volume_id)
                    await location.dustman.run(location.pool.abandon, volume_id)
        for path, found in await location.disk.run(reservations.dead, location.path, self.server_id, lease_s=lease_s):
            for lock in found:
                if lock.purpose in self.abandoned:
                    await self.abandoned[lock.purpose](Place(path, location.disk), lock)
            await location.disk.run(reservations.remove, path)
        for volume_id, entry in list(location.entries.items()):
            if entry.volume.locks or entry.leftovers:
                try:
                    async with self.hold(volume_id, lambda _: None, sharing=True):
                        pass  # taking hold resolves what can be resolved
                except (VolumeLocked, VolumeNotFound):
                    continue
                except Exception:
                    log.exception("volume %s cannot be put right", volume_id)
        await location.disk.run(presence.remove_dead, location.path, lease_s=lease_s)
        for path in await location.disk.run(recycle_bin.trash, location.path):
            self.in_background(self.bin.empty(location, path))

    async def find(self, volume_id: str, check: Check) -> tuple[Location, Volume]:
        """A volume as it is on disk, if ``check`` lets the caller see it.

        Raises VolumeNotFound, LocationUnavailable, and what ``check`` raises.
        """
        for location in self.locations.by_name.values():
            known = location.entries.get(volume_id)
            if known is not None:
                if location.missing is not None:
                    check(known.volume)
                    raise location.unavailable(location.missing)
                with os_errors(location):
                    volume = await location.fresh(volume_id)
                if volume is not None:
                    check(volume)
                    return location, volume
        # Not in the index: somebody may have put it there since the last sweep.
        for location in self.locations.answering():
            if volume_id not in location.entries:
                try:
                    volume = await within(self.locations.patience_s, _look_for(location, volume_id))
                except OSError as error:
                    log.warning("location %s was not asked for %s: %s", location.name, volume_id, error)
                    continue
                if volume is not None:
                    check(volume)
                    return location, volume
        raise VolumeNotFound(volume_id)

    @contextlib.asynccontextmanager
    async def hold(
        self,
        volume_id: str,
        check: Check,
        *,
        own_lock: LockRecord | None = None,
        admit: LockRecord | None = None,
        sharing: bool = False,
        live: bool = False,
    ) -> AsyncIterator[Held]:
        """Exclusive access to one volume, for a moment, against every other operation anywhere.

        ``check`` says whether the caller may; it is asked before anything about locks is given away. ``own_lock`` is
        the lock file of the operation that asks, and has to be there; ``admit`` is one that may be. ``sharing``: the
        caller changes nothing that a reader would see, so those who read may stay. ``live``: the caller changes nothing
        but who can write to the volume, so those who follow every write may stay. Raises VolumeNotFound, VolumeLocked,
        LocationUnavailable, and what ``check`` raises.
        """
        if not sharing and (tell := self.readers.get(volume_id)) is not None:
            await self.find(volume_id, check)  # nobody hears of those who may not
            await tell()
        async with self._one_at_a_time.hold(volume_id):
            location, volume = await self.find(volume_id, check)
            require_writable(location)
            own_name = own_lock.file_name if own_lock else None
            admitted = {lock.file_name for lock in (own_lock, admit) if lock is not None}
            if not admitted.issuperset(volume.locks):
                # Before the guard: whoever holds it for long holds a lock too, and that is the better answer.
                await self._left_over(location, volume, admitted, sharing=sharing, live=live)
            if own_lock is not None and location.pool is not None and not location.pool.claims.holds(volume_id):
                # It was kept for the sake of the lock file: whoever took this server for dead has it, or has had it.
                raise VolumeLocked("the operation's claim was taken away: it stops before it changes anything")
            async with self.guard(location, volume_id):
                settled = await location.reload(volume_id)
                if settled is None:
                    raise VolumeNotFound(volume_id)
                check(settled)
                if not admitted.issuperset(settled.locks):
                    settled = await self._resolve_locks(location, settled, admitted, sharing=sharing, live=live)
                if own_name is not None and own_name not in settled.locks:
                    raise VolumeLocked("the operation's lock file was taken away: it stops before it changes anything")
                if location.entries[volume_id].leftovers:
                    await location.disk.run(_remove_temporaries, location.volume_path(volume_id))
                yield Held(location, settled)

    @contextlib.asynccontextmanager
    async def guard(self, location: Location, volume_id: str) -> AsyncIterator[None]:
        """The volume's guard alone. Raises LocationUnavailable, NoRoom for what the operating system says."""
        with os_errors(location):
            guard = await location.disk.run(volume_guard, location.path, volume_id)
            try:
                if location.mirror is None:
                    yield
                else:
                    async with claim(location, location.mirror, volume_id):
                        yield
            finally:
                await location.disk.run(guard.release)

    @contextlib.asynccontextmanager
    async def operation(self, volume_id: str, operation_id: str) -> AsyncIterator[Operation]:
        """The frame of an operation with a lock file, which it removes itself when it has done its work.

        When it fails, what it left is resolved at once, by the same code as after a crash.
        """
        operation = Operation(operation_id, self.server_id)
        self.active_operations.add(operation_id)
        try:
            yield operation
        except BaseException:
            self.active_operations.discard(operation_id)
            if operation.lock is not None:
                await self.settle(volume_id)
            raise
        finally:
            self.active_operations.discard(operation_id)

    @contextlib.asynccontextmanager
    async def reading(
        self,
        volume_id: str,
        check: Check,
        purpose: str,
        operation_id: str,
        *,
        client: str | None = None,
        journal: dict[str, str | int] | None = None,
        require: Callable[[Held], Awaitable[None]] | None = None,
    ) -> AsyncIterator[Reading]:
        """The volume kept as it is while somebody reads it, however long that takes.

        Any number may read at a time; whoever would change the volume is refused with 423. ``require`` raises what
        forbids reading it, under the guard, before the lock is taken; ``service.reading`` knows what that is.
        Raises VolumeNotFound, VolumeLocked, LocationUnavailable, and what ``check`` and ``require`` raise.
        """
        location, _ = await self.find(volume_id, check)
        if location.read_only:
            yield await self._reading_without_lock(location, volume_id, check, require)
            return
        async with self.operation(volume_id, operation_id) as operation:
            async with self.hold(volume_id, check, sharing=True) as held:
                if require is not None:
                    await require(held)
                lock = await operation.lock_volume(held, purpose, client, journal or {}, shared=True)
                volume = await held.reload()
            yield Reading(self, held.location, volume, lock)
            try:
                async with self.hold(volume_id, lambda _: None, own_lock=lock, sharing=True) as held:
                    await held.place.disk.run(locks.remove_lock, held.place.directory, lock)
                    await held.reload()
            except StorageError as error:
                # What was read is no worse for it; the lock is left over from now on, and the next sweep removes it.
                log.warning("volume %s: the lock of a reader is not removed now: %s", volume_id, error)

    async def _reading_without_lock(
        self, location: Location, volume_id: str, check: Check, require: Callable[[Held], Awaitable[None]] | None
    ) -> Reading:
        with os_errors(location):
            volume = await location.reload(volume_id)
            if volume is None:
                raise VolumeNotFound(volume_id)
            check(volume)
            left = await self._left_over(location, volume, (), sharing=True, live=False)
            if any(not lock.shared for lock in left):
                raise LocationUnavailable(
                    "an operation on the volume was broken off, and cannot be put right while nothing can be written "
                    f"in location {location.name}",
                    location=location.name,
                )
            if require is not None:
                await require(Held(location, volume))
        return Reading(self, location, volume, None)

    async def settle(self, volume_id: str) -> None:
        """Resolve what an operation left that ended badly, by the same code as after a crash.

        What cannot be resolved now stays locked and is tried again by every sweep.
        """
        try:
            async with self.hold(volume_id, lambda _: None, sharing=True):
                pass
        except StorageError as error:
            log.error("volume %s stays locked until its operation can be resolved: %s", volume_id, error)

    async def rewrite_meta(self, place: Place, changes: Mapping[str, object]) -> None:
        """Change keys of a held volume's meta.json in one durable step. Raises OSError."""
        location = next(one for one in self.locations.by_name.values() if place.directory.startswith(f"{one.path}/"))
        pool, volume_id = location.pool, place.volume_id

        def rewrite() -> None:
            if pool is not None and volume_id in pool.index.records:
                meta = changed_meta(place.directory, changes)
                pool.rewrite(volume_id, meta, int(msgspec.json.decode(meta, type=VolumeMeta).size or 0))
            rewrite_meta(place.directory, changes)

        await place.disk.run(rewrite)

    # -- lock files ----------------------------------------------------------------------------------------

    async def read_locks(self, location: Location, volume: Volume) -> list[LockRecord]:
        """The records of a volume's lock files."""
        directory = location.volume_path(volume.volume_id)
        found = [await location.disk.run(locks.read_lock, directory, name) for name in volume.locks]
        return [lock for lock in found if lock is not None]

    async def _left_over(
        self, location: Location, volume: Volume, admitted: Collection[str], *, sharing: bool, live: bool
    ) -> list[LockRecord]:
        """The locks that nobody works under. Raises VolumeLocked for one under which somebody does, but the admitted.

        ``sharing``: those of readers are admitted too; ``live``: those of who follows every write.
        """
        left = []
        for lock in await self.read_locks(location, volume):
            if lock.file_name in admitted:
                continue
            orphaned = await location.disk.run(
                locks.is_orphaned,
                location.path,
                lock,
                self.server_id,
                self.active_operations,
                lease_s=self._settings.lease,
            )
            if orphaned and self.can_resolve(lock):
                left.append(lock)
            elif not ((sharing and lock.shared) or (live and lock.is_live)):
                raise VolumeLocked(
                    f"the volume is locked: {lock.purpose or 'unknown operation'} by "
                    f"{lock.host or 'another product'} since {lock.started or 'an unknown time'}",
                    locked=describe_lock(lock),
                )
        return left

    def can_resolve(self, lock: LockRecord) -> bool:
        """Whether this server knows what to do about the lock once its server is dead."""
        return bool(lock.server) and (lock.shared or lock.purpose in self.resolvers)

    async def _resolve_locks(
        self, location: Location, volume: Volume, admitted: Collection[str], *, sharing: bool, live: bool
    ) -> Volume:
        place = location.place(volume.volume_id)
        left = await self._left_over(location, volume, admitted, sharing=sharing, live=live)
        for lock in left:
            log.warning("volume %s: resolving the %s that its server left", volume.volume_id, lock.purpose)
            if lock.purpose in self.resolvers:
                await self.resolvers[lock.purpose](place, lock)
            await location.disk.run(locks.remove_lock, place.directory, lock)
        settled = await location.reload(volume.volume_id)
        if settled is None:
            raise VolumeNotFound(volume.volume_id)
        return settled


def describe_lock(lock: LockRecord) -> dict[str, object]:
    """The ``locked`` object of answers."""
    return {
        "purpose": lock.purpose,
        "job": lock.operation,
        "since": lock.started or None,
        "host": lock.host or None,
        "shared": lock.shared,
    }


@contextlib.asynccontextmanager
async def claim(location: Location, mirror: PoolMirror, volume_id: str) -> AsyncIterator[None]:
    """A volume of a pool, against all other servers, and as they have left it. Only under its guard.

    It stays claimed for as long as there are lock files or export markers in it.
    """
    claims, directory = mirror.pool.claims, location.volume_path(volume_id)

    def begin() -> None:
        claims.acquire(volume_id)
        mirror.sync_one(volume_id)

    def end() -> None:
        with contextlib.suppress(FileNotFoundError):
            if is_in_use(directory):
                return
        claims.release(volume_id)

    try:
        await location.disk.run(begin)
        yield
    finally:
        try:
            await location.disk.run(end)
        except OSError as error:
            log.warning("volume %s stays claimed by this server: %s", volume_id, error.strerror)


async def _look_for(location: Location, volume_id: str) -> Volume | None:
    if location.mirror is not None:
        await location.disk.run(location.mirror.sync)
    return await location.reload(volume_id)


async def _every(interval_s: float, work: Callable[[], Awaitable[object]]) -> None:
    while True:
        await asyncio.sleep(interval_s)
        try:
            await work()
        except Exception:
            log.exception("background work failed; it is tried again in %g s", interval_s)


def _remove_temporaries(directory: str) -> None:
    for name in os.listdir(directory):
        if name.startswith(TEMPORARY_PREFIX):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(f"{directory}/{name}")
