"""Snapshots of volumes in a directory: files beside raw images, internal ones of qcow2 (docs/on-disk-format.md)."""

import contextlib
import hashlib
import os
from collections import Counter
from dataclasses import dataclass
from typing import Final

from elemento_storage.disk import Place
from elemento_storage.durable import fsync_file
from elemento_storage.engine import image_snapshots, snapshot_files
from elemento_storage.engine.image_header import BadHeader
from elemento_storage.engine.qcow2_snapshots import InternalSnapshot, read_internal_snapshots
from elemento_storage.engine.qemu_img import full_is_no_room
from elemento_storage.engine.sparse_copy import share_blocks
from elemento_storage.errors import ImageDamaged, ImageInUse
from elemento_storage.model import VolumeFormat, normalise_uid
from elemento_storage.progress import Progress
from elemento_storage.stores.base import SnapshotImage, StoredSnapshot

_COPIED: Final = 0.98  # when all that is left is to sync


@dataclass
class _Steps:
    """Turns bytes that were copied into progress, in the thread that copies."""

    progress: Progress
    expected_bytes: int
    done_bytes: int = 0

    def __call__(self, copied: int) -> None:
        self.progress.check()
        self.done_bytes += copied
        self.progress.fraction = min(self.done_bytes / max(self.expected_bytes, 1), 1.0) * _COPIED


class DirectorySnapshots:
    """The part of DirectoryStore that is about snapshots."""

    _job_timeout_s: float

    async def snapshots(self, place: Place, image_format: VolumeFormat) -> list[StoredSnapshot]:
        """See Store.snapshots."""
        return await place.disk.run(_stored, place.directory, image_format)

    async def take_snapshot(
        self, place: Place, image_format: VolumeFormat, snapshot_id: str, progress: Progress
    ) -> None:
        """See Store.take_snapshot."""
        with full_is_no_room():
            if image_format is VolumeFormat.QCOW2:
                progress.commit()
                await image_snapshots.take(_image(place, image_format), snapshot_id, self._job_timeout_s)
            elif not await self.take_snapshot_at_once(place, image_format, snapshot_id, progress):
                progress.advance(0.0, "copying")
                allocated = (await place.disk.run(os.stat, _image(place, image_format))).st_blocks * 512
                step = _Steps(progress, allocated)
                where = (place.directory, image_format.data_file, snapshot_id)
                await place.disk.run(snapshot_files.copy_image, *where, step, progress.commit)

    async def take_snapshot_at_once(
        self, place: Place, image_format: VolumeFormat, snapshot_id: str, progress: Progress
    ) -> bool:
        """See Store.take_snapshot_at_once."""
        if image_format is VolumeFormat.QCOW2:
            return False  # its tables are in memory of whoever writes to it
        with full_is_no_room():
            where = (place.directory, image_format.data_file, snapshot_id)
            return await place.disk.run(snapshot_files.share_image, *where, progress.commit)

    def copy_of_moment(self, place: Place, image_format: VolumeFormat, snapshot_id: str) -> tuple[str, str]:
        """See Store.copy_of_moment."""
        where = (place.directory, snapshot_id)
        return snapshot_files.unfinished_path(*where), snapshot_files.overwritten_path(*where)

    async def publish_copy(
        self, place: Place, image_format: VolumeFormat, snapshot_id: str, progress: Progress
    ) -> None:
        """See Store.publish_copy."""
        with full_is_no_room():
            where = (place.directory, image_format.data_file, snapshot_id)
            await place.disk.run(snapshot_files.publish_image, *where, progress.commit)

    async def set_aside(self, place: Place, image_format: VolumeFormat, snapshot_id: str, progress: Progress) -> None:
        """See Store.set_aside."""
        if image_format is not VolumeFormat.QCOW2:
            where = (place.directory, image_format.data_file, snapshot_id)
            if await place.disk.run(snapshot_files.set_image_aside, *where):
                return
        await self.take_snapshot(place, image_format, snapshot_id, progress)

    async def restore_beside(
        self, place: Place, image_format: VolumeFormat, snapshot: StoredSnapshot, copy_path: str, progress: Progress
    ) -> None:
        """See Store.restore_beside."""
        source = snapshot_files.image_path(place.directory, snapshot.snapshot_id)
        progress.advance(0.0, "copying")
        step = _Steps(progress, snapshot.allocated_bytes or 0)

        def copy() -> None:
            if not share_blocks(source, copy_path):
                snapshot_files.copy_data(source, copy_path, step)
            fsync_file(copy_path)

        with full_is_no_room():
            await place.disk.run(copy)

    async def restore_in_place(self, place: Place, image_format: VolumeFormat, snapshot: StoredSnapshot) -> None:
        """See Store.restore_in_place."""
        path = _image(place, image_format)
        with full_is_no_room():
            await image_snapshots.apply(path, _internal(snapshot), self._job_timeout_s)
            await place.disk.run(fsync_file, path)

    async def delete_snapshot(self, place: Place, image_format: VolumeFormat, snapshot: StoredSnapshot) -> None:
        """See Store.delete_snapshot."""
        if image_format is VolumeFormat.QCOW2:
            await image_snapshots.remove(_image(place, image_format), _internal(snapshot), self._job_timeout_s)
        else:
            await place.disk.run(snapshot_files.remove_image, place.directory, snapshot.snapshot_id)

    async def mend_snapshots(self, place: Place, image_format: VolumeFormat, snapshot_id: str) -> None:
        """See Store.mend_snapshots."""
        await place.disk.run(snapshot_files.remove_unfinished, place.directory, snapshot_id)
        if image_format is VolumeFormat.QCOW2:
            with contextlib.suppress(ImageInUse):  # what serves it was not cut off
                await image_snapshots.repair(_image(place, image_format), self._job_timeout_s)

    def snapshot_image(self, place: Place, image_format: VolumeFormat, snapshot: StoredSnapshot) -> SnapshotImage:
        """See Store.snapshot_image."""
        if image_format is VolumeFormat.QCOW2:
            path = _image(place, image_format)
            return SnapshotImage(path, image_format, snapshot.size_bytes, place.disk, snapshot.key)
        path = snapshot_files.image_path(place.directory, snapshot.snapshot_id)
        return SnapshotImage(path, image_format, snapshot.size_bytes, place.disk)

    async def give_snapshot(
        self, place: Place, image_format: VolumeFormat, snapshot: StoredSnapshot, target: Place
    ) -> bool:
        """See Store.give_snapshot."""
        if image_format is VolumeFormat.QCOW2:
            return False
        path = f"{target.directory}/{image_format.data_file}"
        return await place.disk.run(snapshot_files.move_image, place.directory, snapshot.snapshot_id, path)


def _image(place: Place, image_format: VolumeFormat) -> str:
    return f"{place.directory}/{image_format.data_file}"


def _internal(snapshot: StoredSnapshot) -> InternalSnapshot:
    return InternalSnapshot(
        snapshot.key, snapshot.tag, snapshot.created_ns, snapshot.size_bytes, snapshot.vm_state_bytes
    )


def _stored(directory: str, image_format: VolumeFormat) -> list[StoredSnapshot]:
    if image_format is VolumeFormat.QCOW2:
        found = _stored_inside(f"{directory}/{image_format.data_file}")
    else:
        images = snapshot_files.snapshot_images(directory)
        found = [
            StoredSnapshot(uid, uid, one.st_mtime_ns, one.st_size, min(one.st_size, one.st_blocks * 512))
            for uid, one in images.items()
        ]
    return sorted(found, key=lambda one: (one.created_ns, one.key, one.snapshot_id))


def _stored_inside(path: str) -> list[StoredSnapshot]:
    try:
        internal = read_internal_snapshots(path)
    except BadHeader as error:
        raise ImageDamaged(f"the image's snapshots cannot be read: {error}") from error
    names = Counter(one.tag for one in internal)
    return [
        StoredSnapshot(
            snapshot_id=_uid(one),
            tag=one.tag,
            created_ns=one.created_ns,
            size_bytes=one.size_bytes,
            allocated_bytes=None,
            key=one.key,
            vm_state_bytes=one.vm_state_bytes,
            is_ambiguous=names[one.tag] > 1 or not one.tag,
        )
        for one in internal
    ]


def _uid(one: InternalSnapshot) -> str:
    """Our own are called by their uid. Those of other tools get one that stays the same as long as they are there."""
    if normalise_uid(one.tag) == one.tag:
        return one.tag
    facts = f"{one.key}\0{one.tag}\0{one.created_ns}".encode("utf-8", "surrogateescape")
    return hashlib.blake2b(facts, digest_size=16).hexdigest()
