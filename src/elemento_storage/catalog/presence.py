"""Which servers are alive in a location.

Every server process leaves a file in ``.elemento/servers/`` of each location, holds a lock on it for as long as it
lives, and touches it regularly. It is named after the *process*, not the machine: a server that restarts is another
one, and finds the leftovers of its dead predecessor.

A process is dead when the lock on its file can be had and either it ran under this very kernel (same boot id: the lock
went with the process) or nobody has touched the file for longer than the lease. A paused process still has its
lock: it is alive, may wake up and write, and nothing of it is taken over.
"""

import contextlib
import errno
import fcntl
import os
import socket
import time
from typing import Final

import msgspec

from elemento_storage.catalog.guard import WORK_DIRECTORY, try_lock
from elemento_storage.model import utc_now

_LOCK_WAIT_S: Final = 5.0


def _read_boot_id() -> str:
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return ""


BOOT_ID: Final = _read_boot_id()


class ServerRecord(msgspec.Struct, frozen=True):
    """What a server says of itself in its file."""

    server: str
    host: str
    boot: str
    pid: int
    started: str


class Presence:
    """This process's sign of life in one location. Blocks: use in a thread."""

    def __init__(self, location_path: str, server_id: str) -> None:
        self._directory = f"{location_path}/{WORK_DIRECTORY}/servers"
        os.makedirs(self._directory, exist_ok=True)
        self._path = f"{self._directory}/{server_id}"
        # Locked before it gets its name: nobody ever sees it unlocked and takes us for dead. (Empty until it is
        # locked, so that remove_dead, which may meet it in between, waits for the lease.)
        temporary = f"{self._directory}/.{server_id}"
        os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644))
        # A descriptor that is kept open for writing would keep the file system from being remounted read-only. A read
        # lock is enough: who wants to know whether we live tries for a write lock.
        self._descriptor = os.open(temporary, os.O_RDONLY | os.O_CLOEXEC)
        try:
            # Somebody who looks whether we are alive may hold the lock for a moment.
            deadline = time.monotonic() + _LOCK_WAIT_S
            while not try_lock(self._descriptor, kind=fcntl.F_RDLCK):
                if time.monotonic() > deadline:
                    raise OSError(errno.EBUSY, "the lock on our sign of life cannot be had")
                time.sleep(0.005)
            record = ServerRecord(server_id, socket.gethostname(), BOOT_ID, os.getpid(), utc_now())
            with open(temporary, "wb") as file:
                file.write(msgspec.json.encode(record) + b"\n")
            os.rename(temporary, self._path)
        except BaseException:
            os.close(self._descriptor)
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise

    def touch(self) -> None:
        """A sign of life. Raises FileNotFoundError when somebody took our file away, OSError."""
        os.utime(self._descriptor)
        os.stat(self._path)

    def leave(self) -> None:
        """Say goodbye at a clean stop."""
        with contextlib.suppress(OSError):
            os.unlink(self._path)
        os.close(self._descriptor)


def is_alive(location_path: str, server_id: str, *, lease_s: float) -> bool:
    """Whether the server process of that id still lives. Blocks. Raises OSError."""
    path = f"{location_path}/{WORK_DIRECTORY}/servers/{server_id}"
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return False
    try:
        if not try_lock(descriptor):
            return True
        try:
            record = msgspec.json.decode(os.read(descriptor, 4096), type=ServerRecord)
        except msgspec.DecodeError:
            record = None
        if record is not None and record.boot == BOOT_ID and BOOT_ID:
            return False
        return time.time() - os.fstat(descriptor).st_mtime < lease_s
    finally:
        os.close(descriptor)


def remove_dead(location_path: str, *, lease_s: float) -> list[str]:
    """Remove the files of servers that are dead; their ids. Call when nothing of theirs is left. Blocks."""
    directory = f"{location_path}/{WORK_DIRECTORY}/servers"
    dead = [name.lstrip(".") for name in os.listdir(directory) if not is_alive(location_path, name, lease_s=lease_s)]
    for name in dead:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"{directory}/{name}")
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"{directory}/.{name}")
    return dead
