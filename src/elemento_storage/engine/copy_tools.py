"""rsync and rclone, for those who want their clones made by them (``alg``). Both copy one local file to another."""

import asyncio
import re
from collections.abc import Callable
from typing import Final

from elemento_storage import process

_PERCENT: Final = re.compile(r"(\d+)%")
_RSYNC_MEMORY: Final = 2 * 2**30
_RCLONE_MEMORY: Final = 16 * 2**30  # Go reserves addresses by the gigabyte and uses few of them


async def rsync(
    source: str, target: str, *, on_fraction: Callable[[float], None], timeout_s: float, cancel: asyncio.Event
) -> None:
    """Copy a file with rsync; what is zeros becomes holes. Raises ToolMissing, ToolFailed, ToolTimeout, JobCancelled.

    ``--inplace``: the target has its name from the beginning, in a directory that is not yet a volume.
    """
    argv = ["rsync", "--sparse", "--inplace", "--whole-file", "--info=progress2", "--outbuf=L", "--", source, target]
    await _run(argv, on_fraction, process.Limits(timeout_s, _RSYNC_MEMORY), cancel)


async def rclone(
    source: str, target: str, *, on_fraction: Callable[[float], None], timeout_s: float, cancel: asyncio.Event
) -> None:
    """Copy a file with rclone, holes and all: the caller digs them. Raises as ``rsync``.

    One stream, so that all before the end of the target is written; no configuration, so that only paths count.
    """
    argv = ["rclone", "copyto", "--config=", "--progress", "--stats=500ms", "--stats-one-line"]
    argv += ["--local-no-preallocate", "--multi-thread-streams=0", "--ignore-checksum", "--retries=1"]
    await _run([*argv, "--", source, target], on_fraction, process.Limits(timeout_s, _RCLONE_MEMORY), cancel)


async def _run(
    argv: list[str], on_fraction: Callable[[float], None], limits: process.Limits, cancel: asyncio.Event
) -> None:
    rest = ""

    def parse(piece: str) -> None:
        nonlocal rest
        text = rest + piece
        matches = list(_PERCENT.finditer(text))
        if matches:
            on_fraction(min(int(matches[-1].group(1)), 100) / 100)
        rest = text[-16:]

    await process.run(argv, limits, on_output=parse, cancel=cancel)
