"""Growing a volume."""

from elemento_storage.catalog.locks import LockRecord, new_lock, remove_lock, write_lock
from elemento_storage.catalog.volume_directory import read_image_size, rewrite_meta
from elemento_storage.disk import Place
from elemento_storage.errors import CannotShrink, FormatUnsupported, VolumeExported
from elemento_storage.faultpoints import reached
from elemento_storage.model import Volume, new_uid
from elemento_storage.service.access import Actor
from elemento_storage.service.core import Core

PURPOSE = "resize"


class Resizing:
    """The image grows first, meta.json follows: the image's word counts, so a crash in between loses nothing."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._catalog = core.catalog
        core.catalog.resolvers[PURPOSE] = self.resolve

    async def resize(self, actor: Actor, volume_id: str, size_bytes: int) -> Volume:
        """Set a larger virtual size. Raises CannotShrink, VolumeExported, FormatUnsupported, NoRoom …"""
        operation = new_uid()
        lock: LockRecord | None = None
        try:
            self._catalog.active_operations.add(operation)
            async with self._catalog.hold(volume_id, actor.require_change) as held:
                volume = held.volume
                store = self._core.store(volume.meta.format)
                if volume.meta.format not in store.capabilities.grows:
                    raise FormatUnsupported(f"a volume of format {volume.meta.format} cannot be resized")
                if size_bytes < volume.size_bytes:
                    raise CannotShrink(
                        f"the volume has {volume.size_bytes} bytes and cannot shrink to {size_bytes}: "
                        "what is beyond the new end would be lost",
                        size_bytes=volume.size_bytes,
                    )
                if size_bytes == volume.size_bytes:
                    return volume
                if volume.exported:
                    raise VolumeExported("the volume is exported by something this server does not control")
                reservation = await self._catalog.room.reserve_in(
                    held.location, volume_id, size_bytes, new_volume=False
                )
                try:
                    disk, directory = held.place.disk, held.place.directory
                    lock = new_lock(PURPOSE, operation, self._catalog.server_id, actor.client, {"size": size_bytes})
                    await disk.run(write_lock, directory, lock)
                    reached("resize.locked")
                    await store.grow(held.place, volume.meta.format, size_bytes)
                    reached("resize.grown")
                    await disk.run(rewrite_meta, directory, {"size": size_bytes})
                    reached("resize.recorded")
                    await disk.run(remove_lock, directory, lock)
                    return await held.reload()
                finally:
                    await reservation.release()
        except BaseException:
            self._catalog.active_operations.discard(operation)
            if lock is not None:
                await self._catalog.settle(volume_id)
            raise
        finally:
            self._catalog.active_operations.discard(operation)

    async def resolve(self, place: Place, lock: LockRecord) -> None:
        """After a crash: whatever size the image has, meta.json is made to say the same."""
        size_bytes = await place.disk.run(read_image_size, place.directory)
        await place.disk.run(rewrite_meta, place.directory, {"size": size_bytes})
        reached("resize.resolved")
