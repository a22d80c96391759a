"""The only place that starts other programs.

Every program runs with a time-out, limits on its memory and CPU time, no standard input but what it is given, a plain
locale, in its own session, and dies with this process: an orphaned qemu-img that goes on writing after a restart is a
second writer. ``setpriv --pdeathsig`` and ``prlimit`` (util-linux) set that up in the child; a ``preexec_fn`` would run
Python between fork and exec, which is unsafe with threads.

Daemons are the exception (``start_daemon``): they serve clients and outlive this process on purpose. They are found
again by their pid file, and believed to be ours when their command line names our directory.
"""

import asyncio
import contextlib
import fcntl
import logging
import os
import select
import shutil
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from elemento_storage.errors import JobCancelled, ToolFailed, ToolMissing, ToolTimeout

log = logging.getLogger(__name__)

_STDERR_KEPT = 4096
_REAP_TIMEOUT_S = 10.0
_START_TIMEOUT_S = 10.0
_PIPE_BYTES = 1 << 20
_KERNEL_THREAD = 0x00200000  # PF_KTHREAD of Linux; they have no command line
_OOM_SCORE = -500  # under memory pressure the kernel ends a guest or a cache before the disk of twenty guests
_DETACH = 'exec >>"$1" 2>&1 </dev/null; echo $$ >"$0.new" && mv "$0.new" "$0" || exit; shift; exec "$@"'


@dataclass(frozen=True)
class Limits:
    """What a program may use. ``address_space_bytes`` 0 means no limit."""

    timeout_s: float
    address_space_bytes: int = 2 * 2**30
    cpu_s: int = 0


@dataclass(frozen=True)
class Finished:
    """A program that ended with a status that was expected."""

    stdout: str
    seconds: float
    status: int = 0
    stderr: str = ""


async def run(
    argv: Sequence[str],
    limits: Limits,
    *,
    on_output: Callable[[str], None] | None = None,
    cancel: asyncio.Event | None = None,
    environment: Mapping[str, str] | None = None,
    expected: frozenset[int] = frozenset({0}),
    standard_input: bytes | None = None,
) -> Finished:
    """Run a program to its end. ``environment`` is added to a plain one.

    ``standard_input`` is for a few words that nobody else may see: arguments are shown to everybody by ps(1).

    ``on_output`` gets standard output piece by piece as it comes (progress); it is then not collected. When
    ``cancel`` is set the program is killed.

    Raises ToolMissing, ToolFailed (an exit status that is not ``expected``), ToolTimeout, JobCancelled.
    """
    started = time.monotonic()
    stdin = None if standard_input is None else _readable(standard_input)
    try:
        child = await asyncio.create_subprocess_exec(
            *_confined(limits),
            *argv,
            stdin=asyncio.subprocess.DEVNULL if stdin is None else stdin,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=_environment(environment),
            start_new_session=True,
        )
    except FileNotFoundError as error:
        raise ToolMissing("setpriv and prlimit are missing: install the package util-linux") from error
    finally:
        if stdin is not None:
            os.close(stdin)
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
    _raise_for_status(argv, status, stderr, expected)
    return Finished("".join(collected), time.monotonic() - started, status, stderr)


@contextlib.asynccontextmanager
async def output_of(argv: Sequence[str], limits: Limits, *, standard_input: int) -> AsyncIterator[int]:
    """A program whose output is read, in a thread, from the descriptor that this gives; it blocks.

    Leaving the block in good order waits for the program's end; any other way kills it. ``standard_input`` is a
    descriptor. The time-out is for the block. Raises ToolMissing, ToolFailed, ToolTimeout.
    """
    reader, writer = os.pipe2(os.O_CLOEXEC)
    try:
        try:
            child = await asyncio.create_subprocess_exec(
                *_confined(limits),
                *argv,
                stdin=standard_input,
                stdout=writer,
                stderr=asyncio.subprocess.PIPE,
                env=_environment(None),
                start_new_session=True,
            )
        except FileNotFoundError as error:
            raise ToolMissing("setpriv and prlimit are missing: install the package util-linux") from error
        finally:
            os.close(writer)
        with contextlib.suppress(OSError):  # fewer switches between two programs; not everybody may
            fcntl.fcntl(reader, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        assert child.stderr is not None
        ending = asyncio.gather(_tail(child.stderr), child.wait())
        try:
            async with asyncio.timeout(limits.timeout_s):
                yield reader
                stderr, status = await asyncio.shield(ending)
        except BaseException as error:
            if child.returncode is None:
                await _kill_and_reap(child, ending)
            if isinstance(error, TimeoutError):
                raise ToolTimeout(f"{argv[0]} did not end within {limits.timeout_s:g} s and was killed") from error
            raise
        _raise_for_status(argv, status, stderr, frozenset({0}))
    finally:
        os.close(reader)


def _confined(limits: Limits) -> list[str]:
    """What goes before a program's own arguments: it dies with us, and has limits."""
    prefix = ["setpriv", "--pdeathsig", "KILL", "--", "prlimit"]
    if limits.address_space_bytes:
        prefix.append(f"--as={limits.address_space_bytes}")
    if limits.cpu_s:
        prefix.append(f"--cpu={limits.cpu_s}")
    return [*prefix, "--core=0", "--"]


def _raise_for_status(argv: Sequence[str], status: int, stderr: str, expected: frozenset[int]) -> None:
    if status == 127 and "No such file" in stderr:
        raise ToolMissing(f"{argv[0]} is not installed; `make setup` installs it")
    if status not in expected:
        raise ToolFailed(list(argv), status, stderr)


async def _kill_and_reap(child: asyncio.subprocess.Process, work: "asyncio.Future[Any]") -> None:
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


def _readable(content: bytes) -> int:
    """A descriptor that holds some bytes and then ends. A pipe: uvloop's own is a socket, which has no /dev/stdin."""
    assert len(content) <= select.PIPE_BUF  # so that writing it waits for nobody
    reader, writer = os.pipe2(os.O_CLOEXEC)
    try:
        os.write(writer, content)
    finally:
        os.close(writer)
    return reader


async def start_daemon(
    argv: Sequence[str],
    *,
    pid_file: str,
    log_file: str,
    address_space_bytes: int = 0,
    environment: Mapping[str, str] | None = None,
    inherit: Sequence[int] = (),
) -> int:
    """Start a program that outlives this process; its pid. What it prints goes to the end of ``log_file``.

    ``inherit`` are descriptors it keeps open; no others of ours. (uvloop's children inherit a few more, and a daemon
    that holds the other end of a pipe keeps its reader waiting for ever; so this goes by way of a thread.)

    That it has started says nothing yet of whether it serves. Raises ToolMissing, ToolFailed, ToolTimeout.
    """
    if shutil.which(argv[0]) is None:
        raise ToolMissing(f"{argv[0]} is not installed; `make setup` installs it")
    with contextlib.suppress(FileNotFoundError):
        os.unlink(pid_file)
    limit = [f"--as={address_space_bytes}"] if address_space_bytes else []
    detached = ["setsid", "--fork", "--", "prlimit", "--core=0", *limit, "--"]
    detached += ["sh", "-c", _DETACH, pid_file, log_file, *argv]

    def spawn() -> int:
        null = subprocess.DEVNULL
        return subprocess.run(
            detached,
            stdin=null,
            stdout=null,
            stderr=null,
            env=_environment(environment),
            pass_fds=inherit,
            timeout=_START_TIMEOUT_S,
            check=False,
        ).returncode

    try:
        status = await asyncio.to_thread(spawn)
    except FileNotFoundError as error:
        raise ToolMissing("setsid and prlimit are missing: install the package util-linux") from error
    except subprocess.TimeoutExpired as error:
        raise ToolTimeout(f"{argv[0]} was not started within {_START_TIMEOUT_S:g} s") from error
    if status:
        raise ToolFailed(detached, status, "")
    deadline = time.monotonic() + _START_TIMEOUT_S
    while (pid := _read_pid(pid_file)) is None:
        if time.monotonic() > deadline:
            raise ToolTimeout(f"{argv[0]} was not started within {_START_TIMEOUT_S:g} s")
        await asyncio.sleep(0.001)
    _protect_from_oom_killer(pid)
    return pid


def daemon_pid(pid_file: str, named: str) -> int | None:
    """The pid of a daemon that lives and has ``named`` in its command line; None when there is none."""
    pid = _read_pid(pid_file)
    if pid is None:
        return None
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            command_line = file.read()
        if not command_line:  # in the middle of an exec, about to end, a zombie, or the kernel's own
            with open(f"/proc/{pid}/stat", "rb") as file:
                state, *_, flags = file.read().rpartition(b") ")[2].split()[:7]
            # A zombie's threads may still end, and until they have, its files are open and locked.
            is_gone = state in (b"Z", b"X") and len(os.listdir(f"/proc/{pid}/task")) <= 1
            return None if is_gone or int(flags) & _KERNEL_THREAD else pid
    except OSError:
        return None
    return pid if os.fsencode(named) in command_line else None


def left_of_daemon(pid_file: str, directory: str) -> list[int]:
    """Children that outlived a daemon: they are in the session that it led, and have files in ``directory`` open.

    Blocks. Their titles may be anything by now; and after a reboot the pid may be that of another session.
    """
    leader = _read_pid(pid_file)
    if leader is None:
        return []
    found = []
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        with contextlib.suppress(OSError):  # it has ended
            with open(f"/proc/{name}/stat", "rb") as file:
                state, _, _, session = file.read().rpartition(b") ")[2].split()[:4]
            if int(session) == leader and state not in b"ZX" and _has_open(name, directory):
                found.append(int(name))
    return found


def _has_open(pid: str, directory: str) -> bool:
    prefix = f"{os.path.realpath(directory)}/"
    for name in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):  # it has been closed
            if os.readlink(f"/proc/{pid}/fd/{name}").startswith(prefix):
                return True
    return False


async def end_daemon(pid: int, *, grace_s: float) -> bool:
    """SIGTERM, after ``grace_s`` SIGKILL; whether the process is gone at the end."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        for number, patience_s in ((signal.SIGTERM, grace_s), (signal.SIGKILL, _REAP_TIMEOUT_S)):
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(descriptor, number)
            if await wait_for_end(descriptor, patience_s):
                return True
    finally:
        os.close(descriptor)
    log.error("process %d does not die; its file system probably hangs", pid)
    return False


async def wait_for_end(pid_descriptor: int, timeout_s: float) -> bool:
    """Whether the process of a pidfd has ended within the time."""
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    loop.add_reader(pid_descriptor, ended.set)
    try:
        await asyncio.wait_for(ended.wait(), timeout_s)
    except TimeoutError:
        return False
    else:
        return True
    finally:
        loop.remove_reader(pid_descriptor)


def _environment(more: Mapping[str, str] | None) -> dict[str, str]:
    path = os.environ.get("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
    return {"PATH": path, "LC_ALL": "C.UTF-8", **(more or {})}


def _protect_from_oom_killer(pid: int) -> None:
    with contextlib.suppress(OSError), open(f"/proc/{pid}/oom_score_adj", "w", encoding="ascii") as file:
        file.write(str(_OOM_SCORE))  # lowering it takes root


def _read_pid(pid_file: str) -> int | None:
    try:
        with open(pid_file, encoding="ascii") as file:
            return int(file.read())
    except (OSError, ValueError):
        return None
