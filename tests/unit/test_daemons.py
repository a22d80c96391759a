"""Programs that outlive us: started, found again, told from others, ended."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from elemento_storage import process
from elemento_storage.errors import ToolMissing
from tests.unit.support import python_child, wait_until_gone

SLEEP = "import sys, time; print('here', flush=True); time.sleep(600)"
DEAF = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {SLEEP}"
# The first thread ends, another goes on: as in a daemon that was killed and has not yet let go of everything.
HEADLESS = """
import ctypes, threading, time
threading.Thread(target=time.sleep, args=(600,)).start()
print('here', flush=True)
ctypes.CDLL(None).syscall(60, 0)
"""


class Daemons:
    """Starts daemons in a directory; ends them when the test does."""

    def __init__(self, directory: Path) -> None:
        self.pid_file, self.log_file = str(directory / "pid"), str(directory / "log")
        self.named = f"{directory}/monitor"
        self.started: list[int] = []

    async def start(self, code: str = SLEEP, *, inherit: tuple[int, ...] = ()) -> int:
        argv = [sys.executable, "-c", code, self.named]
        pid = await process.start_daemon(argv, pid_file=self.pid_file, log_file=self.log_file, inherit=inherit)
        self.started.append(pid)
        while "here" not in Path(self.log_file).read_text():
            await asyncio.sleep(0.005)
        return pid

    def pid(self) -> int | None:
        return process.daemon_pid(self.pid_file, self.named)


@pytest.fixture
async def daemons(tmp_path: Path) -> AsyncIterator[Daemons]:
    one = Daemons(tmp_path)
    yield one
    for pid in one.started:
        await process.end_daemon(pid, grace_s=0)


async def test_a_daemon_is_found_and_ended(daemons: Daemons) -> None:
    assert daemons.pid() is None
    pid = await daemons.start()
    assert daemons.pid() == pid
    assert os.getsid(pid) != os.getsid(0), "what ends our session would end it"
    assert await process.end_daemon(pid, grace_s=5)
    assert daemons.pid() is None
    assert wait_until_gone(pid)
    assert await process.end_daemon(pid, grace_s=5)


async def test_a_daemon_that_does_not_listen_is_killed(daemons: Daemons) -> None:
    pid = await daemons.start(DEAF)
    assert await process.end_daemon(pid, grace_s=0.05)
    assert daemons.pid() is None


async def test_somebody_elses_process_is_not_ours(daemons: Daemons) -> None:
    for pid in (os.getpid(), 2, 2**22 + 1):  # another program, the kernel's own, none at all
        Path(daemons.pid_file).write_text(f"{pid}\n")
        assert daemons.pid() is None
    for content in ("", "x", "-1", "1 2"):
        Path(daemons.pid_file).write_text(content)
        assert daemons.pid() is None


async def test_a_daemon_is_there_until_its_last_thread_has_ended(daemons: Daemons) -> None:
    """Its files are open and locked for so long: who believes it gone finds the image in use."""
    pid = await daemons.start(HEADLESS)
    while Path(f"/proc/{pid}/cmdline").read_bytes():
        pass
    assert daemons.pid() == pid
    os.kill(pid, signal.SIGKILL)
    assert wait_until_gone(pid)
    while os.path.exists(f"/proc/{pid}") and len(os.listdir(f"/proc/{pid}/task")) > 1:
        pass
    assert daemons.pid() is None


async def test_a_zombie_is_gone(tmp_path: Path) -> None:
    with python_child("import sys; print('here', flush=True); sys.stdin.read()", str(tmp_path)) as child:
        (tmp_path / "pid").write_text(f"{child.pid}\n")
        assert process.daemon_pid(str(tmp_path / "pid"), str(tmp_path)) == child.pid
        child.kill()
        assert wait_until_gone(child.pid)
        assert process.daemon_pid(str(tmp_path / "pid"), str(tmp_path)) is None


async def test_only_what_is_given_is_inherited(daemons: Daemons, tmp_path: Path) -> None:
    with (tmp_path / "given").open("w") as given, (tmp_path / "kept").open("w") as kept:
        os.set_inheritable(kept.fileno(), True)
        pid = await daemons.start(inherit=(given.fileno(),))
    opened = {os.readlink(f"/proc/{pid}/fd/{number}") for number in os.listdir(f"/proc/{pid}/fd")}
    assert opened == {"/dev/null", daemons.log_file, str(tmp_path / "given")}


async def test_a_missing_program_is_told(tmp_path: Path) -> None:
    with pytest.raises(ToolMissing, match="no-such-program"):
        await process.start_daemon(["no-such-program"], pid_file=str(tmp_path / "p"), log_file=str(tmp_path / "l"))
