"""Jobs: operations that can take longer than a blink, with progress and cancel.

States: ``running`` → ``cancelling`` → one of ``done``, ``failed``, ``cancelled``, ``interrupted``. Cancelling is
cooperative: the work asks ``progress.check()`` between steps and kills its programs when ``progress.cancelled`` is set,
so that nothing is ever cut off in the middle of a commit. ``interrupted`` is what recovery makes of a job whose server
died; its id is that of the lock file it left.
"""

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from enum import StrEnum

from elemento_storage.errors import InternalFault, JobCancelled, JobEnded, JobNotFound, StorageError
from elemento_storage.feed import Audience, Feed
from elemento_storage.model import new_uid, utc_now
from elemento_storage.progress import Progress

log = logging.getLogger(__name__)

_KEPT_S = 3600.0
_KEPT_COUNT = 1000
_EVENT_INTERVAL_S = 0.5


class JobState(StrEnum):
    """Where a job is."""

    RUNNING = "running"
    CANCELLING = "cancelling"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"
    INTERRUPTED = "interrupted"


_ENDED = {JobState.DONE, JobState.FAILED, JobState.CANCELLED, JobState.INTERRUPTED}


class Job:
    """One operation. Visible to the client that began it and to the infrastructure."""

    def __init__(self, job_id: str, purpose: str, client: str | None, volume_id: str | None) -> None:
        self.job_id = job_id
        self.purpose = purpose
        self.client = client
        self.volume_id = volume_id
        self.state = JobState.RUNNING
        self.created = utc_now()
        self.ended: str | None = None
        self.ended_monotonic: float | None = None
        self.result: object = None
        self.error: StorageError | None = None
        self.progress = Progress(job_id)
        self.finished = asyncio.Event()

    def facts(self) -> dict[str, object]:
        """What events say of the job."""
        return {
            "state": self.state.value,
            "purpose": self.purpose,
            "progress": round(self.progress.fraction, 4),
            "phase": self.progress.phase,
            "volume_id": self.volume_id,
            **(self.progress.transfer.facts() if self.progress.transfer.done_bytes is not None else {}),
        }


class Jobs:
    """The registry of running and recently ended jobs."""

    def __init__(self, feed: Feed) -> None:
        self._feed = feed
        self._jobs: OrderedDict[str, Job] = OrderedDict()
        self._tasks: set[asyncio.Task[None]] = set()

    def start(
        self,
        purpose: str,
        work: Callable[[Progress], Awaitable[object]],
        *,
        client: str | None,
        volume_id: str | None = None,
    ) -> Job:
        """Begin an operation in a task of its own, so that a caller who hangs up does not end it."""
        job = Job(new_uid(), purpose, client, volume_id)
        last_event = 0.0

        def changed() -> None:
            nonlocal last_event
            now = time.monotonic()
            if now - last_event >= _EVENT_INTERVAL_S:
                last_event = now
                self._announce(job)

        job.progress = Progress(job.job_id, changed)
        self._jobs[job.job_id] = job
        task = asyncio.create_task(self._run(job, work), name=f"{purpose}-{job.job_id}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        self._announce(job)
        self._forget_old()
        return job

    def record_interrupted(
        self, job_id: str, purpose: str, client: str | None, volume_id: str, outcome: JobState, message: str
    ) -> None:
        """Enter what became of an operation whose server died, under the id its caller knows.

        A job of our own that failed or was cancelled is resolved by the same code; it speaks for itself.
        """
        if job_id in self._jobs:
            return
        job = Job(job_id, purpose, client, volume_id)
        if outcome is JobState.DONE:
            job.progress.advance(1.0)
        else:
            job.error = JobCancelled(message)
        self._jobs[job_id] = job
        self._end(job, outcome)

    async def _run(self, job: Job, work: Callable[[Progress], Awaitable[object]]) -> None:
        state = JobState.FAILED
        try:
            job.result = await work(job.progress)
            state = JobState.DONE
            job.progress.fraction, job.progress.phase = 1.0, ""
        except JobCancelled as error:
            job.error = error
            state = JobState.CANCELLED
        except StorageError as error:
            if isinstance(error, InternalFault):
                log.error("job %s (%s): %s", job.job_id, job.purpose, error.for_the_log())
            job.error = error
        except Exception as error:
            log.exception("job %s (%s) failed", job.job_id, job.purpose)
            job.error = InternalFault(f"the {job.purpose} failed; the server's log has the reason, job {job.job_id}")
            job.error.__cause__ = error
        finally:
            self._end(job, state)

    def _end(self, job: Job, state: JobState) -> None:
        job.state = state
        job.ended = utc_now()
        job.ended_monotonic = time.monotonic()
        job.finished.set()
        self._announce(job)

    def _announce(self, job: Job) -> None:
        audience = Audience(owner=job.client or "", private=True)
        self._feed.publish("job", job.job_id, before=None, after=audience, **job.facts())

    def _forget_old(self) -> None:
        horizon = time.monotonic() - _KEPT_S
        ended = [job for job in self._jobs.values() if job.ended_monotonic is not None]
        surplus = max(0, len(ended) - _KEPT_COUNT)
        for position, job in enumerate(ended):
            if position < surplus or (job.ended_monotonic or 0.0) < horizon:
                del self._jobs[job.job_id]

    def get(self, job_id: str, client: str | None) -> Job:
        """A job the caller may see (None: the infrastructure, which sees all). Raises JobNotFound."""
        job = self._jobs.get(job_id)
        if job is None or (client is not None and job.client != client):
            raise JobNotFound(job_id)
        return job

    def visible(self, client: str | None) -> list[Job]:
        """The jobs the caller may see, oldest first."""
        return [job for job in self._jobs.values() if client is None or job.client == client]

    def cancel(self, job: Job) -> None:
        """Ask a job to stop. Raises JobEnded when it is over or past its point of no return."""
        if job.state in _ENDED or not job.progress.request_cancel():
            raise JobEnded(f"job {job.job_id} is {job.state}: too late to cancel", job_id=job.job_id)
        job.state = JobState.CANCELLING
        self._announce(job)

    def running_count(self) -> int:
        """How many jobs are not over."""
        return sum(job.state not in _ENDED for job in self._jobs.values())

    async def stop(self, grace_s: float) -> None:
        """Cancel everything and wait for it to roll back."""
        for job in self._jobs.values():
            if job.state not in _ENDED and job.progress.request_cancel():
                job.state = JobState.CANCELLING
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=grace_s)
