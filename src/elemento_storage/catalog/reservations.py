"""Reservations on disk: what is being made or grown, visible to every server that shares the location.

``.elemento/staging/<volume id>.<bytes>.<server id>`` is a directory for a volume in the making (it becomes the volume
in one rename) and an empty file for one that grows or comes back from the bin. The name says it all: one system call
reserves. Whatever a dead server left there is removed.

What waits for a client and not for a server (an upload that goes on after a restart, on whichever server the client
asks) has ``LASTING`` in place of the server's id. Nobody's death ends it: who made it says when it is over.
"""

import contextlib
import os
import shutil
from typing import Final

from elemento_storage.catalog.location import STAGING_DIRECTORY
from elemento_storage.catalog.locks import LockRecord, read_lock
from elemento_storage.catalog.presence import is_alive
from elemento_storage.catalog.volume_directory import LOCK_PREFIX, LOCK_SUFFIX
from elemento_storage.model import normalise_uid

LASTING: Final = "lasting"


def staging_path(location_path: str, volume_id: str, size_bytes: int, server_id: str) -> str:
    """The path of a reservation."""
    return f"{location_path}/{STAGING_DIRECTORY}/{volume_id}.{size_bytes}.{server_id}"


def make(path: str, *, directory: bool) -> None:
    """Reserve. Only under the placement guard. Blocks. Raises OSError."""
    if directory:
        os.mkdir(path, 0o755)
    else:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o644))


def remove(path: str) -> None:
    """Give back; what was half made goes with it. Idempotent. Blocks."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        return
    except OSError:
        # unlink of a directory: EISDIR on Linux, EPERM by POSIX
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(path)


def foreign(location_path: str, own_server_id: str) -> dict[str, int]:
    """Bytes reserved by other servers or for longer than a server lives, by volume id. Blocks. Raises OSError."""
    reserved: dict[str, int] = {}
    for name in os.listdir(f"{location_path}/{STAGING_DIRECTORY}"):
        volume_id, _, rest = name.partition(".")
        size, _, server_id = rest.partition(".")
        if server_id != own_server_id and size.isascii() and size.isdigit():
            reserved[volume_id] = max(int(size), reserved.get(volume_id, 0))
    return reserved


def lasting(location_path: str) -> list[tuple[str, int, str]]:
    """Volume id, bytes and path of what was reserved for longer than a server lives. Blocks. Raises OSError."""
    staging = f"{location_path}/{STAGING_DIRECTORY}"
    found = []
    for name in os.listdir(staging):
        volume_id, _, rest = name.partition(".")
        size, _, holder = rest.partition(".")
        if holder == LASTING and size.isascii() and size.isdigit() and normalise_uid(volume_id) == volume_id:
            found.append((volume_id, int(size), f"{staging}/{name}"))
    return found


def arriving(location_path: str) -> set[str]:
    """Uids of the volumes that have a directory of files on their way into them. Blocks. Raises OSError."""
    staging = f"{location_path}/{STAGING_DIRECTORY}"
    return {name.partition(".")[0] for name in os.listdir(staging) if os.path.isdir(f"{staging}/{name}")}


def dead(location_path: str, own_server_id: str, *, lease_s: float) -> list[tuple[str, list[LockRecord]]]:
    """What dead servers left half made: paths, and the lock files in them. Blocks. Raises OSError."""
    staging = f"{location_path}/{STAGING_DIRECTORY}"
    found = []
    for name in os.listdir(staging):
        server_id = name.rpartition(".")[2]
        if server_id in (own_server_id, LASTING):
            continue
        if not is_alive(location_path, server_id, lease_s=lease_s):
            path = f"{staging}/{name}"
            found.append((path, [lock for lock in _locks_in(path) if lock.server == server_id]))
    return found


def _locks_in(path: str) -> list[LockRecord]:
    try:
        names = os.listdir(path)
    except (FileNotFoundError, NotADirectoryError):
        return []
    read = [read_lock(path, name) for name in names if name.startswith(LOCK_PREFIX) and name.endswith(LOCK_SUFFIX)]
    return [lock for lock in read if lock is not None]
