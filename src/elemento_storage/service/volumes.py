"""Creating, changing, destroying and restoring volumes."""

import asyncio
import contextlib
import errno
from collections.abc import Sequence
from dataclasses import dataclass

from elemento_storage.catalog import bin as recycle_bin
from elemento_storage.catalog.bin import BinEntry
from elemento_storage.catalog.location import BIN_DIRECTORY, Location
from elemento_storage.catalog.locations import os_errors, require_writable
from elemento_storage.catalog.room import Demand, Reservation
from elemento_storage.catalog.volume_directory import (
    Entry,
    OddDirectory,
    VolumeVanished,
    finish_staging,
    publish,
    read_entry,
    rewrite_meta,
    take_back,
)
from elemento_storage.disk import Place
from elemento_storage.errors import (
    FormatUnsupported,
    InvalidValue,
    PreconditionFailed,
    VolumeExists,
    VolumeNotFound,
)
from elemento_storage.faultpoints import reached
from elemento_storage.model import Bus, CloneAlgorithm, Preallocation, Volume, VolumeFormat, VolumeMeta, new_uid
from elemento_storage.progress import Progress
from elemento_storage.service.access import INFRASTRUCTURE, Actor
from elemento_storage.service.core import Core
from elemento_storage.undo import Reverter


@dataclass(frozen=True, kw_only=True)
class NewVolume:
    """What a volume to be created shall be."""

    creator_id: str
    name: str
    size_bytes: int
    format: VolumeFormat = VolumeFormat.RAW
    private: bool = False
    readonly: bool = False
    shareable: bool = False
    bootable: bool = False
    clonable: bool | None = None
    alg: CloneAlgorithm | None = None
    bus: Bus = Bus.VIRTIO
    preallocation: Preallocation = Preallocation.OFF
    volume_id: str | None = None  #: of an earlier try that may have made it before its server died


@dataclass(frozen=True, kw_only=True)
class VolumeChanges:
    """What ``update`` changes; None leaves a key as it is."""

    name: str | None = None
    private: bool | None = None
    readonly: bool | None = None
    shareable: bool | None = None
    bootable: bool | None = None
    clonable: bool | None = None
    alg: CloneAlgorithm | None = None
    bus: Bus | None = None


@dataclass(frozen=True)
class BinnedVolume:
    """A destroyed volume that can be restored."""

    volume: Volume
    entry: BinEntry


@dataclass
class _Prepared:
    """A volume that is on disk but for its meta.json and its name."""

    reservation: Reservation
    meta: VolumeMeta
    finished: bool = False

    def finish(self) -> None:
        """Make it whole and durable but for its name. Blocks."""
        finish_staging(self.reservation.path, self.meta)
        self.finished = True

    def publish(self, lease_s: float) -> Entry:
        """Give it its name, and read it back. Blocks."""
        if not self.finished:
            self.finish()
        location, volume_id = self.reservation.location, self.meta.volume_id
        publish(self.reservation.path, location.path, volume_id)
        try:
            return read_entry(location.path, location.name, volume_id, lease_s=lease_s)
        except BaseException:
            take_back(self.reservation.path, location.path, volume_id)
            raise


class Volumes:
    """The use cases that end in one rename each."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._catalog = core.catalog

    # -- create --------------------------------------------------------------------------------------------

    async def create(self, spec: NewVolume, progress: Progress) -> Volume:
        """A new, empty volume; on disk when this returns.

        Raises InvalidValue, FormatUnsupported, NoRoom, JobCancelled, VolumeExists.
        """
        return (await self.create_many([spec], progress))[0]

    async def create_many(self, specs: Sequence[NewVolume], progress: Progress) -> list[Volume]:
        """All of them or, if one cannot be made, none.

        A crash in the middle of publishing may leave some: each a whole volume, none acknowledged.
        """
        metas = [self._new_meta(spec) for spec in specs]
        async with Reverter() as revert:
            prepared: list[_Prepared | Volume] = []
            for spec, meta in zip(specs, metas, strict=True):
                progress.check()
                made = await self._made_before(spec)
                prepared.append(made or await self._prepare(spec, meta, progress, revert))
            if len(prepared) > 1:
                # All of them are whole and durable but for their names before the first one shows.
                await asyncio.gather(*(self._finish(one) for one in prepared if isinstance(one, _Prepared)))
            progress.commit()
            volumes = [one if isinstance(one, Volume) else await self._publish(one, revert) for one in prepared]
            revert.commit()
        return volumes

    async def _made_before(self, spec: NewVolume) -> Volume | None:
        if spec.volume_id is None:
            return None
        try:
            return (await self._catalog.find(spec.volume_id, INFRASTRUCTURE.require_see))[1]
        except VolumeNotFound:
            return None

    def _new_meta(self, spec: NewVolume) -> VolumeMeta:
        capabilities = self._core.store(spec.format).capabilities
        if spec.format not in capabilities.creates:
            raise FormatUnsupported(f"an empty volume cannot be of format {spec.format}")
        if spec.preallocation not in capabilities.preallocates[spec.format]:
            allowed = ", ".join(sorted(capabilities.preallocates[spec.format]))
            raise InvalidValue(f"'preallocation' of a {spec.format} volume is one of {allowed}", key="preallocation")
        refuse_bootable_and_shareable(bootable=spec.bootable, shareable=spec.shareable)
        clonable, alg = clone_settings(spec.clonable, spec.alg)
        return VolumeMeta(
            volume_id=spec.volume_id or new_uid(),
            creator_id=spec.creator_id,
            size=spec.size_bytes,
            name=spec.name,
            format=spec.format,
            private=spec.private,
            bootable=spec.bootable,
            readonly=spec.readonly,
            shareable=spec.shareable,
            clonable=clonable,
            alg=alg,
            bus=spec.bus,
        )

    async def _prepare(self, spec: NewVolume, meta: VolumeMeta, progress: Progress, revert: Reverter) -> _Prepared:
        demand = Demand(
            meta.volume_id,
            spec.size_bytes,
            allocated=spec.preallocation in (Preallocation.FALLOC, Preallocation.FULL),
        )
        reservation = await self._catalog.room.reserve_new(demand)
        revert.add(reservation.release)
        reached("create.reserved")
        location = reservation.location
        with os_errors(location):
            await self._core.store(spec.format).allocate(
                Place(reservation.path, location.disk), spec.format, spec.size_bytes, spec.preallocation, progress
            )
        reached("create.allocated")
        return _Prepared(reservation, meta)

    async def _finish(self, prepared: _Prepared) -> None:
        with os_errors(prepared.reservation.location):
            await prepared.reservation.location.disk.run(prepared.finish)

    async def _publish(self, prepared: _Prepared, revert: Reverter) -> Volume:
        reservation, volume_id = prepared.reservation, prepared.meta.volume_id
        location = reservation.location
        with os_errors(location):
            try:
                entry = await location.disk.run(prepared.publish, self._core.settings.lease)
            except OSError as error:
                if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                    raise VolumeExists(f"volume {volume_id} exists already", volume_id=volume_id) from error
                raise
        revert.add(lambda: self._take_back(prepared))
        location.record(entry)
        reservation.forget()
        return entry.volume

    async def _take_back(self, prepared: _Prepared) -> None:
        location = prepared.reservation.location
        await location.disk.run(take_back, prepared.reservation.path, location.path, prepared.meta.volume_id)
        location.forget(prepared.meta.volume_id)

    # -- change --------------------------------------------------------------------------------------------

    async def update(
        self, actor: Actor, volume_id: str, changes: VolumeChanges, *, if_match: frozenset[str] | None = None
    ) -> Volume:
        """Change metadata in one durable step.

        ``if_match``: the states (``meta_digest``) the caller has seen. Raises PreconditionFailed, InvalidValue …
        """
        async with self._catalog.hold(volume_id, actor.require_change) as held:
            meta = held.volume.meta
            if if_match is not None and held.volume.meta_digest not in if_match:
                raise PreconditionFailed(
                    "the volume was changed since you read it: read it again and repeat", volume_id=volume_id
                )
            asked = {
                name: value
                for name in VolumeChanges.__dataclass_fields__
                if (value := getattr(changes, name)) is not None
            }
            if "clonable" in asked or "alg" in asked:
                asked["clonable"], asked["alg"] = _changed_clone_settings(meta, changes)
            refuse_bootable_and_shareable(
                bootable=asked.get("bootable", meta.bootable), shareable=asked.get("shareable", meta.shareable)
            )
            different = {name: value for name, value in asked.items() if getattr(meta, name) != value}
            if "readonly" in different:
                await self._core.markers.require_unexported(held)  # its engine has it open the other way
            if different:
                await held.place.disk.run(rewrite_meta, held.place.directory, different)
                reached("update.durable")
            return await held.reload()

    async def transfer(self, actor: Actor, volume_id: str, new_owner: str) -> Volume:
        """Make the volume somebody else's."""
        async with self._catalog.hold(volume_id, actor.require_change) as held:
            if new_owner != held.volume.meta.creator_id:
                await self._core.markers.require_unexported(held)
            await held.place.disk.run(rewrite_meta, held.place.directory, {"creatorID": new_owner})
            reached("transfer.durable")
            return await held.reload()

    # -- destroy and restore -------------------------------------------------------------------------------

    async def destroy(self, actor: Actor, volume_id: str) -> None:
        """Move the volume into its location's bin. Raises VolumeExported, VolumeLocked …"""
        async with self._catalog.hold(volume_id, actor.require_change) as held:
            await self._core.markers.require_unexported(held)
            location = held.location
            await location.disk.run(recycle_bin.move_in, location.path, volume_id)
            location.forget(volume_id)
        if self._core.settings.bin_retention == 0:
            for entry in await location.disk.run(recycle_bin.entries, location.path):
                if entry.volume_id == volume_id:
                    self._catalog.in_background(self._catalog.bin.purge(location, entry))

    async def restore(self, actor: Actor, volume_id: str) -> Volume:
        """Bring a volume back from the bin. Raises VolumeNotFound, NotOwner, VolumeExists, NoRoom."""
        location, binned = await self._find_binned(actor, volume_id)
        require_writable(location)
        actor.require_change(binned.volume)
        async with self._catalog.guard(location, volume_id):
            with contextlib.suppress(VolumeNotFound):
                await self._catalog.find(volume_id, INFRASTRUCTURE.require_see)
                raise VolumeExists(f"volume {volume_id} exists already", volume_id=volume_id)
            demand = Demand(volume_id, binned.volume.size_bytes, on_disk_bytes=binned.volume.allocated_bytes)
            reservation = await self._catalog.room.reserve_in(location, demand)
            try:
                await location.disk.run(recycle_bin.move_out, location.path, binned.entry)
                volume = await location.reload(volume_id)
            except FileNotFoundError:
                raise VolumeNotFound(volume_id) from None
            except FileExistsError:
                raise VolumeExists(f"volume {volume_id} exists already", volume_id=volume_id) from None
            finally:
                await reservation.release()
        if volume is None:
            raise VolumeNotFound(volume_id)
        return volume

    async def binned(self, actor: Actor) -> list[BinnedVolume]:
        """What the actor could restore, oldest first."""
        found = []
        for location, entry in await self._catalog.bin.all():
            volume = await self._read_binned(location, entry)
            if volume is not None and (actor.client is None or actor.client == volume.meta.creator_id):
                found.append(BinnedVolume(volume, entry))
        return found

    async def _find_binned(self, actor: Actor, volume_id: str) -> tuple[Location, BinnedVolume]:
        for location, entry in reversed(await self._catalog.bin.all()):
            if entry.volume_id == volume_id:
                volume = await self._read_binned(location, entry)
                if volume is not None and actor.may_see(volume):
                    return location, BinnedVolume(volume, entry)
        raise VolumeNotFound(volume_id)

    async def _read_binned(self, location: Location, entry: BinEntry) -> Volume | None:
        try:
            with os_errors(location):
                found = await location.disk.run(
                    read_entry,
                    location.path,
                    location.name,
                    entry.volume_id,
                    directory_name=f"{BIN_DIRECTORY}/{entry.directory_name}",
                    lease_s=self._core.settings.lease,
                )
        except (OddDirectory, VolumeVanished):
            return None
        return found.volume


def refuse_bootable_and_shareable(*, bootable: bool, shareable: bool) -> None:
    """A bootable volume cannot be shareable (the document's rule). Raises InvalidValue."""
    if bootable and shareable:
        raise InvalidValue("a volume cannot be both 'bootable' and 'shareable'", key="shareable")


def clone_settings(clonable: bool | None, alg: CloneAlgorithm | None) -> tuple[bool, CloneAlgorithm]:
    """``clonable: false`` goes with ``alg: "no"``; one of the two given decides the other. Raises InvalidValue."""
    if clonable is None:
        clonable = alg is not CloneAlgorithm.NO
    if not clonable:
        return False, CloneAlgorithm.NO
    if alg is CloneAlgorithm.NO:
        raise InvalidValue("'alg' is no and 'clonable' is true: a clonable volume needs cp, rsync or rclone", key="alg")
    return True, alg or CloneAlgorithm.CP


def _changed_clone_settings(meta: VolumeMeta, changes: VolumeChanges) -> tuple[bool, CloneAlgorithm]:
    clonable, alg = changes.clonable, changes.alg
    if clonable is None and alg is not CloneAlgorithm.NO and not meta.clonable:
        raise InvalidValue("'alg' of a volume that is not clonable is no: give 'clonable' true as well", key="alg")
    if clonable and alg is None and meta.alg is not CloneAlgorithm.NO:
        alg = meta.alg
    return clone_settings(clonable, alg)
