"""The locations below the root: found, opened, watched and kept true to the disk."""

import asyncio
import contextlib
import errno
import logging
import os
from collections.abc import Callable, Coroutine, Iterable, Iterator
from typing import Any

from elemento_storage.catalog.discovery import branches, find_locations
from elemento_storage.catalog.guard import WORK_DIRECTORY
from elemento_storage.catalog.location import (
    NOT_READ_YET,
    STAGING_DIRECTORY,
    TRASH_DIRECTORY,
    Location,
    OnChange,
    SweepReport,
)
from elemento_storage.catalog.placement import read_space
from elemento_storage.catalog.presence import Presence
from elemento_storage.catalog.settings import SETTINGS_FILE
from elemento_storage.ceph.faults import CephFault
from elemento_storage.ceph.pool import Pools
from elemento_storage.config import Settings
from elemento_storage.disk import Disk, within
from elemento_storage.errors import LocationUnavailable, NoRoom
from elemento_storage.model import Volume, printable

log = logging.getLogger(__name__)

# A sign of life that is gone, or can no longer be touched: it is left anew, or found to be impossible.
_SIGN_LOST = {errno.ENOENT, errno.ESTALE, errno.EROFS, errno.EACCES, errno.EPERM}
_GLANCE_S = 0.2  # how long a location that hung before is waited for
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class Locations:
    """All locations below one root, by name.

    No location can hold up another: each is tended by a task of its own, and one that does not answer in time is marked
    and skipped until that task has come back.
    """

    def __init__(self, settings: Settings, server_id: str, on_change: OnChange, pools: Pools) -> None:
        self.by_name: dict[str, Location] = {}
        self.problem: str | None = None  #: why the root itself cannot be read
        self.duplicates: set[str] = set()  #: volume ids that more than one location has
        self.patience_s = settings.disk_timeout / 3  #: how long one location may keep the others waiting
        self._server_id = server_id
        self._settings = settings
        self._on_change = on_change
        self._pools = pools
        self._following: dict[str, asyncio.Task[None]] = {}
        self._root_disk = Disk("root", threads=1)
        self._search_disk = Disk("search")
        self._searching: dict[str, asyncio.Task[None]] = {}

    def answering(self) -> list[Location]:
        """The locations that are there, by name."""
        return [location for location in self.by_name.values() if location.missing is None]

    # -- looking -------------------------------------------------------------------------------------------

    async def look(self, *, max_age_s: float | None = None) -> SweepReport:
        """Find new locations and compare every one with the disk, its settings included."""
        await self._discover()
        return await self._each(self.by_name.values(), lambda location: self._tend(location, max_age_s))

    async def refresh(self) -> SweepReport:
        """Compare the locations that answer with the index, if that is not just done."""
        return await self._each(self.answering(), lambda location: location.sweep())

    async def _discover(self) -> None:
        root, depth = self._settings.root, self._settings.search_depth
        try:
            starts = await within(self.patience_s, self._root_disk.run(branches, root))
            self.problem = None
        except OSError as error:
            self.problem = f"the root {root} cannot be read: {error.strerror or error}"
            log.error(self.problem)
            return
        begun = set()
        for start in starts:
            searching = self._searching.get(start)
            if searching is None or searching.done():
                self._searching[start] = asyncio.create_task(self._search(root, depth, start), name=f"search-{start}")
                begun.add(self._searching[start])
        if begun:
            await asyncio.wait(begun, timeout=self.patience_s)

    async def _search(self, root: str, depth: int, start: str) -> None:
        try:
            found = await self._search_disk.run(find_locations, root, depth, start)
        except OSError as error:
            log.warning("%s was not searched for locations: %s", printable(start), error)
            return
        for newly in found:
            location = self.by_name.get(newly.name)
            if location is not None:
                location.identity = newly.identity
                continue
            # A link from another branch may lead to a known location, or into one; the highest counts.
            known = list(self.by_name.values())
            if any(one.identity == newly.identity or newly.path.startswith(f"{one.path}/") for one in known):
                continue
            for inside in (one for one in known if one.path.startswith(f"{newly.path}/")):
                log.warning("location %s is inside %s now and no location any more", inside.name, newly.name)
                del self.by_name[inside.name]
                inside.forget_all()
                await inside.close()
            self.by_name[newly.name] = Location(
                newly, lease_s=self._settings.lease, on_change=self._on_change, pools=self._pools
            )
        self.by_name = dict(sorted(self.by_name.items()))

    async def _each(
        self, locations: Iterable[Location], work: Callable[[Location], Coroutine[Any, Any, SweepReport]]
    ) -> SweepReport:
        total = SweepReport()

        async def one(location: Location) -> None:
            known_to_hang = location.missing not in (None, NOT_READ_YET)
            if known_to_hang and location.tending is not None and not location.tending.done():
                return
            location.tending = asyncio.create_task(work(location), name=f"tend-{location.name}")
            location.tending.add_done_callback(_look_at_result)
            try:
                report = await self._patiently(
                    location, location.tending, _GLANCE_S if known_to_hang else self.patience_s
                )
            except TimeoutError:
                self._mark_missing(location, "it does not answer")
            except OSError as error:
                self._mark_missing(location, error.strerror or str(error))
            else:
                total.added += report.added
                total.changed += report.changed
                total.removed += report.removed

        await asyncio.gather(*(one(location) for location in list(locations)))
        return total

    async def _patiently(self, location: Location, task: asyncio.Task[SweepReport], patience_s: float) -> SweepReport:
        """Wait as long as the sweep gets on: a million volumes take long, a dead disk does nothing at all."""
        steps = location.steps.count
        while True:
            done, _ = await asyncio.wait({task}, timeout=patience_s)
            if done:
                return task.result()
            if location.steps.count == steps:
                raise TimeoutError
            steps = location.steps.count

    async def _tend(self, location: Location, max_age_s: float | None) -> SweepReport:
        try:
            await location.load_settings()
        except FileNotFoundError:
            raise FileNotFoundError(errno.ENOENT, "settings.json is gone; is the disk mounted?") from None
        await self._enter(location)
        report = await location.sweep(max_age_s=max_age_s)
        if location.missing is not None:
            log.info("location %s answers", location.name)
            location.missing = None
        return report

    def _mark_missing(self, location: Location, reason: str) -> None:
        if location.missing in (None, NOT_READ_YET):
            log.error("location %s does not answer: %s", location.name, reason)
        location.missing = reason

    # -- signs of life -------------------------------------------------------------------------------------

    async def _enter(self, location: Location) -> None:
        """Make our working directories and leave a sign of life, without which nothing is locked or reserved here."""

        def enter() -> Presence:
            # A disk that is no longer mounted leaves an empty directory: nothing is written below the mount point.
            os.stat(f"{location.path}/{SETTINGS_FILE}")
            if location.is_unique and not read_space(location.path).is_mount_point:
                raise PermissionError(errno.EPERM, "not mounted")
            for directory in (WORK_DIRECTORY, STAGING_DIRECTORY, TRASH_DIRECTORY):
                os.makedirs(f"{location.path}/{directory}", exist_ok=True)
            return Presence(location.path, self._server_id)

        async with location.entering:
            if location.presence is None:
                await self._leave_sign(location, enter)

    async def _leave_sign(self, location: Location, enter: Callable[[], Presence]) -> None:
        before = (location.read_only, location.no_presence)
        try:
            location.presence = await location.pulse.run(enter)
            location.read_only = location.no_presence = None
        except OSError as error:
            reason = error.strerror or str(error)
            if isinstance(error, PermissionError) or error.errno == errno.EROFS:
                location.read_only = f"nothing can be written: {reason}"
            elif error.errno in _FULL:
                # Destroying and purging still work, and are what makes room.
                location.no_presence = f"no sign of life can be left: {reason}"
            else:
                raise
        if (location.read_only, location.no_presence) != before:
            log.warning("location %s: %s", location.name, location.read_only or location.no_presence or "writable")

    async def _leave(self, location: Location) -> None:
        """Let go of a sign of life that is no longer there, or nobody can see; the next look leaves a new one."""
        presence, location.presence = location.presence, None
        if presence is not None:
            with contextlib.suppress(OSError):
                await within(self.patience_s, location.pulse.run(presence.leave))

    async def heartbeat(self) -> None:
        """A sign of life in every location where one was left, those included that do not answer otherwise."""

        async def beat(location: Location, presence: Presence) -> None:
            try:
                await within(self.patience_s, location.pulse.run(presence.touch))
                if location.pool is not None:
                    await within(self.patience_s, location.pulse.run(location.pool.claims.renew))
            except TimeoutError:
                self._mark_missing(location, "it does not answer")
            except OSError as error:
                if isinstance(error, CephFault) or error.errno not in _SIGN_LOST:
                    # Our file and its lock are still there: whoever can see them must not take us for dead.
                    self._mark_missing(location, error.strerror or str(error))
                    return
                await self._leave(location)
                with contextlib.suppress(OSError):  # the next look tells of it
                    await self._enter(location)

        await asyncio.gather(
            *(
                beat(location, location.presence)
                for location in list(self.by_name.values())
                if location.presence is not None and not location.pulse.busy
            )
        )

    async def follow_pools(self) -> None:
        """See what other servers have changed in the pools: one request each when nothing was."""

        async def follow(location: Location) -> None:
            try:
                await location.follow_pool()
            except OSError as error:
                self._mark_missing(location, error.strerror or str(error))

        for location in self.answering():
            following = self._following.get(location.name)
            if location.mirror is not None and (following is None or following.done()):
                self._following[location.name] = asyncio.create_task(follow(location), name=f"follow-{location.name}")

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

    async def close(self) -> None:
        """Leave every location."""
        await asyncio.gather(*(location.close() for location in self.by_name.values()))
        self._root_disk.close()
        self._search_disk.close()


def _look_at_result(task: asyncio.Task[SweepReport]) -> None:
    """Who waited for it has told of its failure; nobody has when it failed after the wait."""
    if not task.cancelled():
        task.exception()


def require_writable(location: Location) -> None:
    """Raises LocationUnavailable when nothing can be written there."""
    if location.read_only:
        raise LocationUnavailable(f"location {location.name}: {location.read_only}", location=location.name)


def require_presence(location: Location) -> None:
    """Raises LocationUnavailable when other servers could take us for dead, and our locks for leftovers."""
    require_writable(location)
    if location.presence is None:
        reason = location.no_presence or "this server has not entered it yet"
        raise LocationUnavailable(f"location {location.name}: {reason}", location=location.name)


@contextlib.contextmanager
def os_errors(location: Location) -> Iterator[None]:
    """Turn what the operating system says about a location into our words."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        if isinstance(error, CephFault) and error.errno not in _FULL:
            raise error.unavailable(f"location {location.name}: {reason}", location=location.name) from error
        if error.errno in _FULL:
            raise NoRoom(f"location {location.name} is full: {reason}", locations={location.name: reason}) from error
        raise LocationUnavailable(
            f"location {location.name} does not work: {reason}", location=location.name
        ) from error
