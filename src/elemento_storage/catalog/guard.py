"""Short critical sections across processes and across servers that share a location.

One file per location, ``.elemento/guard``, and byte-range locks on it: byte 0 guards placement, a byte derived from
the uid guards one volume, so that operations on different volumes never wait for each other. The locks are those of
the open file description (fcntl(2), F_OFD_SETLK): the kernel drops them when the process dies, NFSv4 carries them to
the server, and two threads of one process exclude each other too.

A guard is held for milliseconds around "look, decide, change one name". What takes longer leaves a lock *file* in the
volume (``locks.py``), which is also its journal.

The first 16 bytes of the file are the *stamp* of the server that last changed the location's totals: whoever finds
another stamp than its own reads the location afresh before it believes its totals.
"""

import errno
import fcntl
import os
import struct
import time
from types import TracebackType
from typing import Final, Self

from elemento_storage.errors import LocationUnavailable

WORK_DIRECTORY: Final = ".elemento"
_PLACEMENT_BYTE: Final = 0
_FLOCK: Final = struct.Struct("hhqqi4x")  # struct flock of 64-bit Linux
_WAIT_S: Final = 10.0
_STAMP_BYTES: Final = 16


class Guard:
    """An exclusive lock on one byte of the guard file. Blocks: use in a thread."""

    def __init__(self, location_path: str, byte: int, *, wait_s: float = _WAIT_S) -> None:
        path = f"{location_path}/{WORK_DIRECTORY}/guard"
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            _lock(self._descriptor, byte, wait_s)
        except BaseException:
            os.close(self._descriptor)
            raise

    def read_stamp(self) -> bytes:
        """Who changed the totals last."""
        return os.pread(self._descriptor, _STAMP_BYTES, 0)

    def write_stamp(self, stamp: bytes) -> None:
        """Say that it was us."""
        os.pwrite(self._descriptor, stamp, 0)

    def release(self) -> None:
        """Let the next one in; closing the description drops its locks."""
        os.close(self._descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def placement_guard(location_path: str) -> Guard:
    """Guards the location's totals and reservations. Raises LocationUnavailable, OSError."""
    return Guard(location_path, _PLACEMENT_BYTE)


def volume_guard(location_path: str, volume_id: str) -> Guard:
    """Guards one volume's directory. Raises LocationUnavailable, OSError.

    60 bits of the uid: two volumes that share them wait for each other, nothing worse.
    """
    return Guard(location_path, 1 + int(volume_id[:15], 16))


def try_volume_guard(location_path: str, volume_id: str) -> Guard | None:
    """The same if nobody holds it. Raises OSError."""
    try:
        return Guard(location_path, 1 + int(volume_id[:15], 16), wait_s=0.0)
    except LocationUnavailable:
        return None


def try_lock(descriptor: int, byte: int = 0, *, kind: int = fcntl.F_WRLCK) -> bool:
    """Lock one byte if nobody holds it."""
    try:
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, byte, 1, 0))
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        raise
    return True


def _lock(descriptor: int, byte: int, wait_s: float) -> None:
    # Polling instead of F_OFD_SETLKW: a wait in the kernel has no time-out. Uncontended it is one call.
    deadline = time.monotonic() + wait_s
    pause = 0.0005
    while not try_lock(descriptor, byte):
        if time.monotonic() > deadline:
            raise LocationUnavailable(
                f"another process has held the location's guard for {wait_s:g} s; look for a server that hangs"
            )
        time.sleep(pause)
        pause = min(pause * 2, 0.02)
