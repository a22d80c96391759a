"""Cloning: a new volume with what another one holds now, or what a snapshot of it does.

The source stays readable, also for other clones, and nobody changes it meanwhile; where clients write to it, what it
held at one moment is cloned. The copy is made in the staging directory of a reservation, like every new volume, and
appears in one rename when all of it is on disk.
"""

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass

from elemento_storage.catalog.catalog import Check, Held, Reading
from elemento_storage.catalog.linked_clones import ancestors
from elemento_storage.catalog.location import Location
from elemento_storage.catalog.locations import os_errors
from elemento_storage.catalog.locks import LockRecord
from elemento_storage.catalog.room import Demand, Reservation
from elemento_storage.catalog.volume_directory import ISOINFO_FILE, mark_as_parent, read_isoinfo
from elemento_storage.disk import Place
from elemento_storage.errors import (
    FormatUnsupported,
    LocationNotFound,
    NotClonable,
    NotLinkable,
    StorageError,
)
from elemento_storage.faultpoints import reached
from elemento_storage.jobs import JobState
from elemento_storage.model import Volume, VolumeFormat, VolumeMeta, new_uid
from elemento_storage.progress import Progress
from elemento_storage.service.access import INFRASTRUCTURE, Actor
from elemento_storage.service.clone_source import CloneSource, KeptSnapshot, StillVolume, WrittenVolume
from elemento_storage.service.core import Core
from elemento_storage.service.create import Creating
from elemento_storage.service.iso_library import require_content
from elemento_storage.service.reading import may_be_written, reading
from elemento_storage.service.snapshots import Snapshotting
from elemento_storage.service.staged import Staged
from elemento_storage.service.transient_snapshots import TransientSnapshots
from elemento_storage.stores.base import StoredSnapshot
from elemento_storage.undo import Reverter

PURPOSE = "clone"


@dataclass(frozen=True, kw_only=True)
class NewClone:
    """What a clone shall be; None is as the source is."""

    creator_id: str
    name: str | None = None
    private: bool | None = None
    format: VolumeFormat | None = None
    location: str | None = None  #: None: the source's where a copy costs nothing there, else as for a new volume
    linked: bool = False
    volume_id: str | None = None  #: of an earlier try that may have made it before its server died


class Cloning:
    """Copies volumes, or makes new ones that stand on them."""

    def __init__(
        self, core: Core, creating: Creating, transient: TransientSnapshots, snapshotting: Snapshotting
    ) -> None:
        self._core = core
        self._creating = creating
        self._transient = transient
        self._snapshotting = snapshotting
        self._catalog = core.catalog
        core.catalog.resolvers[PURPOSE] = self.resolve

    async def clone(self, actor: Actor, volume_id: str, spec: NewClone, progress: Progress) -> Volume:
        """A new volume that holds what the source does; on disk when this returns.

        Raises VolumeNotFound, NotClonable, VolumeWaiting, NotLinkable, FormatUnsupported, LocationNotFound,
        VolumeExported, VolumeLocked, NoRoom, JobCancelled …
        """

        def check(volume: Volume) -> None:
            actor.require_see(volume)
            _require_clonable(volume)

        progress.check()
        if (made := await self._creating.made_before(spec.volume_id)) is not None:
            progress.commit()
            return made
        target = self._location(spec)
        new_id = spec.volume_id or new_uid()
        async with self._source(actor, volume_id, check, spec, progress.operation_id, new_id) as source:
            meta = self._new_meta(source, spec, new_id)
            if spec.linked:
                self._require_linkable(source.reading, target)
            return await self._make(source, spec, meta, target, progress)

    async def clone_snapshot(
        self, actor: Actor, volume_id: str, snapshot_id: str, spec: NewClone, progress: Progress
    ) -> Volume:
        """A new volume that holds what a snapshot does, of its size, also while clients write to its volume.

        The owner only: what somebody could read once may have been deleted since. Raises SnapshotNotFound, Conflict (a
        qcow2 volume is smaller now), and what ``clone`` does but VolumeExported and NotLinkable.
        """

        def check(volume: Volume) -> None:
            actor.require_change(volume)
            _require_clonable(volume)

        found: list[StoredSnapshot] = []

        async def find(held: Held) -> None:
            with os_errors(held.location):
                found.append((await self._snapshotting.find(held.place, held.volume, snapshot_id)).stored)

        progress.check()
        if (made := await self._creating.made_before(spec.volume_id)) is not None:
            progress.commit()
            return made
        target = self._location(spec)
        new_id = spec.volume_id or new_uid()
        async with self._catalog.reading(
            volume_id,
            check,
            PURPOSE,
            progress.operation_id,
            client=actor.client,
            journal={"clone": new_id},
            require=find,
        ) as reading_it:
            source = KeptSnapshot(self._core, reading_it, found[0])
            return await self._make(source, spec, self._new_meta(source, spec, new_id), target, progress)

    @contextlib.asynccontextmanager
    async def _source(
        self, actor: Actor, volume_id: str, check: Check, spec: NewClone, operation_id: str, new_id: str
    ) -> AsyncIterator[CloneSource]:
        """The volume as it is, or if clients write to it, as it is at one moment."""
        journal: dict[str, str | int] = {"clone": new_id}
        location, volume = await self._catalog.find(volume_id, check)
        is_written = volume.meta.format in self._core.snapshot_stores and await may_be_written(
            self._core, location, volume
        )
        # A linked clone stands on the source itself: nobody may write to that.
        if is_written and not spec.linked:
            async with self._transient.locked(
                volume_id, check, PURPOSE, operation_id, client=actor.client, journal=journal
            ) as locked:
                yield WrittenVolume(self._core, locked, self._transient)
        else:
            async with reading(
                self._core, volume_id, check, PURPOSE, operation_id, client=actor.client, journal=journal
            ) as still:
                yield StillVolume(self._core, still)

    def _location(self, spec: NewClone) -> Location | None:
        if spec.location is None:
            return None
        location = self._catalog.locations.by_name.get(spec.location)
        if location is None:
            raise LocationNotFound("there is no location of that name", location=spec.location)
        return location

    def _new_meta(self, source: CloneSource, spec: NewClone, new_id: str) -> VolumeMeta:
        """What a clone has from its source, and what not: docs/api.md says it to the caller."""
        meta = source.reading.volume.meta
        capabilities = self._core.store(meta.format).capabilities
        if spec.linked and meta.format not in capabilities.parents:
            raise NotLinkable(f"there are no linked clones of {meta.format} volumes: leave out 'linked'")
        wanted = capabilities.link_format if spec.linked else meta.format
        target = spec.format or wanted or meta.format
        is_possible = target is meta.format or (
            meta.format in capabilities.converts and target in capabilities.converts
        )
        if meta.format not in capabilities.copies or not is_possible:
            raise FormatUnsupported(f"a {meta.format} volume cannot be cloned into {target}")
        if spec.linked and target is not capabilities.link_format:
            raise NotLinkable(f"a linked clone is of format {capabilities.link_format}, and {target} was asked for")
        return VolumeMeta(
            volume_id=new_id,
            creator_id=spec.creator_id,
            size=source.size_bytes,
            name=meta.name if spec.name is None else spec.name,
            format=target,
            private=meta.private if spec.private is None else spec.private,
            bootable=meta.bootable,
            readonly=target is VolumeFormat.ISO,
            shareable=False,
            clonable=True,
            alg=meta.alg,
            bus=meta.bus,
            cloudinit=meta.cloudinit,
        )

    def _require_linkable(self, source: Reading, target: Location | None) -> None:
        volume = source.volume
        if target not in (None, source.location):
            raise NotLinkable(
                f"a linked clone is in the location of its source, which is {source.location.name}: leave out "
                "'location', or 'linked'",
                location=source.location.name,
            )
        below = len(ancestors(source.location, volume))
        if below + 1 > self._core.settings.longest_chain:
            raise NotLinkable(
                f"the volume is a linked clone that stands on {below} others in a row, and no more than "
                f"{self._core.settings.longest_chain} may be: make it independent first (overlay/compact), or leave "
                "out 'linked'"
            )

    async def _make(
        self, source: CloneSource, spec: NewClone, meta: VolumeMeta, target: Location | None, progress: Progress
    ) -> Volume:
        async with Reverter() as revert:
            reservation = await self._reserve(source, spec, meta, target)
            revert.add(reservation.release)
            reached("clone.reserved")
            location = reservation.location
            with os_errors(location):
                await self._fill(source, spec, meta, reservation, progress)
                reached("clone.copied")
                staged = Staged(reservation, meta, files=await self._files(source.reading))
                await location.disk.run(staged.finish)
                await self._confirm(source, linked=spec.linked)
                progress.commit()
                entry = await location.disk.run(staged.publish)
            location.record(entry)
            reservation.forget()
            revert.commit()
        return entry.volume

    async def _reserve(
        self, source: CloneSource, spec: NewClone, meta: VolumeMeta, target: Location | None
    ) -> Reservation:
        home, room = source.reading.location, self._catalog.room
        if spec.linked:
            return await room.reserve_new(Demand(meta.volume_id, source.size_bytes), only=home)
        first, data_bytes = None, source.data_bytes
        if target in (None, home) and source.is_shareable(meta):
            if await self._shares_blocks(meta.format, home):
                first, data_bytes = home, 0
            elif isinstance(source, WrittenVolume):
                first = home  # one copy; anywhere else it would be two
        demand = Demand(meta.volume_id, source.size_bytes, data_bytes=data_bytes)
        return await room.reserve_new(demand, first=first, only=target)

    async def _shares_blocks(self, image_format: VolumeFormat, location: Location) -> bool:
        with os_errors(location):
            return await self._core.store(image_format).shares_blocks(Place(location.path, location.disk))

    async def _fill(
        self, source: CloneSource, spec: NewClone, meta: VolumeMeta, reservation: Reservation, progress: Progress
    ) -> None:
        volume, location = source.reading.volume, reservation.location
        place = reservation.place
        if spec.linked:
            store = self._core.store(meta.format)
            await store.link_to(place, volume.volume_id, volume.meta.format, volume.size_bytes)
        else:
            await source.copy_to(location, place, meta, progress)

    async def _confirm(self, source: CloneSource, *, linked: bool) -> None:
        """The source is still what was read. That it has a clone is on disk before the clone is."""
        if not linked:
            await source.confirm()
            return
        async with source.reading.held() as held:
            await held.place.disk.run(mark_as_parent, held.place.directory)
            reached("clone.parent-marked")
            await held.reload()

    async def _files(self, source: Reading) -> dict[str, bytes]:
        if source.volume.meta.format is not VolumeFormat.ISO:
            return {}
        with os_errors(source.location):
            content = await source.place.disk.run(read_isoinfo, source.place.directory)
        return {} if content is None else {ISOINFO_FILE: content}

    async def resolve(self, place: Place, lock: LockRecord) -> None:
        """After a crash: the clone is whole, or what there was of it goes with its reservation, and the moment too."""
        await self._transient.resolve(place, lock)
        new_id = str(lock.journal.get("clone", ""))
        outcome = JobState.DONE
        try:
            await self._catalog.find(new_id, INFRASTRUCTURE.require_see)
        except StorageError:
            outcome = JobState.INTERRUPTED
        self._core.jobs.record_interrupted(
            lock.operation, PURPOSE, lock.client, new_id, outcome, "the server stopped in the middle; there is no clone"
        )


def _require_clonable(volume: Volume) -> None:
    if not volume.meta.clonable:
        raise NotClonable("the volume says that it is not clonable", volume_id=volume.volume_id)
    require_content(volume)
