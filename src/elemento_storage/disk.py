"""Threads for the blocking calls of one location.

Each location has its own: a network file system that hangs blocks its own threads and nobody else's. There is no
time-out here on purpose. A blocked system call cannot be taken back, so the operation has to keep its locks until
it returns; what is bounded is how long a *caller* waits for the operation (``api/``).
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

_THREADS = 16


class Disk:
    """The threads of one location."""

    def __init__(self, name: str) -> None:
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix=f"disk-{name}")

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call a blocking function in one of the threads."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, lambda: function(*args, **kwargs))

    def close(self) -> None:
        """Take no more work; threads that hang in the kernel are left behind."""
        self._pool.shutdown(wait=False, cancel_futures=True)


@dataclass(frozen=True)
class Place:
    """A volume's directory and the threads that may touch it."""

    directory: str
    disk: Disk
