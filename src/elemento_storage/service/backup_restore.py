"""Restoring backups: as a new volume, or over the content of one that nobody uses.

Over a volume it is like a conversion: what the backup holds is written beside the image and synced, and takes its place
in one rename. At every moment the data file is whole, the old one or the new one.
"""

import contextlib
import os
from typing import Final

import msgspec

from elemento_storage.catalog.backup_directory import Backup
from elemento_storage.catalog.linked_clones import require_no_clones
from elemento_storage.catalog.locations import os_errors
from elemento_storage.catalog.locks import LockRecord, remove_lock
from elemento_storage.catalog.room import Demand, Reservation
from elemento_storage.catalog.volume_directory import read_image_size, rewrite_meta
from elemento_storage.disk import Place
from elemento_storage.durable import fsync_directory, keep_owner_and_mode
from elemento_storage.errors import FormatUnsupported, InternalFault, VolumeNotFound
from elemento_storage.faultpoints import reached
from elemento_storage.jobs import JobState
from elemento_storage.model import Volume, VolumeFormat, VolumeMeta, new_uid, volume_id_of_directory
from elemento_storage.progress import Progress
from elemento_storage.service.access import INFRASTRUCTURE, Actor
from elemento_storage.service.backups import Backups
from elemento_storage.service.core import Core, require_no_snapshots
from elemento_storage.service.staged import Staged
from elemento_storage.undo import Reverter

PURPOSE: Final = "backup-restore"
_COPY_PREFIX: Final = ".elemento-restore-"


class Restoring:
    """Brings back what was backed up."""

    def __init__(self, core: Core, backups: Backups) -> None:
        self._core = core
        self._catalog = core.catalog
        self._backups = backups
        core.catalog.resolvers[PURPOSE] = self.resolve

    async def restore(
        self, actor: Actor, backup_id: str, progress: Progress, *, volume_id: str | None = None, name: str | None = None
    ) -> Volume:
        """A volume with the content of a backup.

        Without ``volume_id`` it is a new one. With that of a volume its content is overwritten; with that of the volume
        that was backed up and exists no more, it is made again under its old id. Raises BackupNotFound, BackupDamaged,
        VolumeExported, HasClones, HasSnapshots, NoRoom, JobCancelled …
        """
        backup = await self._backups.find(actor, backup_id)
        async with self._backups.readable(backup):
            if volume_id is None:
                return await self._as_new(backup, new_uid(), name, progress)
            try:
                await self._catalog.find(volume_id, actor.require_change)
            except VolumeNotFound:
                if volume_id != backup.record.volume_id or await self._exists(volume_id):
                    raise
                return await self._as_new(backup, volume_id, name, progress)
            return await self._over(actor, backup, volume_id, progress)

    async def _exists(self, volume_id: str) -> bool:
        try:
            await self._catalog.find(volume_id, INFRASTRUCTURE.require_see)
        except VolumeNotFound:
            return False
        return True

    async def _as_new(self, backup: Backup, volume_id: str, name: str | None, progress: Progress) -> Volume:
        meta = _meta_of(backup, volume_id, name)
        async with Reverter() as revert:
            reservation = await self._catalog.room.reserve_new(Demand(volume_id, backup.record.size))
            revert.add(reservation.release)
            reached("backup-restore.reserved")
            location = reservation.location
            with os_errors(location):
                await self._copy(backup, meta.format, f"{reservation.path}/{meta.format.data_file}", progress)
                reached("backup-restore.copied")
                progress.commit()
                entry = await location.disk.run(Staged(reservation, meta).publish)
            location.record(entry)
            reservation.forget()
            revert.commit()
        return entry.volume

    async def _over(self, actor: Actor, backup: Backup, volume_id: str, progress: Progress) -> Volume:
        async with self._catalog.operation(volume_id, progress.operation_id) as operation:
            async with self._catalog.hold(volume_id, actor.require_change) as held:
                if not self._core.store(held.volume.meta.format).capabilities.files:
                    raise FormatUnsupported(
                        f"nothing is restored over a {held.volume.meta.format} volume: restore it as a new volume"
                    )
                await self._core.markers.require_unexported(held)
                await require_no_clones(held)
                if held.volume.meta.format in self._core.store(held.volume.meta.format).capabilities.snapshots_inside:
                    require_no_snapshots(held.volume, "delete them first, or restore the backup as a new volume")
                copy = f"{_COPY_PREFIX}{operation.operation_id}"
                lock = await operation.lock_volume(held, PURPOSE, actor.client, {"copy": copy})
            place, image_format = held.place, held.volume.meta.format
            reservation = await self._room_for(held.location.name, held.volume, backup)
            try:
                copy_path = f"{place.directory}/{copy}"
                with os_errors(held.location):
                    await self._copy(backup, image_format, copy_path, progress)
                reached("backup-restore.copied")
                async with self._catalog.hold(volume_id, lambda _: None, own_lock=lock) as held:
                    progress.commit()
                    await place.disk.run(_switch, place.directory, copy_path, image_format)
                    await place.disk.run(remove_lock, place.directory, lock)
                    return await held.reload()
            finally:
                if reservation is not None:
                    await reservation.release()

    async def _room_for(self, location: str, volume: Volume, backup: Backup) -> Reservation | None:
        if backup.record.size <= volume.size_bytes:
            return None
        demand = Demand(volume.volume_id, backup.record.size, new_volume=False)
        return await self._catalog.room.reserve_in(self._catalog.locations.by_name[location], demand)

    async def _copy(self, backup: Backup, image_format: VolumeFormat, path: str, progress: Progress) -> None:
        source = Place(backup.directory, self._catalog.locations.by_name[backup.location].disk)
        await self._core.store(image_format).convert_beside(source, VolumeFormat.QCOW2, image_format, path, progress)

    async def resolve(self, place: Place, lock: LockRecord) -> None:
        """After a crash: the data file is whole, before or after; the copy goes, and meta.json learns the size."""
        await place.disk.run(_resolve, place.directory, lock)
        volume_id = volume_id_of_directory(os.path.basename(place.directory)) or ""
        self._core.jobs.record_interrupted(
            lock.operation,
            PURPOSE,
            lock.client,
            volume_id,
            JobState.INTERRUPTED,
            "the server stopped in the middle; the volume is as it was, or restored",
        )


def _meta_of(backup: Backup, volume_id: str, name: str | None) -> VolumeMeta:
    """What the volume was, under another id, and with its owner as of then."""
    record = backup.record
    meta = msgspec.json.decode(msgspec.json.encode(record.meta), type=VolumeMeta)
    changes = {} if name is None else {"name": name}
    return msgspec.structs.replace(
        meta, volume_id=volume_id, creator_id=record.creator_id, size=record.size, format=record.format, **changes
    )


def _switch(directory: str, copy_path: str, image_format: VolumeFormat) -> None:
    data_file = f"{directory}/{image_format.data_file}"
    with contextlib.suppress(PermissionError):  # a server that is not root owns what it writes
        keep_owner_and_mode(data_file, copy_path)
    os.rename(copy_path, data_file)
    reached("backup-restore.renamed-over")
    fsync_directory(directory)
    rewrite_meta(directory, {"size": read_image_size(directory)})
    reached("backup-restore.recorded")


def _resolve(directory: str, lock: LockRecord) -> None:
    # What is deleted here is named by a file: nothing but what a restore makes is believed.
    copy = str(lock.journal.get("copy", ""))
    if copy != f"{_COPY_PREFIX}{lock.operation}":
        raise InternalFault(f"the journal of the restore {lock.operation} is damaged: look at the volume by hand")
    with contextlib.suppress(FileNotFoundError):
        os.unlink(f"{directory}/{copy}")
    rewrite_meta(directory, {"size": read_image_size(directory)})
    reached("backup-restore.resolved")
