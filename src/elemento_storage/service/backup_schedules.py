"""Backups by schedule: one in each period, made up for once after a time in which nobody could, old ones let go.

What there is to do is read from the disk: the schedule lies in the volume's directory, and when it was carried out last
is said by the backups themselves. Of servers that share a location, the one that has the volume locked looks again
before it begins, so no backup is made twice; one that another server serves is that server's to back up.
"""

import asyncio
import contextlib
import logging
import time
from dataclasses import dataclass
from typing import Final

from elemento_storage.catalog.backup_directory import Backup
from elemento_storage.catalog.backup_schedule import Schedule, read_schedule, remove_schedule, write_schedule
from elemento_storage.catalog.location import Location
from elemento_storage.catalog.locations import os_errors
from elemento_storage.disk import within
from elemento_storage.errors import JobCancelled, NotDue, StorageError, VolumeExported, VolumeLocked, VolumeNotFound
from elemento_storage.faultpoints import reached
from elemento_storage.feed import Audience
from elemento_storage.model import Volume
from elemento_storage.service.access import Actor
from elemento_storage.service.backups import Backups, Wanted
from elemento_storage.service.core import Core
from elemento_storage.service.moments import require_kept

log = logging.getLogger(__name__)

_SWEEPS: Final = 3  # of the locations, to one look
_TIDY_S: Final = 3600.0
_RETRY_FIRST_S: Final = 60.0
_RETRY_S: Final = 3600.0
_ELSEWHERE_S: Final = 60.0


@dataclass
class ScheduleState:
    """How a schedule gets on, as this server knows."""

    volume: Volume
    schedule: Schedule
    last: float | None = None  #: the moment of its last backup
    due: float = 0.0  #: when the next one is to begin
    retry: float = 0.0  #: not before this time
    failures: int = 0
    reason: str = ""  #: of the last failure
    running: bool = False

    @property
    def problem(self) -> str | None:
        """What an operator should know."""
        if self.failures:
            return f"the backup of volume {self.volume.volume_id} fails: {self.reason}"
        late_s = time.time() - self.due
        if late_s > max(self.schedule.period_s, _RETRY_S) and not self.running:
            return f"the backup of volume {self.volume.volume_id} is overdue by {late_s / 3600:.0f} hours"
        return None


class BackupSchedules:
    """Sets schedules, and carries them out."""

    def __init__(self, core: Core, backups: Backups) -> None:
        self._core = core
        self._catalog = core.catalog
        self._backups = backups
        self._states: dict[str, ScheduleState] = {}
        self._running: dict[str, asyncio.Task[None]] = {}
        self._task: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()
        self._tidied = 0.0

    # -- setting -------------------------------------------------------------------------------------------

    async def set(self, actor: Actor, volume_id: str, schedule: Schedule | None) -> ScheduleState | None:
        """Back a volume up from now on, or no more. Raises VolumeNotFound, NotOwner, VolumeLocked."""
        async with self._catalog.hold(volume_id, actor.require_change, sharing=True, live=True) as held:
            place = held.place
            if schedule is None:
                await place.disk.run(remove_schedule, place.directory)
            else:
                if not self._core.store(held.volume.meta.format).capabilities.files:
                    require_kept(held.volume)
                await place.disk.run(write_schedule, place.directory, schedule)
            reached("backup-schedule.written")
            await held.reload()
        self._states.pop(volume_id, None)
        await self._read(held.location, held.volume.volume_id)
        self._wake.set()
        return self._states.get(volume_id)

    def visible(self, actor: Actor) -> list[ScheduleState]:
        """Those of the actor's volumes."""
        return [one for one in self._states.values() if actor.client in (None, one.volume.meta.creator_id)]

    def problems(self) -> list[str]:
        """What an operator should know."""
        return [problem for one in self._states.values() if (problem := one.problem) is not None]

    # -- carrying out --------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to look."""
        self._task = asyncio.create_task(self._run(), name="backup-schedules")

    async def stop(self) -> None:
        """Begin no more; those that run are jobs, and end with them."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def _run(self) -> None:
        while True:
            try:
                await self.look()
            except Exception:
                log.exception("the schedules of backups were not looked at")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), self._core.settings.sweep_interval * _SWEEPS)
            self._wake.clear()

    async def look(self) -> None:
        """Begin what is due."""
        if time.monotonic() - self._tidied > _TIDY_S or not self._tidied:
            self._tidied = time.monotonic()
            await self._backups.tidy_all()
        seen = set()
        for location in self._catalog.locations.answering():
            for volume_id, entry in list(location.entries.items()):
                if entry.volume.scheduled:
                    seen.add(volume_id)
                    await self._read(location, volume_id)
            if location.missing is not None:
                seen |= {one for one, state in self._states.items() if state.volume.location == location.name}
        for volume_id in self._states.keys() - seen - self._running.keys():
            del self._states[volume_id]
        now = time.time()
        for state in sorted(self._states.values(), key=lambda one: one.due):
            if len(self._running) >= self._core.settings.backups_at_once:
                return
            volume_id = state.volume.volume_id
            if state.due <= now and state.retry <= now and volume_id not in self._running:
                self._running[volume_id] = asyncio.create_task(self._carry_out(state), name=f"backup-{volume_id}")

    async def _read(self, location: Location, volume_id: str) -> None:
        """What a volume's schedule says, and when its next backup is due."""
        entry = location.entries.get(volume_id)
        if entry is None:
            self._states.pop(volume_id, None)
            return
        try:
            patience_s = self._catalog.locations.patience_s
            with os_errors(location):
                schedule = await within(patience_s, location.disk.run(read_schedule, location.volume_path(volume_id)))
                if schedule is None or schedule.creator_id != entry.volume.meta.creator_id:
                    # What is of another owner's making is no order of this one.
                    self._states.pop(volume_id, None)
                    return
                state = self._states.get(volume_id)
                if state is None or state.schedule != schedule:
                    state = self._states[volume_id] = ScheduleState(entry.volume, schedule)
                    await self._reckon(state)
                state.volume = entry.volume
        except (StorageError, TimeoutError) as error:
            log.warning("the schedule of volume %s is not read now: %s", volume_id, error)

    async def _reckon(self, state: ScheduleState) -> list[Backup]:
        backups = await self._own(state)
        state.last = max((one.record.moment for one in backups), default=None)
        schedule = state.schedule
        # The first one is due in the first period that begins, or at once where a time of day has no meaning.
        base = schedule.since if state.last is None else state.last
        state.due = base if state.last is None and not schedule.at else schedule.begin_of(schedule.slot(base) + 1)
        return backups

    async def _own(self, state: ScheduleState) -> list[Backup]:
        found = await self._backups.of_volume(state.volume.volume_id)
        creator = state.schedule.creator_id
        return [
            one for one in found if one.record.scheduled and one.record.creator_id == creator and not one.record.deleted
        ]

    async def _carry_out(self, state: ScheduleState) -> None:
        volume_id = state.volume.volume_id
        state.running = True
        try:
            backups = await self._reckon(state)
            if state.due <= time.time():
                await self._back_up(state, backups)
            await self._let_go(state)
            state.failures, state.reason = 0, ""
        except (VolumeLocked, VolumeExported, NotDue):
            state.retry = time.time() + _ELSEWHERE_S
        except VolumeNotFound:
            self._states.pop(volume_id, None)
        except (StorageError, OSError) as error:
            state.failures += 1
            state.reason = error.message if isinstance(error, StorageError) else str(error)
            state.retry = time.time() + min(_RETRY_FIRST_S * 2 ** (state.failures - 1), _RETRY_S)
            log.error("the scheduled backup of volume %s failed: %s", volume_id, state.reason)
            audience = Audience(owner=state.schedule.creator_id, private=True)
            self._core.feed.publish(
                "backup",
                volume_id,
                before=None,
                after=audience,
                volume_id=volume_id,
                state="failed",
                reason=state.reason,
            )
        except Exception:
            state.failures += 1
            state.reason = "an internal fault; the server's log has the reason"
            state.retry = time.time() + _RETRY_S
            log.exception("the scheduled backup of volume %s failed", volume_id)
        finally:
            state.running = False
            self._running.pop(volume_id, None)
            self._wake.set()

    async def _back_up(self, state: ScheduleState, backups: list[Backup]) -> None:
        schedule, volume_id = state.schedule, state.volume.volume_id
        increments = backups[-1].record.increments if backups else 0
        is_full = schedule.full_every is not None and increments + 1 >= schedule.full_every
        job = self._core.jobs.start(
            "backups/create",
            lambda progress: self._backups.create(
                Actor(schedule.creator_id),
                volume_id,
                progress,
                wanted=Wanted.FULL if is_full else Wanted.AUTO,
                scheduled_after=state.last or 0.0,
            ),
            client=schedule.creator_id,
            volume_id=volume_id,
        )
        await job.finished.wait()
        if isinstance(job.error, JobCancelled):
            # Somebody wished so; the next one is made in the next period.
            state.due = schedule.begin_of(schedule.slot(time.time()) + 1)
        elif job.error is not None:
            raise job.error
        await self._reckon(state)

    async def _let_go(self, state: ScheduleState) -> None:
        """Delete what is too old, and what is too much, of what the schedule made itself."""
        schedule = state.schedule
        backups = await self._own(state)
        too_old = time.time() - schedule.keep_days * 86400 if schedule.keep_days is not None else 0.0
        too_many = len(backups) - schedule.keep if schedule.keep is not None else 0
        for position, one in enumerate(backups[:-1]):  # the newest stays whatever its age
            if position < too_many or one.record.moment < too_old:
                await self._backups.delete(Actor(schedule.creator_id), one.backup_id)
