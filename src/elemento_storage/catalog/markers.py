"""Export markers: one file per export in the volume's directory, touched while the export is healthy.

What is in them belongs to the exports; here they are files. A marker that nobody touched for longer than the lease is
stale (contract, section 3). All functions block.
"""

import contextlib
import errno
import os
import stat

from elemento_storage.durable import fsync_directory, replace
from elemento_storage.faultpoints import reached
from elemento_storage.model import MARKER_SUFFIX, TARGET_PREFIX

_LARGEST_BYTES = 65536
_NO_FILE = (errno.ENOENT, errno.ELOOP, errno.ENXIO)  # gone, a symbolic link, a socket


def marker_names(directory: str) -> list[str]:
    """Names of the markers in a volume's directory. Raises OSError."""
    return sorted(
        name for name in os.listdir(directory) if name.startswith(TARGET_PREFIX) and name.endswith(MARKER_SUFFIX)
    )


def read_marker(directory: str, name: str) -> tuple[bytes, float] | None:
    """A marker's content and when it was touched last (seconds since the epoch).

    None when it is gone, or no file at all: one wrong thing in one volume does not stop the exports of the others.
    """
    try:
        descriptor = os.open(f"{directory}/{name}", os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        if error.errno in _NO_FILE:
            return None
        raise
    try:
        status = os.fstat(descriptor)
        return (os.read(descriptor, _LARGEST_BYTES), status.st_mtime) if stat.S_ISREG(status.st_mode) else None
    finally:
        os.close(descriptor)


def write_marker(directory: str, name: str, content: bytes) -> None:
    """Make a marker durable, in one step. Readable by its owner only: it holds the export's credentials."""
    replace(f"{directory}/{name}", content, mode=0o600)
    reached("export.recorded")


def remove_marker(directory: str, name: str) -> None:
    """Make it durable that the export is none any more."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(f"{directory}/{name}")
    reached("export.erased")
    fsync_directory(directory)


def touch_markers(paths: list[str]) -> None:
    """A sign of life of exports that were just seen to serve."""
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            os.utime(path, follow_symlinks=False)
