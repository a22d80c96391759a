"""What a clone is made of: a volume that nobody changes, a snapshot, or one moment of what clients write to."""

from typing import Protocol

from elemento_storage.catalog.catalog import Reading
from elemento_storage.catalog.linked_clones import allocated_bytes
from elemento_storage.catalog.location import Location
from elemento_storage.catalog.locations import os_errors
from elemento_storage.disk import Place
from elemento_storage.errors import Conflict, SnapshotNotFound
from elemento_storage.faultpoints import reached
from elemento_storage.model import CloneAlgorithm, VolumeFormat, VolumeMeta
from elemento_storage.progress import Portion, Progress
from elemento_storage.service.core import Core
from elemento_storage.service.transient_snapshots import TransientSnapshots
from elemento_storage.stores.base import StoredSnapshot

_KEPT = 0.5  # of a clone of a moment, when there is a copy of that; nearly all, if the copy becomes the clone


class CloneSource(Protocol):
    """Where a clone's content comes from. The volume is locked, and stays where it is until the end."""

    reading: Reading

    @property
    def size_bytes(self) -> int:
        """What a guest of the clone will see."""

    @property
    def data_bytes(self) -> int:
        """What a copy takes at the most."""

    def is_shareable(self, meta: VolumeMeta) -> bool:
        """Whether the clone is the same bytes, so that it can share them with the source where files can."""

    async def copy_to(self, location: Location, place: Place, meta: VolumeMeta, progress: Progress) -> None:
        """Make the clone's image, on disk but for its name. Raises NoRoom, JobCancelled …"""

    async def confirm(self) -> None:
        """When all is read: it is what was to be read. Raises VolumeLocked, VolumeNotFound, SnapshotNotFound …"""


class StillVolume:
    """A volume that nobody changes meanwhile."""

    def __init__(self, core: Core, reading: Reading) -> None:
        self.reading = reading
        self._core = core

    @property
    def size_bytes(self) -> int:
        """See CloneSource."""
        return self.reading.volume.size_bytes

    @property
    def data_bytes(self) -> int:
        """See CloneSource."""
        return allocated_bytes(self.reading.location, self.reading.volume)

    def is_shareable(self, meta: VolumeMeta) -> bool:
        """See CloneSource."""
        volume = self.reading.volume
        return meta.format is volume.meta.format and meta.alg is CloneAlgorithm.CP and volume.parent is None

    async def copy_to(self, location: Location, place: Place, meta: VolumeMeta, progress: Progress) -> None:
        """See CloneSource."""
        image = self._core.image(self.reading.location, self.reading.volume)
        await self._core.store(meta.format).copy_from(place, meta.format, image, meta.alg, progress)

    async def confirm(self) -> None:
        """See CloneSource."""
        await self.reading.confirm()


class KeptSnapshot:
    """A snapshot, which stays what it is, whatever becomes of its volume meanwhile."""

    def __init__(self, core: Core, reading: Reading, snapshot: StoredSnapshot) -> None:
        self.reading = reading
        self._core = core
        self._snapshot = snapshot
        self._format = reading.volume.meta.format
        self._is_inside = self._format in core.snapshot_store(self._format).capabilities.snapshots_inside
        if self._is_inside and snapshot.size_bytes > reading.volume.size_bytes:
            raise Conflict(
                f"the snapshot is of {snapshot.size_bytes} bytes and cannot be read as long as the volume is smaller: "
                "resize the volume to that first",
                volume_id=reading.volume.volume_id,
            )

    @property
    def size_bytes(self) -> int:
        """See CloneSource."""
        return self._snapshot.size_bytes

    @property
    def data_bytes(self) -> int:
        """See CloneSource."""
        own_bytes = self._snapshot.allocated_bytes
        return allocated_bytes(self.reading.location, self.reading.volume) if own_bytes is None else own_bytes

    def is_shareable(self, meta: VolumeMeta) -> bool:
        """See CloneSource."""
        return not self._is_inside and meta.format is self._format and meta.alg is CloneAlgorithm.CP

    async def copy_to(self, location: Location, place: Place, meta: VolumeMeta, progress: Progress) -> None:
        """See CloneSource."""
        image = self._core.snapshot_store(self._format).snapshot_image(self.reading.place, self._format, self._snapshot)
        await self._core.snapshot_store(self._format).copy_snapshot(place, meta.format, image, meta.alg, progress)

    async def confirm(self) -> None:
        """See CloneSource. Other tools do not ask for locks."""
        await self.reading.confirm()
        with os_errors(self.reading.location):
            stored = await self._core.snapshot_store(self._format).snapshots(self.reading.place, self._format)
        if self._snapshot not in stored:
            raise SnapshotNotFound(self._snapshot.snapshot_id)


class WrittenVolume(StillVolume):
    """What a volume that clients write to holds at one moment of the call, by a snapshot that is gone afterwards."""

    def __init__(self, core: Core, reading: Reading, transient: TransientSnapshots) -> None:
        super().__init__(core, reading)
        self._transient = transient

    def is_shareable(self, meta: VolumeMeta) -> bool:
        """See CloneSource. The copy that is made of a moment becomes the clone, where nothing else has to be done."""
        inside = self._core.store(meta.format).capabilities.snapshots_inside
        return meta.format is self.reading.volume.meta.format and meta.format not in inside

    async def copy_to(self, location: Location, place: Place, meta: VolumeMeta, progress: Progress) -> None:
        """See CloneSource."""
        source, image_format = self.reading, self.reading.volume.meta.format
        store = self._core.snapshot_store(image_format)
        becomes_clone = location is source.location and self.is_shareable(meta)
        # Where the copy becomes the clone its room is reserved already.
        spare_bytes = 0 if becomes_clone else source.volume.allocated_bytes
        is_copied = image_format is VolumeFormat.RAW
        portion = Portion(progress, (_KEPT if not becomes_clone else 1.0) if is_copied else 0.0)
        snapshot = await self._transient.keep(source, spare_bytes, portion)
        reached("clone.moment-kept")
        if not (becomes_clone and await store.give_snapshot(source.place, image_format, snapshot, place)):
            kept = KeptSnapshot(self._core, source, snapshot)
            await kept.copy_to(location, place, meta, Portion(progress, 1.0))
        reached("clone.moment-read")
        await self._transient.drop(source)
        reached("clone.moment-dropped")
