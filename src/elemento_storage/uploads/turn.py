"""Whose turn it is to write an upload, and how many of its bytes are safe.

Both are in the file ``offset``: its first byte is locked by whoever writes (a lock of the open file description, which
the kernel drops when the process dies), its content is the number of bytes that were on disk when it was written. It is
written after the bytes' own fdatasync and before anybody is told of them, so it never promises what a power failure
takes, and never less than what was acknowledged.
"""

import os
import time
from types import TracebackType
from typing import Self

from elemento_storage.catalog.guard import try_lock
from elemento_storage.faultpoints import reached
from elemento_storage.uploads.record import OFFSET_FILE, OFFSET_START, directory_of, format_offset, parse_offset

_PAUSE_S = 0.02


class Busy(Exception):
    """Somebody else writes this upload."""


class Gone(Exception):
    """The upload was ended meanwhile."""


class Turn:
    """The right to write one upload, until it is given up. Blocks.

    Raises Busy when somebody else has it for longer than ``patience_s``, Gone, OSError.
    """

    def __init__(self, location_path: str, upload_id: str, patience_s: float = 0.0) -> None:
        path = f"{directory_of(location_path, upload_id)}/{OFFSET_FILE}"
        try:
            self._descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except (FileNotFoundError, NotADirectoryError):
            raise Gone(upload_id) from None
        try:
            deadline = time.monotonic() + patience_s
            while not try_lock(self._descriptor):
                if time.monotonic() >= deadline:
                    raise Busy(upload_id)
                time.sleep(_PAUSE_S)
            if not _is_still_there(self._descriptor, path):
                raise Gone(upload_id)
            self.offset = parse_offset(os.pread(self._descriptor, len(OFFSET_START), 0))
        except BaseException:
            os.close(self._descriptor)
            raise

    def advance(self, offset: int) -> None:
        """So many bytes are on disk: durable when it returns. Raises OSError."""
        os.pwrite(self._descriptor, format_offset(offset), 0)
        os.fdatasync(self._descriptor)
        self.offset = offset
        reached("upload.advanced")

    def touch(self) -> None:
        """Something happened: the time until it expires begins anew. Raises OSError."""
        os.utime(self._descriptor)

    def give_up(self) -> None:
        """Let the next one write; closing the description drops its locks."""
        os.close(self._descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.give_up()


def read_offset(location_path: str, upload_id: str) -> tuple[int, float]:
    """The bytes that are safe, and when that was last told, in seconds since the epoch. Raises Gone, OSError."""
    path = f"{directory_of(location_path, upload_id)}/{OFFSET_FILE}"
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except (FileNotFoundError, NotADirectoryError):
        raise Gone(upload_id) from None
    try:
        return parse_offset(os.pread(descriptor, len(OFFSET_START), 0)), os.fstat(descriptor).st_mtime
    finally:
        os.close(descriptor)


def _is_still_there(descriptor: int, path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False
