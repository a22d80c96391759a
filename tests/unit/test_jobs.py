import asyncio
from collections.abc import Awaitable, Callable

import pytest

from elemento_storage.errors import (
    InternalFault,
    JobCancelled,
    JobEnded,
    JobNotFound,
    NoRoom,
)
from elemento_storage.feed import Feed
from elemento_storage.jobs import Job, Jobs, JobState
from elemento_storage.progress import Progress
from tests.unit.support import ALICE, BOB


class Gate:
    """Work that goes on when the test says so."""

    def __init__(self) -> None:
        self.open = asyncio.Event()

    async def work(self, progress: Progress) -> str:
        await self.open.wait()
        progress.check()
        return "result"


def working(error: Exception | None = None) -> Callable[[Progress], Awaitable[str]]:
    async def work(progress: Progress) -> str:
        progress.advance(0.5, "half")
        await asyncio.sleep(0)
        if error is not None:
            raise error
        return "result"

    return work


async def ended(job: Job) -> Job:
    await asyncio.wait_for(job.finished.wait(), 5)
    return job


async def test_a_job_that_works() -> None:
    jobs = Jobs(Feed())
    job = jobs.start("convert", working(), client=ALICE, volume_id="v")
    assert (job.state, job.result, job.ended) == (JobState.RUNNING, None, None)
    assert jobs.running_count() == 1
    await ended(job)
    assert (job.state, job.result, job.error) == (JobState.DONE, "result", None)
    assert job.progress.fraction == 1.0
    assert job.ended is not None
    assert job.ended >= job.created
    assert jobs.running_count() == 0


async def test_a_job_that_fails_keeps_the_reason() -> None:
    jobs = Jobs(Feed())
    error = NoRoom("full")
    job = await ended(jobs.start("convert", working(error), client=None))
    assert job.state is JobState.FAILED
    assert job.error is error


async def test_an_unforeseen_error_is_a_fault_without_its_text(caplog: pytest.LogCaptureFixture) -> None:
    jobs = Jobs(Feed())
    job = await ended(jobs.start("convert", working(RuntimeError("secret detail")), client=None))
    assert job.state is JobState.FAILED
    assert isinstance(job.error, InternalFault)
    assert "secret detail" not in job.error.message
    assert job.job_id in job.error.message
    assert "secret detail" in caplog.text


async def test_cancel_stops_the_work_at_its_next_look() -> None:
    jobs = Jobs(Feed())
    gate = Gate()
    job = jobs.start("convert", gate.work, client=ALICE)
    jobs.cancel(job)
    assert job.state is JobState.CANCELLING
    assert jobs.running_count() == 1
    gate.open.set()
    assert (await ended(job)).state is JobState.CANCELLED
    assert isinstance(job.error, JobCancelled)
    with pytest.raises(JobEnded):
        jobs.cancel(job)


async def test_cancel_after_the_point_of_no_return_is_refused() -> None:
    jobs = Jobs(Feed())
    gate = Gate()

    async def work(progress: Progress) -> str:
        progress.commit()
        return await gate.work(progress)

    job = jobs.start("convert", work, client=ALICE)
    await asyncio.sleep(0)
    with pytest.raises(JobEnded, match="too late"):
        jobs.cancel(job)
    gate.open.set()
    await ended(job)
    assert job.state is JobState.DONE


async def test_a_cancel_before_the_point_of_no_return_wins() -> None:
    progress = Progress()
    assert progress.request_cancel()
    with pytest.raises(JobCancelled):
        progress.commit()
    with pytest.raises(JobCancelled):
        progress.check()


async def test_cancel_twice_is_harmless() -> None:
    jobs = Jobs(Feed())
    gate = Gate()
    job = jobs.start("convert", gate.work, client=ALICE)
    jobs.cancel(job)
    jobs.cancel(job)
    gate.open.set()
    assert (await ended(job)).state is JobState.CANCELLED


async def test_progress_stays_between_0_and_1() -> None:
    progress = Progress()
    for told, shown in ((-1.0, 0.0), (0.25, 0.25), (1.5, 1.0)):
        progress.advance(told)
        assert progress.fraction == shown
    progress.advance(0.5, "syncing")
    progress.advance(0.6)
    assert progress.phase == "syncing"


async def test_only_its_client_and_the_infrastructure_find_a_job() -> None:
    jobs = Jobs(Feed())
    job = await ended(jobs.start("convert", working(), client=ALICE))
    assert jobs.get(job.job_id, ALICE) is job
    assert jobs.get(job.job_id, None) is job
    with pytest.raises(JobNotFound):
        jobs.get(job.job_id, BOB)
    with pytest.raises(JobNotFound):
        jobs.get("f" * 32, None)


async def test_jobs_are_listed_oldest_first_to_those_who_may_see_them() -> None:
    jobs = Jobs(Feed())
    made = [jobs.start("convert", working(), client=client) for client in (ALICE, BOB, None, ALICE)]
    assert jobs.visible(None) == made
    assert jobs.visible(ALICE) == [made[0], made[3]]
    assert jobs.visible(BOB) == [made[1]]
    for job in made:
        await ended(job)
    assert jobs.visible(None) == made


async def test_a_job_is_told_in_the_feed_from_start_to_end() -> None:
    feed = Feed()
    start = feed.revision
    jobs = Jobs(feed)
    job = await ended(jobs.start("convert", working(), client=ALICE, volume_id="v"))
    events = feed.since(start)
    assert events is not None
    assert {(event.kind, event.subject) for event in events} == {("job", job.job_id)}
    states = [event.data["state"] for event in events]
    assert (states[0], states[-1]) == ("running", "done")
    assert events[-1].data["progress"] == 1.0
    assert events[-1].data["volume_id"] == "v"
    assert [event.seen_by(BOB) for event in events] == [None] * len(events)
    assert events[0].seen_by(ALICE) == "job"


async def test_a_chatty_job_does_not_flood_the_feed() -> None:
    feed = Feed()
    start = feed.revision
    jobs = Jobs(feed)

    async def chatter(progress: Progress) -> None:
        for step in range(10_000):
            progress.advance(step / 10_000)

    await ended(jobs.start("convert", chatter, client=ALICE))
    events = feed.since(start)
    assert events is not None
    assert len(events) < 10


async def test_what_recovery_finds_has_the_id_its_caller_knows() -> None:
    jobs = Jobs(Feed())
    jobs.record_interrupted("1" * 32, "convert", ALICE, "v", JobState.INTERRUPTED, "the server stopped")
    jobs.record_interrupted("2" * 32, "convert", ALICE, "v", JobState.DONE, "")
    stopped, done = jobs.get("1" * 32, ALICE), jobs.get("2" * 32, ALICE)
    assert stopped.state is JobState.INTERRUPTED
    assert stopped.error is not None
    assert "the server stopped" in stopped.error.message
    assert (done.state, done.error, done.progress.fraction) == (JobState.DONE, None, 1.0)
    assert stopped.finished.is_set()
    with pytest.raises(JobEnded):
        jobs.cancel(stopped)


async def test_only_the_latest_thousand_ended_jobs_are_kept_and_every_running_one() -> None:
    jobs = Jobs(Feed())
    gate = Gate()
    running = jobs.start("convert", gate.work, client=None)
    for number in range(1005):
        jobs.record_interrupted(f"{number:032x}", "convert", None, "v", JobState.DONE, "")
    newest = await ended(jobs.start("convert", working(), client=None))
    assert len(jobs.visible(None)) == 1002
    assert jobs.get(running.job_id, None) is running
    assert jobs.get(newest.job_id, None) is newest
    with pytest.raises(JobNotFound):
        jobs.get(f"{0:032x}", None)
    assert jobs.get(f"{1004:032x}", None)
    gate.open.set()
    await ended(running)


async def test_stop_cancels_what_runs_and_waits_for_it_to_roll_back() -> None:
    jobs = Jobs(Feed())
    rolled_back = False

    async def work(progress: Progress) -> None:
        nonlocal rolled_back
        await progress.cancelled.wait()
        await asyncio.sleep(0.02)
        rolled_back = True
        progress.check()

    job = jobs.start("convert", work, client=None)
    await asyncio.wait_for(jobs.stop(5), 5)
    assert rolled_back
    assert job.state is JobState.CANCELLED
    await jobs.stop(5)


async def test_stop_does_not_wait_for_ever() -> None:
    jobs = Jobs(Feed())
    gate = Gate()
    job = jobs.start("convert", gate.work, client=None)
    await asyncio.wait_for(jobs.stop(0.01), 5)
    assert job.state is JobState.CANCELLING
    gate.open.set()
    await ended(job)
