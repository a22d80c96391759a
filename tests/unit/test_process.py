import asyncio
import os
import resource
import signal
import sys
import time
from collections.abc import Awaitable
from pathlib import Path

import pytest

from elemento_storage import process
from elemento_storage.errors import JobCancelled, ToolFailed, ToolMissing, ToolTimeout
from elemento_storage.process import Finished, Limits
from tests.unit.support import python_child, wait_until_gone

QUICK = Limits(timeout_s=10)


def shell(script: str, limits: Limits = QUICK, cancel: asyncio.Event | None = None) -> Awaitable[Finished]:
    return process.run(["sh", "-c", script], limits, cancel=cancel)


async def pid_in(path: Path) -> int:
    for _ in range(500):
        if path.exists() and (text := path.read_text()).endswith("\n"):
            return int(text)
        await asyncio.sleep(0.01)
    raise AssertionError("the program did not start")


async def test_standard_output_comes_back() -> None:
    finished = await shell("echo one; echo two")
    assert finished.stdout == "one\ntwo\n"
    assert 0 < finished.seconds < 10


async def test_arguments_are_passed_as_they_are() -> None:
    odd = ["a b", "$HOME", ";", "*", "--", "é", ""]
    finished = await process.run([sys.executable, "-c", "import sys; print(sys.argv[1:])", *odd], QUICK)
    assert finished.stdout.strip() == repr(odd)


async def test_much_output_on_both_streams_does_not_block() -> None:
    script = "import sys\nfor _ in range(2000): sys.stdout.write('o' * 1000); sys.stderr.write('e' * 1000)"
    finished = await process.run([sys.executable, "-c", script], QUICK)
    assert len(finished.stdout) == 2_000_000


async def test_output_can_be_had_as_it_comes() -> None:
    pieces: list[str] = []
    finished = await process.run(["sh", "-c", "echo one; sleep 0.05; echo two"], QUICK, on_output=pieces.append)
    assert "".join(pieces) == "one\ntwo\n"
    assert len(pieces) > 1
    assert finished.stdout == ""


async def test_failure_keeps_arguments_status_and_the_end_of_stderr() -> None:
    with pytest.raises(ToolFailed) as caught:
        await shell("head -c 100000 /dev/zero | tr '\\0' x >&2; echo the reason >&2; exit 3")
    error = caught.value
    assert error.status == 3
    assert error.argv[:2] == ["sh", "-c"]
    assert error.stderr.endswith("the reason")
    assert len(error.stderr) <= 4096
    assert "the reason" not in error.message


async def test_death_by_a_signal_is_a_failure() -> None:
    with pytest.raises(ToolFailed) as caught:
        await shell("kill -TERM $$")
    assert caught.value.status == -signal.SIGTERM


async def test_a_missing_program_is_told_by_name() -> None:
    with pytest.raises(ToolMissing, match="no-such-program"):
        await process.run(["no-such-program"], QUICK)


async def test_a_program_that_ends_with_127_itself_is_not_missing() -> None:
    with pytest.raises(ToolFailed):
        await shell("exit 127")


async def test_missing_util_linux_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ToolMissing, match="util-linux"):
        await process.run(["true"], QUICK)


async def test_no_standard_input_a_plain_environment_and_a_session_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "x")
    monkeypatch.setenv("LC_ALL", "de_DE")
    assert (await shell("cat")).stdout == ""
    assert sorted((await process.run(["env"], QUICK)).stdout.split()) == [
        "LC_ALL=C.UTF-8",
        f"PATH={os.environ['PATH']}",
    ]
    script = "import os; print(os.getsid(0) == os.getpid())"
    assert (await process.run([sys.executable, "-c", script], QUICK)).stdout == "True\n"


async def test_standard_input_is_what_is_given_and_can_be_opened_by_name() -> None:
    assert (await process.run(["cat"], QUICK, standard_input=b"a secret")).stdout == "a secret"
    assert (await process.run(["cat", "/dev/stdin"], QUICK, standard_input=b"a secret")).stdout == "a secret"
    assert (await process.run(["true"], QUICK, standard_input=b"nobody reads it")).stdout == ""
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ToolMissing):
        await process.run(["no-such-program"], QUICK, standard_input=b"a secret")
    assert len(os.listdir("/proc/self/fd")) == before


async def test_output_that_is_not_utf8_is_no_error() -> None:
    assert (await shell("printf '\\377x'")).stdout == "\ufffdx"


async def test_a_program_that_takes_too_long_is_killed_with_its_children(tmp_path: Path) -> None:
    started = time.monotonic()
    with pytest.raises(ToolTimeout, match=r"0\.5 s"):
        await shell(f"sleep 60 & echo $! > {tmp_path}/pid; wait", Limits(timeout_s=0.5))
    assert time.monotonic() - started < 5
    assert wait_until_gone(await pid_in(tmp_path / "pid"))


async def test_cancel_kills_the_program_and_its_children(tmp_path: Path) -> None:
    cancel = asyncio.Event()
    running = asyncio.ensure_future(shell(f"sleep 60 & echo $! > {tmp_path}/pid; wait", cancel=cancel))
    pid = await pid_in(tmp_path / "pid")
    cancel.set()
    with pytest.raises(JobCancelled):
        await asyncio.wait_for(running, 5)
    assert wait_until_gone(pid)


async def test_cancelled_before_it_began() -> None:
    cancel = asyncio.Event()
    cancel.set()
    with pytest.raises(JobCancelled):
        await shell("sleep 60", cancel=cancel)


async def test_a_cancelled_task_leaves_no_program_behind(tmp_path: Path) -> None:
    running = asyncio.ensure_future(shell(f"sleep 60 & echo $! > {tmp_path}/pid; wait"))
    pid = await pid_in(tmp_path / "pid")
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert wait_until_gone(pid)


async def test_memory_is_limited() -> None:
    grab = [sys.executable, "-c", "x = bytearray(600 * 2**20); print(len(x))"]
    with pytest.raises(ToolFailed, match="exit status 1"):
        await process.run(grab, Limits(timeout_s=10, address_space_bytes=500 * 2**20))
    assert await process.run(grab, Limits(timeout_s=10, address_space_bytes=0))


async def test_limits_are_set_and_there_are_no_core_dumps() -> None:
    script = "import resource as r; print([r.getrlimit(x)[0] for x in (r.RLIMIT_AS, r.RLIMIT_CPU, r.RLIMIT_CORE)])"
    run = await process.run([sys.executable, "-c", script], Limits(timeout_s=10, address_space_bytes=2**30, cpu_s=7))
    assert run.stdout.strip() == f"[{2**30}, 7, 0]"
    run = await process.run([sys.executable, "-c", script], Limits(timeout_s=10, address_space_bytes=0))
    inherited = [resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_AS, resource.RLIMIT_CPU)]
    assert run.stdout.strip() == str([*inherited, 0])


async def test_programs_run_side_by_side() -> None:
    started = time.monotonic()
    await asyncio.gather(*(shell("sleep 0.4") for _ in range(8)))
    assert time.monotonic() - started < 2


def test_a_program_dies_with_the_process_that_started_it(tmp_path: Path) -> None:
    """An orphaned qemu-img that goes on writing after a restart is a second writer."""
    code = (
        "import asyncio, sys\n"
        "from elemento_storage import process\n"
        "print('ready', flush=True)\n"
        "script = f'echo $$ > {sys.argv[1]}; exec sleep 60'\n"
        "asyncio.run(process.run(['sh', '-c', script], process.Limits(timeout_s=60)))\n"
    )
    path = tmp_path / "pid"
    with python_child(code, str(path)) as child:
        pid = asyncio.run(pid_in(path))
        assert Path(f"/proc/{pid}").exists()
        child.kill()
        child.wait(5)
        assert wait_until_gone(pid)
