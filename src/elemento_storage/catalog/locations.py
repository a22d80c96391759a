"""The locations below the root: found, opened, watched and kept true to the disk."""

import asyncio
import contextlib
import errno
import logging
import os
from collections.abc import Iterator

from elemento_storage.catalog import reservations
from elemento_storage.catalog.discovery import find_locations
from elemento_storage.catalog.guard import WORK_DIRECTORY
from elemento_storage.catalog.location import (
    STAGING_DIRECTORY,
    TRASH_DIRECTORY,
    Location,
    OnChange,
    SweepReport,
)
from elemento_storage.catalog.placement import read_space
from elemento_storage.catalog.presence import Presence
from elemento_storage.catalog.settings import SETTINGS_FILE
from elemento_storage.config import Settings
from elemento_storage.disk import Disk
from elemento_storage.errors import LocationUnavailable, NoRoom
from elemento_storage.model import Volume

log = logging.getLogger(__name__)

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class Locations:
    """All locations below one root, by name."""

    def __init__(self, settings: Settings, server_id: str, on_change: OnChange) -> None:
        self.by_name: dict[str, Location] = {}
        self.problem: str | None = None  #: why the root itself cannot be read
        self.duplicates: set[str] = set()  #: volume ids that more than one location has
        self._server_id = server_id
        self._settings = settings
        self._on_change = on_change
        self._root_disk = Disk("root")
        self._looking = asyncio.Lock()

    def answering(self) -> list[Location]:
        """The locations that are there, by name."""
        return [location for location in self.by_name.values() if location.missing is None]

    async def discover(self) -> list[Location]:
        """Look for locations: vanished ones are marked, changed settings are read; the new ones."""
        async with self._looking:
            try:
                found = await self._root_disk.run(find_locations, self._settings.root, self._settings.search_depth)
                self.problem = None
            except OSError as error:
                found = []
                self.problem = f"the root {self._settings.root} cannot be read: {error.strerror}"
                log.error(self.problem)
            present = {location.name: location for location in found}
            for name, location in self.by_name.items():
                newly = present.get(name)
                if newly is None:
                    self._mark_missing(location, f"{location.path}/{SETTINGS_FILE} is gone; is the disk mounted?")
                elif location.missing is not None or newly.identity != location.identity:
                    log.info("location %s is back", name)
                    location.identity = newly.identity
                    location.missing = None
            fresh = []
            for name, newly in present.items():
                if name not in self.by_name:
                    fresh.append(Location(newly, lease_s=self._settings.lease, on_change=self._on_change))
            for location in fresh:
                self.by_name[location.name] = location
            self.by_name = dict(sorted(self.by_name.items()))
            for location in self.by_name.values():
                if location.missing is None:
                    try:
                        await location.load_settings()
                    except OSError as error:
                        self._mark_missing(location, f"settings.json cannot be read: {error.strerror}")
            return fresh

    def _mark_missing(self, location: Location, reason: str) -> None:
        if location.missing is None:
            log.error("location %s does not answer: %s", location.name, reason)
        location.missing = reason

    async def open(self, location: Location) -> None:
        """First contact: leave a sign of life, remove what the dead left half made, read the volumes."""
        if location.missing is not None:
            return
        try:
            await self._enter(location)
            await location.sweep(max_age_s=0.0)
        except OSError as error:
            self._mark_missing(location, error.strerror or str(error))
            return

    async def _enter(self, location: Location) -> None:
        def enter() -> Presence:
            # A disk that is no longer mounted leaves an empty directory: nothing is written below the mount point.
            os.stat(f"{location.path}/{SETTINGS_FILE}")
            if location.is_unique and not read_space(location.path).is_mount_point:
                raise PermissionError(errno.EPERM, "not mounted")
            for directory in (WORK_DIRECTORY, STAGING_DIRECTORY, TRASH_DIRECTORY):
                os.makedirs(f"{location.path}/{directory}", exist_ok=True)
            sign = Presence(location.path, self._server_id)
            reservations.remove_dead(location.path, self._server_id, lease_s=self._settings.lease)
            return sign

        try:
            location.presence = await location.disk.run(enter)
            location.read_only = None
        except PermissionError as error:
            location.read_only = f"nothing can be written: {error.strerror}"
        except OSError as error:
            if error.errno not in (errno.EROFS, *_FULL):
                raise
            location.read_only = f"nothing can be written: {error.strerror}"
        if location.read_only:
            log.warning("location %s: %s", location.name, location.read_only)

    async def heartbeat(self) -> None:
        """A sign of life in every location."""

        async def beat(location: Location) -> None:
            presence = location.presence
            try:
                if presence is None:
                    await self._enter(location)
                    return
                try:
                    await location.disk.run(presence.touch)
                except FileNotFoundError:
                    # Somebody took the file away, or a disk was mounted over it: say again that we are here.
                    location.presence = None
                    await location.disk.run(presence.leave)
            except OSError as error:
                self._mark_missing(location, error.strerror or str(error))

        await asyncio.gather(*(beat(location) for location in self.answering()))

    async def refresh(self, *, max_age_s: float | None = None) -> SweepReport:
        """Compare every location with the disk; one that does not answer in time is marked, not waited for."""
        total = SweepReport()

        async def one(location: Location) -> None:
            try:
                report = await asyncio.wait_for(location.sweep(max_age_s=max_age_s), self._settings.disk_timeout)
            except OSError as error:
                reason = "it does not answer" if isinstance(error, TimeoutError) else error.strerror or str(error)
                self._mark_missing(location, reason)
                return
            total.added += report.added
            total.changed += report.changed
            total.removed += report.removed

        await asyncio.gather(*(one(location) for location in self.answering()))
        return total

    def find_duplicates(self) -> None:
        """Volumes copied by hand into a second location: the first by name counts, the others are reported."""
        seen: set[str] = set()
        duplicates: set[str] = set()
        if len(self.by_name) > 1:
            for location in self.by_name.values():
                duplicates |= seen & location.entries.keys()
                seen |= location.entries.keys()
        for volume_id in duplicates - self.duplicates:
            log.error("volume %s is in more than one location; the one first by name counts", volume_id)
        self.duplicates = duplicates

    def volumes(self) -> Iterator[Volume]:
        """Every volume in the index whose location answers."""
        shown: set[str] = set()
        for location in self.answering():
            for volume_id, entry in location.entries.items():
                if volume_id in self.duplicates:
                    if volume_id in shown:
                        continue
                    shown.add(volume_id)
                yield entry.volume

    def close(self) -> None:
        """Leave every location."""
        for location in self.by_name.values():
            location.close()
        self._root_disk.close()


def require_writable(location: Location) -> None:
    """Raises LocationUnavailable when nothing can be written there."""
    if location.read_only:
        raise LocationUnavailable(f"location {location.name}: {location.read_only}", location=location.name)


@contextlib.contextmanager
def os_errors(location: Location) -> Iterator[None]:
    """Turn what the operating system says about a location into our words."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in _FULL:
            raise NoRoom(f"location {location.name} is full: {reason}", locations={location.name: reason}) from error
        raise LocationUnavailable(
            f"location {location.name} does not work: {reason}", location=location.name
        ) from error
