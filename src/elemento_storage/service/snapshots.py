"""Snapshots: keep what a volume holds, bring it back, forget it.

A lock file with the purpose ``snapshot`` is the journal of each change; ``do`` in it says which. What a crash left is
resolved by looking at what is there: a snapshot is there or not, an image was exchanged or not. Restoring a format that
keeps its snapshots inside has no such moment, so it is finished, once it has begun.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from elemento_storage.catalog.catalog import Held, Operation
from elemento_storage.catalog.linked_clones import require_no_clones
from elemento_storage.catalog.locations import os_errors
from elemento_storage.catalog.locks import LockRecord, remove_lock, rewrite_lock
from elemento_storage.catalog.room import Demand, Reservation
from elemento_storage.catalog.spare_room import spare_room
from elemento_storage.catalog.volume_directory import read_format, read_image_size, rewrite_meta
from elemento_storage.disk import Place
from elemento_storage.durable import fsync_directory, keep_owner_and_mode
from elemento_storage.engine.snapshot_files import (
    Description,
    read_descriptions,
    remove_description,
    remove_image,
    write_description,
)
from elemento_storage.errors import (
    InternalFault,
    SnapshotNotFound,
    SnapshotUnclear,
    TooManySnapshots,
)
from elemento_storage.faultpoints import reached
from elemento_storage.jobs import JobState
from elemento_storage.model import Volume, VolumeFormat, iso_time, new_uid, normalise_uid, utc_now
from elemento_storage.progress import Progress
from elemento_storage.service.access import Actor
from elemento_storage.service.core import Core
from elemento_storage.service.live_snapshots import LiveSnapshots
from elemento_storage.service.transient_snapshots import TransientSnapshots
from elemento_storage.stores.base import SnapshotStore, StoredSnapshot

PURPOSE = "snapshot"
_COPY_PREFIX = ".elemento-restore-"
_CREATE, _RESTORE, _DELETE = "create", "restore", "delete"


@dataclass(frozen=True)
class Snapshot:
    """A snapshot as callers see it."""

    snapshot_id: str
    name: str
    description: str
    created: str
    stored: StoredSnapshot


class Snapshotting:
    """The use cases create, list, restore, delete."""

    def __init__(self, core: Core, live: LiveSnapshots, transient: TransientSnapshots) -> None:
        self._core = core
        self._catalog = core.catalog
        self._live = live
        self._transient = transient
        core.catalog.resolvers[PURPOSE] = self.resolve

    # -- looking -------------------------------------------------------------------------------------------

    async def snapshots(self, actor: Actor, volume_id: str) -> list[Snapshot]:
        """A volume's snapshots, oldest first. Raises VolumeNotFound, ImageDamaged."""
        location, volume = await self._catalog.find(volume_id, actor.require_see)
        with os_errors(location):
            return await self.present(location.place(volume_id), volume)

    async def present(self, place: Place, volume: Volume) -> list[Snapshot]:
        """The snapshots of a volume that is in hand. Raises ImageDamaged, OSError."""
        image_format = volume.meta.format
        if image_format not in self._core.snapshot_stores:
            return []
        stored = await self._core.snapshot_store(image_format).snapshots(place, image_format)
        if not stored:
            return []
        descriptions = await place.disk.run(read_descriptions, place.directory)
        return [_described(one, descriptions.get(one.snapshot_id)) for one in stored]

    async def find(self, place: Place, volume: Volume, snapshot_id: str) -> Snapshot:
        """One snapshot of a volume that is in hand. Raises SnapshotNotFound, ImageDamaged, OSError."""
        for one in await self.present(place, volume):
            if one.snapshot_id == snapshot_id:
                return one
        raise SnapshotNotFound(snapshot_id)

    def _store(self, volume: Volume) -> SnapshotStore:
        return self._core.snapshot_store(volume.meta.format)

    def _is_inside(self, volume: Volume) -> bool:
        return volume.meta.format in self._core.store(volume.meta.format).capabilities.snapshots_inside

    def _require_fewer(self, present: Sequence[Snapshot]) -> None:
        most = self._core.settings.max_snapshots
        if len(present) >= most:
            raise TooManySnapshots(
                f"the volume has {len(present)} snapshots and {most} are allowed: delete one, or raise max-snapshots",
                snapshots=len(present),
            )

    # -- create --------------------------------------------------------------------------------------------

    async def create(
        self, actor: Actor, volume_id: str, label: Description, progress: Progress, *, snapshot_id: str | None = None
    ) -> Snapshot:
        """Keep what the volume holds now; all that a client was told is flushed is in it.

        ``snapshot_id`` is that of an earlier try that may have succeeded. Raises FormatUnsupported, TooManySnapshots,
        VolumeExported, ImageInUse, NoRoom, JobCancelled, ExportFailed …
        """
        snapshot_id = snapshot_id or new_uid()
        label = msgspec.structs.replace(label, created=utc_now())
        async with self._catalog.operation(volume_id, progress.operation_id) as operation:
            async with self._catalog.hold(volume_id, actor.require_change) as held:
                self._store(held.volume)
                present = await self.present(held.place, held.volume)
                made = next((one for one in present if one.snapshot_id == snapshot_id), None)
                if made is not None:
                    return made
                self._require_fewer(present)
                await self._live.require_reachable(held)
                if self._is_inside(held.volume):
                    await require_no_clones(held)
                journal: dict[str, str | int] = {"do": _CREATE, "snapshot": snapshot_id}
                lock = await operation.lock_volume(held, PURPOSE, actor.client, journal)
            with os_errors(held.location):
                await held.place.disk.run(write_description, held.place.directory, snapshot_id, label)
                await self._transient.take(held, snapshot_id, held.volume.allocated_bytes, progress)
            reached("snapshot.taken")
            async with self._catalog.hold(volume_id, lambda _: None, own_lock=lock) as held:
                await held.place.disk.run(remove_lock, held.place.directory, lock)
                return await self.find(held.place, await held.reload(), snapshot_id)

    # -- restore -------------------------------------------------------------------------------------------

    async def restore(
        self, actor: Actor, volume_id: str, snapshot_id: str, keep: Description | None, progress: Progress
    ) -> tuple[Volume, str | None]:
        """Make the volume what it was, its size included. The snapshot stays.

        ``keep``: what it holds now becomes a snapshot first, whose uid is answered too. Raises VolumeExported,
        SnapshotNotFound, TooManySnapshots, ImageInUse, NoRoom, JobCancelled.
        """
        async with self._catalog.operation(volume_id, progress.operation_id) as operation:
            async with self._catalog.hold(volume_id, actor.require_change) as held:
                store = self._store(held.volume)
                await self._core.markers.require_unexported(held)
                await require_no_clones(held)
                snapshot = (await self.find(held.place, held.volume, snapshot_id)).stored
                if keep is not None:
                    self._require_fewer(await self.present(held.place, held.volume))
                kept = "" if keep is None else new_uid()
                journal: dict[str, str | int] = {"do": _RESTORE, "snapshot": snapshot_id, "keep": kept}
                lock = await operation.lock_volume(held, PURPOSE, actor.client, journal)
            reservation = await self._reserve(held, snapshot)
            try:
                with os_errors(held.location):
                    restore = self._restore_in_place if self._is_inside(held.volume) else self._restore_beside
                    work = _Restore(operation, held, store, snapshot, lock, kept, keep, progress)
                    await restore(work)
                async with self._catalog.hold(volume_id, lambda _: None, own_lock=lock) as held:
                    size_bytes = await held.place.disk.run(read_image_size, held.place.directory)
                    await held.place.disk.run(rewrite_meta, held.place.directory, {"size": size_bytes})
                    reached("snapshot.recorded")
                    await held.place.disk.run(remove_lock, held.place.directory, lock)
                    return await held.reload(), kept or None
            finally:
                if reservation is not None:
                    await reservation.release()

    async def _reserve(self, held: Held, snapshot: StoredSnapshot) -> Reservation | None:
        if snapshot.size_bytes <= held.volume.size_bytes:
            return None
        demand = Demand(held.volume.volume_id, snapshot.size_bytes, new_volume=False)
        return await self._catalog.room.reserve_in(held.location, demand)

    async def _set_aside(self, work: "_Restore") -> None:
        if work.keep is not None:
            place, image_format = work.held.place, work.held.volume.meta.format
            label = msgspec.structs.replace(work.keep, created=utc_now())
            await place.disk.run(write_description, place.directory, work.kept, label)
            await work.store.set_aside(place, image_format, work.kept, work.progress)
            reached("snapshot.kept")

    async def _restore_beside(self, work: "_Restore") -> None:
        held, image_format = work.held, work.held.volume.meta.format
        place, volume_id = held.place, held.volume.volume_id
        copy_path = f"{place.directory}/{_COPY_PREFIX}{work.operation.operation_id}"
        needed = work.snapshot.allocated_bytes or 0
        async with spare_room(self._catalog.bin, held.location, volume_id, needed, "the snapshot's data is copied"):
            await work.store.restore_beside(place, image_format, work.snapshot, copy_path, work.progress)
        reached("snapshot.restored-beside")
        async with self._catalog.hold(volume_id, lambda _: None, own_lock=work.lock):
            work.progress.commit()
            await self._set_aside(work)
            await place.disk.run(_exchange, place.directory, copy_path, image_format, work.lock)

    async def _restore_in_place(self, work: "_Restore") -> None:
        held, image_format = work.held, work.held.volume.meta.format
        work.progress.commit()
        await self._set_aside(work)
        async with self._catalog.hold(held.volume.volume_id, lambda _: None, own_lock=work.lock):
            begun = _with(work.lock, begun=1)
            await held.place.disk.run(rewrite_lock, held.place.directory, begun)
            reached("snapshot.restore-begun")
        await work.store.restore_in_place(held.place, image_format, work.snapshot)
        reached("snapshot.restored-in-place")

    # -- delete --------------------------------------------------------------------------------------------

    async def delete(self, actor: Actor, volume_id: str, snapshot_id: str, progress: Progress) -> Volume:
        """Forget a snapshot; the volume and its other snapshots stay as they are.

        Raises SnapshotNotFound, SnapshotUnclear, VolumeExported, ImageInUse, ExportFailed.
        """
        async with self._catalog.operation(volume_id, progress.operation_id) as operation:
            async with self._catalog.hold(volume_id, actor.require_change) as held:
                store = self._store(held.volume)
                snapshot = (await self.find(held.place, held.volume, snapshot_id)).stored
                if snapshot.is_ambiguous:
                    raise SnapshotUnclear(
                        f"the image has several snapshots called {snapshot.tag!r}, made by another tool: delete it "
                        "with that tool"
                    )
                if self._is_inside(held.volume):
                    await self._live.require_reachable(held)
                    await require_no_clones(held)
                progress.commit()
                journal: dict[str, str | int] = {"do": _DELETE, "snapshot": snapshot_id}
                lock = await operation.lock_volume(held, PURPOSE, actor.client, journal)
            with os_errors(held.location):
                inside = self._is_inside(held.volume)
                if not (inside and await self._live.remove(held, snapshot)):
                    await store.delete_snapshot(held.place, held.volume.meta.format, snapshot)
            reached("snapshot.deleted")
            async with self._catalog.hold(volume_id, lambda _: None, own_lock=lock) as held:
                await held.place.disk.run(remove_description, held.place.directory, snapshot_id)
                await held.place.disk.run(remove_lock, held.place.directory, lock)
                return await held.reload()

    # -- after a crash -------------------------------------------------------------------------------------

    async def resolve(self, place: Place, lock: LockRecord) -> None:
        """Roll back or finish, by what is there."""
        volume_id = os.path.basename(place.directory)[4:-6]
        image_format = await place.disk.run(read_format, place.directory)
        store = self._core.snapshot_store(image_format)
        snapshot_id, what = str(lock.journal.get("snapshot", "")), lock.journal.get("do")
        named = (snapshot_id, str(lock.journal.get("keep") or snapshot_id))
        if what not in (_CREATE, _RESTORE, _DELETE) or any(normalise_uid(uid) != uid for uid in named):
            # What is deleted here is named by a file: nothing but what these operations write is believed.
            raise InternalFault(f"the journal of the operation {lock.operation} is damaged: look at the volume by hand")
        stored = await store.snapshots(place, image_format)
        there = any(one.snapshot_id == snapshot_id for one in stored)
        if what == _RESTORE:
            done = await self._resolve_restore(place, image_format, lock, stored)
        else:
            await self._live.abandon(volume_id)
            await store.mend_snapshots(place, image_format, snapshot_id)
            done = there == (what == _CREATE)
            if not there:
                await place.disk.run(remove_description, place.directory, snapshot_id)
        reached("snapshot.resolved")
        self._core.jobs.record_interrupted(
            lock.operation,
            f"snapshots/{what}",
            lock.client,
            volume_id,
            JobState.DONE if done else JobState.INTERRUPTED,
            "the server stopped in the middle; the volume and its snapshots are as they were",
        )

    async def _resolve_restore(
        self, place: Place, image_format: VolumeFormat, lock: LockRecord, stored: Sequence[StoredSnapshot]
    ) -> bool:
        store = self._core.snapshot_store(image_format)
        kept = str(lock.journal.get("keep", ""))
        if image_format not in store.capabilities.snapshots_inside:
            done = await place.disk.run(_resolve_exchange, place.directory, image_format, lock, kept)
        elif done := bool(lock.journal.get("begun")):
            # Not mended before: an image that was cut off while it became shorter cannot be, and then is right.
            [snapshot] = [one for one in stored if one.snapshot_id == lock.journal["snapshot"]]
            await store.restore_in_place(place, image_format, snapshot)
            await store.mend_snapshots(place, image_format, snapshot.snapshot_id)
        elif kept:
            await store.mend_snapshots(place, image_format, kept)
            for one in stored:
                if one.snapshot_id == kept:
                    await store.delete_snapshot(place, image_format, one)
            await place.disk.run(remove_description, place.directory, kept)
        if done:
            size_bytes = await place.disk.run(read_image_size, place.directory)
            await place.disk.run(rewrite_meta, place.directory, {"size": size_bytes})
        return done


@dataclass(frozen=True)
class _Restore:
    """What the steps of one restore work with."""

    operation: Operation
    held: Held
    store: SnapshotStore
    snapshot: StoredSnapshot
    lock: LockRecord
    kept: str
    keep: Description | None
    progress: Progress


def _described(stored: StoredSnapshot, said: Description | None) -> Snapshot:
    said = said or Description()
    created = said.created or iso_time(stored.created_ns)
    return Snapshot(stored.snapshot_id, said.name or stored.tag, said.description, created, stored)


def _with(lock: LockRecord, **more: str | int) -> LockRecord:
    changed: LockRecord = msgspec.structs.replace(lock, journal={**lock.journal, **more})
    return changed


def _exchange(directory: str, copy_path: str, image_format: VolumeFormat, lock: LockRecord) -> None:
    """Put the copy in the image's place: the rename is the commit, and the inode in the journal tells it."""
    data_path = f"{directory}/{image_format.data_file}"
    keep_owner_and_mode(data_path, copy_path)
    rewrite_lock(directory, _with(lock, inode=os.lstat(copy_path).st_ino))
    reached("snapshot.restore-begun")
    os.rename(copy_path, data_path)
    reached("snapshot.exchanged")
    fsync_directory(directory)


def _resolve_exchange(directory: str, image_format: VolumeFormat, lock: LockRecord, kept: str) -> bool:
    done = os.lstat(f"{directory}/{image_format.data_file}").st_ino == lock.journal.get("inode")
    if kept and not done:
        remove_image(directory, kept)
        remove_description(directory, kept)
    # What is deleted here is named by nothing but our own operation's uid.
    try:
        os.unlink(f"{directory}/{_COPY_PREFIX}{lock.operation}")
    except FileNotFoundError:
        return done
    fsync_directory(directory)
    return done
