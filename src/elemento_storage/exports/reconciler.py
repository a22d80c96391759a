"""The loop that keeps exports true to the disk.

The markers in the volumes say what shall be served; the daemons are asked what is; where they differ,
``Publisher.settle`` mends it. That is also how exports come back after a crash or a reboot. Every export is then used
as a client would, and only if that succeeds is its marker touched.

A volume whose location does not answer is left as it is: not to know is no reason to take a disk from a guest.
"""

import asyncio
import contextlib
import functools
import logging
import os
import time
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from elemento_storage.catalog.catalog import Catalog
from elemento_storage.catalog.location import Location
from elemento_storage.catalog.markers import marker_names, read_marker, remove_marker, touch_markers
from elemento_storage.catalog.settings import SETTINGS_FILE
from elemento_storage.ceph.pool import Pool
from elemento_storage.config import Settings
from elemento_storage.disk import within
from elemento_storage.engine.volume_engine import Source
from elemento_storage.errors import ExportFailed, StorageError, VolumeLocked
from elemento_storage.exports.base import Attachment, Presence
from elemento_storage.exports.publisher import Publisher, ServedVolume
from elemento_storage.exports.record import ExportRecord, Protocol, decode_record
from elemento_storage.model import Volume, marker_name, utc_now, volume_id_of_directory

log = logging.getLogger(__name__)

_AT_ONCE: Final = 32
_STOP_S: Final = 5.0
_GATHER_S: Final = 0.05  # daemons that die together are mended together


@dataclass
class ExportStatus:
    """How an export is, as far as this process has seen."""

    healthy: bool = False
    reason: str | None = "it was not looked at yet"
    last_probe: str | None = None
    latency_s: float | None = None
    presence: Presence = field(default_factory=Presence)
    seen_s: float = 0.0  #: monotonic time of the last look that succeeded
    repairs: int = 0  #: how often something had to be mended since this process started

    def as_of_now(self, lease_s: float) -> "ExportStatus":
        """The same, but that a success does not count for longer than the lease."""
        if not self.healthy or time.monotonic() - self.seen_s <= lease_s:
            return self
        return replace(
            self, healthy=False, reason=f"it does not answer: it was not seen to work since {self.last_probe}"
        )


@dataclass(frozen=True)
class Wanted:
    """A volume of which something shall be served here."""

    location: Location
    volume: Volume
    records: tuple[ExportRecord, ...]


@dataclass(frozen=True)
class Orphan:
    """Something that is served and that no marker asks for."""

    name: str
    volume_id: str | None
    protocol: str | None


SourceOf = Callable[[Location, Volume], Source]
OnStatus = Callable[[Wanted, ExportRecord, ExportStatus], None]


class Reconciler:
    """Compares, mends, probes, touches: every heartbeat, and at once when a daemon dies."""

    def __init__(
        self,
        settings: Settings,
        catalog: Catalog,
        publisher: Publisher,
        source_of: SourceOf,
        server_id: str,
        on_status: OnStatus,
    ) -> None:
        self.status: dict[str, ExportStatus] = {}
        self.wanted: dict[str, Wanted] = {}
        self.orphans: list[Orphan] = []
        self.problem: str | None = None  #: why nothing is looked after at all
        self._settings = settings
        self._catalog = catalog
        self._publisher = publisher
        self._source_of = source_of
        self._server_id = server_id
        self._on_status = on_status
        self._wake = asyncio.Event()
        self._watched: dict[int, int] = {}  # pid → pidfd
        self._task: asyncio.Task[None] | None = None
        self._limit = asyncio.Semaphore(_AT_ONCE)
        self._tending: dict[str, asyncio.Task[None]] = {}
        self._asked: dict[Protocol, asyncio.Task[Mapping[str, Presence] | StorageError]] = {}
        self._changed: set[str] = set()  # volumes that ``want`` was called for since the markers are being read

    # -- life ----------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin; what a crash or reboot has ended comes back in the background."""
        self._task = asyncio.create_task(self._run(), name="reconcile")

    async def stop(self) -> None:
        """Leave everything as it is: clients notice nothing of a server that restarts."""
        tasks = {*self._tending.values(), *self._asked.values(), *([self._task] if self._task else [])}
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=_STOP_S)
        for pid in list(self._watched):
            self._unwatch(pid)
        self._publisher.release()

    def want(self, volume_id: str, wanted: Wanted | None) -> None:
        """An operation of ours has changed what is to be served: markers being read just now do not count for it."""
        self._changed.add(volume_id)
        if wanted is None:
            self.wanted.pop(volume_id, None)
        else:
            self.wanted[volume_id] = wanted

    def wake(self) -> None:
        """Look now."""
        self._wake.set()

    async def _run(self) -> None:
        while True:
            self._wake.clear()
            try:
                await self.look()
            except Exception:
                log.exception("exports could not be looked after; it is tried again in %g s", self._settings.heartbeat)
            try:
                await asyncio.wait_for(self._wake.wait(), self._settings.heartbeat)
                await asyncio.sleep(_GATHER_S)
            except TimeoutError:
                pass

    # -- one look ------------------------------------------------------------------------------------------

    async def look(self) -> None:
        """Compare, mend, probe and touch once."""
        await self._read_wanted()
        try:
            self._publisher.claim()
            self.problem = None
        except ExportFailed as error:
            if self.problem != error.message:
                log.error("no exports are looked after: %s", error)
            self.problem = error.message
            for wanted in self.wanted.values():
                for record in wanted.records:
                    self._set(wanted, record, reason=error.message)
            return
        self._ask()
        for volume_id, wanted in self.wanted.items():
            if volume_id not in self._tending:
                task = asyncio.create_task(self._tend(wanted), name=f"tend-{volume_id}")
                self._tending[volume_id] = task
                task.add_done_callback(functools.partial(self._tended, volume_id))
        # A daemon that hangs holds up its own volumes and nothing else.
        await asyncio.wait({*self._tending.values(), *self._asked.values()}, timeout=self._settings.heartbeat)
        present = {protocol: asked.result() for protocol, asked in self._asked.items() if asked.done()}
        # After the daemons were asked: what they serve was written down before.
        served = await asyncio.to_thread(self._publisher.served)
        await self._withdraw_orphans(served, present)
        self.watch()
        self._forget_old()

    async def _read_wanted(self) -> None:
        locations = self._catalog.locations.by_name.values()
        found: dict[str, Wanted] = {}
        self._changed.clear()
        for location in locations:
            marked = [
                entry.volume
                for volume_id, entry in location.entries.items()
                # The index learns of a marker when its export is done.
                if entry.volume.markers or volume_id in self.wanted
            ]
            if location.missing is not None:
                # Known from before: they stay wanted, and nothing can be done for them.
                found |= {one: known for one, known in self.wanted.items() if known.location is location}
                continue
            if not marked:
                continue
            try:
                read = await within(
                    self._catalog.locations.patience_s, location.disk.run(self._read_records, location, marked)
                )
            except OSError as error:
                log.warning("location %s: export markers cannot be read: %s", location.name, error)
                found |= {one: known for one, known in self.wanted.items() if known.location is location}
                continue
            for volume in marked:
                if read[volume.volume_id]:
                    found[volume.volume_id] = Wanted(location, volume, read[volume.volume_id])
        for volume_id in self._changed:
            found.pop(volume_id, None)
            if volume_id in self.wanted:
                found[volume_id] = self.wanted[volume_id]
        self.wanted = found

    def _read_records(self, location: Location, volumes: list[Volume]) -> dict[str, tuple[ExportRecord, ...]]:
        return {one.volume_id: self.read_records(location.volume_path(one.volume_id)) for one in volumes}

    def read_records(self, directory: str) -> tuple[ExportRecord, ...]:
        """What this server shall serve of the volume in a directory. Blocks. Raises OSError."""
        volume_id = volume_id_of_directory(os.path.basename(directory)) or ""
        records = []
        try:
            names = marker_names(directory)
        except FileNotFoundError:
            # A volume is gone only where its location is still there; else its disk is, and its guests keep theirs.
            os.stat(f"{os.path.dirname(directory)}/{SETTINGS_FILE}")
            return ()
        for name in names:
            content = read_marker(directory, name)
            record = decode_record(content[0], volume_id) if content else None
            if (
                record is not None
                and record.server == self._server_id
                and marker_name(record.client, volume_id) == name
            ):
                records.append(record)
        return tuple(records)

    def _ask(self) -> None:
        """Ask the daemons what they serve; one that has not answered yet is not asked again."""
        for protocol in self._publisher.exporters:
            asked = self._asked.get(protocol)
            if asked is None or asked.done():
                self._asked[protocol] = asyncio.create_task(self._published(protocol), name=f"ask-{protocol}")

    async def _published(self, protocol: Protocol) -> Mapping[str, Presence] | StorageError:
        try:
            return await self._publisher.exporters[protocol].published()
        except StorageError as error:
            return error

    def _tended(self, volume_id: str, _: asyncio.Task[None]) -> None:
        self._tending.pop(volume_id, None)

    # -- one volume ----------------------------------------------------------------------------------------

    async def _tend(self, wanted: Wanted) -> None:
        async with self._limit:
            if wanted.location.missing is not None:
                for record in wanted.records:
                    self._set(wanted, record, reason=f"location {wanted.location.name}: {wanted.location.missing}")
                return
            async with self._publisher.changing(wanted.volume.volume_id):
                try:
                    protocols = {record.protocol for record in wanted.records}
                    present = {protocol: await self._asked[protocol] for protocol in protocols}
                    await self._settle_and_probe(wanted, present)
                except (StorageError, OSError) as error:
                    for record in wanted.records:
                        self._set(wanted, record, reason=str(error))
                except Exception:
                    log.exception("the exports of volume %s cannot be put right", wanted.volume.volume_id)
                    for record in wanted.records:
                        self._set(wanted, record, reason="an internal fault; the server's log has the reason")

    async def _settle_and_probe(
        self, wanted: Wanted, present: Mapping[Protocol, Mapping[str, Presence] | StorageError]
    ) -> None:
        volume_id = wanted.volume.volume_id
        location = wanted.location
        directory = location.volume_path(volume_id)
        # Read again: an export or unexport may have been under way until now.
        records = await within(self._catalog.locations.patience_s, location.disk.run(self.read_records, directory))
        volume = await within(self._catalog.locations.patience_s, location.fresh(volume_id))
        if not records or volume is None:
            return
        wanted = Wanted(location, volume, records)
        if location.pool is not None and not await self._is_still_ours(location, location.pool, wanted):
            return
        source = self._source_of(location, volume)
        if self._publisher.engine(volume_id).daemon.pid is None or self._is_mending_needed(records, present):
            log.warning("volume %s: bringing its exports back", volume_id)
            is_safe = source.plain_file is not None or source.node.write_through
            if self._publisher.engine(volume_id).has_died and not is_safe:
                log.error(
                    "volume %s: its storage daemon died with the image open: what guests had written and not flushed "
                    "may be gone, look at them",
                    volume_id,
                )
            for record in records:
                self._status(record).repairs += 1
        settled = await self._publisher.settle(source, records)
        healthy = []
        for record in records:
            failure = settled.failures.get(record.export_id)
            if failure is None and settled.attachment is not None:
                failure = await self.probe(wanted, record, settled.attachment, present)
            if failure is None:
                healthy.append(f"{directory}/{marker_name(record.client, volume_id)}")
            else:
                self._set(wanted, record, reason=failure.message)
        if healthy:
            await within(self._catalog.locations.patience_s, location.disk.run(touch_markers, healthy))

    async def _is_still_ours(self, location: Location, pool: Pool, wanted: Wanted) -> bool:
        """Whether no other server has taken the volume over; where one has, nothing of it is served here any more."""
        volume_id = wanted.volume.volume_id
        if wanted.volume.locks:
            # The operation's claim is the volume's; to claim it anew would hide from the operation that it was lost.
            return pool.claims.holds(volume_id)
        try:
            await location.disk.run(pool.claims.acquire, volume_id)
        except VolumeLocked:
            log.error("volume %s: another server has taken it over, its exports here are ended", volume_id)
            await self._publisher.withdraw_all(volume_id)
            for record in wanted.records:
                name = marker_name(record.client, volume_id)
                await location.disk.run(remove_marker, location.volume_path(volume_id), name)
            self.wanted.pop(volume_id, None)
            await location.reload(volume_id)
            return False
        return True

    def _is_mending_needed(
        self, records: tuple[ExportRecord, ...], present: Mapping[Protocol, Mapping[str, Presence] | StorageError]
    ) -> bool:
        for record in records:
            served = present.get(record.protocol, {})
            if isinstance(served, StorageError) or (served and record.export_id not in served):
                return True
        return False

    async def probe(
        self,
        wanted: Wanted,
        record: ExportRecord,
        attachment: Attachment,
        present: Mapping[Protocol, Mapping[str, Presence] | StorageError],
    ) -> StorageError | None:
        """Use the export as a client would, and note how it went."""
        try:
            probe = await self._publisher.exporters[record.protocol].probe(record, attachment)
        except StorageError as error:
            return error
        served = present.get(record.protocol)
        presence = served.get(record.export_id) if isinstance(served, Mapping) else None
        if presence is None and probe.sessions is not None:
            presence = Presence(sessions=probe.sessions)
        self._set(wanted, record, latency_s=probe.latency_s, presence=presence)
        return None

    def _status(self, record: ExportRecord) -> ExportStatus:
        return self.status.setdefault(record.export_id, ExportStatus())

    def _set(
        self,
        wanted: Wanted,
        record: ExportRecord,
        *,
        reason: str | None = None,
        latency_s: float | None = None,
        presence: Presence | None = None,
    ) -> None:
        status = self._status(record)
        was_healthy, before = status.healthy, status.reason
        status.healthy, status.reason = reason is None, reason
        if reason is None:
            status.last_probe, status.latency_s, status.seen_s = utc_now(), latency_s, time.monotonic()
        if presence is not None:
            status.presence = presence
        if status.healthy != was_healthy or (reason != before and not status.healthy):
            log.log(
                logging.INFO if status.healthy else logging.ERROR,
                "export %s of volume %s over %s: %s",
                record.export_id,
                record.volume_id,
                record.protocol.value,
                reason or "healthy",
            )
            self._on_status(wanted, record, status)

    def _forget_old(self) -> None:
        known = {record.export_id for wanted in self.wanted.values() for record in wanted.records}
        for export_id in self.status.keys() - known:
            del self.status[export_id]

    # -- what nobody asked for -----------------------------------------------------------------------------

    async def _withdraw_orphans(
        self,
        served: Mapping[str, ServedVolume | None],
        present: Mapping[Protocol, Mapping[str, Presence] | StorageError],
    ) -> None:
        orphans = []
        known: set[str] = set()
        for volume_id, state in served.items():
            if state is not None:
                known |= state.exports.keys()
            if volume_id in self.wanted or self._publisher.is_kept(volume_id):
                continue
            if state is None:
                await self._sweep(volume_id)
                continue
            if not await self._is_unwanted(state):
                continue
            orphans += [Orphan(one, volume_id, protocol) for one, protocol in state.exports.items()]
            log.warning("volume %s is served and no marker asks for it: it is withdrawn", volume_id)
            async with self._publisher.changing(volume_id):
                if not self._publisher.is_kept(volume_id) and await self._is_unwanted(state):
                    await self._quietly(self._publisher.withdraw_all(volume_id))
        wanted = {record.export_id for one in self.wanted.values() for record in one.records}
        for protocol, found in present.items():
            if isinstance(found, StorageError):
                continue
            for export_id in found.keys() - known - wanted:
                # Nothing in the run directory knows it: made by something else, or left by a crash before that.
                orphans.append(Orphan(export_id, None, protocol))
                log.warning("%s serves %s, which nobody asked for: it is withdrawn", protocol.value, export_id)
                await self._quietly(self._publisher.exporters[protocol].withdraw(export_id, None))
        self.orphans = orphans

    async def _sweep(self, volume_id: str) -> None:
        """Remove a run directory that says nothing, unless an export was about to write into it."""
        async with self._publisher.changing(volume_id):
            if (await asyncio.to_thread(self._publisher.served)).get(volume_id) is not None:
                return
            if await self._has_no_records(volume_id):
                await self._quietly(self._publisher.withdraw_all(volume_id))
            else:
                await self._quietly(self._publisher.sweep(volume_id))

    async def _has_no_records(self, volume_id: str) -> bool:
        """Whether the volume is here and its markers ask for nothing."""
        for location in self._catalog.locations.answering():
            if volume_id in location.entries:
                directory = location.volume_path(volume_id)
                try:
                    patience_s = self._catalog.locations.patience_s
                    return not await within(patience_s, location.disk.run(self.read_records, directory))
                except OSError:
                    return False
        return False

    async def _is_unwanted(self, state: ServedVolume) -> bool:
        """Whether the disk says so, and not only keeps silent."""
        parent = os.path.dirname(state.directory)
        for location in self._catalog.locations.answering():
            if location.path == parent:
                try:
                    records = await within(
                        self._catalog.locations.patience_s, location.disk.run(self.read_records, state.directory)
                    )
                except OSError:
                    return False
                return not records
        return False

    async def _quietly(self, work: Awaitable[None]) -> None:
        try:
            await work
        except (StorageError, OSError) as error:
            log.error("what nobody asked for cannot be withdrawn: %s", error)

    # -- daemons that die ----------------------------------------------------------------------------------

    @property
    def daemons(self) -> Collection[int]:
        """The processes that serve exports, as of the last look."""
        return self._watched.keys()

    def watch(self) -> None:
        """Notice at once when a daemon ends."""
        pids = {pid for one in self.wanted for pid in self._publisher.engine(one).pids}
        for exporter in self._publisher.exporters.values():
            pids |= set(exporter.pids)
        for pid in self._watched.keys() - pids:
            self._unwatch(pid)
        for pid in pids - self._watched.keys():
            try:
                descriptor = os.pidfd_open(pid)
            except OSError:
                continue
            self._watched[pid] = descriptor
            asyncio.get_running_loop().add_reader(descriptor, self._died, pid)

    def _died(self, pid: int) -> None:
        self._unwatch(pid)
        self.wake()

    def _unwatch(self, pid: int) -> None:
        descriptor = self._watched.pop(pid, None)
        if descriptor is not None:
            asyncio.get_running_loop().remove_reader(descriptor)
            with contextlib.suppress(OSError):
                os.close(descriptor)
