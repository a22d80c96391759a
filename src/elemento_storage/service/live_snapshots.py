"""Snapshots of what is exported: through the daemon that serves it, while clients write.

Three ways. A raw image on a file system that shares extents needs no daemon at all: the store copies it at one moment,
whoever writes (``take_snapshot_at_once``). A qcow2 image is changed by the one who has it open. Any other raw image is
copied by its daemon; where tgtd has the image itself, its LUNs are moved to the daemon first, as limits do it.
"""

import contextlib
from collections.abc import AsyncIterator

from elemento_storage.catalog.catalog import Held
from elemento_storage.disk import Place
from elemento_storage.engine import live_snapshots
from elemento_storage.engine.qcow2_snapshots import InternalSnapshot
from elemento_storage.engine.volume_engine import Source, VolumeEngine
from elemento_storage.errors import VolumeExported
from elemento_storage.exports.publisher import Publisher
from elemento_storage.exports.record import ExportRecord
from elemento_storage.faultpoints import reached
from elemento_storage.model import VolumeFormat
from elemento_storage.progress import Progress
from elemento_storage.service.core import Core
from elemento_storage.service.exporting import source_of
from elemento_storage.stores.base import StoredSnapshot

_COPIED = 0.98


class LiveSnapshots:
    """Takes and deletes snapshots through the engines of exported volumes."""

    def __init__(self, core: Core, publisher: Publisher) -> None:
        self._core = core
        self._markers = core.markers
        self._publisher = publisher

    async def require_reachable(self, held: Held) -> None:
        """Raises VolumeExported when the volume is open where we cannot have its snapshots changed."""
        markers = await self._markers.of(held)
        own = self._markers.own_records(markers)
        volume = held.volume
        if any(marker.fresh and marker.record not in own for marker in markers):
            raise VolumeExported(
                "the volume is exported by a server that is not this one: ask that one", volume_id=volume.volume_id
            )
        inside = self._core.store(volume.meta.format).capabilities.snapshots_inside
        if own and volume.meta.readonly and volume.meta.format in inside:
            raise VolumeExported(
                "the volume is exported read-only, and its snapshots are kept inside the image: unexport it first",
                volume_id=volume.volume_id,
            )

    async def take(self, held: Held, snapshot_id: str, progress: Progress) -> bool:
        """Keep what the volume holds at one moment of the call; False when it is not exported.

        Raises ExportFailed, NoRoom, JobCancelled.
        """
        volume = held.volume
        image_format = volume.meta.format
        store = self._core.snapshot_store(image_format)
        async with self._open(held) as (engine, source, own):
            if engine is None or volume.meta.readonly:
                return False
            if image_format in store.capabilities.snapshots_inside:
                progress.commit()
                await live_snapshots.take_internal(engine, snapshot_id)
                return True
            await self._publisher.move_to_daemon(source, own)
            files = store.copy_of_moment(held.place, image_format, snapshot_id)
            await live_snapshots.begin_copy(engine, held.place.disk, *files)
            reached("snapshot.copying")
        try:
            await live_snapshots.wait_for_copy(engine, progress, up_to=_COPIED)
        finally:
            async with self._publisher.changing(volume.volume_id):
                await live_snapshots.end_copy(engine)
        await store.publish_copy(held.place, image_format, snapshot_id, progress)
        return True

    async def remove(self, held: Held, snapshot: StoredSnapshot) -> bool:
        """Delete one that is kept inside an exported image; False when it is not exported. Raises ExportFailed."""
        async with self._open(held) as (engine, _, _):
            if engine is None:
                return False
            await live_snapshots.remove_internal(engine, _internal(snapshot))
            return True

    async def remove_wherever(
        self, place: Place, volume_id: str, image_format: VolumeFormat, snapshot: StoredSnapshot
    ) -> None:
        """Delete one through the daemon if that runs, else from the image: nobody opens it here meanwhile.

        Raises ExportFailed, ImageInUse, ToolFailed.
        """
        store = self._core.snapshot_store(image_format)
        async with self._publisher.changing(volume_id):
            engine = self._publisher.engine(volume_id)
            if image_format in store.capabilities.snapshots_inside and engine.daemon.pid is not None:
                await live_snapshots.remove_internal(engine, _internal(snapshot))
            else:
                await store.delete_snapshot(place, image_format, snapshot)

    async def abandon(self, volume_id: str) -> None:
        """Leave nothing of a copy that was cut off. Raises ExportFailed."""
        self._publisher.claim()
        async with self._publisher.changing(volume_id):
            await live_snapshots.end_copy(self._publisher.engine(volume_id))

    @contextlib.asynccontextmanager
    async def _open(self, held: Held) -> AsyncIterator[tuple[VolumeEngine | None, Source, list[ExportRecord]]]:
        """The engine of a volume that is exported here, running; None of one that is not."""
        source = source_of(self._core, held.location, held.volume)
        async with self._publisher.changing(source.volume_id):
            own = self._markers.own_records(await self._markers.of(held))
            engine = self._publisher.engine(source.volume_id) if own else None
            if engine is not None:
                await engine.start(source)
            yield engine, source, own


def _internal(snapshot: StoredSnapshot) -> InternalSnapshot:
    return InternalSnapshot(
        snapshot.key, snapshot.tag, snapshot.created_ns, snapshot.size_bytes, snapshot.vm_state_bytes
    )
