"""Giving a volume another image of the same format and size: an empty one (reset), or one that stands on no other
(overlay/compact).

The new image is made in a directory inside the volume's and synced. One rename over the old image is the commit: at
every moment ``data.<ext>`` is a whole image, the old one or the new. Before it the old one gets a second name in the
trash, so that the answer does not wait until gigabytes are deleted. What a crash left is resolved by removing the
directory, whichever of the two images is in place.
"""

import contextlib
import os
import shutil
from collections.abc import Awaitable, Callable

from elemento_storage.catalog.bin import link_file_to_trash
from elemento_storage.catalog.catalog import Held, Operation
from elemento_storage.catalog.linked_clones import allocated_bytes, require_no_clones
from elemento_storage.catalog.locations import os_errors
from elemento_storage.catalog.locks import LockRecord, remove_lock
from elemento_storage.catalog.placement import read_space
from elemento_storage.catalog.room import no_room
from elemento_storage.catalog.volume_directory import read_format
from elemento_storage.disk import Place
from elemento_storage.durable import fsync_directory, fsync_file, keep_owner_and_mode
from elemento_storage.errors import FormatUnsupported, NoFirstState
from elemento_storage.faultpoints import reached
from elemento_storage.jobs import JobState
from elemento_storage.model import CloneAlgorithm, Preallocation, Volume, volume_id_of_directory
from elemento_storage.progress import Progress
from elemento_storage.service.access import Actor
from elemento_storage.service.core import Core, require_no_snapshots

RESET = "reset"
COMPACT = "compact"

Make = Callable[[Held, Place, Progress], Awaitable[None]]


class ReplacingImages:
    """The use cases ``reset`` and ``overlay/compact``."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._catalog = core.catalog
        for purpose in (RESET, COMPACT):
            core.catalog.resolvers[purpose] = self.resolve

    async def reset(self, actor: Actor, volume_id: str, progress: Progress) -> Volume:
        """Back to the first state that is kept: empty, or for a linked clone what its parent holds.

        Raises VolumeExported, HasClones, NoFirstState, FormatUnsupported, NoRoom, JobCancelled …
        """
        async with self._catalog.operation(volume_id, progress.operation_id) as operation:
            async with self._catalog.hold(volume_id, actor.require_change) as held:
                await self._require_resettable(held)
                lock = await self._lock(operation, held, RESET, actor)
            return await self._replace(held, lock, self._make_first, progress)

    async def compact(self, actor: Actor, volume_id: str, progress: Progress) -> Volume:
        """Make a linked clone independent of what it stands on; nothing to do for any other volume.

        Raises VolumeExported, HasClones, NoRoom, JobCancelled …
        """
        async with self._catalog.operation(volume_id, progress.operation_id) as operation:
            async with self._catalog.hold(volume_id, actor.require_change) as held:
                if held.volume.parent is None:
                    return held.volume
                require_no_snapshots(held.volume, "delete them, or clone the volume: a clone stands on no other")
                await self._core.markers.require_unexported(held)
                await require_no_clones(held)
                await self._require_space(held)
                lock = await self._lock(operation, held, COMPACT, actor)
            return await self._replace(held, lock, self._make_independent, progress)

    async def _require_resettable(self, held: Held) -> None:
        meta = held.volume.meta
        capabilities = self._core.store(meta.format).capabilities
        if meta.format not in capabilities.creates or not capabilities.files:
            raise FormatUnsupported(f"a {meta.format} volume cannot be reset")
        if meta.format in self._core.store(meta.format).capabilities.snapshots_inside:
            require_no_snapshots(held.volume, "delete them first, or restore one of them instead")
        await self._core.markers.require_unexported(held)
        await require_no_clones(held)
        if meta.cloudinit and held.volume.parent is None:
            raise NoFirstState(
                "the cloud image that the volume was made of is not kept: make linked clones of it, and reset those",
                volume_id=held.volume.volume_id,
            )

    async def _require_space(self, held: Held) -> None:
        needed_bytes = allocated_bytes(held.location, held.volume)
        space = await held.place.disk.run(read_space, held.location.path)
        if needed_bytes > space.free_bytes:
            await self._catalog.bin.make_room(held.location, needed_bytes - space.free_bytes)
            space = await held.place.disk.run(read_space, held.location.path)
        if needed_bytes > space.free_bytes:
            reason = f"the file system has {space.free_bytes} bytes free, and {needed_bytes} are needed for a moment"
            raise no_room({held.location.name: reason})

    # -- the new image -------------------------------------------------------------------------------------

    async def _make_first(self, held: Held, place: Place, progress: Progress) -> None:
        volume = held.volume
        store = self._core.store(volume.meta.format)
        if volume.parent is None:
            await store.allocate(place, volume.meta.format, volume.size_bytes, Preallocation.OFF, progress)
            return
        image = self._core.image(held.location, volume)
        await store.link_to(place, volume.parent, image.below[0].format, volume.size_bytes)

    async def _make_independent(self, held: Held, place: Place, progress: Progress) -> None:
        image_format = held.volume.meta.format
        image = self._core.image(held.location, held.volume)
        await self._core.store(image_format).copy_from(place, image_format, image, CloneAlgorithm.CP, progress)

    # -- the steps -----------------------------------------------------------------------------------------

    async def _lock(self, operation: Operation, held: Held, purpose: str, actor: Actor) -> LockRecord:
        # Which file is the old image: after a crash that tells whether the new one has taken its place.
        inode = await held.place.disk.run(_inode, f"{held.place.directory}/{held.volume.meta.format.data_file}")
        return await operation.lock_volume(held, purpose, actor.client, {"replaces": inode})

    async def _replace(self, held: Held, lock: LockRecord, make: Make, progress: Progress) -> Volume:
        place, image_format = held.place, held.volume.meta.format
        beside = Place(f"{place.directory}/{_directory(lock)}", place.disk)
        with os_errors(held.location):
            await place.disk.run(os.mkdir, beside.directory, 0o755)
            await make(held, beside, progress)
            new, old = f"{beside.directory}/{image_format.data_file}", f"{place.directory}/{image_format.data_file}"
            await place.disk.run(_finish, old, new)
        reached(f"{lock.purpose}.made")
        async with self._catalog.hold(held.volume.volume_id, lambda _: None, own_lock=lock) as held_again:
            progress.commit()
            rubbish = await place.disk.run(link_file_to_trash, held.location.path, old)
            reached(f"{lock.purpose}.old-kept")
            await place.disk.run(_switch, place.directory, new, old)
            reached(f"{lock.purpose}.committed")
            await place.disk.run(os.rmdir, beside.directory)
            await place.disk.run(remove_lock, place.directory, lock)
            if rubbish is not None:
                self._catalog.in_background(self._catalog.bin.empty(held.location, rubbish))
            return await held_again.reload()

    async def resolve(self, place: Place, lock: LockRecord) -> None:
        """After a crash: the image that is in place stays, the one beside it goes."""
        finished = await place.disk.run(_resolve, place.directory, lock)
        self._core.jobs.record_interrupted(
            lock.operation,
            lock.purpose,
            lock.client,
            volume_id_of_directory(os.path.basename(place.directory)) or "",
            JobState.DONE if finished else JobState.INTERRUPTED,
            "the server stopped in the middle; the volume is as it was",
        )


def _directory(lock: LockRecord) -> str:
    return f".elemento-{lock.purpose}-{lock.operation}"


def _finish(old: str, new: str) -> None:
    with contextlib.suppress(PermissionError):  # a server that is not root owns what it writes
        keep_owner_and_mode(old, new)
    fsync_file(new)


def _switch(directory: str, new: str, old: str) -> None:
    os.rename(new, old)
    fsync_directory(directory)


def _resolve(directory: str, lock: LockRecord) -> bool:
    shutil.rmtree(f"{directory}/{_directory(lock)}", ignore_errors=True)
    fsync_directory(directory)
    reached(f"{lock.purpose}.resolved")
    return _inode(f"{directory}/{read_format(directory).data_file}") != lock.journal.get("replaces")


def _inode(path: str) -> int:
    return os.lstat(path).st_ino
