"""Our private tgtd, and its management socket.

The socket's protocol is that of tgtadm (tgt 1.0.85, usr/tgtadm.h): a fixed request of 120 bytes with a text of
parameters behind it, an answer of 8 bytes with a text behind it. It is spoken here and not by running tgtadm because
a CHAP secret in tgtadm's arguments is shown to everybody on the host by ps(1), and a spawn per command would be most
of the time an export takes. ``Tgtd.start`` asks a question first, so another tgt that speaks otherwise is found out at
once.
"""

import asyncio
import contextlib
import os
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Final

from elemento_storage import process
from elemento_storage.config import IscsiBacking
from elemento_storage.errors import ExportFailed

_REQUEST: Final = struct.Struct("<ii64sIiQQIIIIII")
_ANSWER: Final = struct.Struct("<II")
_NO_TID: Final = -1
_NO_LUN: Final = 2**64 - 1
_ANSWER_S: Final = 10.0
_QUERY_S: Final = 3.0
_START_S: Final = 10.0
_LARGEST_ANSWER: Final = 1 << 26
_CONTROL_PORT: Final = 1  # the number is part of the socket's name, and the socket is in a directory of our own


LIBRARY: Final = os.path.join(os.path.dirname(os.path.dirname(__file__)), "native", "tgt_vhost.so")


class Mode(IntEnum):
    """What a command is about."""

    SYSTEM = 0
    TARGET = 1
    LOGICAL_UNIT = 2
    PORTAL = 3
    CONNECTION = 6
    ACCOUNT = 7


class Op(IntEnum):
    """What is to be done with it."""

    NEW = 0
    DELETE = 1
    SHOW = 2
    BIND = 3
    UNBIND = 4
    UPDATE = 5
    STAT = 6


class Problem(IntEnum):
    """The answers that we act upon; the others are reported by number."""

    NO_TARGET = 4
    NO_LOGICAL_UNIT = 5
    NO_SESSION = 6
    NO_CONNECTION = 7
    TARGET_EXISTS = 9
    ACCOUNT_EXISTS = 14
    NO_ACCOUNT = 15
    TARGET_ACTIVE = 19
    LOGICAL_UNIT_ACTIVE = 20


class Refused(ExportFailed):
    """tgtd said no; ``problem`` is its number."""

    def __init__(self, what: str, problem: int) -> None:
        super().__init__(f"tgtd refuses to {what}: error {problem}")
        self.problem = problem


@dataclass
class Target:
    """A target as tgtd describes it."""

    tid: int
    name: str
    path: str | None = None  #: of LUN 1
    online: bool = False
    readonly: bool = False
    accounts: list[str] = field(default_factory=list)
    acl: list[str] = field(default_factory=list)
    initiators: list[tuple[int, str]] = field(default_factory=list)  #: session id and initiator name


class Tgtd:
    """One tgtd process in a run directory, listening on one portal."""

    def __init__(self, run_directory: str, host: str, port: int, backing: IscsiBacking = IscsiBacking.VHOST) -> None:
        self._with_library = backing is IscsiBacking.VHOST and os.path.exists(LIBRARY)
        self.directory = f"{run_directory}/tgt"
        self.portal = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        self._socket = f"{self.directory}/ipc.{_CONTROL_PORT}"
        self._pid_file = f"{self.directory}/pid"
        self._named = f"{self.directory}/tgtd.pid"
        self._log_file = f"{self.directory}/log"
        self._starting = asyncio.Lock()
        self._trusted: int | None = None  #: the pid that was seen to listen where it shall, and nowhere else

    @property
    def pid(self) -> int | None:
        """The process, if it lives."""
        return process.daemon_pid(self._pid_file, self._named)

    async def start(self) -> None:
        """Have it running, and listening where it shall. Raises ExportFailed, ToolMissing."""
        if self._trusted is not None and self._trusted == self.pid:
            return
        async with self._starting:
            is_new = self.pid is None
            if is_new:
                await self._spawn()
            await self._wait_for_answer()
            await self._require_portal(is_new=is_new)
            self._trusted = self.pid

    async def _spawn(self) -> None:
        preload = {"LD_PRELOAD": LIBRARY} if self._with_library else {}
        os.makedirs(self.directory, mode=0o700, exist_ok=True)
        for name in (self._socket, self._log_file):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name)
        await process.start_daemon(
            [
                "tgtd",
                "-f",
                "-C",
                str(_CONTROL_PORT),
                "--pid-file",
                self._named,
                "--iscsi",
                f"portal={self.portal}",
            ],
            pid_file=self._pid_file,
            log_file=self._log_file,
            environment={"TGT_IPC_SOCKET": f"{self.directory}/ipc", **preload},
        )

    async def _wait_for_answer(self) -> None:
        deadline = asyncio.get_running_loop().time() + _START_S
        while True:
            try:
                await self.execute(Mode.SYSTEM, Op.SHOW)
            except ExportFailed:
                if not self._lives() or asyncio.get_running_loop().time() > deadline:
                    raise ExportFailed(f"tgtd does not start on {self.portal}: {self._log_tail()}") from None
                await asyncio.sleep(0.005)
            else:
                return

    async def _require_portal(self, *, is_new: bool) -> None:
        # tgtd that cannot have its portal listens on port 3260 of every address of the machine instead.
        portals = [line.partition(": ")[2].partition(",")[0] for line in (await self._portals()).splitlines()]
        if portals == [self.portal]:
            return
        if is_new or any(portal.startswith(("0.0.0.0:", "[::]:")) for portal in portals):
            reason = self._log_tail()
            await self.kill()
            raise ExportFailed(f"tgtd cannot listen on {self.portal}: {reason}")
        raise ExportFailed(
            f"tgtd listens on {', '.join(portals)} and the settings say {self.portal}: set export-address and "
            f"iscsi-port back, or end tgtd (pid {self.pid}) when its clients may be disconnected"
        )

    async def _portals(self) -> str:
        return await self.execute(Mode.PORTAL, Op.SHOW)

    def _lives(self) -> bool:
        return self.pid is not None

    def _log_tail(self) -> str:
        try:
            with open(self._log_file, encoding="utf-8", errors="replace") as file:
                lines = [line for line in file.read()[-4096:].splitlines() if "RDMA" not in line]
        except OSError:
            return "it said nothing"
        telling = [line for line in lines if "unable to" in line] or lines
        return telling[-1].partition(") ")[2] or telling[-1] if telling else "it said nothing"

    @property
    def speaks_vhost(self) -> bool:
        """Whether a LUN may be a vhost-user-blk export (native/tgt_vhost.c): now, or of one to be started."""
        pid = self.pid
        if pid is None:
            return self._with_library
        try:
            with open(f"/proc/{pid}/environ", "rb") as file:
                return os.fsencode(f"LD_PRELOAD={LIBRARY}") in file.read()
        except OSError:
            return False

    async def kill(self) -> None:
        """End it at once; it takes no notice of SIGTERM. Raises ExportFailed."""
        pid = self.pid
        if pid is not None and not await process.end_daemon(pid, grace_s=0.0):
            raise ExportFailed(f"tgtd {pid} does not end")

    async def execute(
        self,
        mode: Mode,
        op: Op,
        parameters: str = "",
        *,
        tid: int = _NO_TID,
        lun: int = _NO_LUN,
        session: int = 0,
        connection: int = 0,
        force: bool = False,
    ) -> str:
        """One command; the text of the answer. Raises Refused, ExportFailed."""
        text = parameters.encode() + b"\0" if parameters else b""
        request = _REQUEST.pack(
            mode, op, b"iscsi", _REQUEST.size + len(text), tid, session, lun, connection, 0, 0, 0, 0, force
        )
        patience_s = _QUERY_S if op is Op.SHOW else _ANSWER_S
        try:
            async with asyncio.timeout(patience_s):
                reader, writer = await asyncio.open_unix_connection(self._socket)
                try:
                    writer.write(request + text)
                    problem, length = _ANSWER.unpack(await reader.readexactly(_ANSWER.size))
                    if not _ANSWER.size <= length <= _LARGEST_ANSWER:
                        raise ExportFailed("tgtd answers in a way that is not understood: is it another version?")
                    answer = await reader.readexactly(length - _ANSWER.size)
                finally:
                    writer.close()
        except TimeoutError as error:
            raise ExportFailed(f"tgtd does not answer within {patience_s:g} s") from error
        except (OSError, EOFError) as error:
            raise ExportFailed(f"tgtd cannot be reached: {error}") from error
        if problem:
            raise Refused(f"{op.name.lower()} a {mode.name.lower().replace('_', ' ')}", problem)
        return answer.rstrip(b"\0").decode("utf-8", "replace")

    async def targets(self) -> dict[str, Target]:
        """All targets by name. Raises Refused, ExportFailed."""
        return parse_targets(await self.execute(Mode.TARGET, Op.SHOW))

    async def connections(self, tid: int) -> list[tuple[int, int]]:
        """The open connections of a target: session id, connection id. Raises Refused, ExportFailed."""
        found, session = [], 0
        for line in (await self.execute(Mode.CONNECTION, Op.SHOW, tid=tid)).splitlines():
            key, _, value = line.strip().partition(": ")
            if key == "Session":
                session = int(value)
            elif key == "Connection":
                found.append((session, int(value)))
        return found

    async def traffic(self, tid: int) -> Mapping[str, int]:
        """Bytes that were read and written by the sessions of a target that are open now."""
        total = {"read": 0, "written": 0}
        for line in (await self.execute(Mode.TARGET, Op.STAT, tid=tid)).splitlines()[1:]:
            # tgt lun sid rd_subm(bytes,cmds) rd_done(bytes,cmds) wr_subm(bytes,cmds) wr_done(bytes,cmds) errs
            numbers = re.findall(r"\d+", line)
            if len(numbers) >= 11:
                total["read"] += int(numbers[5])
                total["written"] += int(numbers[9])
        return total


_TARGET: Final = re.compile(r"Target (\d+): (\S+)")


def parse_targets(text: str) -> dict[str, Target]:
    """What ``tgtadm --op show --mode target`` prints."""
    found: dict[str, Target] = {}
    target = Target(0, "")
    section, lun, session = "", -1, 0
    for line in text.splitlines():
        words = line.strip()
        if match := _TARGET.fullmatch(line):
            target = found[match[2]] = Target(int(match[1]), match[2])
        elif line.startswith("    ") and not line.startswith("     "):
            section, lun = words.rstrip(":"), -1
        elif section == "LUN information":
            key, _, value = words.partition(": ")
            if key == "LUN":
                lun = int(value) if value.isdecimal() else -1
            elif lun == 1:
                if key == "Backing store path":
                    target.path = None if value == "None" else value
                elif key == "Online":
                    target.online = value == "Yes"
                elif key == "Readonly":
                    target.readonly = value == "Yes"
        elif section == "I_T nexus information":
            key, _, value = words.partition(": ")
            if key == "I_T nexus":
                session = int(value) if value.isdecimal() else 0
            elif key == "Initiator":
                target.initiators.append((session, value.partition(" alias:")[0]))
        elif section == "Account information":
            target.accounts.append(words)
        elif section == "ACL information":
            target.acl.append(words)
    return found
