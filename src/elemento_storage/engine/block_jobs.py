"""Block jobs of a storage daemon (QMP reference, ``query-jobs``): started, watched, ended, never left behind."""

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from typing import Final

from elemento_storage.engine.storage_daemon import StorageDaemon
from elemento_storage.errors import ExportFailed, JobCancelled, NoRoom

_POLL_FIRST_S: Final = 0.005
_POLL_S: Final = 0.25
_END_S: Final = 60.0
_FULL_WORDS: Final = ("No space left on device", "Disk quota exceeded", "File too large")


async def run_job(
    daemon: StorageDaemon,
    command: str,
    arguments: Mapping[str, object],
    *,
    job_id: str,
    on_fraction: Callable[[float], None],
    cancel: asyncio.Event,
) -> None:
    """Start a job and wait until it has done its work; when this returns or raises, it is gone.

    Raises JobCancelled, NoRoom, ExportFailed with what the job failed of.
    """
    options = {**arguments, "job-id": job_id, "auto-finalize": True, "auto-dismiss": False}
    async with daemon.conversation():  # events of the job go to whoever opens the monitor next, in place of a greeting
        await daemon.execute(command, options)
        try:
            await _watch(daemon, command, job_id, on_fraction, cancel)
        finally:
            await end_job(daemon, job_id)


async def _watch(
    daemon: StorageDaemon, command: str, job_id: str, on_fraction: Callable[[float], None], cancel: asyncio.Event
) -> None:
    pause = _POLL_FIRST_S
    while True:
        found = await job_of(daemon, job_id)
        if found is None:
            raise ExportFailed(f"the storage daemon has lost the job {job_id}")
        if found["status"] == "concluded":
            break
        total = int(str(found["total-progress"]))
        on_fraction(int(str(found["current-progress"])) / total if total else 0.0)
        if cancel.is_set():
            raise JobCancelled("cancelled; nothing was changed")
        await asyncio.sleep(pause)
        pause = min(pause * 2, _POLL_S)
    error = str(found.get("error", ""))
    if any(words in error for words in _FULL_WORDS):
        raise NoRoom("the file system ran full in the middle; nothing was changed")
    if error:
        raise ExportFailed(f"{command} failed: {error}")


async def end_job(daemon: StorageDaemon, job_id: str) -> None:
    """Have no job of this id any more, whatever it was doing. Idempotent. Raises ExportFailed when it does not end."""
    deadline = asyncio.get_running_loop().time() + _END_S
    while daemon.pid is not None and (found := await job_of(daemon, job_id)) is not None:
        if found["status"] == "concluded":
            await daemon.execute("job-dismiss", {"id": job_id})
            continue
        if found["status"] not in ("aborting", "null"):
            with contextlib.suppress(ExportFailed):  # it has ended since it was asked
                await daemon.execute("job-cancel", {"id": job_id})
        if asyncio.get_running_loop().time() > deadline:
            raise ExportFailed("a job of the storage daemon does not end: its file system probably hangs")
        await asyncio.sleep(0.01)


async def job_of(daemon: StorageDaemon, job_id: str) -> Mapping[str, object] | None:
    """What the daemon says of a job; None when it has none of this id."""
    for found in await daemon.execute("query-jobs"):
        if found["id"] == job_id:
            return dict(found)
    return None
