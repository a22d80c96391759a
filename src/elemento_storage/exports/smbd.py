"""Our private smbd: one process that listens, one child of it per connection.

It knows no users but those of its files (``smb_files``): nss_wrapper, preloaded, answers for the host's accounts. What
it serves is told by the files, who is connected by smbstatus. A client is disconnected by ending the child that serves
it: when a process has ended, no read or write of it is under way, which no message to it can say.
"""

import asyncio
import contextlib
import os
import socket
from collections import Counter
from collections.abc import Mapping
from typing import Final

import msgspec

from elemento_storage import process
from elemento_storage.errors import ExportFailed, ToolMissing
from elemento_storage.exports.smb_files import Account, Share, SmbFiles

_START_S: Final = 10.0
_GRACE_S: Final = 2.0
_ROUNDS: Final = 5
_STATUS_LIMITS: Final = process.Limits(timeout_s=10.0)


class _ServerId(msgspec.Struct):
    pid: str


class _Session(msgspec.Struct):
    uid: int
    server_id: _ServerId


class _Connection(msgspec.Struct):
    service: str
    server_id: _ServerId


class Status(msgspec.Struct):
    """Who has logged in, and who uses which share (smbstatus(1))."""

    sessions: dict[str, _Session]
    tcons: dict[str, _Connection]

    def count(self) -> Mapping[str, int]:
        """Connections of each share."""
        return Counter(one.service for one in self.tcons.values())

    def pids(self, share: str, uid: int | None) -> set[int]:
        """The processes that serve a share or a user."""
        found = {int(one.server_id.pid) for one in self.tcons.values() if one.service == share}
        return found | {int(one.server_id.pid) for one in self.sessions.values() if one.uid == uid}


def parse_status(text: str) -> Status:
    """What ``smbstatus --json`` prints. Raises ExportFailed."""
    try:
        return msgspec.json.decode(text, type=Status)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ExportFailed("smbstatus answers in a way that is not understood: is samba older than 4.17?") from error


class Smbd:
    """One smbd in a run directory, listening on one address and port."""

    def __init__(self, run_directory: str, host: str, port: int) -> None:
        self.host = host
        self.port = port
        self.directory = f"{run_directory}/smb"
        self.files = SmbFiles(self.directory, host, port)
        self._pid_file = f"{self.directory}/pid"
        self._output = f"{self.directory}/log/output"
        self._log_file = f"{self.directory}/log/smbd"
        self._starting = asyncio.Lock()

    @property
    def pid(self) -> int | None:
        """The process that listens, if it lives."""
        return process.daemon_pid(self._pid_file, self.files.conf)

    # -- life ----------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Have it running. Raises ExportFailed, ToolMissing."""
        async with self._starting:  # even if it lives: it may be starting, and not listen yet
            await self._start()

    async def _start(self) -> None:
        if self.pid is not None:
            if self.files.is_current:
                return
            await self.stop()  # it was started with another address or port
        if os.geteuid() != 0:
            raise ExportFailed(
                "SMB takes root, because smbd works as the user who has logged in: run the server as root, or export "
                "the volume over another protocol"
            )
        if not self.files.is_path_safe:
            raise ExportFailed(
                "SMB needs a run-dir of letters, digits and . _ + - only: samba takes others for its own"
            )
        await self._end_left()
        _require_port(self.host, self.port)
        self.files.make()
        for path in (self._output, self._log_file):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
        await process.start_daemon(
            ["smbd", "-F", "--no-process-group", "-s", self.files.conf, "-l", f"{self.directory}/log"],
            pid_file=self._pid_file,
            log_file=self._output,
            environment={
                "LD_PRELOAD": "libnss_wrapper.so",
                "NSS_WRAPPER_PASSWD": self.files.passwd,
                "NSS_WRAPPER_GROUP": self.files.group,
            },
        )
        deadline = asyncio.get_running_loop().time() + _START_S
        while not await self._listens():
            if self.pid is None or asyncio.get_running_loop().time() > deadline:
                await self.stop()
                raise ExportFailed(
                    f"smbd does not start on {self.host}:{self.port}: {self._reason()}. export-address has to be an "
                    "address of one of this machine's interfaces"
                )
            await asyncio.sleep(0.01)
        if "cannot be preloaded" in _tail(self._output):
            await self.stop()
            raise ToolMissing("libnss_wrapper is not installed; `make setup` installs it")

    async def _listens(self) -> bool:
        try:
            async with asyncio.timeout(1.0):
                _, writer = await asyncio.open_connection(self.host, self.port)
        except (OSError, TimeoutError):
            return False
        writer.close()
        return True

    def _reason(self) -> str:
        lines = (_tail(self._log_file) or _tail(self._output)).splitlines()
        return next((line.strip() for line in lines if "PANIC" in line or "ERROR" in line), lines[-1] if lines else "?")

    async def stop(self) -> None:
        """End it and all connections. Raises ExportFailed."""
        pid = self.pid
        if pid is not None and not await process.end_daemon(pid, grace_s=5.0):
            raise ExportFailed(f"smbd {pid} does not end")
        await self._end_left()

    async def _end_left(self) -> None:
        """End the children of one that has ended. They do so by themselves, unless they hang in a read or write."""
        pids = await asyncio.to_thread(process.left_of_daemon, self._pid_file, self.directory)
        await asyncio.gather(*(self._end(pid) for pid in pids))

    async def _end(self, pid: int) -> None:
        if not await process.end_daemon(pid, grace_s=_GRACE_S):
            raise ExportFailed(f"process {pid} of smbd does not end: a read or write of its client hangs")

    # -- shares --------------------------------------------------------------------------------------------

    async def put(self, share: Share) -> Account:
        """Serve a share to its user. When it was another one, clients are disconnected, and find it as it is now.

        Before, so that a crash leaves nobody with what it was; after, for those who were quicker than we.
        """
        if self.files.would_change(share):
            account = self.files.account_of(share.name)
            await self.disconnect(share.name, account.uid if account else None)
        put = self.files.put(share)
        if put.was_other:
            await self.disconnect(share.name, put.account.uid)
        return put.account

    async def remove(self, name: str) -> None:
        """Serve a share no more; its user is not let in and has nothing under way when this returns."""
        if self.pid is None and not self.files.are_there:
            return
        account = self.files.account_of(name)
        self.files.remove(name)
        if self.pid is None:
            await self._end_left()
            return
        # A login reads the files as they are now, but a session that exists may use a share that has gone. Logins that
        # had read the files before are in the list by now: smbd takes them in one step.
        for _ in range(_ROUNDS):
            if not await self.disconnect(name, account.uid if account else None):
                return
        raise ExportFailed(f"smbd still serves {name}: its clients come back faster than they can be disconnected")

    async def disconnect(self, name: str, uid: int | None) -> int:
        """Close the connections of a share and its user; how many there were.

        Other shares that a client uses over the same TCP connection are closed as well. Clients connect again.
        """
        pids = [pid for pid in (await self.status()).pids(name, uid) if self._is_child(pid)]
        await asyncio.gather(*(self._end(pid) for pid in pids))
        return len(pids)

    def _is_child(self, pid: int) -> bool:
        try:
            with open(f"/proc/{pid}/stat", "rb") as file:
                state, parent = file.read().rpartition(b") ")[2].split()[:2]
        except OSError:
            return False
        return int(parent) == self.pid and state not in b"ZX"

    async def status(self) -> Status:
        """Who is connected. 35 ms of processor time, however many there are. Raises ExportFailed, ToolMissing …"""
        return parse_status((await process.run(["smbstatus", "-s", self.files.conf, "--json"], _STATUS_LIMITS)).stdout)


def _require_port(host: str, port: int) -> None:
    """smbd says in its log only that it cannot listen, and somebody else would answer instead of it."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as attempt:
        attempt.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            attempt.bind((host, port))
        except OSError as error:
            raise ExportFailed(
                f"smbd cannot listen on {host}:{port} ({error.strerror}): give the server another smb-port or "
                "export-address"
            ) from error


def _tail(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()[-65536:]
    except OSError:
        return ""
