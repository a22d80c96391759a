"""Room for volumes: reservations that hold across tasks, processes and servers, and emptying the bin for them."""

import asyncio
import logging
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace

from elemento_storage.catalog import reservations
from elemento_storage.catalog.bin import RecycleBin
from elemento_storage.catalog.guard import placement_guard
from elemento_storage.catalog.location import Location
from elemento_storage.catalog.locations import Locations, os_errors, require_presence
from elemento_storage.catalog.placement import (
    Space,
    Usage,
    creation_problem,
    free_quota,
    quota_problem,
    space_problem,
)
from elemento_storage.ceph.pool import Pool
from elemento_storage.config import Settings
from elemento_storage.disk import Place, within
from elemento_storage.durable import create
from elemento_storage.errors import LocationUnavailable, NoRoom, VolumeExists
from elemento_storage.model import VolumeFormat

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reservation:
    """Room in a location for one volume, to be given back or turned into the volume."""

    location: Location
    volume_id: str
    size_bytes: int
    path: str
    lasting: bool = False  #: it outlives this process, and belongs to no server
    grows: bool = False  #: for a volume that is there already

    @property
    def place(self) -> Place:
        """The directory of a volume in the making."""
        return Place(self.path, self.location.disk, self.volume_id)

    def enter(self) -> None:
        """Count it among what is reserved in the location."""
        self._of_location[self.volume_id] = self.size_bytes

    @property
    def _of_location(self) -> dict[str, int]:
        return self.location.foreign_reservations if self.lasting else self.location.own_reservations

    async def release(self) -> None:
        """Give the room back; half-made data goes with it. Idempotent."""
        location, pool = self.location, self.location.pool
        try:
            await location.disk.run(reservations.remove, self.path)
            if pool is not None and self.grows:
                await location.disk.run(pool.unreserve, self.volume_id)
            elif pool is not None:
                await location.disk.run(pool.abandon, self.volume_id)
        finally:
            self.forget()

    def forget(self) -> None:
        """The reservation has become a volume."""
        self._of_location.pop(self.volume_id, None)
        self.location.own_allocations.pop(self.volume_id, None)


GoOn = Callable[[Reservation], None]


@dataclass(frozen=True)
class Demand:
    """What is asked of a location: ``more_bytes`` for ``volume_id``, which will have ``size_bytes`` in all."""

    volume_id: str
    size_bytes: int
    new_volume: bool = True
    allocated: bool = False  #: all of it is allocated at once, not when it is written
    on_disk_bytes: int = 0  #: what it has on this file system already, in the bin
    lasting: bool = False  #: the reservation outlives this process
    data_bytes: int = 0  #: what is written at once, whatever the size: a copy's data
    in_pool: bool = False  #: an image of a Ceph pool, and no file

    @property
    def promised_bytes(self) -> int:
        """What will be taken from the file system's free space before long."""
        return self.size_bytes if self.allocated else self.data_bytes


@dataclass(frozen=True)
class Refusal:
    """Why a location has no room. ``missing_bytes`` of free space is what emptying the bin could help with."""

    reason: str
    missing_bytes: int = 0


@dataclass(eq=False)
class _Applicant:
    """Somebody who waits for a reservation."""

    demand: Demand
    reservation: Reservation
    directory: bool
    go_on: GoOn | None
    reserved: bool = False


class Room:
    """Finds room and reserves it."""

    def __init__(self, settings: Settings, server_id: str, locations: Locations, bins: RecycleBin) -> None:
        self._overcommit = settings.overcommit
        self._server_id = server_id
        self._locations = locations
        self._bins = bins
        self._queues: dict[Location, list[_Applicant]] = {}

    async def reserve_new(
        self,
        demand: Demand,
        go_on: GoOn | None = None,
        *,
        first: Location | None = None,
        only: Location | None = None,
    ) -> Reservation:
        """Room for a new volume in the best location, as a staging directory there. Raises NoRoom.

        ``first`` is asked before the others, however little quota it has left; ``only`` and no other.

        ``go_on`` is what the caller does with it next, in a thread of the location. Where nobody else is served it
        may have been called already, to save a hand-over. It must not raise.

        Where only space is missing and the bin has enough of it, the bin is emptied as far as needed.
        """
        reasons: dict[str, str] = {}
        short_of_space: list[tuple[Location, int]] = []
        candidates = _of_kind(await self._by_free_quota(reasons), reasons, in_pool=demand.in_pool)
        if first in candidates:
            candidates = [first, *(one for one in candidates if one is not first)]
        if only is not None:
            reasons = {name: reason for name, reason in reasons.items() if name == only.name}
            if only.problem:
                reasons.setdefault(only.name, only.problem)
            candidates = [one for one in candidates if one is only]
        for location in candidates:
            outcome = await self._try(location, demand, reasons, go_on)
            if isinstance(outcome, Reservation):
                return outcome
            if outcome is not None and outcome.missing_bytes:
                short_of_space.append((location, outcome.missing_bytes))
        # Not under the placement guard: purging takes volumes' guards, which come first, and may take long.
        for location, missing_bytes in short_of_space:
            if await self._bins.make_room(location, missing_bytes):
                outcome = await self._try(location, demand, reasons, go_on)
                if isinstance(outcome, Reservation):
                    return outcome
        if self._locations.problem:
            reasons.setdefault(".", self._locations.problem)
        raise no_room(reasons)

    async def reserve_in(self, location: Location, demand: Demand, *, directory: bool = False) -> Reservation:
        """Room in one location: for a volume that grows, comes back from the bin or gets content. Raises NoRoom.

        ``directory``: as a staging directory, for files that are on their way into the volume.
        """
        if location.settings_problem:
            raise no_room({location.name: location.settings_problem})
        with os_errors(location):
            outcome = await self._reserve(location, demand, directory=directory)
        if isinstance(outcome, Refusal):
            raise no_room({location.name: outcome.reason})
        if location.pool is not None:
            limit = pool_limit(location, demand.size_bytes, new_volume=demand.new_volume)
            try:
                with os_errors(location):
                    await location.disk.run(location.pool.reserve, demand.volume_id, demand.size_bytes, limit)
            except BaseException:
                await outcome.release()
                raise
        return outcome

    async def resize(self, reservation: Reservation, size_bytes: int) -> Reservation:
        """The same for another size, as what arrives turns out to be larger or smaller. Raises NoRoom: it stays then.

        The directory is another one afterwards: its name holds the size.
        """
        location = reservation.location
        demand = Demand(reservation.volume_id, size_bytes, new_volume=False, lasting=reservation.lasting)
        resized = replace(self._reservation(location, demand), grows=reservation.grows)
        if resized == reservation:
            return reservation
        async with location.placement:
            with os_errors(location):
                guard = await location.disk.run(placement_guard, location.path)
                try:
                    await self._read_afresh(location)
                    entry = location.entries.get(demand.volume_id)
                    present_bytes = max(reservation.size_bytes, entry.volume.size_bytes if entry else 0)
                    space = await self._space(location)
                    refusal = self._refusal(location, demand, usage(location), present_bytes, space)
                    if refusal is not None and size_bytes > present_bytes:
                        raise no_room({location.name: refusal.reason})
                    await location.disk.run(os.rename, reservation.path, resized.path)
                    resized.enter()
                    await location.disk.run(guard.write_stamp, bytes.fromhex(self._server_id))
                finally:
                    await location.disk.run(guard.release)
        return resized

    async def lasting(self) -> list[Reservation]:
        """What was reserved for longer than a server lives, in all locations that answer."""
        found: list[Reservation] = []
        for location in self._locations.answering():
            try:
                read = await within(self._locations.patience_s, location.disk.run(reservations.lasting, location.path))
            except OSError as error:
                log.warning("location %s was not asked for what waits in it: %s", location.name, error)
                continue
            found += [Reservation(location, *one, lasting=True) for one in read]
        return found

    def _reservation(self, location: Location, demand: Demand) -> Reservation:
        holder = reservations.LASTING if demand.lasting else self._server_id
        path = reservations.staging_path(location.path, demand.volume_id, demand.size_bytes, holder)
        grows = not demand.new_volume
        return Reservation(location, demand.volume_id, demand.size_bytes, path, demand.lasting, grows=grows)

    async def _try(
        self, location: Location, demand: Demand, reasons: dict[str, str], go_on: GoOn | None
    ) -> Reservation | Refusal | None:
        """None when the location does not work: the next one may. Every failure leaves its reason."""
        try:
            with os_errors(location):
                outcome = await self._reserve(location, demand, directory=True, go_on=go_on)
        except (LocationUnavailable, NoRoom) as error:
            reasons[location.name] = error.message
            return None
        if isinstance(outcome, Refusal):
            reasons[location.name] = outcome.reason
        return outcome

    async def _by_free_quota(self, reasons: dict[str, str]) -> list[Location]:
        candidates = [location for location in self._locations.by_name.values() if location.problem is None]
        if len(candidates) == 1 and len(self._locations.by_name) == 1:
            return candidates
        ranked: list[tuple[int, str, Location]] = []
        by_device: dict[int, Space] = {}  # one reading per file system, so that equals stay equal
        for location, read in (await self._spaces(reasons)).items():
            space = read if location.is_unique else by_device.setdefault(location.identity[0], read)
            ranked.append((-free_quota(location.settings, usage(location), space), location.name, location))
        return [location for _, _, location in sorted(ranked, key=lambda item: item[:2])]

    async def _spaces(self, reasons: dict[str, str]) -> dict[Location, Space]:
        """The space of every location that takes volumes; why the others do not goes into ``reasons``."""

        async def one(location: Location) -> Space | None:
            if location.problem is None:
                try:
                    return await self._space(location)
                except OSError as error:
                    reasons[location.name] = error.strerror or str(error)
            else:
                reasons[location.name] = location.problem
            return None

        candidates = list(self._locations.by_name.values())
        found = await asyncio.gather(*(one(location) for location in candidates))
        return {location: space for location, space in zip(candidates, found, strict=True) if space is not None}

    async def _space(self, location: Location) -> Space:
        read = location.disk.run(_read_space_left, location)
        return await within(self._locations.patience_s, read)

    async def _reserve(
        self, location: Location, demand: Demand, *, directory: bool, go_on: GoOn | None = None
    ) -> Reservation | Refusal:
        """Before it says no, and whenever another server changed the totals, the location is read afresh."""
        require_presence(location)
        reservation = self._reservation(location, demand)
        applicant = _Applicant(demand, reservation, directory, go_on)
        queue = self._queues.setdefault(location, [])
        queue.append(applicant)
        async with location.placement:
            if applicant in queue:
                await self._reserve_at_once(location, queue)
            refusal = None if applicant.reserved else await self._reserve_afresh(location, applicant)
        if refusal is None and location.pool is not None and directory:
            await _begin_in_pool(location, location.pool, reservation)
        return refusal or reservation

    async def _reserve_at_once(self, location: Location, queue: list[_Applicant]) -> None:
        """For all who wait, in one hand-over to a thread, as far as nobody else was here and there is room.

        One by one they would each wait for the journal's commit that the one before began.
        """
        batch, queue[:] = queue[:], []
        own_stamp = bytes.fromhex(self._server_id)
        before = usage(location)
        present = [_present_bytes(location, applicant.demand) for applicant in batch]
        # Who is alone here goes on in the same thread. With others about it would keep them waiting for its syncs.
        alone = batch[0] if len(batch) == 1 and not location.own_reservations else None

        def reserve() -> None:
            reserve_all()
            if alone is not None and alone.reserved and alone.go_on is not None:
                alone.go_on(alone.reservation)

        def reserve_all() -> None:
            now = before
            with placement_guard(location.path) as guard:
                if guard.read_stamp() != own_stamp:
                    return
                space = _read_space_left(location)
                for applicant, present_bytes in zip(batch, present, strict=True):
                    demand = applicant.demand
                    if demand.promised_bytes or self._refusal(location, demand, now, present_bytes, space):
                        continue
                    try:
                        reservations.make(applicant.reservation.path, directory=applicant.directory)
                    except OSError:
                        continue  # it is met again, and told, where this one is alone
                    applicant.reserved = True
                    now = Usage(
                        now.volume_count + demand.new_volume, now.virtual_bytes + demand.size_bytes - present_bytes
                    )

        try:
            await location.disk.run(reserve)
        finally:
            for applicant in batch:
                if applicant.reserved:
                    applicant.reservation.enter()

    async def _reserve_afresh(self, location: Location, applicant: _Applicant) -> Refusal | None:
        """After reading the location again; why not, if not."""
        demand = applicant.demand
        guard = await location.disk.run(placement_guard, location.path)
        try:
            await self._read_afresh(location)
            present_bytes = _present_bytes(location, demand)
            space = await self._space(location)
            refusal = self._refusal(location, demand, usage(location), present_bytes, space)
            if refusal is not None:
                return refusal
            await location.disk.run(reservations.make, applicant.reservation.path, directory=applicant.directory)
            applicant.reservation.enter()
            if demand.promised_bytes:
                location.own_allocations[demand.volume_id] = demand.promised_bytes
            await location.disk.run(guard.write_stamp, bytes.fromhex(self._server_id))
        finally:
            await location.disk.run(guard.release)
        return None

    def _refusal(
        self, location: Location, demand: Demand, now: Usage, present_bytes: int, space: Space
    ) -> Refusal | None:
        more_bytes = demand.size_bytes - present_bytes
        reason = creation_problem(unique=location.is_unique, space=space) or quota_problem(
            location.settings,
            now,
            space,
            unique=location.is_unique,
            more_bytes=more_bytes,
            more_volumes=1 if demand.new_volume else 0,
            largest_bytes=demand.size_bytes,
        )
        if reason is not None:
            return Refusal(reason)
        new_data_bytes = more_bytes - demand.on_disk_bytes
        reason = space_problem(space, overcommit=self._overcommit, more_bytes=new_data_bytes)
        if reason is not None:
            return Refusal(reason, missing_bytes=math.ceil(new_data_bytes / self._overcommit) - space.free_bytes)
        reason = space_problem(space, overcommit=1.0, more_bytes=demand.data_bytes)
        return None if reason is None else Refusal(reason, missing_bytes=demand.data_bytes - space.free_bytes)

    async def _read_afresh(self, location: Location) -> None:
        # Staging first: a volume that is published in between is then seen twice, not missed.
        location.foreign_reservations = await location.disk.run(reservations.foreign, location.path, self._server_id)
        await location.sweep(max_age_s=0.0)

    async def can_take(self, sizes_bytes: list[int]) -> tuple[bool, dict[str, str | None]]:
        """Whether volumes of these sizes would all find room now; for each location None or why it is no help.

        Plays placement through, largest volume first, without reserving anything.
        """
        await self._locations.refresh()
        reasons: dict[str, str] = {}
        candidates = _of_kind(await self._by_free_quota(reasons), reasons, in_pool=False)
        answer: dict[str, str | None] = dict(reasons)
        planned: dict[str, list[int]] = {location.name: [] for location in candidates}
        spaces = await self._spaces({})
        for location, space in spaces.items():
            purgeable = await self._bins.purgeable_bytes(location)
            spaces[location] = replace(space, free_bytes=space.free_bytes + purgeable)

        def plan(location: Location) -> Usage:
            now, more = usage(location), planned[location.name]
            return Usage(now.volume_count + len(more), now.virtual_bytes + sum(more))

        def problem_in(location: Location, size_bytes: int) -> str | None:
            return (
                creation_problem(unique=location.is_unique, space=spaces[location])
                or quota_problem(
                    location.settings,
                    plan(location),
                    spaces[location],
                    unique=location.is_unique,
                    more_bytes=size_bytes,
                    more_volumes=1,
                    largest_bytes=size_bytes,
                )
                or space_problem(spaces[location], overcommit=self._overcommit, more_bytes=size_bytes)
            )

        def quota_left(location: Location) -> int:
            return free_quota(location.settings, plan(location), spaces[location])

        for size_bytes in sorted(sizes_bytes, reverse=True):
            problems = {location.name: problem_in(location, size_bytes) for location in candidates}
            if not any(planned.values()):
                answer |= problems  # what is said of a location where all goes well is about the largest
            fitting = [location for location in candidates if problems[location.name] is None]
            if not fitting:
                return False, dict(sorted((answer | problems).items()))
            best = min(fitting, key=lambda location: (-quota_left(location), location.name))
            planned[best.name].append(size_bytes)
        return True, dict(sorted(answer.items()))


def _of_kind(candidates: list[Location], reasons: dict[str, str], *, in_pool: bool) -> list[Location]:
    """Those that keep files, or those that stand for pools; why the others do not do goes into ``reasons``."""
    for location in candidates:
        if (location.pool is not None) is not in_pool:
            reasons[location.name] = (
                "it stands for no Ceph pool: volumes of format rbd are not kept here"
                if in_pool
                else "it stands for a Ceph pool: only volumes of format rbd are kept here"
            )
    return [location for location in candidates if location.name not in reasons]


def pool_limit(location: Location, size_bytes: int, *, new_volume: bool) -> Callable[[int, int], None]:
    """The location's limits as they are asked of a pool, where all servers' volumes count."""

    def limit(volume_count: int, virtual_bytes: int) -> None:
        problem = quota_problem(
            location.settings,
            Usage(volume_count, virtual_bytes),
            Space(0, 0, is_mount_point=True),
            unique=False,
            more_bytes=size_bytes,
            more_volumes=1 if new_volume else 0,
            largest_bytes=size_bytes,
        )
        if problem is not None:
            raise no_room({location.name: problem})

    return limit


async def _begin_in_pool(location: Location, pool: Pool, reservation: Reservation) -> None:
    """Reserve the room among all servers as well. Raises NoRoom, VolumeExists, OSError."""
    limit = pool_limit(location, reservation.size_bytes, new_volume=True)

    def begin() -> None:
        create(f"{reservation.path}/{VolumeFormat.RBD.data_file}", pool.ref(reservation.volume_id).encode())
        pool.begin(reservation.volume_id, reservation.size_bytes, limit)

    try:
        await location.disk.run(begin)
    except VolumeExists:
        # What is there is somebody else's: giving back must not touch it.
        await location.disk.run(reservations.remove, reservation.path)
        reservation.forget()
        raise
    except BaseException:
        await reservation.release()
        raise


def _present_bytes(location: Location, demand: Demand) -> int:
    entry = location.entries.get(demand.volume_id)
    return entry.volume.size_bytes if entry and not demand.new_volume else 0


def _read_space_left(location: Location) -> Space:
    """What the file system says, without what is being preallocated. Blocks."""
    space = location.read_space()
    promised = sum(location.own_allocations.copy().values())
    return replace(space, free_bytes=max(0, space.free_bytes - promised))


def usage(location: Location) -> Usage:
    """What counts against the location's limits."""
    return Usage(location.volume_count, location.virtual_bytes)


def no_room(reasons: dict[str, str]) -> NoRoom:
    """The error with each location's reason."""
    if not reasons:
        return NoRoom("there is no location: put a settings.json into a directory below the root", locations={})
    told = "; ".join(f"{name}: {reason}" for name, reason in sorted(reasons.items()))
    return NoRoom(f"no location has room ({told})", locations=reasons)
