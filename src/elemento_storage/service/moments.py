"""Moments of volumes: what they held at one time, kept in their engines for whoever reads it.

Guests go on meanwhile, exports come and go. Who keeps a moment has a lock file in the volume; these are the steps at
its beginning and at its end, and the end is the same after a crash.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from elemento_storage.catalog.catalog import Held
from elemento_storage.catalog.location import Location
from elemento_storage.catalog.locations import os_errors
from elemento_storage.disk import Place
from elemento_storage.engine import qemu_img
from elemento_storage.engine.block_node import LIMIT_NODES, VOLUME_NODE
from elemento_storage.engine.frozen import FrozenVolume, remove_scratch
from elemento_storage.engine.volume_engine import VolumeEngine
from elemento_storage.errors import FormatUnsupported, VolumeExported
from elemento_storage.exports.publisher import Publisher
from elemento_storage.exports.record import ExportRecord
from elemento_storage.faultpoints import reached
from elemento_storage.model import Volume, VolumeFormat, volume_id_of_directory
from elemento_storage.service.core import Core
from elemento_storage.service.exporting import source_of

SCRATCH_PREFIX: Final = ".elemento-moment-"  #: of the file for what guests overwrite, in the volume's directory
_KEPT: Final = frozenset({VolumeFormat.RAW, VolumeFormat.QCOW2})


def require_kept(volume: Volume) -> None:
    """Raises FormatUnsupported for volumes that have no backups."""
    if volume.meta.format is VolumeFormat.RBD:
        raise FormatUnsupported("a volume in a Ceph pool has no backups here yet: the cluster has snapshots of its own")
    if volume.meta.format not in _KEPT:
        raise FormatUnsupported(f"a {volume.meta.format} volume has no backups: nothing writes to it here")


@dataclass(frozen=True)
class Moment:
    """A moment that is kept."""

    engine: VolumeEngine
    frozen: FrozenVolume
    changed: str | None  #: the bitmap of what changed since the earlier moment
    changed_bytes: int  #: how much that is
    reason: str  #: why there is none
    tracked: bool  #: a bitmap records what changes from now on


class Moments:
    """Keeps volumes open, and moments of them."""

    def __init__(self, core: Core, publisher: Publisher) -> None:
        self._core = core
        self._publisher = publisher

    async def require_possible(self, held: Held) -> None:
        """Raises FormatUnsupported; VolumeExported when another server has the volume open."""
        require_kept(held.volume)
        markers = self._core.markers
        found = await markers.of(held)
        own = markers.own_records(found)
        if any(marker.fresh and marker.record not in own for marker in found):
            raise VolumeExported(
                "the volume is exported by a server that is not this one: ask that one", volume_id=held.volume.volume_id
            )

    async def take(
        self, held: Held, operation_id: str, prefix: str, earlier: str | None, *, only_changes: bool, reason: str = ""
    ) -> Moment:
        """Keep this moment until ``end``. The caller has its lock file in the volume.

        ``prefix`` is that of the bitmaps of one kind of reader. ``earlier``: the moment whose bitmap says what changed
        since; with ``only_changes`` that bitmap ends here. ``reason`` says why no increment is wanted. Raises
        VolumeExported, ImageInUse, ImageDamaged, ExportFailed, NoRoom.
        """
        volume = held.volume
        source = source_of(self._core, held.location, volume)
        async with self._publisher.changing(volume.volume_id):
            engine = await self._publisher.keep(source, await self._own_records(held.location, volume))
            reached("backup.kept-open")
            if VOLUME_NODE in (await engine.daemon.exports()).values():
                # What these write does not pass the filter; QEMU would refuse to put it in.
                raise VolumeExported(
                    f"more than {len(LIMIT_NODES)} clients have the volume: unexport it from some of them",
                    volume_id=volume.volume_id,
                )
            frozen = FrozenVolume(engine.daemon, read_only=source.node.read_only)
            tracked = await frozen.can_record()
            if tracked:
                earlier = earlier or await frozen.sole_bitmap(prefix, besides=operation_id)
                said = await frozen.settle_bitmaps(prefix, earlier)
                reason = reason or said or ""
            else:
                reason = frozen.why_not(volume.meta.format)
            changed = f"{prefix}{earlier}" if only_changes and not reason else None
            changed_bytes = (await frozen.bitmaps())[changed].dirty_bytes if changed else 0
            scratch = f"{held.place.directory}/{SCRATCH_PREFIX}{operation_id}"
            if not source.node.read_only:
                with os_errors(held.location):
                    await qemu_img.create(scratch, VolumeFormat.QCOW2, volume.size_bytes)
            await frozen.freeze(scratch, begin=f"{prefix}{operation_id}" if tracked else None, end=changed)
        return Moment(engine, frozen, changed, changed_bytes, reason, tracked)

    async def publish(self, volume_id: str, moment: Moment, name: str) -> str:
        """Serve a moment over NBD; its URI. Raises ExportFailed."""
        async with self._publisher.changing(volume_id):
            uri = await moment.engine.listen()
            await moment.frozen.publish(name, changed=moment.changed)
        return uri.format(name)

    def volume_of(self, place: Place) -> tuple[Location, Volume]:
        """A volume that is held, by its directory."""
        parent, name = os.path.split(place.directory)
        location = next(one for one in self._core.catalog.locations.by_name.values() if one.path == parent)
        return location, location.entries[volume_id_of_directory(name) or ""].volume

    async def end(
        self, location: Location, volume: Volume, operation_id: str, prefix: str, current: str | None
    ) -> None:
        """Keep it no longer. ``current`` is the moment since which what changes goes on being recorded; None: whichever
        was before.

        Idempotent, and right for a moment of a process that died. Raises ExportFailed, LocationUnavailable.
        """
        source = source_of(self._core, location, volume)
        async with self._publisher.changing(volume.volume_id):
            engine = self._publisher.engine(volume.volume_id)
            if os.path.isdir(engine.directory):  # noqa: ASYNC240  in memory: a run directory is on no disk
                frozen = FrozenVolume(engine.daemon, read_only=source.node.read_only)
                await frozen.thaw()
                reached("backup.thawed")
                if engine.daemon.pid is not None and await frozen.can_record():
                    current = current or await frozen.sole_bitmap(prefix, besides=operation_id)
                    await frozen.settle_bitmaps(prefix, current)
                await self._publisher.let_go(source, await self._own_records(location, volume))
            scratch = f"{source.directory}/{SCRATCH_PREFIX}{operation_id}"
            with os_errors(location):
                await location.disk.run(remove_scratch, scratch)

    async def _own_records(self, location: Location, volume: Volume) -> Sequence[ExportRecord]:
        with os_errors(location):
            fresh = await location.reload(volume.volume_id)
            found = [] if fresh is None else await self._core.markers.read(location, fresh)
        return self._core.markers.own_records(found)
