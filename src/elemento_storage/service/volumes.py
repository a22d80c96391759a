"""Changing, destroying and restoring volumes."""

import contextlib
from dataclasses import dataclass
from datetime import UTC, datetime

from elemento_storage.catalog import bin as recycle_bin
from elemento_storage.catalog.bin import BinEntry
from elemento_storage.catalog.bin_names import BIN_DIRECTORY
from elemento_storage.catalog.linked_clones import require_no_clones
from elemento_storage.catalog.location import Location
from elemento_storage.catalog.locations import os_errors, require_writable
from elemento_storage.catalog.room import Demand
from elemento_storage.catalog.volume_directory import OddDirectory, VolumeVanished, read_entry
from elemento_storage.errors import InvalidValue, PreconditionFailed, VolumeExists, VolumeNotFound
from elemento_storage.faultpoints import reached
from elemento_storage.model import Bus, CloneAlgorithm, Volume, VolumeMeta
from elemento_storage.service.access import INFRASTRUCTURE, Actor
from elemento_storage.service.core import Core
from elemento_storage.service.create import clone_settings, refuse_bootable_and_shareable


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


class Volumes:
    """The use cases that end in one rename each."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._catalog = core.catalog

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
            if different.get("private"):
                await self._core.markers.require_unexported_to_others(held)
            if "readonly" in different:
                await self._core.markers.require_unexported(held)  # its engine has it open the other way
            if different.get("readonly") is False:
                await require_no_clones(held)
            if different:
                await self._catalog.rewrite_meta(held.place, different)
                reached("update.durable")
            return await held.reload()

    async def transfer(self, actor: Actor, volume_id: str, new_owner: str) -> Volume:
        """Make the volume somebody else's."""
        async with self._catalog.hold(volume_id, actor.require_change) as held:
            if new_owner != held.volume.meta.creator_id:
                await self._core.markers.require_unexported(held)
                await require_no_clones(held)
            await self._catalog.rewrite_meta(held.place, {"creatorID": new_owner})
            reached("transfer.durable")
            return await held.reload()

    # -- destroy and restore -------------------------------------------------------------------------------

    async def destroy(self, actor: Actor, volume_id: str) -> None:
        """Move the volume into its location's bin. Raises VolumeExported, VolumeLocked …"""
        async with self._catalog.hold(volume_id, actor.require_change) as held:
            await self._core.markers.require_unexported(held)
            await require_no_clones(held)
            location = held.location
            with os_errors(location):
                await location.disk.run(_destroy, location, volume_id)
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
                with os_errors(location):
                    await location.disk.run(_restore, location, binned.entry)
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


def _destroy(location: Location, volume_id: str) -> None:
    now = datetime.now(UTC)
    if (pool := location.pool) is not None and volume_id in pool.index.records:
        pool.bin(volume_id, now.isoformat())
    recycle_bin.move_in(location.path, volume_id, now)


def _restore(location: Location, entry: BinEntry) -> None:
    if (pool := location.pool) is not None and entry.volume_id in pool.index.records:
        pool.restore(entry.volume_id)
    recycle_bin.move_out(location.path, entry)


def _changed_clone_settings(meta: VolumeMeta, changes: VolumeChanges) -> tuple[bool, CloneAlgorithm]:
    clonable, alg = changes.clonable, changes.alg
    if clonable is None and alg is not CloneAlgorithm.NO and not meta.clonable:
        raise InvalidValue("'alg' of a volume that is not clonable is no: give 'clonable' true as well", key="alg")
    if clonable and alg is None and meta.alg is not CloneAlgorithm.NO:
        alg = meta.alg
    return clone_settings(clonable, alg)
