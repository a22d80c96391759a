"""Growing a volume.

The image grows first, meta.json follows: the image's word counts, so a crash in between loses nothing.
"""

from elemento_storage.catalog.catalog import Held
from elemento_storage.catalog.linked_clones import require_no_clones
from elemento_storage.catalog.locations import os_errors
from elemento_storage.catalog.locks import LockRecord, remove_lock
from elemento_storage.catalog.room import Demand
from elemento_storage.catalog.volume_directory import read_format
from elemento_storage.ceph.faults import ImageGone
from elemento_storage.disk import Place
from elemento_storage.errors import CannotShrink, FormatUnsupported
from elemento_storage.faultpoints import reached
from elemento_storage.model import Volume, new_uid
from elemento_storage.service.access import Actor
from elemento_storage.service.core import Core
from elemento_storage.service.exporting import Exporting

PURPOSE = "resize"


class Resizing:
    """Grows raw and qcow2 volumes, exported ones through the engine that has them open."""

    def __init__(self, core: Core, exporting: Exporting) -> None:
        self._core = core
        self._exporting = exporting
        self._catalog = core.catalog
        core.catalog.resolvers[PURPOSE] = self.resolve

    async def resize(self, actor: Actor, volume_id: str, size_bytes: int) -> Volume:
        """Set a larger virtual size. Raises CannotShrink, VolumeExported, FormatUnsupported, NoRoom …"""
        async with self._catalog.operation(volume_id, new_uid()) as operation:
            async with self._catalog.hold(volume_id, actor.require_change) as held:
                if not self._is_to_grow(held, size_bytes):
                    return held.volume
                await self._exporting.require_growable(held)
                await require_no_clones(held)
                lock = await operation.lock_volume(held, PURPOSE, actor.client, {"size": size_bytes})
            demand = Demand(volume_id, size_bytes, new_volume=False)
            reservation = await self._catalog.room.reserve_in(held.location, demand)
            try:
                with os_errors(held.location):
                    if not await self._exporting.grow(held, size_bytes):
                        image_format = held.volume.meta.format
                        await self._core.store(image_format).grow(held.place, image_format, size_bytes)
                reached("resize.grown")
                async with self._catalog.hold(volume_id, lambda _: None, own_lock=lock) as held:
                    await self._catalog.rewrite_meta(held.place, {"size": size_bytes})
                    reached("resize.recorded")
                    await held.place.disk.run(remove_lock, held.place.directory, lock)
                    return await held.reload()
            finally:
                await reservation.release()

    def _is_to_grow(self, held: Held, size_bytes: int) -> bool:
        volume = held.volume
        if volume.meta.format not in self._core.store(volume.meta.format).capabilities.grows:
            raise FormatUnsupported(f"a volume of format {volume.meta.format} cannot be resized")
        if size_bytes < volume.size_bytes:
            raise CannotShrink(
                f"the volume has {volume.size_bytes} bytes and cannot shrink to {size_bytes}: "
                "what is beyond the new end would be lost",
                size_bytes=volume.size_bytes,
            )
        return size_bytes > volume.size_bytes

    async def resolve(self, place: Place, lock: LockRecord) -> None:
        """After a crash: whatever size the image has, meta.json is made to say the same."""
        image_format = await place.disk.run(read_format, place.directory)
        try:
            size_bytes = await self._core.store(image_format).size_bytes(place, image_format)
        except ImageGone:
            return  # there is nothing left to agree with
        await self._catalog.rewrite_meta(place, {"size": size_bytes})
        reached("resize.resolved")
