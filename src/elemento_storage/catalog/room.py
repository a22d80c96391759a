"""Room for volumes: reservations that hold across tasks, processes and servers, and emptying the bin for them."""

import asyncio
import math
from dataclasses import dataclass, replace

from elemento_storage.catalog import reservations
from elemento_storage.catalog.bin import RecycleBin
from elemento_storage.catalog.guard import Guard, placement_guard
from elemento_storage.catalog.location import Location
from elemento_storage.catalog.locations import Locations, os_errors, require_presence
from elemento_storage.catalog.placement import (
    Space,
    Usage,
    creation_problem,
    free_quota,
    quota_problem,
    read_space,
    space_problem,
)
from elemento_storage.config import Settings
from elemento_storage.disk import within
from elemento_storage.errors import LocationUnavailable, NoRoom


@dataclass(frozen=True)
class Reservation:
    """Room in a location for one volume, to be given back or turned into the volume."""

    location: Location
    volume_id: str
    path: str

    async def release(self) -> None:
        """Give the room back; half-made data goes with it. Idempotent."""
        try:
            await self.location.disk.run(reservations.remove, self.path)
        finally:
            self.forget()

    def forget(self) -> None:
        """The reservation has become a volume."""
        self.location.own_reservations.pop(self.volume_id, None)
        self.location.own_allocations.pop(self.volume_id, None)


@dataclass(frozen=True)
class Demand:
    """What is asked of a location: ``more_bytes`` for ``volume_id``, which will have ``size_bytes`` in all."""

    volume_id: str
    size_bytes: int
    new_volume: bool = True
    allocated: bool = False  #: all of it is allocated at once, not when it is written


class Room:
    """Finds room and reserves it."""

    def __init__(self, settings: Settings, server_id: str, locations: Locations, bins: RecycleBin) -> None:
        self._overcommit = settings.overcommit
        self._server_id = server_id
        self._locations = locations
        self._bins = bins

    async def reserve_new(self, demand: Demand) -> Reservation:
        """Room for a new volume in the best location, as a staging directory there. Raises NoRoom."""
        reasons: dict[str, str] = {}
        ranked = await self._by_free_quota(reasons)
        for may_purge in (False, True):
            for location in ranked:
                reservation = await self._reserve(location, demand, reasons, directory=True, may_purge=may_purge)
                if reservation is not None:
                    return reservation
        if self._locations.problem:
            reasons.setdefault(".", self._locations.problem)
        raise no_room(reasons)

    async def reserve_in(self, location: Location, demand: Demand) -> Reservation:
        """Room in one location: for a volume that grows, or comes back from the bin. Raises NoRoom."""
        reasons: dict[str, str] = {}
        if location.settings_problem:
            raise no_room({location.name: location.settings_problem})
        for may_purge in (False, True):
            reservation = await self._reserve(location, demand, reasons, directory=False, may_purge=may_purge)
            if reservation is not None:
                return reservation
        raise no_room(reasons)

    async def _by_free_quota(self, reasons: dict[str, str]) -> list[Location]:
        spaces = await self._spaces(reasons)
        ranked: list[tuple[int, str, Location]] = []
        by_device: dict[int, Space] = {}  # one reading per file system, so that equals stay equal
        for location, read in spaces.items():
            space = read if location.is_unique else by_device.setdefault(location.identity[0], read)
            reason = creation_problem(unique=location.is_unique, space=space)
            if reason is not None:
                reasons[location.name] = reason
                continue
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
        space = await within(self._locations.patience_s, location.disk.run(read_space, location.path))
        promised = sum(location.own_allocations.values())
        return replace(space, free_bytes=max(0, space.free_bytes - promised))

    async def _reserve(
        self, location: Location, demand: Demand, reasons: dict[str, str], *, directory: bool, may_purge: bool
    ) -> Reservation | None:
        """None, and the reason in ``reasons``, when the location has no room.

        Before it says no, and whenever another server changed the totals, the location is read afresh.
        """
        try:
            require_presence(location)
        except LocationUnavailable as error:
            reasons[location.name] = error.message
            return None
        own_stamp = bytes.fromhex(self._server_id)
        path = reservations.staging_path(location.path, demand.volume_id, demand.size_bytes, self._server_id)

        def enter() -> tuple[Guard, bytes]:
            guard = placement_guard(location.path)
            return guard, guard.read_stamp()

        def leave(guard: Guard) -> None:
            reservations.make(path, directory=directory)
            guard.write_stamp(own_stamp)

        async with location.placement:
            with os_errors(location):
                guard, stamp = await location.disk.run(enter)
                try:
                    problem = None
                    if stamp == own_stamp:
                        problem = await self._problem(location, demand, may_purge=False)
                    if stamp != own_stamp or problem is not None:
                        await self._read_afresh(location)
                        problem = await self._problem(location, demand, may_purge=may_purge)
                    if problem is not None:
                        reasons[location.name] = problem
                        return None
                    await location.disk.run(leave, guard)
                    location.own_reservations[demand.volume_id] = demand.size_bytes
                    if demand.allocated:
                        location.own_allocations[demand.volume_id] = demand.size_bytes
                finally:
                    await location.disk.run(guard.release)
        return Reservation(location, demand.volume_id, path)

    async def _problem(self, location: Location, demand: Demand, *, may_purge: bool) -> str | None:
        entry = location.entries.get(demand.volume_id)
        present_bytes = entry.volume.size_bytes if entry and not demand.new_volume else 0
        more_bytes = demand.size_bytes - present_bytes
        for purged in (False, True):
            space = await self._space(location)
            problem = quota_problem(
                location.settings,
                usage(location),
                space,
                unique=location.is_unique,
                more_bytes=more_bytes,
                more_volumes=1 if demand.new_volume else 0,
                largest_bytes=demand.size_bytes,
            )
            if problem is not None:
                return problem
            problem = space_problem(space, overcommit=self._overcommit, more_bytes=more_bytes)
            if problem is None or purged or not may_purge:
                return problem
            # Space is all that is missing, and only if the bin has enough of it is anything purged.
            missing_bytes = math.ceil(more_bytes / self._overcommit) - space.free_bytes
            if not await self._bins.make_room(location, missing_bytes):
                return problem
        return problem

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
        candidates = await self._by_free_quota(reasons)
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
            return quota_problem(
                location.settings,
                plan(location),
                spaces[location],
                unique=location.is_unique,
                more_bytes=size_bytes,
                more_volumes=1,
                largest_bytes=size_bytes,
            ) or space_problem(spaces[location], overcommit=self._overcommit, more_bytes=size_bytes)

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


def usage(location: Location) -> Usage:
    """What counts against the location's limits."""
    return Usage(location.volume_count, location.virtual_bytes)


def no_room(reasons: dict[str, str]) -> NoRoom:
    """The error with each location's reason."""
    if not reasons:
        return NoRoom("there is no location: put a settings.json into a directory below the root", locations={})
    told = "; ".join(f"{name}: {reason}" for name, reason in sorted(reasons.items()))
    return NoRoom(f"no location has room ({told})", locations=reasons)
