"""Changes to the disk that survive a power failure once the call has returned.

A file's bytes are on disk after its own fsync, its *name* after an fsync of the directory that holds it
(POSIX; ext4 and XFS keep rename atomic but not durable). Every function here blocks: call it in a thread.
"""

import contextlib
import os
import secrets
import stat

from elemento_storage.faultpoints import reached

TEMPORARY_PREFIX = ".elemento-tmp-"


def fsync_directory(path: str) -> None:
    """Make the names in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_file(path: str) -> None:
    """Make a file's bytes durable, whoever wrote them."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def create(path: str, content: bytes, *, mode: int = 0o644, sync: bool = False) -> None:
    """Create a file that must not exist yet. ``sync``: its bytes are on disk; its name is not yet durable."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, mode)
    try:
        write_all(descriptor, content)
        if sync:
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace(
    path: str, content: bytes, *, mode: int = 0o644, made_in: str | None = None, sync_name: bool = True
) -> None:
    """Put ``content`` at ``path`` in one step: readers see the old bytes or the new ones, never a mixture.

    A file that is there already keeps its mode and owner. ``made_in`` is the directory for the temporary file, on the
    same file system, where that is another than the file's own. Without ``sync_name`` a power failure may take it back.
    """
    directory = os.path.dirname(path)
    temporary = f"{made_in or directory}/{TEMPORARY_PREFIX}{secrets.token_hex(8)}"
    try:
        create(temporary, content, mode=mode, sync=True)
        with contextlib.suppress(FileNotFoundError, PermissionError):  # a server that is not root owns what it writes
            keep_owner_and_mode(path, temporary)
        reached("replace.written")
        os.rename(temporary, path)
        reached("replace.renamed")
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    if sync_name:
        fsync_directory(directory)


def keep_owner_and_mode(old: str, new: str) -> None:
    """Give ``new`` the mode and owner of ``old``, as far as they differ. Raises OSError."""
    wanted, present = os.lstat(old), os.lstat(new)
    if (wanted.st_uid, wanted.st_gid) != (present.st_uid, present.st_gid):
        os.chown(new, wanted.st_uid, wanted.st_gid)
    if wanted.st_mode != present.st_mode:
        os.chmod(new, stat.S_IMODE(wanted.st_mode))


def write_all(descriptor: int, content: bytes) -> None:
    """os.write until every byte is taken."""
    view = memoryview(content)
    while view:
        view = view[os.write(descriptor, view) :]
