"""Converting a volume to another format.

The new image is written beside the old one and synced; then it gets its name, then meta.json says the new format (the
commit), then the old image goes. At every moment the data file of the format in meta.json is whole, so what a crash
left is resolved by looking at meta.json alone: the other data file is the one that goes.
"""

import contextlib
import os

from elemento_storage.catalog.bin import move_file_to_trash
from elemento_storage.catalog.catalog import Held
from elemento_storage.catalog.linked_clones import allocated_bytes, require_no_clones
from elemento_storage.catalog.locations import os_errors
from elemento_storage.catalog.locks import LockRecord, remove_lock
from elemento_storage.catalog.placement import read_space
from elemento_storage.catalog.room import no_room
from elemento_storage.catalog.volume_directory import image_size, read_format, rewrite_meta
from elemento_storage.disk import Place
from elemento_storage.durable import fsync_directory, keep_owner_and_mode
from elemento_storage.errors import Conflict, FormatUnsupported, InternalFault
from elemento_storage.faultpoints import reached
from elemento_storage.jobs import JobState
from elemento_storage.model import Volume, VolumeFormat
from elemento_storage.progress import Progress
from elemento_storage.service.access import Actor
from elemento_storage.service.core import Core, require_no_snapshots

PURPOSE = "convert"
_COPY_PREFIX = ".elemento-convert-"
_FILES = frozenset({VolumeFormat.RAW, VolumeFormat.QCOW2})


class Converting:
    """raw ↔ qcow2, as a job that can be cancelled until it commits."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._catalog = core.catalog
        core.catalog.resolvers[PURPOSE] = self.resolve

    async def convert(self, actor: Actor, volume_id: str, target: VolumeFormat, progress: Progress) -> Volume:
        """Change the format; the same format is no work. Raises FormatUnsupported, VolumeExported, NoRoom …"""
        async with self._catalog.operation(volume_id, progress.operation_id) as operation:
            async with self._catalog.hold(volume_id, actor.require_change) as held:
                source = held.volume.meta.format
                if source is target:
                    return held.volume
                await self._require_convertible(held, target)
                copy = f"{_COPY_PREFIX}{operation.operation_id}"
                journal: dict[str, str | int] = {"from": source.value, "to": target.value, "copy": copy}
                lock = await operation.lock_volume(held, PURPOSE, actor.client, journal)
            place = held.place
            with os_errors(held.location):
                copy_path = f"{place.directory}/{copy}"
                await self._core.store(source).convert_beside(place, source, target, copy_path, progress)
            reached("convert.copied")
            async with self._catalog.hold(volume_id, lambda _: None, own_lock=lock) as held:
                progress.commit()
                await place.disk.run(_switch, place.directory, copy_path, source, target)
                # Deleting gigabytes takes long; out of the volume in one rename, it can be done later.
                old = f"{place.directory}/{source.data_file}"
                rubbish = await place.disk.run(move_file_to_trash, held.location.path, old)
                reached("convert.old-removed")
                await place.disk.run(remove_lock, place.directory, lock)
                self._catalog.in_background(self._catalog.bin.empty(held.location, rubbish))
                return await held.reload()

    async def _require_convertible(self, held: Held, target: VolumeFormat) -> None:
        volume = held.volume
        converts = self._core.store(volume.meta.format).capabilities.converts
        if volume.meta.format not in converts or target not in converts:
            raise FormatUnsupported(f"a {volume.meta.format} volume cannot be converted to {target}")
        require_no_snapshots(volume, "delete them, or clone the volume into the other format")
        await self._core.markers.require_unexported(held)
        await require_no_clones(held)
        if await held.place.disk.run(os.path.lexists, f"{held.place.directory}/{target.data_file}"):
            raise Conflict(
                f"the volume's directory holds a {target.data_file} that is not part of it: move it away first",
                volume_id=volume.volume_id,
            )
        needed_bytes = allocated_bytes(held.location, volume)
        space = await held.place.disk.run(read_space, held.location.path)
        if needed_bytes > space.free_bytes:
            await self._catalog.bin.make_room(held.location, needed_bytes - space.free_bytes)
            space = await held.place.disk.run(read_space, held.location.path)
        if needed_bytes > space.free_bytes:
            raise no_room(
                {
                    held.location.name: f"the file system has {space.free_bytes} bytes free and both copies "
                    f"are needed for a moment: {needed_bytes}"
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


def _switch(directory: str, copy_path: str, source: VolumeFormat, target: VolumeFormat) -> None:
    with contextlib.suppress(PermissionError):  # a server that is not root owns what it writes
        keep_owner_and_mode(f"{directory}/{source.data_file}", copy_path)
    os.rename(copy_path, f"{directory}/{target.data_file}")
    fsync_directory(directory)
    reached("convert.renamed")
    rewrite_meta(directory, {"format": target.value, "size": image_size(directory, target)})
    reached("convert.committed")


def _resolve(directory: str, lock: LockRecord) -> bool:
    # What is deleted here is named by a file: nothing but what a conversion makes is believed.
    copy = str(lock.journal.get("copy", ""))
    formats = {VolumeFormat(str(lock.journal.get(key))) for key in ("from", "to")}
    present = read_format(directory)
    if copy != f"{_COPY_PREFIX}{lock.operation}" or present not in formats or not formats <= _FILES:
        raise InternalFault(f"the journal of the conversion {lock.operation} is damaged: look at the volume by hand")
    for name in (copy, *(image_format.data_file for image_format in formats if image_format is not present)):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"{directory}/{name}")
    fsync_directory(directory)
    reached("convert.resolved")
    return present.value == lock.journal["to"]
