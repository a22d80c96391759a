"""Converting a volume to another format.

The new image is written beside the old one and synced; then it gets its name, then meta.json says the new format (the
commit), then the old image goes. At every moment the data file of the format in meta.json is whole, so what a crash
left is resolved by looking at meta.json alone: the other data file is the one that goes.
"""

import contextlib
import os
import shutil

from elemento_storage.catalog.catalog import Held
from elemento_storage.catalog.locks import LockRecord, new_lock, remove_lock, write_lock
from elemento_storage.catalog.placement import read_space
from elemento_storage.catalog.room import no_room
from elemento_storage.catalog.volume_directory import image_size, read_format, rewrite_meta
from elemento_storage.disk import Place
from elemento_storage.durable import fsync_directory
from elemento_storage.errors import FormatUnsupported, VolumeExported
from elemento_storage.faultpoints import reached
from elemento_storage.jobs import JobState
from elemento_storage.model import Volume, VolumeFormat
from elemento_storage.progress import Progress
from elemento_storage.service.access import Actor
from elemento_storage.service.core import Core

PURPOSE = "convert"


class Converting:
    """raw ↔ qcow2, as a job that can be cancelled until it commits."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._catalog = core.catalog
        core.catalog.resolvers[PURPOSE] = self.resolve

    async def convert(self, actor: Actor, volume_id: str, target: VolumeFormat, progress: Progress) -> Volume:
        """Change the format; the same format is no work. Raises FormatUnsupported, VolumeExported, NoRoom …"""
        operation = progress.operation_id
        lock: LockRecord | None = None
        self._catalog.active_operations.add(operation)
        try:
            async with self._catalog.hold(volume_id, actor.require_change) as held:
                source = held.volume.meta.format
                if source is target:
                    return held.volume
                await self._require_convertible(held, target)
                lock = new_lock(
                    PURPOSE,
                    operation,
                    self._catalog.server_id,
                    actor.client,
                    {"from": source.value, "to": target.value, "copy": f".elemento-convert-{operation}"},
                )
                await held.place.disk.run(write_lock, held.place.directory, lock)
                reached("convert.locked")
                await held.reload()
            place = held.place
            await self._core.store(source).convert_beside(place, source, target, _copy_path(place, lock), progress)
            reached("convert.copied")
            async with self._catalog.hold(volume_id, lambda _: None, own_lock=lock) as held:
                progress.commit()
                await place.disk.run(_switch, place.directory, lock, source, target)
                await place.disk.run(remove_lock, place.directory, lock)
                return await held.reload()
        except BaseException:
            self._catalog.active_operations.discard(operation)
            if lock is not None:
                await self._catalog.settle(volume_id)
            raise
        finally:
            self._catalog.active_operations.discard(operation)

    async def _require_convertible(self, held: Held, target: VolumeFormat) -> None:
        volume = held.volume
        converts = self._core.store(volume.meta.format).capabilities.converts
        if volume.meta.format not in converts or target not in converts:
            raise FormatUnsupported(f"a {volume.meta.format} volume cannot be converted to {target}")
        if volume.exported:
            raise VolumeExported("the volume is exported: unexport it first", volume_id=volume.volume_id)
        space = await held.place.disk.run(read_space, held.location.path)
        if volume.allocated_bytes > space.free_bytes:
            await self._catalog.bin.make_room(volume.allocated_bytes)
            space = await held.place.disk.run(read_space, held.location.path)
        if volume.allocated_bytes > space.free_bytes:
            raise no_room(
                {
                    held.location.name: f"the file system has {space.free_bytes} bytes free and both copies "
                    f"are needed for a moment: {volume.allocated_bytes}"
                }
            )

    async def resolve(self, place: Place, lock: LockRecord) -> None:
        """After a crash: finish if meta.json says the new format, else go back to the old one."""
        finished = await place.disk.run(_resolve, place.directory, lock)
        volume_id = os.path.basename(place.directory)[4:-6]
        self._core.jobs.record_interrupted(
            lock.operation,
            PURPOSE,
            lock.client,
            volume_id,
            JobState.DONE if finished else JobState.INTERRUPTED,
            "the server stopped in the middle; the volume is as it was",
        )


def _copy_path(place: Place, lock: LockRecord) -> str:
    return f"{place.directory}/{lock.journal['copy']}"


def _switch(directory: str, lock: LockRecord, source: VolumeFormat, target: VolumeFormat) -> None:
    copy = f"{directory}/{lock.journal['copy']}"
    old = f"{directory}/{source.data_file}"
    new = f"{directory}/{target.data_file}"
    shutil.copymode(old, copy)
    status = os.stat(old)
    os.chown(copy, status.st_uid, status.st_gid)
    os.rename(copy, new)
    fsync_directory(directory)
    reached("convert.renamed")
    rewrite_meta(directory, {"format": target.value, "size": image_size(directory, target)})
    reached("convert.committed")
    os.unlink(old)
    reached("convert.old-removed")


def _resolve(directory: str, lock: LockRecord) -> bool:
    source, target = VolumeFormat(str(lock.journal["from"])), VolumeFormat(str(lock.journal["to"]))
    present = read_format(directory)
    leftovers = [str(lock.journal["copy"])]
    leftovers += [image_format.data_file for image_format in (source, target) if image_format is not present]
    for name in leftovers:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"{directory}/{os.path.basename(name)}")
    fsync_directory(directory)
    reached("convert.resolved")
    return present is target
