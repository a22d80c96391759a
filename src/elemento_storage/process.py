"""The only place that starts other programs.

Every program runs with a time-out, limits on its memory and CPU time, no standard input, a plain locale, in
its own session, and dies with this process: an orphaned qemu-img that goes on writing after a restart is a second
writer. ``setpriv --pdeathsig`` and ``prlimit`` (util-linux) set that up in the child; a ``preexec_fn`` would run Python
between fork and exec, which is unsafe with threads.
"""

import asyncio
import contextlib
import logging
import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from elemento_storage.errors import JobCancelled, ToolFailed, ToolMissing, ToolTimeout

log = logging.getLogger(__name__)

_STDERR_KEPT = 4096
_REAP_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Limits:
    """What a program may use. ``address_space_bytes`` 0 means no limit."""

    timeout_s: float
    address_space_bytes: int = 2 * 2**30
    cpu_s: int = 0


@dataclass(frozen=True)
class Finished:
    """A program that ended with status 0."""

    stdout: str
    seconds: float


async def run(
    argv: Sequence[str],
    limits: Limits,
    *,
    on_output: Callable[[str], None] | None = None,
    cancel: asyncio.Event | None = None,
) -> Finished:
    """Run a program to its end.

    ``on_output`` gets standard output piece by piece as it comes (progress); it is then not collected. When
    ``cancel`` is set the program is killed.

    Raises ToolMissing, ToolFailed (exit status not 0), ToolTimeout, JobCancelled.
    """
    started = time.monotonic()
    prefix = ["setpriv", "--pdeathsig", "KILL", "--", "prlimit"]
    if limits.address_space_bytes:
        prefix.append(f"--as={limits.address_space_bytes}")
    if limits.cpu_s:
        prefix.append(f"--cpu={limits.cpu_s}")
    prefix.append("--core=0")
    try:
        child = await asyncio.create_subprocess_exec(
            *prefix,
            "--",
            *argv,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={"PATH": os.environ.get("PATH", "/usr/sbin:/usr/bin:/sbin:/bin"), "LC_ALL": "C.UTF-8"},
            start_new_session=True,
        )
    except FileNotFoundError as error:
        raise ToolMissing("setpriv and prlimit are missing: install the package util-linux") from error
    assert child.stdout is not None
    assert child.stderr is not None
    collected: list[str] = []
    sink = on_output or collected.append
    work = asyncio.gather(_drain(child.stdout, sink), _tail(child.stderr), child.wait())
    cancelled = asyncio.ensure_future(cancel.wait()) if cancel else None
    try:
        waited_for: set[asyncio.Future[Any]] = {work, *([cancelled] if cancelled else [])}
        done, _ = await asyncio.wait(waited_for, timeout=limits.timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if work not in done:
            await _kill_and_reap(child, work)
            if cancelled in done:
                raise JobCancelled("cancelled; nothing was changed")
            raise ToolTimeout(f"{argv[0]} did not end within {limits.timeout_s:g} s and was killed")
        _, stderr, status = work.result()
    except BaseException:
        if child.returncode is None:
            await _kill_and_reap(child, work)
        raise
    finally:
        if cancelled:
            cancelled.cancel()
    if status == 127 and "No such file" in stderr:
        raise ToolMissing(f"{argv[0]} is not installed; `make setup` installs it")
    if status != 0:
        raise ToolFailed(list(argv), status, stderr)
    return Finished("".join(collected), time.monotonic() - started)


async def _kill_and_reap(child: asyncio.subprocess.Process, work: "asyncio.Future[tuple[None, str, int]]") -> None:
    """Kill the program's session and wait for its end; one stuck in the kernel (dead NFS) is left behind."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    _, late = await asyncio.wait({asyncio.ensure_future(child.wait())}, timeout=_REAP_TIMEOUT_S)
    if late:
        log.error("process %d does not die; its file system probably hangs", child.pid)
    work.cancel()
    await asyncio.gather(work, return_exceptions=True)


async def _drain(stream: asyncio.StreamReader, sink: Callable[[str], None]) -> None:
    while piece := await stream.read(65536):
        sink(piece.decode("utf-8", "replace"))


async def _tail(stream: asyncio.StreamReader) -> str:
    kept = b""
    while piece := await stream.read(65536):
        kept = (kept + piece)[-_STDERR_KEPT:]
    return kept.decode("utf-8", "replace").strip()
