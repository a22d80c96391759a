"""Threads for the blocking calls of one location, and waits that end.

Each location has its own threads, so that a file system that hangs does not use up those of the others. A blocked
system call cannot be taken back: an operation that is cancelled waits for its thread before it lets go of a guard or a
lock, or the thread would go on changing what somebody else now holds. What is bounded is how long a *caller* waits
(``within``).
"""

import asyncio
import errno
import logging
import queue
import threading
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

log = logging.getLogger(__name__)

_THREADS = 16
_MOST_WAITING = 512

_abandoned: set[asyncio.Task[Any]] = set()


class Disk:
    """Threads for one purpose in one location, started as they are needed.

    Not a ThreadPoolExecutor: a hand-over through one costs half as much again (118 against 82 µs, measured), and its
    threads keep the interpreter from ending when a file system hangs.
    """

    def __init__(self, name: str, threads: int = _THREADS) -> None:
        self._name = name
        self._most_threads = threads
        self._threads = 0
        self._under_way = 0
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()

    @property
    def busy(self) -> bool:
        """Whether something is under way."""
        return self._under_way > 0

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call a blocking function in one of the threads. Raises OSError (EBUSY) when too many wait already."""
        if self._under_way >= _MOST_WAITING:
            raise OSError(errno.EBUSY, "too many operations wait for it")
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def work() -> None:
            try:
                result = function(*args, **kwargs)
            except BaseException as error:  # noqa: BLE001  it is raised where somebody waits for it
                loop.call_soon_threadsafe(future.set_exception, error)
            else:
                loop.call_soon_threadsafe(future.set_result, result)

        self._under_way += 1
        if self._under_way > self._threads and self._threads < self._most_threads:
            self._threads += 1
            threading.Thread(target=self._serve, name=f"disk-{self._name}-{self._threads}", daemon=True).start()
        self._queue.put(work)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            await asyncio.wait({future})
            future.exception()
            raise
        finally:
            self._under_way -= 1

    def _serve(self) -> None:
        while (work := self._queue.get()) is not None:
            work()

    def close(self) -> None:
        """Take no more work; threads that hang in the kernel are left behind."""
        for _ in range(self._threads):
            self._queue.put(None)


@dataclass(frozen=True)
class Place:
    """A volume's directory and the threads that may touch it."""

    directory: str
    disk: Disk
    volume_id: str = ""  #: where it is known


async def within(timeout_s: float, work: Coroutine[Any, Any, T]) -> T:
    """Wait for ``work`` for at most this long. Work that takes longer goes on unwatched: it is never cut off.

    Raises TimeoutError, and what ``work`` raises.
    """
    task = asyncio.ensure_future(work)
    done, _ = await asyncio.wait({task}, timeout=timeout_s)
    if not done:
        _abandoned.add(task)
        task.add_done_callback(_note_late_end)
        raise TimeoutError(f"no answer within {timeout_s:g} s")
    return task.result()


def _note_late_end(task: asyncio.Task[Any]) -> None:
    _abandoned.discard(task)
    if not task.cancelled() and (error := task.exception()) is not None:
        log.warning("something nobody waits for any more failed: %s", error)
