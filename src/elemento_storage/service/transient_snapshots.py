"""Snapshots that nobody asked for: what a volume held at one moment, kept until it was read, while clients write on.

The volume's lock is held as long as there is one, and names it. So a crash leaves none behind: whoever resolves the
lock takes it away (``resolve``), through the daemon if that has the image open.
"""

import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from typing import Final

from elemento_storage.catalog.catalog import Held, Reading
from elemento_storage.catalog.locations import os_errors
from elemento_storage.catalog.locks import LockRecord, remove_lock
from elemento_storage.catalog.spare_room import spare_room
from elemento_storage.catalog.volume_directory import read_format
from elemento_storage.disk import Place
from elemento_storage.engine.snapshot_files import Description, remove_description, write_description
from elemento_storage.errors import InternalFault, StorageError, VolumeExported
from elemento_storage.model import Volume, VolumeFormat, new_uid, normalise_uid, utc_now, volume_id_of_directory
from elemento_storage.progress import Progress
from elemento_storage.service.core import Core
from elemento_storage.service.live_snapshots import LiveSnapshots
from elemento_storage.stores.base import StoredSnapshot

log = logging.getLogger(__name__)

_KEY: Final = "passing"  # of the lock's journal


class TransientSnapshots:
    """Takes snapshots of volumes in hand, exported or not, and those of them away that are nobody's."""

    def __init__(self, core: Core, live: LiveSnapshots) -> None:
        self._core = core
        self._catalog = core.catalog
        self._live = live

    async def take(self, held: Held, snapshot_id: str, spare_bytes: int, progress: Progress) -> None:
        """Make a snapshot of what the volume holds at one moment, whoever writes to it.

        ``spare_bytes`` is what there has to be room for if it is a copy. Raises VolumeExported, ImageInUse, NoRoom,
        JobCancelled, ExportFailed …
        """
        place, image_format = held.place, held.volume.meta.format
        store = self._core.snapshot_store(image_format)
        progress.check()
        if await store.take_snapshot_at_once(place, image_format, snapshot_id, progress):
            return
        needed = 0 if image_format in store.capabilities.snapshots_inside else spare_bytes
        async with spare_room(self._catalog.bin, held.location, snapshot_id, needed, "the snapshot is a copy"):
            if not await self._live.take(held, snapshot_id, progress):
                await store.take_snapshot(place, image_format, snapshot_id, progress)

    @contextlib.asynccontextmanager
    async def locked(
        self,
        volume_id: str,
        check: Callable[[Volume], None],
        purpose: str,
        operation_id: str,
        *,
        client: str | None,
        journal: dict[str, str | int],
    ) -> AsyncIterator[Reading]:
        """A volume of which a moment may be kept, until the end; its clients go on, everybody else is kept out.

        The resolver of ``purpose`` has to call ``resolve``. Raises VolumeNotFound, VolumeLocked, VolumeExported (where
        no snapshot can be made) and what ``check`` raises.
        """
        async with self._catalog.operation(volume_id, operation_id) as operation:
            async with self._catalog.hold(volume_id, check) as held:
                image_format = held.volume.meta.format
                if image_format not in self._core.snapshot_stores:
                    raise VolumeExported(
                        "the volume is exported and its client may be writing: unexport it first", volume_id=volume_id
                    )
                await self._live.require_reachable(held)
                lock = await operation.lock_volume(held, purpose, client, {**journal, _KEY: new_uid()})
                volume = await held.reload()
            yield Reading(self._catalog, held.location, volume, lock)
            try:
                async with self._catalog.hold(volume_id, lambda _: None, own_lock=lock) as held:
                    await held.place.disk.run(remove_lock, held.place.directory, lock)
                    await held.reload()
            except StorageError as error:
                # What it was for is done; the next sweep finds that nobody works under the lock any more.
                log.warning("volume %s: its lock is not removed now: %s", volume_id, error)

    async def keep(self, source: Reading, spare_bytes: int, progress: Progress) -> StoredSnapshot:
        """Take the snapshot of a volume that is ``locked``. Raises what ``take`` does."""
        snapshot_id = _snapshot_id(source)
        place, image_format = source.place, source.volume.meta.format
        label = Description(name="of a clone that is being made", created=utc_now())
        with os_errors(source.location):
            await place.disk.run(write_description, place.directory, snapshot_id, label)
            await self.take(Held(source.location, source.volume), snapshot_id, spare_bytes, progress)
            stored = await self._core.snapshot_store(image_format).snapshots(place, image_format)
        for one in stored:
            if one.snapshot_id == snapshot_id:
                return one
        raise InternalFault("a snapshot that was just taken is not there")

    async def drop(self, source: Reading) -> None:
        """Take it away again; what was written meanwhile stays. Raises ExportFailed, ImageInUse, ToolFailed."""
        with os_errors(source.location):
            await self._drop(source.place, source.volume.meta.format, _snapshot_id(source))

    async def resolve(self, place: Place, lock: LockRecord) -> None:
        """After a crash: leave nothing of it, whole or half. Raises what ``drop`` does."""
        if (snapshot_id := lock.journal.get(_KEY)) is None:
            return
        if not isinstance(snapshot_id, str) or normalise_uid(snapshot_id) != snapshot_id:
            # What is deleted here is named by a file: nothing but what these operations write is believed.
            raise InternalFault(f"the journal of the operation {lock.operation} is damaged: look at the volume by hand")
        image_format = await place.disk.run(read_format, place.directory)
        await self._live.abandon(_volume_id(place))
        await self._core.snapshot_store(image_format).mend_snapshots(place, image_format, snapshot_id)
        await self._drop(place, image_format, snapshot_id)

    async def _drop(self, place: Place, image_format: VolumeFormat, snapshot_id: str) -> None:
        for one in await self._core.snapshot_store(image_format).snapshots(place, image_format):
            if one.snapshot_id == snapshot_id:
                await self._live.remove_wherever(place, _volume_id(place), image_format, one)
        await place.disk.run(remove_description, place.directory, snapshot_id)


def _snapshot_id(source: Reading) -> str:
    assert source.lock is not None, "it is locked"
    return str(source.lock.journal[_KEY])


def _volume_id(place: Place) -> str:
    return volume_id_of_directory(place.directory.rpartition("/")[2]) or ""
