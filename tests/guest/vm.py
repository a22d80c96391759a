"""Virtual machines for tests: started, watched on their serial console, moved to each other, and always ended.

Emulated (TCG) on every machine, so that a test means and takes the same everywhere.
"""

import asyncio
import contextlib
import re
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from qemu.qmp import ExecuteError, QMPClient, QMPError

from tests.guest.build import COMMAND_LINE, images

#: Pinned: the two ends of a migration must be the same machine, and a newer QEMU must not change what is tested.
MACHINE = "pc-i440fx-10.0"

Orders = Mapping[str, str | int]

_POLL_S = 0.01
_END_S = 20.0


class GuestFailed(Exception):
    """A guest ended, or did not do in time what was waited for; the message holds its console."""


class MigrationFailed(Exception):
    """A migration ended otherwise than completed."""


@dataclass(frozen=True)
class Migration:
    """What a completed migration took."""

    total_ms: int
    downtime_ms: int
    transferred_bytes: int


class Guest:
    """One QEMU process, running while the context lasts.

    ``disks`` are QEMU's words for the disks, pasted as they are (``-blockdev`` ... ``-device`` ...). ``orders`` choose
    the workload (see init.c): ``mode`` is ``boot``, ``rw`` or ``count``; ``disk`` (vda), ``base``, ``seed``; for
    ``rw`` ``extents`` and ``stride``; for ``count`` ``max``, ``rate`` (records a second, 0 for no limit), ``every``.
    With ``boots_itself`` the BIOS finds the system on the disk, and ``base`` is ``BOOT_DISK_AREA`` if not ordered
    otherwise; without, QEMU loads the system, the disk may hold anything, and ``base`` is 0.
    With ``incoming`` it waits for ``migrate_to`` of another guest.
    """

    def __init__(
        self,
        directory: Path,
        disks: Sequence[str],
        orders: Orders | None = None,
        *,
        name: str = "guest",
        boots_itself: bool = False,
        incoming: bool = False,
        memory_mib: int = 96,
        more: Sequence[str] = (),
    ) -> None:
        self.name = name
        self.console_path = directory / f"{name}.console"
        self.errors_path = directory / f"{name}.stderr"
        self.client = QMPClient(name)
        self.process: subprocess.Popen[bytes] | None = None
        self._words = [
            *("qemu-system-x86_64", "-name", name, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
            *("-accel", "tcg,thread=multi", "-cpu", "qemu64", "-M", MACHINE, "-m", str(memory_mib)),
            *("-chardev", f"file,id=console,path={_escaped(self.console_path)}", "-serial", "chardev:console"),
        ]
        if not boots_itself:
            kernel = images()
            self._words += ["-kernel", str(kernel.kernel), "-initrd", str(kernel.initramfs), "-append", COMMAND_LINE]
        for key, value in (orders or {}).items():
            self._words += ["-smbios", f"type=11,value={_escaped(f'guest.{key}={value}')}"]
        if incoming:
            self._words += ["-incoming", "defer"]
        self._words += [*disks, *more]

    # ---- its life ----

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def start(self) -> None:
        """Start QEMU and connect to its monitor; the guest runs when this returns."""
        assert self.process is None
        # One end is QEMU's from the start: no path that may be too long, no waiting for a socket to come up.
        ours, theirs = socket.socketpair()
        self.console_path.write_bytes(b"")
        with theirs, self.errors_path.open("wb") as errors:
            self.process = subprocess.Popen(
                # Dies with the tests, whatever becomes of them.
                [
                    *("setpriv", "--pdeathsig", "KILL", "--", *self._words),
                    *("-chardev", f"socket,id=monitor,fd={theirs.fileno()}", "-mon", "chardev=monitor,mode=control"),
                ],
                stdin=subprocess.DEVNULL,
                stdout=errors,
                stderr=errors,
                pass_fds=(theirs.fileno(),),
            )
        try:
            await asyncio.wait_for(self.client.connect(ours), _END_S)
        except (QMPError, TimeoutError) as error:
            ours.close()
            await self.close()
            raise GuestFailed(self._story("did not start")) from error
        except BaseException:
            ours.close()
            await self.close()
            raise

    @property
    def running(self) -> bool:
        """Whether the process is there."""
        return self.process is not None and self.process.poll() is None

    async def wait_off(self, timeout_s: float = 60) -> None:
        """Until the guest has powered itself off, and QEMU ended well."""
        assert self.process is not None
        await self._until(lambda: not self.running, timeout_s, "did not power off")
        if self.process.returncode:
            raise GuestFailed(self._story("ended badly"))

    async def quit(self) -> None:
        """Ask QEMU to end, as a hypervisor does with the source of a migration."""
        # QEMU may be gone before its answer is.
        with contextlib.suppress(QMPError):
            await self.client.execute("quit")
        await self.wait_off(_END_S)

    def kill(self) -> None:
        """SIGKILL: the host's power failure."""
        assert self.process is not None
        self.process.kill()
        self.process.wait(_END_S)

    async def close(self) -> None:
        """End QEMU if it is still there, and the connection to it."""
        if self.running:
            self.kill()
        # The connection broke because QEMU ended; that is what was wanted.
        with contextlib.suppress(EOFError, OSError, QMPError):
            await self.client.disconnect()

    # ---- its console ----

    @property
    def console(self) -> str:
        """What the guest has printed so far."""
        return self.console_path.read_text(errors="replace").replace("\r", "")

    async def wait_for(self, pattern: str, timeout_s: float = 60) -> re.Match[str]:
        """Until a regular expression (``^`` and ``$`` of lines) is found on the console; GuestFailed if it never is."""
        wanted = re.compile(pattern, re.MULTILINE)
        found: list[re.Match[str]] = []

        def look() -> bool:
            # Asked first: what was printed before the end is on the console then.
            running = self.running
            if match := wanted.search(self.console):
                found.append(match)
            elif not running:
                raise GuestFailed(self._story(f"ended without {pattern!r}"))
            return bool(found)

        await self._until(look, timeout_s, f"did not print {pattern!r}")
        return found[0]

    def complaints(self) -> list[str]:
        """Every line that tells of a fault: what the workload found wrong, and what the kernel did."""
        return re.findall(r"^.*(?:IOERR|BADREAD|I/O error|Kernel panic|module \d+:).*$", self.console, re.MULTILINE)

    def counted(self) -> int:
        """The last record that the workload ``count`` has told of: it and all before it are on the disk."""
        told = re.findall(r"^COUNT (\d+) [0-9a-f]{64}$", self.console, re.MULTILINE)
        return int(told[-1]) if told else 0

    # ---- its monitor ----

    async def qmp(self, command: str, **arguments: Any) -> Any:
        """A QMP command's answer, underscores for dashes in the arguments' names; GuestFailed if QEMU is gone."""
        words = {key.replace("_", "-"): value for key, value in arguments.items()}
        try:
            return await self.client.execute(command, words)
        except ExecuteError:
            raise
        except QMPError as error:
            raise GuestFailed(self._story(f"ended during {command}")) from error

    async def migrate_to(
        self, destination: "Guest", *, bytes_per_s: int | None = None, timeout_s: float = 60
    ) -> Migration:
        """Move to a guest that was started with ``incoming``; it runs when this returns, and this one has stopped."""
        await self.begin_migration(destination, bytes_per_s=bytes_per_s)
        return await self.finish_migration(destination, timeout_s=timeout_s)

    async def begin_migration(self, destination: "Guest", *, bytes_per_s: int | None = None) -> None:
        """Start moving, no faster than told, and return at once."""
        await destination.qmp("migrate-incoming", uri="tcp:127.0.0.1:0")
        (address,) = (await destination.qmp("query-migrate"))["socket-address"]
        if bytes_per_s is not None:
            await self.qmp("migrate-set-parameters", max_bandwidth=bytes_per_s)
        await self.qmp("migrate", uri=f"tcp:{address['host']}:{address['port']}")

    async def finish_migration(self, destination: "Guest", *, timeout_s: float = 60) -> Migration:
        """Until the destination runs; MigrationFailed if it never will."""
        deadline = time.monotonic() + timeout_s
        while (state := await self.qmp("query-migrate"))["status"] != "completed":
            if state["status"] in ("failed", "cancelled"):
                raise MigrationFailed(f"{state['status']}: {state.get('error-desc')}\n{destination._story('')}")
            if time.monotonic() > deadline:
                raise MigrationFailed(f"not completed after {timeout_s:g} s: {state}")
            await asyncio.sleep(_POLL_S)
        # The source is done when all is sent; the destination opens the disks for writing after that.
        while (status := (await destination.qmp("query-status"))["status"]) != "running":
            if time.monotonic() > deadline:
                raise MigrationFailed(f"the destination is {status!r} after {timeout_s:g} s")
            await asyncio.sleep(_POLL_S)
        return Migration(state["total-time"], state["downtime"], state["ram"]["transferred"])

    # ---- helpers ----

    async def _until(self, done: Callable[[], bool], timeout_s: float, otherwise: str) -> None:
        deadline = time.monotonic() + timeout_s
        while not done():
            if time.monotonic() > deadline:
                raise GuestFailed(self._story(f"{otherwise} within {timeout_s:g} s"))
            await asyncio.sleep(_POLL_S)

    def _story(self, what: str) -> str:
        status = self.process.poll() if self.process else None
        return (
            f"{self.name} {what} (status {status})\n{self.errors_path.read_text(errors='replace')[-2000:]}"
            f"{self.console[-3000:]}"
        )


def _escaped(value: str | Path) -> str:
    """A value inside one of QEMU's comma-separated options."""
    return str(value).replace(",", ",,")
