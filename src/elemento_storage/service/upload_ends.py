"""How uploads end: as a volume, refused, expired; and what a server that died left of them."""

import asyncio
import contextlib
import logging
import time
from typing import Final

import msgspec

from elemento_storage.catalog.location import Location
from elemento_storage.catalog.locations import os_errors
from elemento_storage.errors import (
    InternalFault,
    JobCancelled,
    StorageError,
    Unavailable,
    VolumeLocked,
    VolumeNotFound,
)
from elemento_storage.faultpoints import reached
from elemento_storage.jobs import Job, JobState
from elemento_storage.model import Volume
from elemento_storage.progress import Progress
from elemento_storage.service.access import INFRASTRUCTURE
from elemento_storage.service.core import Core
from elemento_storage.service.intake import Arrival, Intake
from elemento_storage.service.upload_store import Upload, UploadStore
from elemento_storage.uploads import record as records
from elemento_storage.uploads.place import is_abandoned
from elemento_storage.uploads.record import Phase, Problem, UploadRecord
from elemento_storage.uploads.turn import Busy, Gone, Turn

log = logging.getLogger(__name__)

PURPOSE: Final = "upload"
_SHORTEST_PAUSE_S: Final = 0.1
_MOST_ATTEMPTS: Final = 5


class UploadEnds:
    """Finishes what is complete, and removes what is over."""

    def __init__(self, core: Core, intake: Intake, store: UploadStore) -> None:
        self._core = core
        self._intake = intake
        self._store = store
        self._expiry_s = core.settings.upload_expiry
        self._lease_s = core.settings.lease
        self._jobs: dict[str, Job] = {}
        self._stopping = False
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Look now and then, beginning at once: what another server, or the last run of this one, left is finished."""
        self._task = asyncio.create_task(self._keep_looking(), name="uploads")

    async def stop(self) -> None:
        """What is being finished is left to the next start."""
        self._stopping = True
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})

    # -- finishing -----------------------------------------------------------------------------------------

    def job(self, upload_id: str) -> Job | None:
        """What makes a volume of the upload, here and now."""
        return self._jobs.get(upload_id)

    def finish(self, location: Location, record: UploadRecord, arrival: Arrival, turn: Turn, digest: str | None) -> Job:
        """Make a volume of an upload whose last byte is there, or fill the one that waits. The turn goes to the job."""

        async def work(progress: Progress) -> dict[str, str]:
            try:
                volume = await self._finish(location, record, arrival, turn, digest, progress)
            finally:
                self._jobs.pop(record.upload_id, None)
                await location.disk.run(turn.give_up)
            return {"vid": volume.volume_id}

        job = self._core.jobs.start(PURPOSE, work, client=record.owner, volume_id=record.upload_id)
        self._jobs[record.upload_id] = job
        return job

    async def _finish(
        self,
        location: Location,
        record: UploadRecord,
        arrival: Arrival,
        turn: Turn,
        digest: str | None,
        progress: Progress,
    ) -> Volume:
        assert record.target is not None, "a part is concatenated, never finished"
        target = record.target
        record = msgspec.structs.replace(
            record, phase=Phase.FINISHING, job=progress.operation_id, attempts=record.attempts + 1
        )
        await self._store.write(location, record)
        reached("upload.finishing")
        try:
            if record.attempts > _MOST_ATTEMPTS:
                raise InternalFault(f"the server died {_MOST_ATTEMPTS} times while it made a volume of upload")
            volume = await self._intake.finish(arrival, target, progress, digest=digest)
        except StorageError as error:
            if not (_may_go_well_later(error) or (isinstance(error, JobCancelled) and self._stopping)):
                await self.fail(location, record, arrival, error)
            raise
        except Exception:
            await self.fail(location, record, arrival, InternalFault("the upload could not be finished"))
            raise
        reached("upload.finished")
        await self._end(location, record, turn, volume.volume_id)
        return volume

    async def fail(
        self, location: Location, record: UploadRecord, arrival: Arrival, error: StorageError
    ) -> UploadRecord:
        """No volume can be made of it: give its room back. What is recorded from now on. Only by whose turn it is.

        The room first: a crash in between leaves an upload whose place is gone, which the next look forgets.
        """
        message = "the server's log has the reason" if isinstance(error, InternalFault) else error.message
        failed = msgspec.structs.replace(record, phase=Phase.FAILED, problem=Problem(error.code, message))
        with contextlib.suppress(StorageError), os_errors(location):
            await arrival.release()
            reached("upload.released")
            await self._store.write(location, failed)
        return failed

    async def _end(self, location: Location, record: UploadRecord, turn: Turn, volume_id: str) -> None:
        done = msgspec.structs.replace(record, phase=Phase.DONE, volume_id=volume_id)
        with os_errors(location):
            await location.disk.run(turn.touch)
            await location.disk.run(records.write, location.path, done)

    # -- looking -------------------------------------------------------------------------------------------

    async def _keep_looking(self) -> None:
        while True:
            try:
                await self.look()
            except Exception:
                log.exception("the look at the uploads failed")
            await asyncio.sleep(max(_SHORTEST_PAUSE_S, min(self._lease_s, self._expiry_s / 4)))

    async def look(self) -> None:
        """Finish, forget and remove whatever is due, in every location that answers."""
        for location in self._core.catalog.locations.answering():
            if location.problem is not None:
                continue
            try:
                with os_errors(location):
                    for upload_id in await location.disk.run(records.ids, location.path):
                        await self._tend(location, upload_id)
            except StorageError as error:
                log.warning("the uploads in location %s were not looked at: %s", location.name, error)
        await self._remove_abandoned()

    async def _tend(self, location: Location, upload_id: str) -> None:
        upload = await self._store.load(location, upload_id)
        now_s = time.time()
        if upload is None:
            if await location.disk.run(records.is_old, location.path, upload_id, now_s, self._lease_s):
                await self._store.forget(location, upload_id)
            return
        if not self._is_due(upload, now_s):
            return
        try:
            turn = await location.disk.run(Turn, location.path, upload_id)
        except (Busy, Gone):
            return
        if not await self.settle(location, upload_id, turn):
            await location.disk.run(turn.give_up)

    def _is_due(self, upload: Upload, now_s: float) -> bool:
        if upload.expires_s < now_s:
            return True
        if upload.is_over:
            return False
        if not upload.has_place:
            return True
        return (upload.is_complete and not upload.record.is_part) or upload.record.is_assembled

    async def settle(self, location: Location, upload_id: str, turn: Turn) -> bool:
        """Do with an upload what is due; whether the turn went to a job that finishes it."""
        upload = await self._store.load(location, upload_id)
        if upload is None:
            return False
        record, expired = upload.record, upload.expires_s < time.time()
        if upload.is_over:
            if expired:
                await self._store.forget(location, upload_id)
            return False
        arrival = await self._store.arrival(location, upload_id)
        if arrival is None:
            await self._end_without_place(location, record, turn)
            return False
        if expired or (record.is_assembled and not upload.is_complete):
            log.info("upload %s in %s is removed: %s", upload_id, location.name, "expired" if expired else "left over")
            await self.remove(location, upload_id, arrival)
            return False
        if not upload.is_complete or record.is_part or self._stopping:
            return False
        self._tell_of_interruption(record)
        self.finish(location, record, arrival, turn, None)
        return True

    async def _end_without_place(self, location: Location, record: UploadRecord, turn: Turn) -> None:
        """It has become the volume, or was being removed when the server died."""
        if record.phase is Phase.FINISHING:
            try:
                _, volume = await self._core.catalog.find(record.upload_id, INFRASTRUCTURE.require_see)
            except VolumeNotFound:
                pass
            else:
                if not volume.waiting:
                    self._tell_of_interruption(record, JobState.DONE)
                    await self._end(location, record, turn, volume.volume_id)
                    return
        await self._store.forget(location, record.upload_id)

    def _tell_of_interruption(self, record: UploadRecord, outcome: JobState = JobState.INTERRUPTED) -> None:
        if record.job is not None:
            self._core.jobs.record_interrupted(
                record.job,
                PURPOSE,
                record.owner,
                record.upload_id,
                outcome,
                "the server stopped in the middle; another job goes on with the upload",
            )

    async def remove(self, location: Location, upload_id: str, arrival: Arrival | None) -> None:
        """The bytes, then the record. Only by whose turn it is. Idempotent."""
        with os_errors(location):
            if arrival is not None:
                await arrival.release()
            reached("upload.released")
            await self._store.forget(location, upload_id)

    async def _remove_abandoned(self) -> None:
        """Places that were reserved for an upload that was never recorded."""
        for reservation in await self._core.catalog.room.lasting():
            location = reservation.location
            if await self._store.load(location, reservation.volume_id) is None and await location.disk.run(
                is_abandoned, reservation.path, self._lease_s
            ):
                log.info("the place of upload %s in %s is removed: left over", reservation.volume_id, location.name)
                await reservation.release()


def _may_go_well_later(error: StorageError) -> bool:
    """Nothing is wrong with the image: the location does not answer, or somebody holds the volume for now."""
    return isinstance(error, Unavailable | VolumeLocked)
