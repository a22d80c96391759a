"""The bytes of one upload as they go into its file: in order, without the runs of zeros. Everything here blocks.

What lies behind the last ``keep`` counts for nothing: whoever goes on cuts it off first. So a chunk whose checksum
turns out wrong, or the end of a transfer whose server died, leaves no trace, not even where a hole is to be.
"""

import ctypes
import errno
import os
from typing import Final, Protocol

from elemento_storage.faultpoints import reached
from elemento_storage.uploads.turn import Turn

_BLOCK_BYTES: Final = 64 * 1024  # runs of zeros are looked for in blocks of this size, which is a qcow2 cluster
_PROBES: Final = (0, 4096, 32768)  # data has a byte that is not zero at one of these most of the time
_WRITEBACK_BYTES: Final = 8 << 20
_ZEROS: Final = (ctypes.c_char * _BLOCK_BYTES)()
_memcmp = ctypes.CDLL(None).memcmp
_memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_memcmp.restype = ctypes.c_int


class Hash(Protocol):
    """What hashlib makes."""

    def update(self, data: memoryview, /) -> object:
        """Take these bytes in."""

    def digest(self) -> bytes:
        """Of all of them."""

    def hexdigest(self) -> str:
        """The same in hex digits."""


class Hashes:
    """Two that take in the same bytes; the digest is the first one's. A Hash."""

    def __init__(self, first: Hash, second: Hash) -> None:
        self._first = first
        self._second = second

    def update(self, data: memoryview, /) -> None:
        """See Hash."""
        self._first.update(data)
        self._second.update(data)

    def digest(self) -> bytes:
        """See Hash."""
        return self._first.digest()

    def hexdigest(self) -> str:
        """See Hash."""
        return self._first.hexdigest()


class Content:
    """The file of one upload, open for writing at ``offset``. Raises OSError, also for a file that is not there.

    ``digest`` takes in every byte of the content, zeros that are skipped included.
    """

    def __init__(self, path: str, offset: int, *, create: bool = False, digest: Hash | None = None) -> None:
        flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | (os.O_CREAT if create else 0)
        self._descriptor = os.open(path, flags, 0o644)
        self._digest = digest
        self._begun = offset  # of what the kernel was not yet told to write back
        self.position = offset
        try:
            os.ftruncate(self._descriptor, offset)
        except BaseException:
            os.close(self._descriptor)
            raise

    def write(self, data: memoryview) -> None:
        """The next bytes, from a buffer that can be written to. Raises OSError."""
        if self._digest is not None:
            self._digest.update(data)
        address = ctypes.addressof(ctypes.c_char.from_buffer(data)) if data else 0
        length, start, at = len(data), 0, 0
        while at < length:
            # Blocks of the file, not of the buffer, whatever length the pieces come in.
            size = min(_BLOCK_BYTES - (self.position + at - start) % _BLOCK_BYTES, length - at)
            if _is_zero(data, address, at, size):
                self._put(data[start:at])
                self.position += size
                start = at + size
            at += size
        self._put(data[start:length])
        if self.position - self._begun >= _WRITEBACK_BYTES:
            # Begins the writing now, so that the last sync has little left to do.
            os.posix_fadvise(self._descriptor, self._begun, 0, os.POSIX_FADV_DONTNEED)
            self._begun = self.position

    def _put(self, data: memoryview) -> None:
        while data:
            written = os.pwrite(self._descriptor, data, self.position)
            self.position += written
            data = data[written:]

    def skip(self, count: int) -> None:
        """So many zeros, of which nobody sent any. Raises OSError."""
        self.position += count
        if self._digest is not None:
            left = count
            while left:
                size = min(left, _BLOCK_BYTES)
                self._digest.update(memoryview(_ZEROS)[:size])
                left -= size

    def keep(self, turn: Turn | None = None) -> int:
        """Make everything up to here durable, and tell it to ``turn``; where that is. Raises OSError."""
        os.ftruncate(self._descriptor, self.position)
        os.fdatasync(self._descriptor)
        reached("upload.synced")
        if turn is not None:
            turn.advance(self.position)
        return self.position

    def head(self, count: int) -> bytes:
        """The first bytes, as many as there are of ``count``. Raises OSError."""
        present = os.pread(self._descriptor, count, 0)
        return present.ljust(min(count, self.position), b"\0")  # zeros at the end are in no file yet

    def rewind(self, offset: int) -> None:
        """Forget everything behind ``offset``. Raises OSError."""
        os.ftruncate(self._descriptor, offset)
        self.position = self._begun = offset

    def append(self, path: str, length: int) -> None:
        """The first ``length`` bytes of another file of this file system, shared where it can share, without holes.

        Raises OSError.
        """
        source = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            present = os.fstat(source).st_size
            if present < length:
                raise OSError(errno.ENODATA, f"a part of an upload ends at {present} bytes and not at {length}")
            at = 0
            while at < length:
                data, hole = _extent(source, at, length)
                self.position += data - at
                at = data
                while at < hole:
                    copied = _copy(source, at, self._descriptor, self.position, hole - at)
                    if copied == 0:
                        raise OSError(errno.ENODATA, f"a part of an upload was cut off at {at} bytes")
                    at += copied
                    self.position += copied
        finally:
            os.close(source)

    def close(self) -> None:
        """Let go of the file."""
        os.close(self._descriptor)


def _is_zero(data: memoryview, address: int, at: int, size: int) -> bool:
    if any(data[at + probe] for probe in _PROBES if probe < size):
        return False
    return bool(_memcmp(address + at, ctypes.addressof(_ZEROS), size) == 0)


def _copy(source: int, at: int, target: int, position: int, count: int) -> int:
    """In the kernel, by sharing blocks where that is possible; how many bytes."""
    try:
        return os.copy_file_range(source, target, count, at, position)
    except OSError as error:
        if error.errno not in {errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS}:
            raise
    os.lseek(target, position, os.SEEK_SET)  # between file systems that cannot
    return os.sendfile(target, source, at, count)


def _extent(descriptor: int, at: int, end: int) -> tuple[int, int]:
    """Where the next data begins and ends, at or behind ``at``; both are ``end`` when only a hole follows."""
    try:
        data = os.lseek(descriptor, at, os.SEEK_DATA)
    except OSError:  # ENXIO: nothing but a hole up to the end
        return end, end
    return min(data, end), min(os.lseek(descriptor, data, os.SEEK_HOLE), end)
