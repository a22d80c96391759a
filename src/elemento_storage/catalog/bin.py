"""The recycle bin of a location: ``elemento-bin/vid.<volume_uid>.elimg.<time>``.

Destroying is one rename into it, restoring one rename back; the time of destruction is in the name, so that nothing has
to be written beside the rename. Purging renames once more, into ``.elemento/trash``, and deletes there: a purge that is
interrupted never leaves half a volume that could be restored.
"""

import contextlib
import errno
import logging
import os
import shutil
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from elemento_storage.catalog.bin_names import BIN_DIRECTORY, name_in_bin, read_stamp
from elemento_storage.catalog.guard import volume_guard
from elemento_storage.catalog.location import TRASH_DIRECTORY, Location
from elemento_storage.catalog.locations import Locations, os_errors
from elemento_storage.ceph.index import State
from elemento_storage.ceph.pool import Pool
from elemento_storage.config import Settings
from elemento_storage.disk import within
from elemento_storage.durable import fsync_directory
from elemento_storage.faultpoints import reached
from elemento_storage.model import new_uid, volume_directory_name, volume_id_of_directory

log = logging.getLogger(__name__)

_CENTURY_S = 100 * 365.25 * 86400  # what a datetime can hold is not much more


@dataclass(frozen=True)
class BinEntry:
    """A destroyed volume that can still be restored."""

    volume_id: str
    directory_name: str  #: below ``elemento-bin/``
    destroyed: datetime

    def purge_at(self, retention_s: float) -> datetime:
        """When it will be gone."""
        return self.destroyed + timedelta(seconds=min(retention_s, _CENTURY_S))


def entries(location_path: str) -> list[BinEntry]:
    """What is in the bin, oldest first; other things in there are left alone. Blocks. Raises OSError."""
    try:
        names = os.listdir(f"{location_path}/{BIN_DIRECTORY}")
    except FileNotFoundError:
        return []
    found = []
    for name in names:
        volume_id = volume_id_of_directory(name[: len(volume_directory_name("0" * 32))])
        stamp = name[len(volume_directory_name("0" * 32)) + 1 :]
        if volume_id is None:
            continue
        try:
            destroyed = read_stamp(stamp)
        except ValueError:
            continue
        found.append(BinEntry(volume_id, name, destroyed))
    return sorted(found, key=lambda entry: entry.destroyed)


def move_in(location_path: str, volume_id: str, destroyed: datetime | None = None) -> None:
    """Destroy: durable when it returns. Only under the volume's guard. Blocks. Raises OSError."""
    directory = f"{location_path}/{BIN_DIRECTORY}"
    os.makedirs(directory, exist_ok=True)
    where = name_in_bin(volume_id, destroyed or datetime.now(UTC))
    os.rename(f"{location_path}/{volume_directory_name(volume_id)}", f"{location_path}/{where}")
    reached("destroy.renamed")
    # Target first: a power failure in between shows the volume in both places or none changed, never in neither.
    fsync_directory(directory)
    fsync_directory(location_path)
    reached("destroy.durable")


def move_out(location_path: str, entry: BinEntry) -> None:
    """Restore: durable when it returns. Only under the volume's guard. Blocks. Raises OSError."""
    target = f"{location_path}/{volume_directory_name(entry.volume_id)}"
    if os.path.lexists(target):
        raise FileExistsError(target)
    os.rename(f"{location_path}/{BIN_DIRECTORY}/{entry.directory_name}", target)
    reached("restore.renamed")
    fsync_directory(location_path)
    fsync_directory(f"{location_path}/{BIN_DIRECTORY}")
    reached("restore.durable")


def move_to_trash(location_path: str, entry: BinEntry) -> str:
    """Purge, first half: from here on it cannot be restored. Only under the volume's guard. Blocks."""
    path = f"{location_path}/{TRASH_DIRECTORY}/{new_uid()}"
    os.rename(f"{location_path}/{BIN_DIRECTORY}/{entry.directory_name}", path)
    reached("purge.renamed")
    return path


def move_file_to_trash(location_path: str, path: str) -> str:
    """Take a file out of a volume in one rename, to be deleted later; where it is then. Blocks."""
    target = f"{location_path}/{TRASH_DIRECTORY}/{new_uid()}"
    os.rename(path, target)
    return target


def link_file_to_trash(location_path: str, path: str) -> str | None:
    """Give a file that will be replaced a second name, under which it is deleted later. Blocks.

    None where the file system has no second names: it is deleted when it is replaced.
    """
    target = f"{location_path}/{TRASH_DIRECTORY}/{new_uid()}"
    try:
        os.link(path, target, follow_symlinks=False)
    except OSError as error:
        if error.errno in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
            return None
        raise
    return target


def allocated_bytes(location_path: str, entry: BinEntry) -> int:
    """What purging gives back. Blocks."""
    directory = f"{location_path}/{BIN_DIRECTORY}/{entry.directory_name}"
    found = 0
    for path, _, names in os.walk(directory):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                found += os.lstat(f"{path}/{name}").st_blocks * 512
    return found


def empty_trash(path: str) -> None:
    """Purge, second half: give the space back. Idempotent; several may do it at once. Blocks."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        return
    except OSError:  # a directory
        shutil.rmtree(path, ignore_errors=True)
    reached("purge.deleted")


def trash(location_path: str) -> list[str]:
    """What an interrupted purge left. Blocks."""
    with contextlib.suppress(FileNotFoundError):
        directory = f"{location_path}/{TRASH_DIRECTORY}"
        return [f"{directory}/{name}" for name in os.listdir(directory)]
    return []


def _doom(pool: Pool, entry: BinEntry) -> bool:
    """Of a volume in a pool, the step from which on no server can restore it; whether it is one, and destroyed."""
    pool.index.refresh()
    record = pool.index.records.get(entry.volume_id)
    if record is None or record.state is not State.BINNED:
        return False
    pool.claims.acquire(entry.volume_id)
    try:
        pool.doom(entry.volume_id)
    finally:
        pool.claims.release(entry.volume_id)
    return True


class RecycleBin:
    """The bins of all locations."""

    def __init__(self, settings: Settings, locations: Locations) -> None:
        self._retention_s = settings.bin_retention
        self._locations = locations

    async def all(self) -> list[tuple[Location, BinEntry]]:
        """What can be restored, oldest first, in the locations whose bin can be read."""
        found: list[tuple[Location, BinEntry]] = []
        for location in self._locations.answering():
            try:
                found += [
                    (location, entry)
                    for entry in await within(self._locations.patience_s, location.disk.run(entries, location.path))
                ]
            except OSError as error:
                log.warning("the bin of %s cannot be read: %s", location.name, error)
        return sorted(found, key=lambda item: item[1].destroyed)

    async def purge(self, location: Location, entry: BinEntry) -> None:
        """Delete a binned volume for good; nothing if somebody else was quicker."""
        with os_errors(location):
            guard = await location.disk.run(volume_guard, location.path, entry.volume_id)
            doomed = False
            try:
                if location.pool is not None:
                    doomed = await location.disk.run(_doom, location.pool, entry)
                path = await location.disk.run(move_to_trash, location.path, entry)
            except FileNotFoundError:
                return
            finally:
                await location.disk.run(guard.release)
            log.info("purging volume %s from the bin of %s", entry.volume_id, location.name)
            if location.pool is not None and doomed:
                await location.dustman.run(location.pool.abandon, entry.volume_id)
        await self.empty(location, path)

    async def empty(self, location: Location, path: str) -> None:
        """Delete something in the trash, in a thread of its own; nothing if that is under way."""
        if path not in location.emptying:
            location.emptying.add(path)
            try:
                await location.dustman.run(empty_trash, path)
            finally:
                location.emptying.discard(path)

    async def purge_expired(self) -> None:
        """Delete what has been in the bin for longer than the retention time."""
        now = datetime.now(UTC)
        for location, entry in await self.all():
            if location.read_only is None and entry.purge_at(self._retention_s) <= now:
                await self.purge(location, entry)

    async def purgeable_bytes(self, location: Location) -> int:
        """What emptying one location's bin would give back."""
        return sum(size for _, size in await self._sized(location))

    async def _sized(self, location: Location) -> list[tuple[BinEntry, int]]:
        with os_errors(location):
            return await location.disk.run(
                lambda: [(entry, allocated_bytes(location.path, entry)) for entry in entries(location.path)]
            )

    async def make_room(self, location: Location, missing_bytes: int) -> bool:
        """Purge the oldest of one location's bin until that much space is free again.

        Nothing is purged, and the answer is False, when all of the bin would not be enough.
        """
        if location.read_only:
            return False
        sized = await self._sized(location)
        if sum(size for _, size in sized) < missing_bytes:
            return False
        for entry, size in sized:
            if missing_bytes <= 0:
                break
            log.warning("the bin of %s makes room: volume %s goes early", location.name, entry.volume_id)
            await self.purge(location, entry)
            missing_bytes -= size
        return True
