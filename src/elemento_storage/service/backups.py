"""Backups: a volume's content at one moment, as images in another place, each increment on top of the one before.

An increment is made only where a bitmap in the volume's own image says what changed since the newest backup, which is
there and whole, and belongs to the same owner. Any doubt about that makes a full backup, with the reason
(docs/decisions/0020-backups.md names every way in which a write could escape a bitmap).

The lock file in the volume is the journal. A backup exists when its record does; what was half made goes with the
resolver, whichever step a crash came at.
"""

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import AsyncIterator, Collection, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

import msgspec

from elemento_storage.catalog import backup_directory as store
from elemento_storage.catalog.backup_directory import Backup, BackupMode, BackupRecord, BrokenChain, StoreBusy
from elemento_storage.catalog.linked_clones import allocated_bytes
from elemento_storage.catalog.location import Location
from elemento_storage.catalog.locations import os_errors, require_presence
from elemento_storage.catalog.locks import LockRecord, remove_lock
from elemento_storage.catalog.placement import read_space
from elemento_storage.catalog.room import no_room
from elemento_storage.catalog.volume_directory import read_meta_values
from elemento_storage.disk import Place
from elemento_storage.engine import qemu_img
from elemento_storage.errors import (
    BackupDamaged,
    BackupNotFound,
    BackupsBusy,
    LocationUnavailable,
    NoIncrement,
    NotDue,
    StorageError,
    ToolFailed,
)
from elemento_storage.faultpoints import reached
from elemento_storage.feed import Audience
from elemento_storage.jobs import JobState
from elemento_storage.model import Volume, VolumeFormat, utc_now
from elemento_storage.progress import Progress
from elemento_storage.service.access import Actor
from elemento_storage.service.core import Core
from elemento_storage.service.moments import Moment, Moments

log = logging.getLogger(__name__)

PURPOSE: Final = "backup"
_BITMAPS: Final = "backup-"
_COPIED: Final = 0.8  #: of a backup, when all that is left is to check it
_PATIENCE_S: Final = 300.0
_LONGEST_CHAIN: Final = 100  # every read of the newest one asks them all
_SPARE_BYTES: Final = 4 << 20  # tables of an image, and the record


class Wanted(StrEnum):
    """What kind of backup somebody asks for."""

    AUTO = "auto"  #: an increment where one can be trusted
    FULL = "full"
    INCREMENTAL = "incremental"  #: nothing else: refused where it would have to be a full one


@dataclass(frozen=True)
class Tip:
    """The newest backup of a volume, as what an increment could be put on."""

    backup: Backup | None  #: None: no increment can, and ``reason`` says why
    number: int  #: of the newest, whether it can be used or not
    reason: str = ""


class Backups:
    """Makes, lists, checks and deletes backups."""

    def __init__(self, core: Core, moments: Moments) -> None:
        self._core = core
        self._catalog = core.catalog
        self._moments = moments
        core.catalog.resolvers[PURPOSE] = self.resolve

    # -- making --------------------------------------------------------------------------------------------

    async def create(
        self,
        actor: Actor,
        volume_id: str,
        progress: Progress,
        *,
        wanted: Wanted = Wanted.AUTO,
        name: str = "",
        scheduled_after: float | None = None,
    ) -> Backup:
        """Back a volume up as it is now, exported or not; on disk and checked when this returns.

        ``scheduled_after``: it is one of a schedule, whose last one was made at that time; raises NotDue if there is a
        later one. Raises VolumeNotFound, NotOwner, VolumeLocked, FormatUnsupported, NoIncrement, NoRoom, JobCancelled …
        """
        backup_id = progress.operation_id
        async with self._catalog.operation(volume_id, backup_id) as operation:
            async with self._catalog.hold(volume_id, actor.require_change) as held:
                await self._moments.require_possible(held)
                volume, place = held.volume, held.place
                backups = await self.of_volume(volume_id)
                if scheduled_after is not None and any(
                    one.record.scheduled and one.record.moment > scheduled_after for one in backups
                ):
                    raise NotDue("another server has made this backup", volume_id=volume_id)
                tip = _tip(volume, backups, self._read_only())
                since = tip.backup.backup_id if tip.backup else ""
                lock = await operation.lock_volume(held, PURPOSE, actor.client, {"since": since})
                meta = await place.disk.run(read_meta_values, place.directory)
                only_changes = tip.backup is not None and wanted is not Wanted.FULL
                moment = await self._moments.take(
                    held, backup_id, _BITMAPS, since or None, only_changes=only_changes, reason=tip.reason
                )
            if wanted is Wanted.INCREMENTAL and moment.changed is None:
                raise NoIncrement(f"it would have to be a full backup: {moment.reason}", reason=moment.reason)
            reason = "it was asked for" if wanted is Wanted.FULL and not moment.reason else moment.reason
            record = BackupRecord(
                backup_id=backup_id,
                volume_id=volume_id,
                creator_id=volume.meta.creator_id,
                number=tip.number + 1,
                created=utc_now(),
                moment=time.time(),
                mode=BackupMode.INCREMENTAL if moment.changed else BackupMode.FULL,
                reason="" if moment.changed else reason,
                name=name,
                size=volume.size_bytes,
                format=volume.meta.format,
                tracked=moment.tracked,
                scheduled=scheduled_after is not None,
                increments=tip.backup.record.increments + 1 if tip.backup and moment.changed else 0,
                meta=meta,
            )
            parent = tip.backup if moment.changed else None
            backup = await self._write(volume, parent, moment, record, progress)
            with _told_of(volume_id, "it is made, and its lock stays until the next sweep"):
                async with self._catalog.hold(volume_id, lambda _: None, own_lock=lock) as held:
                    await self._moments.end(held.location, held.volume, backup_id, _BITMAPS, backup_id)
                    with os_errors(held.location):
                        await held.place.disk.run(remove_lock, held.place.directory, lock)
                    await held.reload()
        self._announce(backup, "created")
        await self.tidy(volume_id)
        return backup

    async def _write(
        self, volume: Volume, parent: Backup | None, moment: Moment, record: BackupRecord, progress: Progress
    ) -> Backup:
        """The image and its record, in the place that suits best. Raises NoRoom, JobCancelled, ExportFailed …"""
        home = self._catalog.locations.by_name[volume.location]
        needed = (moment.changed_bytes if parent else allocated_bytes(home, volume)) + _SPARE_BYTES
        location = await self._choose(volume, parent, needed)
        location.own_allocations[record.backup_id] = needed
        try:
            with os_errors(location):
                async with self._locked(location, volume.volume_id, exclusive=False):
                    run = location.disk.run
                    directory = await run(store.make_directory, location.path, volume.volume_id, record.backup_id)
                    reached("backup.directory-made")
                    image = f"{directory}/{store.DATA_FILE}"
                    below = store.backing_name(parent.backup_id) if parent else None
                    await qemu_img.create_increment(image, record.size, below)
                    progress.advance(0.0, "copying")
                    await moment.frozen.copy(
                        image,
                        changed=moment.changed,
                        on_fraction=lambda fraction: progress.advance(fraction * _COPIED),
                        cancel=progress.cancelled,
                    )
                    reached("backup.copied")
                    progress.advance(_COPIED, "checking")
                    await require_sound(image)
                    sha256 = await run(store.digest, image, progress.check)
                    progress.advance(0.98)
                    progress.commit()
                    await run(store.publish, directory, msgspec.structs.replace(record, sha256=sha256))
                    backup = await run(store.read_backup, directory, location.name)
        finally:
            del location.own_allocations[record.backup_id]
        if backup is None or backup.problem or backup.parent != (parent.backup_id if parent else None):
            raise BackupDamaged(f"the backup cannot be read back: {backup.problem if backup else 'it is gone'}")
        return backup

    async def _choose(self, volume: Volume, parent: Backup | None, needed: int) -> Location:
        """Where a backup goes. Raises NoRoom, LocationUnavailable."""
        by_name = self._catalog.locations.by_name
        home = by_name[volume.location]
        named = parent.location if parent else self._core.settings.backup_location
        if named and named not in by_name:
            raise LocationUnavailable(f"backup-location is {named}, and there is no such location", location=named)
        reasons: dict[str, str] = {}
        rated = []
        for location in [by_name[named]] if named else list(by_name.values()):
            if location.pool is not None:
                reasons[location.name] = "it stands for a Ceph pool, and backups are files"
                continue
            try:
                free_bytes = await self._free_bytes(location)
            except StorageError as error:
                reasons[location.name] = error.message
                continue
            if free_bytes < needed and await self._catalog.bin.make_room(location, needed - free_bytes):
                free_bytes = await self._free_bytes(location)
            if free_bytes < needed:
                reasons[location.name] = f"the file system has {free_bytes} bytes free, the backup may need {needed}"
                continue
            # Another file system survives what this one may not; another location on the same one is better than none.
            is_apart = (location.identity[0] != home.identity[0], location is not home)
            rated.append((is_apart, free_bytes, location))
        if not rated:
            raise no_room(reasons)
        return max(rated, key=lambda one: one[:2])[2]

    def _read_only(self) -> set[str]:
        return {one.name for one in self._catalog.locations.by_name.values() if one.read_only}

    async def _free_bytes(self, location: Location) -> int:
        if location.missing is not None:
            raise LocationUnavailable(f"location {location.name} does not answer: {location.missing}")
        require_presence(location)
        try:
            location.path.encode()
        except UnicodeEncodeError:
            why = f"location {location.name}: its name is not UTF-8, and QEMU opens no such path"
            raise LocationUnavailable(why, location=location.name) from None
        with os_errors(location):
            space = await location.disk.run(read_space, location.path)
        return space.free_bytes - sum(location.own_allocations.values())

    async def resolve(self, place: Place, lock: LockRecord) -> None:
        """After a crash or a failure: what was published stays, everything else is as before."""
        location, volume = self._moments.volume_of(place)
        volume_id = volume.volume_id
        is_made = any(one.backup_id == lock.operation for one in await self.of_volume(volume_id))
        current = lock.operation if is_made else str(lock.journal.get("since", "")) or None
        await self._moments.end(location, volume, lock.operation, _BITMAPS, current)
        reached("backup.resolved")
        self._catalog.in_background(self.tidy(volume_id))
        outcome = JobState.DONE if is_made else JobState.INTERRUPTED
        self._core.jobs.record_interrupted(
            lock.operation, PURPOSE, lock.client, volume_id, outcome, "the server stopped in the middle: back up again"
        )

    # -- looking -------------------------------------------------------------------------------------------

    async def of_volume(self, volume_id: str) -> list[Backup]:
        """A volume's backups in all locations that answer, oldest first, with those that are only kept for others."""
        found: list[Backup] = []
        for location in self._catalog.locations.answering():
            with os_errors(location):
                found += await location.disk.run(store.read_backups, location.path, location.name, volume_id)
        return sorted(found, key=lambda one: (one.record.number, one.record.created))

    async def visible(self, actor: Actor, volume_id: str | None) -> list[Backup]:
        """The actor's own backups, of one volume or of all, oldest first."""
        volumes = {volume_id} if volume_id is not None else await self._volumes()
        found = []
        for one in sorted(volumes):
            found += [backup for backup in await self.of_volume(one) if not backup.record.deleted]
        return [backup for backup in found if _owns(actor, backup)]

    async def find(self, actor: Actor, backup_id: str) -> Backup:
        """One of the actor's own backups. Raises BackupNotFound, to a stranger too."""
        for location in self._catalog.locations.answering():
            with os_errors(location):
                path = await location.disk.run(store.find_backup, location.path, backup_id)
                backup = await location.disk.run(store.read_backup, path, location.name) if path else None
            if backup is not None and not backup.record.deleted and _owns(actor, backup):
                return backup
        raise BackupNotFound(f"no backup {backup_id}", backup=backup_id)

    async def _volumes(self) -> set[str]:
        found: set[str] = set()
        for location in self._catalog.locations.answering():
            with os_errors(location):
                found |= set(await location.disk.run(store.volumes_with_backups, location.path))
        return found

    @contextlib.asynccontextmanager
    async def readable(self, backup: Backup) -> AsyncIterator[list[Backup]]:
        """A backup and all that it needs, kept from being deleted. Raises BackupsBusy, BackupDamaged."""
        location = self._catalog.locations.by_name[backup.location]
        volume_id = backup.record.volume_id
        with os_errors(location):
            async with self._locked(location, volume_id, exclusive=False):
                backups = await location.disk.run(store.read_backups, location.path, location.name, volume_id)
                try:
                    chain = store.chain_of(backups, backup.backup_id)
                except BrokenChain as error:
                    raise BackupDamaged(str(error), backup=backup.backup_id) from None
                yield chain

    async def verify(self, actor: Actor, backup_id: str, progress: Progress) -> Backup:
        """Read a backup, and all that it needs, and compare with what was written.

        Raises BackupNotFound, BackupDamaged; what is damaged is known from then on, and no increment is put on it.
        """
        backup = await self.find(actor, backup_id)
        location = self._catalog.locations.by_name[backup.location]
        async with self.readable(backup) as chain:
            for position, one in enumerate(chain):
                progress.advance(position / len(chain), "reading")
                try:
                    await require_sound(one.image)
                    found = await location.disk.run(store.digest, one.image, progress.check)
                    if found not in (one.record.sha256, one.record.sha256_after):
                        raise BackupDamaged(
                            f"the backup {one.backup_id} is not what was written: its checksum is another one"
                        )
                except BackupDamaged as error:
                    if not location.read_only:
                        await self._rewrite(location, one, damaged=error.message)
                    raise BackupDamaged(error.message, backup=backup_id) from None
        return backup

    # -- deleting ------------------------------------------------------------------------------------------

    async def delete(self, actor: Actor, backup_id: str) -> Backup:
        """Take a backup away. Later ones stay whole: what they need of it is merged into the next one.

        Raises BackupNotFound, LocationUnavailable.
        """
        backup = await self.find(actor, backup_id)
        await self._rewrite(self._catalog.locations.by_name[backup.location], backup, deleted=True)
        reached("backup.deleted")
        self._announce(backup, "deleted")
        self._catalog.in_background(self.tidy(backup.record.volume_id))
        return backup

    async def _rewrite(self, location: Location, backup: Backup, **changes: object) -> None:
        def rewrite() -> None:
            present = store.read_backup(backup.directory, location.name)
            if present is not None:
                store.write_record(backup.directory, msgspec.structs.replace(present.record, **changes))

        async with self._catalog.guard(location, backup.record.volume_id):
            await location.disk.run(rewrite)

    async def tidy(self, volume_id: str) -> None:
        """Remove what was half made, and what was deleted, as far as nobody reads it. Raises nothing that is expected.

        May be cut off at every step, and done again.
        """
        for location in self._catalog.locations.answering():
            if location.read_only:
                continue
            try:
                with os_errors(location):
                    if not await location.disk.run(os.path.isdir, store.store_path(location.path, volume_id)):
                        continue
                    async with self._locked(location, volume_id, exclusive=True):
                        await self._tidy(location, volume_id)
            except BackupsBusy:
                continue  # who works there now does it at the end, or the next backup does
            except StorageError as error:
                log.warning("the backups of %s in %s are not tidied now: %s", volume_id, location.name, error.message)

    async def _tidy(self, location: Location, volume_id: str) -> None:
        run = location.disk.run
        for directory in await run(store.half_made, location.path, volume_id):
            await self._remove(location, directory)
        backups = await run(store.read_backups, location.path, location.name, volume_id)
        deleted = {one.backup_id for one in backups if one.record.deleted}
        for one in backups:
            if one.record.sha256_after and one.parent not in deleted:
                await self._rewrite(location, one, sha256=one.record.sha256_after, sha256_after="")
        while (deleted_one := _last_deleted(backups)) is not None:
            following = [other for other in backups if other.parent == deleted_one.backup_id]
            if following:
                await self._merge(location, deleted_one, following)
            await self._remove(location, deleted_one.directory)
            backups = await run(store.read_backups, location.path, location.name, volume_id)
        await run(store.forget_empty, location.path, volume_id)

    async def _merge(self, location: Location, deleted: Backup, following: list[Backup]) -> None:
        """Put the next increment into the deleted backup, which then takes the increment's place, in one rename.

        The increment reads the same before, meanwhile and afterwards: what is written below it, it hides.
        """
        run = location.disk.run
        if len(following) != 1 or deleted.problem or deleted.record.damaged:
            raise BackupDamaged(f"the backup {deleted.backup_id} cannot be merged into the next one: it is damaged")
        [after] = following
        await qemu_img.commit(after.image, timeout_s=self._core.settings.job_timeout)
        await run(store.sync_image, deleted.image)
        reached("backup.merged")
        await require_sound(deleted.image)
        sha256 = await run(store.digest, deleted.image)
        await self._rewrite(location, after, sha256_after=sha256)
        reached("backup.merge-recorded")
        await run(store.take_place, deleted.directory, after.directory)
        await self._rewrite(location, after, sha256=sha256, sha256_after="")

    async def _remove(self, location: Location, directory: str) -> None:
        rubbish = await location.disk.run(store.remove, location.path, directory)
        if rubbish is not None:
            self._catalog.in_background(self._catalog.bin.empty(location, rubbish))

    async def tidy_all(self) -> None:
        """The same for every volume that has backups."""
        for volume_id in sorted(await self._volumes()):
            await self.tidy(volume_id)

    # -- order ---------------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def _locked(self, location: Location, volume_id: str, *, exclusive: bool) -> AsyncIterator[None]:
        """Who reads or makes a backup waits for who puts them in order, for a while, and not the other way round."""
        if location.read_only and not exclusive:
            yield  # nobody can change them
            return
        deadline = time.monotonic() + (0.0 if exclusive else _PATIENCE_S)
        while True:
            try:
                descriptor = await location.disk.run(store.lock_store, location.path, volume_id, exclusive=exclusive)
                break
            except StoreBusy:
                if time.monotonic() >= deadline:
                    raise BackupsBusy(
                        "the backups of this volume are being read or put in order: try again later",
                        volume_id=volume_id,
                    ) from None
            await asyncio.sleep(0.1)
        try:
            yield
        finally:
            await location.disk.run(os.close, descriptor)

    def _announce(self, backup: Backup, state: str) -> None:
        record = backup.record
        facts: Mapping[str, object] = {"volume_id": record.volume_id, "mode": record.mode.value, "state": state}
        audience = Audience(owner=record.creator_id, private=True)
        self._core.feed.publish("backup", record.backup_id, before=None, after=audience, **facts)


def _tip(volume: Volume, backups: list[Backup], read_only: Collection[str]) -> Tip:
    """The newest backup, if an increment can be put on it; the bitmap has a say later."""
    number = max((one.record.number for one in backups), default=0)
    newest = next((one for one in reversed(backups) if not one.record.deleted), None)
    reason = ""
    if newest is None:
        return Tip(None, number, "there is no earlier backup")
    if newest.location in read_only:
        reason = f"nothing can be written in location {newest.location}, where the last backup is"
    elif not newest.record.tracked:
        reason = "the last backup was made of an image that records nothing"
    elif newest.record.creator_id != volume.meta.creator_id:
        reason = "the volume had another owner when it was backed up last"
    elif newest.record.size != volume.size_bytes:
        reason = f"the volume had {newest.record.size} bytes when it was backed up last"
    elif newest.record.format is not volume.meta.format:
        reason = f"the volume was {newest.record.format} when it was backed up last"
    else:
        try:
            chain = store.chain_of([one for one in backups if one.location == newest.location], newest.backup_id)
            if len(chain) > _LONGEST_CHAIN:
                reason = f"the last full backup has {_LONGEST_CHAIN} increments"
        except BrokenChain as error:
            reason = f"the last backup cannot be used: {error}"
    return Tip(None if reason else newest, number, reason)


def _last_deleted(backups: list[Backup]) -> Backup | None:
    return next((one for one in reversed(backups) if one.record.deleted), None)


def _owns(actor: Actor, backup: Backup) -> bool:
    return actor.client is None or actor.client == backup.record.creator_id


async def require_sound(image: str) -> None:
    """Raises BackupDamaged when the image's own tables contradict each other, or it cannot be opened at all."""
    try:
        findings = await qemu_img.check(image, VolumeFormat.QCOW2)
    except ToolFailed as error:
        raise BackupDamaged("it cannot be opened by qemu-img") from error
    if findings.corruptions:
        raise BackupDamaged(f"qemu-img check finds {findings.corruptions} corruptions in it")


@contextlib.contextmanager
def _told_of(volume_id: str, consequence: str) -> Iterator[None]:
    try:
        yield
    except StorageError as error:
        log.error("the backup of volume %s: %s: %s", volume_id, consequence, error.message)
