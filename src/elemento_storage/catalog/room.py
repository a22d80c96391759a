"""Room for volumes: reservations that hold across tasks, processes and servers, and emptying the bin for them."""

from dataclasses import dataclass

from elemento_storage.catalog import reservations
from elemento_storage.catalog.bin import RecycleBin
from elemento_storage.catalog.guard import placement_guard
from elemento_storage.catalog.location import Location
from elemento_storage.catalog.locations import Locations, os_errors
from elemento_storage.catalog.placement import (
    Space,
    Usage,
    creation_problem,
    free_quota,
    read_space,
    room_problem,
)
from elemento_storage.config import Settings
from elemento_storage.errors import NoRoom


@dataclass(frozen=True)
class Reservation:
    """Room in a location for one volume, to be given back or turned into the volume."""

    location: Location
    volume_id: str
    path: str

    async def release(self) -> None:
        """Give the room back; half-made data goes with it. Idempotent."""
        await self.location.disk.run(reservations.remove, self.path)
        self.location.own_reservations.pop(self.volume_id, None)


class Room:
    """Finds room and reserves it."""

    def __init__(self, settings: Settings, server_id: str, locations: Locations, bins: RecycleBin) -> None:
        self._overcommit = settings.overcommit
        self._server_id = server_id
        self._locations = locations
        self._bins = bins

    async def reserve_new(self, volume_id: str, size_bytes: int) -> Reservation:
        """Room for a new volume in the best location, as a staging directory there. Raises NoRoom."""
        reasons: dict[str, str] = {}
        for emptied in (False, True):
            if emptied and not await self._bins.make_room(size_bytes):
                break
            reasons = {}
            for location in await self._by_free_quota(reasons):
                reservation = await self._reserve(
                    location, volume_id, size_bytes, reasons, new_volume=True, directory=True
                )
                if reservation is not None:
                    return reservation
        if self._locations.problem:
            reasons.setdefault(".", self._locations.problem)
        raise no_room(reasons)

    async def reserve_in(self, location: Location, volume_id: str, size_bytes: int, *, new_volume: bool) -> Reservation:
        """Room in one location: for a volume that grows to ``size_bytes``, or comes back. Raises NoRoom."""
        reasons: dict[str, str] = {}
        reservation = await self._reserve(
            location, volume_id, size_bytes, reasons, new_volume=new_volume, directory=False
        )
        if reservation is None:
            raise no_room(reasons)
        return reservation

    async def _by_free_quota(self, reasons: dict[str, str]) -> list[Location]:
        ranked: list[tuple[int, str, Location]] = []
        spaces: dict[int, Space] = {}  # once per file system, so that equals stay equal
        for location in self._locations.by_name.values():
            reason = location.problem
            if reason is None:
                try:
                    device = location.identity[0]
                    if device not in spaces or location.is_unique:
                        spaces[device] = await location.disk.run(read_space, location.path)
                    space = spaces[device]
                    reason = creation_problem(location.settings, unique=location.is_unique, space=space)
                    quota = free_quota(location.settings, usage(location), space)
                    ranked.append((-quota, location.name, location))
                except OSError as error:
                    reason = error.strerror or str(error)
            if reason is not None:
                reasons[location.name] = reason
                ranked = [item for item in ranked if item[2] is not location]
        return [location for _, _, location in sorted(ranked, key=lambda item: item[:2])]

    async def _reserve(
        self,
        location: Location,
        volume_id: str,
        size_bytes: int,
        reasons: dict[str, str],
        *,
        new_volume: bool,
        directory: bool,
    ) -> Reservation | None:
        """None, and the reason in ``reasons``, when the location has no room.

        Before it says no, and whenever another server changed the totals, the location is read afresh.
        """
        path = reservations.staging_path(location.path, volume_id, size_bytes, self._server_id)
        own_stamp = bytes.fromhex(self._server_id)

        async with location.placement:
            with os_errors(location):
                guard = await location.disk.run(placement_guard, location.path)
                try:
                    believed = guard.read_stamp() == own_stamp
                    while True:
                        if not believed:
                            await self._read_afresh(location)
                        entry = location.entries.get(volume_id)
                        present = entry.volume.size_bytes if entry and not new_volume else 0
                        space = await location.disk.run(read_space, location.path)
                        problem = room_problem(
                            location.settings,
                            usage(location),
                            space,
                            unique=location.is_unique,
                            overcommit=self._overcommit,
                            more_bytes=size_bytes - present,
                            more_volumes=1 if new_volume else 0,
                            largest_bytes=size_bytes,
                        )
                        if problem is None or not believed:
                            break
                        believed = False
                    if problem is not None:
                        reasons[location.name] = problem
                        return None
                    await location.disk.run(reservations.make, path, directory=directory)
                    location.own_reservations[volume_id] = size_bytes
                    guard.write_stamp(own_stamp)
                finally:
                    guard.release()
        return Reservation(location, volume_id, path)

    async def _read_afresh(self, location: Location) -> None:
        # Staging first: a volume that is published in between is then seen twice, not missed.
        location.foreign_reservations = await location.disk.run(reservations.foreign, location.path, self._server_id)
        await location.sweep(max_age_s=0.0)

    async def can_take(self, sizes_bytes: list[int]) -> tuple[bool, dict[str, str | None]]:
        """Whether volumes of these sizes would all find room now; for each location None or why it is no help.

        Plays placement through, largest volume first, without reserving anything.
        """
        reasons: dict[str, str] = {}
        candidates = await self._by_free_quota(reasons)
        answer: dict[str, str | None] = dict(reasons)
        planned: dict[str, list[int]] = {location.name: [] for location in candidates}
        spaces: dict[str, Space] = {}
        for location in candidates:
            with os_errors(location):
                spaces[location.name] = await location.disk.run(read_space, location.path)

        def problem_in(location: Location, size_bytes: int) -> str | None:
            before = planned[location.name]
            now = usage(location)
            return room_problem(
                location.settings,
                Usage(now.volume_count + len(before), now.virtual_bytes + sum(before)),
                spaces[location.name],
                unique=location.is_unique,
                overcommit=self._overcommit,
                more_bytes=size_bytes,
                more_volumes=1,
                largest_bytes=size_bytes,
            )

        def quota_left(location: Location) -> int:
            return free_quota(location.settings, usage(location), spaces[location.name]) - sum(planned[location.name])

        fits = True
        for size_bytes in sorted(sizes_bytes, reverse=True):
            for location in sorted(candidates, key=lambda candidate: (-quota_left(candidate), candidate.name)):
                answer[location.name] = problem_in(location, size_bytes)
                if answer[location.name] is None:
                    planned[location.name].append(size_bytes)
                    break
            else:
                fits = False
        return fits, dict(sorted(answer.items()))


def usage(location: Location) -> Usage:
    """What counts against the location's limits."""
    return Usage(location.volume_count, location.virtual_bytes)


def no_room(reasons: dict[str, str]) -> NoRoom:
    """The error with each location's reason."""
    if not reasons:
        return NoRoom("there is no location: put a settings.json into a directory below the root", locations={})
    told = "; ".join(f"{name}: {reason}" for name, reason in sorted(reasons.items()))
    return NoRoom(f"no location has room ({told})", locations=reasons)
