"""What a guest sees of a volume, as something to read: bytes, and where there are none.

Everything here blocks and belongs into a thread. A stretch is handed out in *parts*, so that whoever takes it can let
the kernel send what lies in a file, and need not read what is zero.
"""

import errno
import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final, Protocol

from elemento_storage.errors import ImageChanged

LEAST_HOLE_BYTES: Final = 65536  #: a smaller one among data is read as if it were data: that is one step, not three


@dataclass(frozen=True, slots=True)
class Extent:
    """A stretch that is alike throughout."""

    start: int
    length: int
    zero: bool  #: reads as zeros
    hole: bool  #: takes no room in the image

    @property
    def stop(self) -> int:
        """The first byte after it."""
        return self.start + self.length


@dataclass(frozen=True, slots=True)
class FileRange:
    """Bytes that lie in a file, one after the other."""

    descriptor: int
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Zeros:
    """So many zeros."""

    length: int


Part = FileRange | Zeros | bytes | memoryview  #: a memoryview is good until the next part is asked for


class Readable(Protocol):
    """Bytes; several threads may read them at the same time."""

    @property
    def size_bytes(self) -> int:
        """How many there are."""

    def parts(self, start: int, stop: int) -> Iterator[Part]:
        """The bytes of a stretch. Raises OSError."""


class Content(Readable, Protocol):
    """Bytes that a guest sees, and what is known of them without reading."""

    def extents(self, start: int, stop: int) -> Iterator[Extent]:
        """What is in a stretch: it is covered from start to stop, and neighbours differ. Raises OSError."""


class OpenFile:
    """A file that is kept open, and has to stay as it was then."""

    def __init__(self, path: str) -> None:
        """Raises OSError, also for what is not a regular file."""
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            self._status = os.fstat(self.descriptor)
            if not stat.S_ISREG(self._status.st_mode):
                raise OSError(errno.EINVAL, "not a regular file")
        except BaseException:
            os.close(self.descriptor)
            raise

    @property
    def size_bytes(self) -> int:
        """Its length."""
        return self._status.st_size

    @property
    def modified_ns(self) -> int:
        """When it was last written to."""
        return self._status.st_mtime_ns

    @property
    def identity(self) -> tuple[int, int, int, int]:
        """What changes whenever its bytes do."""
        return _identity(self._status)

    def require_unchanged(self) -> None:
        """Raises ImageChanged when somebody wrote to it since it was opened."""
        if _identity(os.fstat(self.descriptor)) != self.identity:
            raise ImageChanged("the image was changed while it was read: read it again from the start")

    def close(self) -> None:
        """Let go of it."""
        os.close(self.descriptor)


def _identity(status: os.stat_result) -> tuple[int, int, int, int]:
    return status.st_ino, status.st_mtime_ns, status.st_ctime_ns, status.st_size


class FileContent:
    """Bytes that are those of a file."""

    def __init__(self, file: OpenFile) -> None:
        self._descriptor = file.descriptor
        self._size_bytes = file.size_bytes

    @property
    def size_bytes(self) -> int:
        """See Content."""
        return self._size_bytes

    def extents(self, start: int, stop: int) -> Iterator[Extent]:
        """See Content. Where the file system knows no holes, all is data."""
        while start < stop:
            data = min(_seek(self._descriptor, start, os.SEEK_DATA, otherwise=stop), stop)
            if data > start:
                yield Extent(start, data - start, zero=True, hole=True)
            start = data
            if start < stop:
                hole = min(_seek(self._descriptor, start, os.SEEK_HOLE, otherwise=stop), stop)
                yield Extent(start, hole - start, zero=False, hole=False)
                start = hole

    def parts(self, start: int, stop: int) -> Iterator[Part]:
        """See Content."""
        for extent in coarse(self.extents(start, stop)):
            if extent.zero:
                yield Zeros(extent.length)
            else:
                yield FileRange(self._descriptor, extent.start, extent.length)


def _seek(descriptor: int, offset: int, whence: int, *, otherwise: int) -> int:
    try:
        # Moves the file's position as well, which nobody here goes by.
        return os.lseek(descriptor, offset, whence)
    except OSError as error:
        if error.errno == errno.ENXIO:  # nothing but a hole from here on
            return otherwise
        raise


def read_into(content: Readable, start: int, buffer: memoryview) -> None:
    """The bytes from ``start`` on, as many as the buffer takes. Raises OSError."""
    for part in content.parts(start, start + len(buffer)):
        if isinstance(part, FileRange):
            piece, buffer = buffer[: part.length], buffer[part.length :]
            read_file(part, piece)
        elif isinstance(part, Zeros):
            piece, buffer = buffer[: part.length], buffer[part.length :]
            piece[:] = bytes(part.length)
        else:
            buffer[: len(part)] = part
            buffer = buffer[len(part) :]


def read_file(part: FileRange, buffer: memoryview) -> None:
    """All of a range. Raises OSError, also when the file is shorter than it was."""
    offset = part.offset
    while buffer:
        count = os.preadv(part.descriptor, [buffer], offset)
        if not count:
            raise OSError(errno.EIO, "the image is shorter than it was")
        offset, buffer = offset + count, buffer[count:]


def merged(extents: Iterable[Extent]) -> Iterator[Extent]:
    """The same with like neighbours joined."""
    last: Extent | None = None
    for extent in extents:
        if last is not None and (last.zero, last.hole) == (extent.zero, extent.hole):
            last = Extent(last.start, last.length + extent.length, last.zero, last.hole)
            continue
        if last is not None:
            yield last
        last = extent
    if last is not None:
        yield last


def coarse(extents: Iterable[Extent], least_bytes: int = LEAST_HOLE_BYTES) -> Iterator[Extent]:
    """Data and zeros only, and no zeros but long ones."""
    return merged(
        Extent(extent.start, extent.length, long_zeros, long_zeros)
        for extent in merged(Extent(one.start, one.length, one.zero, one.zero) for one in extents)
        for long_zeros in (extent.zero and extent.length >= least_bytes,)
    )
