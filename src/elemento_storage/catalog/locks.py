"""Lock files: ``elemento.<purpose>.<operation_uid>.ignore`` in the volume, for the length of an operation.

The file is the operation's journal too: one line of JSON with all that is needed to roll back or finish if the server
dies. It is created and removed under the volume's guard, which makes taking it atomic across processes and servers.

Those who only read say so in the file (``shared``): any number of them hold a volume together, and whoever would change
it is refused until the last one has let go.
"""

import contextlib
import os
import re

import msgspec

from elemento_storage.catalog.presence import is_alive
from elemento_storage.catalog.volume_directory import LIVE_LOCKS, LOCK_PREFIX, LOCK_SUFFIX
from elemento_storage.durable import fsync_directory, replace
from elemento_storage.faultpoints import reached
from elemento_storage.model import normalise_uid, printable, utc_now

_NAME = re.compile(r"elemento\.([^.]+)\.([^.]+)\.ignore", re.ASCII)


class LockRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What a lock file says. One we cannot read (another product's) has no server."""

    purpose: str
    operation: str
    server: str = ""
    host: str = ""
    pid: int = 0
    started: str = ""
    client: str | None = None
    shared: bool = False  #: held by somebody who only reads
    journal: dict[str, str | int] = {}

    @property
    def is_live(self) -> bool:
        """Whether who holds it does not mind that the volume is exported, written and unexported meanwhile."""
        return self.file_name.startswith(LIVE_LOCKS)

    @property
    def file_name(self) -> str:
        """The document's name for the file."""
        return f"{LOCK_PREFIX}{self.purpose}.{self.operation}{LOCK_SUFFIX}"


def new_lock(
    purpose: str,
    operation: str,
    server_id: str,
    client: str | None,
    journal: dict[str, str | int],
    *,
    shared: bool = False,
) -> LockRecord:
    """The record of an operation that starts now, here."""
    return LockRecord(
        purpose=purpose,
        operation=operation,
        server=server_id,
        host=os.uname().nodename,
        pid=os.getpid(),
        started=utc_now(),
        client=client,
        shared=shared,
        journal=journal,
    )


def write_lock(directory: str, lock: LockRecord) -> None:
    """Make the lock durable, and a shared one visible. Blocks.

    Only under the volume's guard, with no lock there that excludes it.
    """
    path = f"{directory}/{lock.file_name}"
    try:
        # In one rename: half a lock file could be read by nobody, and would lock the volume for ever.
        # After a power failure nobody reads any more: then it does no harm if a reader's is gone, or is back.
        replace(path, msgspec.json.encode(lock) + b"\n", sync_name=not lock.shared)
        reached("lock.written")
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(path)
        raise


def rewrite_lock(directory: str, lock: LockRecord) -> None:
    """Make another content of our own lock durable; the lock stays when that fails, with either content. Blocks."""
    replace(f"{directory}/{lock.file_name}", msgspec.json.encode(lock) + b"\n")
    reached("lock.rewritten")


def remove_lock(directory: str, lock: LockRecord) -> None:
    """Let go. The change that the lock covered is durable before this is called. Blocks."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(f"{directory}/{lock.file_name}")
    reached("lock.removed")
    if not lock.shared:
        fsync_directory(directory)


def read_lock(directory: str, name: str) -> LockRecord | None:
    """What a lock file says; None when it is gone. Blocks."""
    try:
        descriptor = os.open(f"{directory}/{name}", os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            content = os.read(descriptor, 65536)
        finally:
            os.close(descriptor)
    except FileNotFoundError:
        return None
    except OSError:
        content = b""
    match = _NAME.fullmatch(name)
    purpose, operation = match.groups() if match else (name[len(LOCK_PREFIX) : -len(LOCK_SUFFIX)], "")
    foreign = LockRecord(purpose=printable(purpose), operation=printable(operation))
    try:
        record = msgspec.json.decode(content, type=LockRecord)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        return foreign
    # The name is what excludes others; a content that disagrees, or is not of our making, is not believed.
    uids_are_ours = all(normalise_uid(uid) == uid for uid in (record.operation, record.server))
    if (record.purpose, record.operation) != (purpose, operation) or not uids_are_ours:
        return foreign
    return record


def is_orphaned(location_path: str, lock: LockRecord, own_server_id: str, active: set[str], *, lease_s: float) -> bool:
    """Whether nobody works under the lock any more, so that the operation is ours to resolve. Blocks.

    ``active`` are the operations under way in this process.

    A lock without a server is another product's: nobody here can know what it protects, so it stays until somebody
    removes the file by hand (``rescan`` reports it).
    """
    if not lock.server:
        return False
    if lock.server == own_server_id:
        return lock.operation not in active
    return not is_alive(location_path, lock.server, lease_s=lease_s)
