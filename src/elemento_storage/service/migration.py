"""Live migration: for a moment two hosts reach the same disk, then only one of them (contract, section 8).

The journal is a lock file in each volume, ``elemento.livemigration.<migration>.ignore``, which keeps everything else
from the volume. It names all volumes of the migration; the one whose uid sorts first is the coordinator: its phase is
that of the migration. It gets its lock first and loses it last.

    preparing ──> prepared ──> concluding ──> (concluded: locks gone)
        │             └──────> reverting ──> (reverted: locks gone)
        └─ after a crash: reverting, nobody was told of it

A change of the coordinator's phase, durable, is the decision; what follows is only carried out, and after a crash
carried on. A migration that is prepared stays so until somebody decides, however long that takes. Only the server that
serves the exports ends a migration: another one that shares the location could not keep the source from writing.
"""

import asyncio
import contextlib
import logging
import math
import os
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final

import msgspec

from elemento_storage import durable
from elemento_storage.catalog.catalog import Held
from elemento_storage.catalog.locations import os_errors, require_presence
from elemento_storage.catalog.locks import LockRecord, new_lock, remove_lock, rewrite_lock, write_lock
from elemento_storage.catalog.markers import remove_marker, write_marker
from elemento_storage.catalog.volume_directory import LOCK_PREFIX
from elemento_storage.disk import Disk
from elemento_storage.errors import (
    ExportDiffers,
    MigrationConflict,
    MigrationNotFound,
    StorageError,
    VolumeNotFound,
)
from elemento_storage.exports.record import ExportRecord
from elemento_storage.faultpoints import reached
from elemento_storage.feed import Audience
from elemento_storage.keyed_locks import KeyedLocks
from elemento_storage.model import marker_name, new_uid
from elemento_storage.service.access import INFRASTRUCTURE, Actor
from elemento_storage.service.core import Core
from elemento_storage.service.exporting import (
    Exporting,
    ExportOptions,
    ExportView,
    check_options,
    require_one_path,
    require_same,
    require_shared_limits,
)

log = logging.getLogger(__name__)

PURPOSE: Final = "livemigration"
_KEPT: Final = 1000


class Phase(StrEnum):
    """Where a migration is."""

    PREPARING = "preparing"
    PREPARED = "prepared"
    CONCLUDING = "concluding"
    CONCLUDED = "concluded"
    REVERTING = "reverting"
    REVERTED = "reverted"


@dataclass(frozen=True)
class Migration:
    """A migration as the coordinator's lock file tells it."""

    migration_id: str
    volumes: tuple[str, ...]  #: sorted; the first is the coordinator
    source: str
    destination: str
    deadline: int  #: seconds since the epoch
    exporter: str  #: the server (its state directory's id) that serves the exports
    phase: Phase

    @property
    def overdue(self) -> bool:
        """Whether it should have been concluded or reverted by now."""
        return self.phase is Phase.PREPARED and time.time() > self.deadline

    def journal(self) -> dict[str, str | int]:
        """What a lock file says of it."""
        return {
            "volumes": ",".join(self.volumes),
            "source": self.source,
            "destination": self.destination,
            "deadline": self.deadline,
            "exporter": self.exporter,
            "phase": self.phase.value,
        }


class EndedMigration(msgspec.Struct, frozen=True):
    """What became of a migration, so that the call that ended it can be repeated."""

    migration_id: str
    volumes: tuple[str, ...]
    source: str
    destination: str
    phase: Phase


@dataclass(frozen=True)
class Prepared:
    """A migration and its destination's exports."""

    migration: Migration
    exports: list[ExportView]


class Migrating:
    """The use cases prepare, revert and conclude."""

    def __init__(self, core: Core, exporting: Exporting, state_directory: str, state_disk: Disk) -> None:
        self._core = core
        self._catalog = core.catalog
        self._exporting = exporting
        self._path = f"{state_directory}/migrations.json"
        self._disk = state_disk
        self._ended: dict[str, EndedMigration] = {}
        self._active: set[str] = set()
        self._one_at_a_time = KeyedLocks()
        self._overdue: set[str] = set()
        self._task: asyncio.Task[None] | None = None

    # -- life ----------------------------------------------------------------------------------------------

    async def read(self) -> None:
        """Read what became of earlier migrations. Raises OSError."""
        self._ended = {one.migration_id: one for one in await self._disk.run(self._read_ended)}

    def start(self) -> None:
        """Carry on with what a crash cut off, now and whenever a location comes back."""
        self._task = asyncio.create_task(self._run(), name="migrations")

    async def stop(self) -> None:
        """Stop looking; what is prepared stays prepared."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def _run(self) -> None:
        while True:
            try:
                await self._carry_on()
            except Exception:
                log.exception("migrations could not be looked after; it is tried again")
            await asyncio.sleep(self._core.settings.heartbeat)

    async def _carry_on(self) -> None:
        for migration in await self.under_way():
            if migration.overdue and migration.migration_id not in self._overdue:
                self._overdue.add(migration.migration_id)
                log.error("live migration %s is overdue: conclude or revert it", migration.migration_id)
                self._announce(migration, "overdue")
            is_ours = migration.exporter == self._core.markers.server_id
            if migration.phase is Phase.PREPARED or not is_ours or migration.migration_id in self._active:
                continue
            try:
                await self._carry_on_with(migration)
            except (StorageError, OSError) as error:
                log.error("live migration %s cannot be ended now: %s", migration.migration_id, error)

    async def _carry_on_with(self, migration: Migration) -> None:
        async with self._alone(migration.volumes):
            if await self._of_volume(migration.volumes[0]) != migration:
                return  # it was being prepared or ended, and that went on since it was read
            log.warning("live migration %s: carrying on with what was %s", migration.migration_id, migration.phase)
            concluding = migration.phase is Phase.CONCLUDING
            await self._carry_out(migration, Phase.CONCLUDED if concluding else Phase.REVERTED)

    # -- prepare -------------------------------------------------------------------------------------------

    async def prepare(
        self,
        actor: Actor,
        volume_ids: Sequence[str],
        source: str,
        destination: str,
        options: ExportOptions,
        deadline_s: float,
    ) -> Prepared:
        """Give the destination a second export of each volume, or of none.

        Raises MigrationConflict, VolumeNotFound, VolumeLocked, ProtocolsExclude, ExportFailed …
        """
        options = check_options(options)
        volumes = tuple(sorted(set(volume_ids)))
        await self._require_change(actor, volumes)
        async with self._alone(volumes):
            known = await self._of_volume(volumes[0])
            if known is not None:
                if (known.volumes, known.source, known.destination) != (volumes, source, destination):
                    raise MigrationConflict(
                        f"the volume is in another live migration, {known.migration_id}", migration=known.migration_id
                    )
                self._require_ours(known)
                if known.phase is Phase.PREPARED:
                    return await self._prepared(known, options)
                if known.phase is not Phase.PREPARING:
                    raise MigrationConflict(
                        f"the migration {known.migration_id} is {known.phase}", migration=known.migration_id
                    )
            migration = known or Migration(
                migration_id=new_uid(),
                volumes=volumes,
                source=source,
                destination=destination,
                deadline=math.ceil(time.time() + deadline_s),
                exporter=self._core.markers.server_id,
                phase=Phase.PREPARING,
            )
            with self._doing(migration):
                prepared = replace(migration, phase=Phase.PREPARED)
                try:
                    for volume_id in volumes:
                        await self._prepare_one(actor, migration, volume_id, options)
                    await self._set_phase(prepared)
                except BaseException:
                    await self._take_back(migration)
                    raise
            self._announce(prepared, Phase.PREPARED.value)
            return await self._prepared(prepared, options)

    async def _prepared(self, migration: Migration, options: ExportOptions) -> Prepared:
        views = [await self._view(migration, one) for one in migration.volumes]
        for view in views:
            assert view.record is not None
            try:
                require_same(view.record, options)
            except ExportDiffers as error:
                raise MigrationConflict(
                    f"the migration is prepared with another '{error.details['key']}': revert it first",
                    migration=migration.migration_id,
                ) from error
        return Prepared(migration, views)

    async def _prepare_one(self, actor: Actor, migration: Migration, volume_id: str, options: ExportOptions) -> None:
        async with self._hold(migration, volume_id, actor) as (held, lock):
            own = self._core.markers.own_records(await self._core.markers.of(held))
            source = next((record for record in own if record.client == migration.source), None)
            if source is None:
                raise MigrationConflict(
                    "the volume is not exported to the migration's source by this server", volume_id=volume_id
                )
            present = next((record for record in own if record.client == migration.destination), None)
            if present is not None and present.migration != migration.migration_id:
                raise MigrationConflict("the volume is exported to the destination already", volume_id=volume_id)
            chosen = replace(
                options, protocol=options.protocol or source.protocol, limits=options.limits or source.limits
            )
            record = present or msgspec.structs.replace(
                self._exporting.new_record(held.volume, migration.destination, chosen, own),
                migration=migration.migration_id,
                readonly=source.readonly or bool(options.readonly),
            )
            require_one_path(record, own)
            require_shared_limits(record, own)
            require_presence(held.location)
            check_options(chosen)
            with os_errors(held.location):
                await held.place.disk.run(write_lock, held.place.directory, lock)
                reached("livemigration.locked")
            async with self._exporting.changing(volume_id):
                await self._exporting.add(held, [one for one in own if one != record], record)
            reached("livemigration.added")
            await held.reload()

    async def _take_back(self, migration: Migration) -> None:
        try:
            await self._take_from(migration, migration.destination, None)
        except Exception:
            log.exception("live migration %s cannot be taken back now; it is tried again", migration.migration_id)

    async def _view(self, migration: Migration, volume_id: str) -> ExportView:
        location, volume = await self._catalog.find(volume_id, lambda _: None)
        for marker in await self._core.markers.read(location, volume):
            if marker.client == migration.destination:
                return self._exporting.view(volume, marker)
        raise MigrationConflict("the destination's export is gone: revert the migration", volume_id=volume_id)

    # -- revert and conclude -------------------------------------------------------------------------------

    async def revert(
        self, actor: Actor, *, migration_id: str | None = None, volume_id: str | None = None
    ) -> EndedMigration:
        """Take the destination's exports away; the source's stay as they were. Raises MigrationNotFound …"""
        return await self._end(actor, migration_id, volume_id, Phase.REVERTING, Phase.REVERTED)

    async def conclude(
        self, actor: Actor, *, migration_id: str | None = None, volume_id: str | None = None
    ) -> EndedMigration:
        """Take the source's exports away, and make ordinary ones of the destination's.

        When this returns the source can no longer write. Raises MigrationNotFound, MigrationConflict, ExportFailed …
        """
        return await self._end(actor, migration_id, volume_id, Phase.CONCLUDING, Phase.CONCLUDED)

    async def _end(
        self, actor: Actor, migration_id: str | None, volume_id: str | None, doing: Phase, done: Phase
    ) -> EndedMigration:
        if volume_id is not None:
            await self._require_change(actor, [volume_id])
        found = await self._find(migration_id, volume_id)
        if found is None:
            return await self._ended_before(actor, migration_id, volume_id, done)
        async with self._alone(found.volumes):
            migration = await self._of_volume(found.volumes[0])
            if migration is None or migration.migration_id != found.migration_id:
                return await self._ended_before(actor, found.migration_id, None, done)
            await self._require_change(actor, migration.volumes)
            self._require_ours(migration)
            allowed = {Phase.PREPARED, doing} | ({Phase.PREPARING} if doing is Phase.REVERTING else set())
            if migration.phase not in allowed:
                raise MigrationConflict(f"the migration is {migration.phase} already", migration=migration.migration_id)
            if migration.phase is Phase.PREPARED and doing is Phase.CONCLUDING:
                for one in migration.volumes:
                    await self._view(migration, one)
            with self._doing(migration):
                decided = replace(migration, phase=doing)
                if migration.phase is not doing:
                    await self._set_phase(decided)
                await self._carry_out(decided, done)
            return self._ended[decided.migration_id]

    async def _carry_out(self, migration: Migration, done: Phase) -> None:
        await self._take_from(migration, migration.source if done is Phase.CONCLUDED else migration.destination, done)
        self._overdue.discard(migration.migration_id)
        self._announce(replace(migration, phase=done), done.value)

    async def _take_from(self, migration: Migration, leaving: str, done: Phase | None) -> None:
        # The first failure ends it: as long as one volume is locked the coordinator has to be.
        for volume_id in reversed(migration.volumes):
            await self._end_one(migration, volume_id, leaving, done)

    async def _end_one(self, migration: Migration, volume_id: str, leaving: str, done: Phase | None) -> None:
        try:
            location, _ = await self._catalog.find(volume_id, lambda _: None)
            lock_path = f"{location.volume_path(volume_id)}/{self._new_lock(migration).file_name}"
            with os_errors(location):
                is_locked = await location.disk.run(os.path.lexists, lock_path)
            if not is_locked:
                return  # not begun, or done, before a crash; who has locked it since then has nothing to do with it
            async with self._hold(migration, volume_id, INFRASTRUCTURE) as (held, lock):
                await self._remove(held, leaving)
                reached("livemigration.removed")
                if done is Phase.CONCLUDED:
                    await self._make_ordinary(held, migration)
                if done is not None and volume_id == migration.volumes[0]:
                    # The coordinator's lock goes last; from here on the state directory remembers the migration.
                    await self._remember(migration, done)
                with os_errors(held.location):
                    await held.place.disk.run(remove_lock, held.place.directory, lock)
                reached("livemigration.unlocked")
                await held.reload()
        except VolumeNotFound:
            log.warning("live migration %s: volume %s is gone", migration.migration_id, volume_id)

    async def _remove(self, held: Held, client: str) -> None:
        """Fence a client off. Its marker goes first: whatever happens now, nobody brings its export back."""
        volume_id = held.volume.volume_id
        async with self._exporting.changing(volume_id):
            with os_errors(held.location):
                await held.place.disk.run(remove_marker, held.place.directory, marker_name(client, volume_id))
            own = self._core.markers.own_records(await self._core.markers.of(held))
            await self._exporting.withdraw(held, client, [record for record in own if record.client != client])

    async def _make_ordinary(self, held: Held, migration: Migration) -> None:
        for record in self._core.markers.own_records(await self._core.markers.of(held)):
            if record.migration == migration.migration_id:
                ordinary: ExportRecord = msgspec.structs.replace(record, migration=None)
                name = marker_name(record.client, record.volume_id)
                with os_errors(held.location):
                    await held.place.disk.run(write_marker, held.place.directory, name, ordinary.encode())

    async def _require_change(self, actor: Actor, volume_ids: Sequence[str]) -> None:
        """Raises VolumeNotFound, also to strangers of a private volume; NotOwner."""
        if actor.client is not None:
            for volume_id in volume_ids:
                await self._catalog.find(volume_id, actor.require_change)

    def _require_ours(self, migration: Migration) -> None:
        if migration.exporter != self._core.markers.server_id:
            raise MigrationConflict(
                "another server, which serves the exports, carries out this migration: ask it",
                migration=migration.migration_id,
            )

    # -- the journal ---------------------------------------------------------------------------------------

    async def _set_phase(self, migration: Migration) -> None:
        async with self._hold(migration, migration.volumes[0], INFRASTRUCTURE) as (held, lock):
            with os_errors(held.location):
                await held.place.disk.run(rewrite_lock, held.place.directory, lock)
            reached(f"livemigration.said-{migration.phase.value}")
            await held.reload()

    def _new_lock(self, migration: Migration) -> LockRecord:
        return new_lock(PURPOSE, migration.migration_id, self._catalog.server_id, None, migration.journal())

    @contextlib.asynccontextmanager
    async def _hold(self, migration: Migration, volume_id: str, actor: Actor) -> AsyncIterator[tuple[Held, LockRecord]]:
        lock = self._new_lock(migration)
        async with self._catalog.hold(volume_id, actor.require_change, admit=lock) as held:
            yield held, lock

    async def under_way(self) -> list[Migration]:
        """Every migration that is not ended, but for those whose coordinator is out of reach now."""
        found: dict[str, Migration] = {}
        for volume_id in self._locked(""):
            with contextlib.suppress(StorageError):
                migration = await self._of_volume(volume_id)
                if migration is not None:
                    found[migration.migration_id] = migration
        return list(found.values())

    def _locked(self, migration_id: str) -> list[str]:
        """Volumes with the lock file of a migration, or of any."""
        prefix = f"{LOCK_PREFIX}{PURPOSE}.{migration_id}"
        return [
            entry.volume.volume_id
            for location in self._catalog.locations.answering()
            for entry in location.entries.values()
            if any(name.startswith(prefix) for name in entry.volume.locks)
        ]

    async def _find(self, migration_id: str | None, volume_id: str | None) -> Migration | None:
        if volume_id is None:
            assert migration_id is not None
            for one in self._locked(migration_id):
                return await self._of_volume(one)
            return None
        found = await self._of_volume(volume_id)
        if found is None:
            # It may be done with this volume, and not with others.
            found = next((one for one in await self.under_way() if volume_id in one.volumes), None)
        return found if found is None or migration_id in (None, found.migration_id) else None

    async def _of_volume(self, volume_id: str) -> Migration | None:
        """The migration of a volume, in the phase that its coordinator says."""
        own = await self._read_lock(volume_id)
        if own is None or own.volumes[0] == volume_id:
            return own
        coordinator = await self._read_lock(own.volumes[0])
        if coordinator is None or coordinator.migration_id != own.migration_id:
            raise MigrationConflict(
                f"the volume {own.volumes[0]}, which decides on the migration {own.migration_id}, is not here",
                migration=own.migration_id,
            )
        return coordinator

    async def _read_lock(self, volume_id: str) -> Migration | None:
        location, volume = await self._catalog.find(volume_id, lambda _: None)
        for lock in await self._catalog.read_locks(location, volume):
            if lock.purpose == PURPOSE and lock.server:
                try:
                    return _read_journal(lock)
                except (KeyError, ValueError) as error:
                    raise MigrationConflict(
                        f"the lock file of the live migration {lock.operation} cannot be understood",
                        migration=lock.operation,
                    ) from error
        return None

    # -- what was --------------------------------------------------------------------------------------------

    async def _ended_before(
        self, actor: Actor, migration_id: str | None, volume_id: str | None, done: Phase
    ) -> EndedMigration:
        for one in reversed(self._ended.values()):
            if one.migration_id == migration_id or (migration_id is None and volume_id in one.volumes):
                await self._require_change(actor, one.volumes)
                if volume_id is not None and not await self._is_still_so(one, volume_id):
                    break  # the answer would be about a migration that something else came after
                if one.phase is done:
                    return one
                raise MigrationConflict(f"the migration {one.migration_id} was {one.phase}", migration=one.migration_id)
        raise MigrationNotFound("no such live migration is under way", migration=migration_id, volume_id=volume_id)

    async def _is_still_so(self, ended: EndedMigration, volume_id: str) -> bool:
        location, volume = await self._catalog.find(volume_id, lambda _: None)
        own = self._core.markers.own_records(await self._core.markers.read(location, volume))
        left = ended.source if ended.phase is Phase.CONCLUDED else ended.destination
        return all(record.client != left for record in own)

    async def _remember(self, migration: Migration, done: Phase) -> None:
        self._ended.pop(migration.migration_id, None)
        self._ended[migration.migration_id] = EndedMigration(
            migration.migration_id, migration.volumes, migration.source, migration.destination, done
        )
        while len(self._ended) > _KEPT:
            del self._ended[next(iter(self._ended))]
        await self._disk.run(durable.replace, self._path, msgspec.json.encode(list(self._ended.values())), mode=0o600)

    def _read_ended(self) -> list[EndedMigration]:
        try:
            with open(self._path, "rb") as file:
                return msgspec.json.decode(file.read(), type=list[EndedMigration])
        except FileNotFoundError:
            os.makedirs(os.path.dirname(self._path), mode=0o700, exist_ok=True)
            return []
        except msgspec.DecodeError as error:
            log.error("%s is damaged, what became of earlier migrations is forgotten: %s", self._path, error)
            return []

    # -- order -----------------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def _alone(self, volumes: Sequence[str]) -> AsyncIterator[None]:
        async with contextlib.AsyncExitStack() as stack:
            for volume_id in sorted(volumes):
                await stack.enter_async_context(self._one_at_a_time.hold(volume_id))
            yield

    @contextlib.contextmanager
    def _doing(self, migration: Migration) -> Iterator[None]:
        self._active.add(migration.migration_id)
        try:
            yield
        finally:
            self._active.discard(migration.migration_id)

    def _announce(self, migration: Migration, state: str) -> None:
        self._core.feed.publish(
            "migration",
            migration.migration_id,
            before=None,
            after=Audience(owner="", private=True),
            state=state,
            volumes=list(migration.volumes),
            source=migration.source,
            destination=migration.destination,
        )


def _read_journal(lock: LockRecord) -> Migration:
    journal = lock.journal
    return Migration(
        migration_id=lock.operation,
        volumes=tuple(str(journal["volumes"]).split(",")),
        source=str(journal["source"]),
        destination=str(journal["destination"]),
        deadline=int(journal["deadline"]),
        exporter=str(journal["exporter"]),
        phase=Phase(str(journal["phase"])),
    )
