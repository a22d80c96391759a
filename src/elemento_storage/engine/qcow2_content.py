"""What a guest sees of a qcow2 image, read from the file itself (QEMU, docs/interop/qcow2.txt).

Where every cluster is a plain one, the image's tables say which bytes of the file a guest sees, and which are those of
the image below it. Then the kernel can send them as those of a raw image, and no program has to be started. Everything
else (compressed clusters, encryption, features that we do not know, whatever looks odd) is for QEMU: ``NotPlain``.
"""

import errno
import os
import struct
from collections.abc import Iterator
from typing import Final

from elemento_storage.engine.content import Content, Extent, FileContent, OpenFile, Part, Zeros, merged
from elemento_storage.engine.image_header import BadHeader, qcow2_header

_HEADER_BYTES: Final = 4096
_LAYOUT: Final = struct.Struct(">4sIQIIQIIQ")  #: up to the offset of the L1 table
_FEATURES: Final = struct.Struct(">Q")
_FEATURES_OFFSET: Final = 72
_ENTRY_BYTES: Final = 8
_OFFSET_MASK: Final = 0x00FF_FFFF_FFFF_FE00
_ALL_ZEROS: Final = 1
_BELOW: Final = -1  #: in place of an offset: what the image below has there
_MOST_L1_BYTES: Final = 2**20  #: 64 TiB with clusters of 64 KiB
_MOST_L2_BYTES: Final = 2**28  #: 2 TiB of data; looking through all of it takes a quarter of a second

# The first and the last byte of an L2 entry of a plain cluster. The others' high bits say "compressed" and what is not
# defined yet; in version 2 the lowest bit does not say "zeros".
_PLAIN_FIRST: Final = b"\x00\x80"
_PLAIN_LAST: Final = {2: b"\x00", 3: b"\x00\x01"}


class NotPlain(Exception):
    """Only QEMU knows what a guest sees of this image. The text says why."""


class Qcow2Content:
    """The content of one image file. A Content."""

    def __init__(self, file: OpenFile, below: Content | None = None) -> None:
        """Look through the image's tables. ``below`` is what it stands on. Blocks. Raises NotPlain, OSError."""
        self._file = file
        self._below = below
        self._unallocated = None if below is None else _BELOW
        self._bytes = FileContent(file)
        header = os.pread(file.descriptor, _HEADER_BYTES, 0)
        try:
            self._size_bytes = qcow2_header(header).size_bytes
        except BadHeader as error:
            raise NotPlain(str(error)) from error
        _, version, backing_file, _, bits, _, encryption, l1_entries, l1_offset = _LAYOUT.unpack_from(header)
        features = _FEATURES.unpack_from(header, _FEATURES_OFFSET)[0] if version == 3 else 0
        if bool(backing_file) != (below is not None) or encryption or features:
            raise NotPlain("the image stands on another one than is said, is encrypted, or has features of its own")
        self._cluster = cluster = 1 << bits
        self._per_table = cluster // _ENTRY_BYTES
        needed = -(-self._size_bytes // (cluster * self._per_table))
        if needed * _ENTRY_BYTES > _MOST_L1_BYTES or l1_entries < needed:
            raise NotPlain("the image's first table has an unusual size")
        if l1_offset % cluster or l1_offset + needed * _ENTRY_BYTES > file.size_bytes:
            raise NotPlain("the image's first table is not where one can be")
        self._tables = [self._table(entry) for entry in self._read(l1_offset, needed)]
        self._require_plain(_PLAIN_LAST[version])

    def _table(self, entry: int) -> int:
        offset = entry & _OFFSET_MASK
        if offset % self._cluster or entry & ~_OFFSET_MASK & ~(1 << 63):
            raise NotPlain("the image's first table is odd")
        return offset

    def _require_plain(self, last: bytes) -> None:
        offsets = [offset for offset in self._tables if offset]
        if len(offsets) * self._cluster > _MOST_L2_BYTES:
            raise NotPlain("the image has too many tables to look through")
        for offset in offsets:
            table = os.pread(self._file.descriptor, self._cluster, offset)
            if len(table) < self._cluster:
                raise NotPlain("the image is shorter than its tables say")
            if table[::_ENTRY_BYTES].translate(None, _PLAIN_FIRST) or table[7::_ENTRY_BYTES].translate(None, last):
                raise NotPlain("the image has compressed clusters, or others that are not plain")

    def _read(self, offset: int, count: int) -> tuple[int, ...]:
        """Entries of a table. Raises OSError."""
        content = os.pread(self._file.descriptor, count * _ENTRY_BYTES, offset)
        if len(content) < count * _ENTRY_BYTES:
            raise OSError(errno.EIO, "the image is shorter than its tables say")
        return struct.unpack(f">{count}Q", content)

    @property
    def size_bytes(self) -> int:
        """See Content."""
        return self._size_bytes

    def extents(self, start: int, stop: int) -> Iterator[Extent]:
        """See Content. What the file has no room for is a hole, whatever the tables say."""
        return merged(self._extents(start, stop))

    def _extents(self, start: int, stop: int) -> Iterator[Extent]:
        for begin, length, at in self._runs(start, stop):
            end = begin
            if at == _BELOW:
                assert self._below is not None
                end = max(begin, min(begin + length, self._below.size_bytes))
                yield from self._below.extents(begin, end)
            elif at is not None:
                for one in self._bytes.extents(at, min(at + length, self._bytes.size_bytes)):
                    yield Extent(begin + one.start - at, one.length, one.zero, one.hole)
                    end = begin + one.stop - at
            if end < begin + length:
                yield Extent(end, begin + length - end, zero=True, hole=True)

    def parts(self, start: int, stop: int) -> Iterator[Part]:
        """See Content."""
        for begin, length, at in self._runs(start, stop):
            inside = 0
            if at == _BELOW:
                assert self._below is not None
                inside = max(0, min(length, self._below.size_bytes - begin))
                yield from self._below.parts(begin, begin + inside)
            elif at is not None:
                inside = max(0, min(length, self._bytes.size_bytes - at))
                yield from self._bytes.parts(at, at + inside)
            if inside < length:
                yield Zeros(length - inside)

    def _runs(self, start: int, stop: int) -> Iterator[tuple[int, int, int | None]]:
        """Where a stretch begins, its length, and where in the file it lies; None: zeros. Neighbours do not go on."""
        begin, length, at = start, 0, None
        for here, more, there in self._stretches(start, stop):
            if length and there != (at if at in (None, _BELOW) else at + length):
                yield begin, length, at
                length = 0
            if not length:
                begin, at = here, there
            length += more
        if length:
            yield begin, length, at

    def _stretches(self, start: int, stop: int) -> Iterator[tuple[int, int, int | None]]:
        """The same cluster by cluster, or more at a time where there are none."""
        cluster = self._cluster
        covered = cluster * self._per_table
        while start < stop:
            table, within = divmod(start, covered)
            end = min(stop, (table + 1) * covered)
            first = within // cluster
            count = -(-(within + end - start) // cluster) - first
            offset = self._tables[table]
            entries = self._read(offset + first * _ENTRY_BYTES, count) if offset else ()
            if not any(entries):
                yield start, end - start, self._unallocated
                start = end
            for entry in entries if start < end else ():
                there = entry & _OFFSET_MASK
                if there % cluster:
                    raise OSError(errno.EIO, "a table of the image is damaged: look at it with qemu-img check")
                inside = start % cluster
                length = min(cluster - inside, end - start)
                if entry & _ALL_ZEROS:
                    yield start, length, None
                else:
                    yield start, length, there + inside if there else self._unallocated
                start += length
