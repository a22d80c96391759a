"""A vmdk image of a disk, put together while it is sent: ``monolithicSparse`` of VMware's Virtual Disk Format 1.1.

    header | descriptor | grain directory and grain tables | the same again | grains

As with qcow2 (``qcow2_layout.py``), where everything lies follows from which grains hold data. Grain tables of empty
stretches are there as well: VMware's own programs count on them.
"""

import hashlib
import struct
import sys
from array import array
from collections.abc import Callable, Iterator
from typing import Final

from elemento_storage.engine.cluster_map import ClusterMap
from elemento_storage.engine.content import Content, Part
from elemento_storage.errors import FormatUnsupported
from elemento_storage.model import SECTOR_BYTES

_HEADER: Final = struct.Struct("<4sIIQQQQIQQQB4sH")
_NEWLINES_AND_SECOND_DIRECTORY: Final = 3
_GRAIN_SECTORS: Final = 128
_GRAIN_BYTES: Final = _GRAIN_SECTORS * SECTOR_BYTES
_TABLE_ENTRIES: Final = 512
_ENTRY_BYTES: Final = 4
_TABLE_BYTES: Final = _TABLE_ENTRIES * _ENTRY_BYTES
_DESCRIPTOR_SECTOR, _DESCRIPTOR_SECTORS = 1, 20
_MOST_DISK_BYTES: Final = 2**41 - 2**33  #: sectors are numbered with 32 bits, tables included
_HEADS, _SECTORS_PER_TRACK = 255, 63
_PIECE_BYTES: Final = 65536

_DESCRIPTOR: Final = """\
# Disk DescriptorFile
version=1
CID={cid:08x}
parentCID=ffffffff
createType="monolithicSparse"

# Extent description
RW {sectors} SPARSE "{file_name}"

# The Disk Data Base
#DDB

ddb.virtualHWVersion = "4"
ddb.geometry.cylinders = "{cylinders}"
ddb.geometry.heads = "{heads}"
ddb.geometry.sectors = "{track}"
ddb.adapterType = "lsilogic"
"""


class VmdkLayout:
    """See above. A Readable. ``file_name``: what the descriptor calls the image, plain ASCII."""

    def __init__(self, content: Content, file_name: str) -> None:
        """Look through the content. Blocks. Raises FormatUnsupported, OSError."""
        if content.size_bytes > _MOST_DISK_BYTES:
            raise FormatUnsupported(f"a vmdk cannot hold more than {_MOST_DISK_BYTES} bytes: ask for qcow2 or raw")
        self._map = ClusterMap(content, _GRAIN_BYTES)
        self._file_name = file_name
        self._sectors = -(-content.size_bytes // SECTOR_BYTES)
        self._table_count = -(-self._sectors // (_GRAIN_SECTORS * _TABLE_ENTRIES))
        self._directory_bytes = -(-self._table_count * _ENTRY_BYTES // SECTOR_BYTES) * SECTOR_BYTES
        index_bytes = self._directory_bytes + self._table_count * _TABLE_BYTES
        self._second_at = (_DESCRIPTOR_SECTOR + _DESCRIPTOR_SECTORS) * SECTOR_BYTES
        self._first_at = self._second_at + index_bytes
        self._grains_at = -(-(self._first_at + index_bytes) // _GRAIN_BYTES) * _GRAIN_BYTES

    @property
    def size_bytes(self) -> int:
        """See Readable."""
        return self._grains_at + self._map.count * _GRAIN_BYTES

    @property
    def digest(self) -> str:
        """What tells this image from others of the same bytes."""
        return hashlib.blake2b((self._map.digest + self._file_name).encode(), digest_size=8).hexdigest()

    def parts(self, start: int, stop: int) -> Iterator[Part]:
        """See Readable."""
        makers: tuple[tuple[int, Callable[[int, int, int], bytes]], ...] = (
            (self._second_at, self._head),
            (self._second_at + self._directory_bytes, self._directory),
            (self._first_at, self._tables),
            (self._first_at + self._directory_bytes, self._directory),
            (self._first_at + self._directory_bytes + self._table_count * _TABLE_BYTES, self._tables),
            (self._grains_at, lambda _, first, after: bytes(after - first)),
        )
        region = 0
        for region_stop, make in makers:
            while start < min(stop, region_stop):
                piece_stop = min(stop, region_stop, start + _PIECE_BYTES)
                yield make(region, start - region, piece_stop - region)
                start = piece_stop
            region = region_stop
        if start < stop:
            yield from self._map.parts(start - self._grains_at, stop - self._grains_at)

    # -- the regions: where they begin, and which bytes of them ------------------------------------------------

    def _head(self, _: int, start: int, stop: int) -> bytes:
        header = _HEADER.pack(
            b"KDMV",
            1,  # version
            _NEWLINES_AND_SECOND_DIRECTORY,
            self._sectors,
            _GRAIN_SECTORS,
            _DESCRIPTOR_SECTOR,
            _DESCRIPTOR_SECTORS,
            _TABLE_ENTRIES,
            self._second_at // SECTOR_BYTES,
            self._first_at // SECTOR_BYTES,
            self._grains_at // SECTOR_BYTES,
            0,  # shut down in good order
            b"\n \r\n",  # whether a transfer as text has changed them
            0,  # not compressed
        )
        descriptor = _DESCRIPTOR.format(
            cid=int(self.digest[:8], 16) & 0x7FFFFFFF,
            sectors=self._sectors,
            file_name=self._file_name,
            cylinders=self._sectors // (_HEADS * _SECTORS_PER_TRACK),
            heads=_HEADS,
            track=_SECTORS_PER_TRACK,
        ).encode("ascii")
        head = header.ljust(_DESCRIPTOR_SECTOR * SECTOR_BYTES, b"\0") + descriptor
        return head.ljust(self._second_at, b"\0")[start:stop]

    def _directory(self, at: int, start: int, stop: int) -> bytes:
        tables_at = (at + self._directory_bytes) // SECTOR_BYTES
        step = _TABLE_BYTES // SECTOR_BYTES
        return _table(start, stop, array("I", range(tables_at, tables_at + self._table_count * step, step)), 0)

    def _tables(self, _: int, start: int, stop: int) -> bytes:
        first, after = start // _ENTRY_BYTES, -(-stop // _ENTRY_BYTES)
        entries = array("I", bytes((after - first) * _ENTRY_BYTES))
        for grain, count, number in self._map.runs(first, after):
            at = self._grains_at // SECTOR_BYTES + number * _GRAIN_SECTORS
            position = grain - first
            entries[position : position + count] = array("I", range(at, at + count * _GRAIN_SECTORS, _GRAIN_SECTORS))
        return _table(start, stop, entries, first)


def _table(start: int, stop: int, entries: "array[int]", first: int) -> bytes:
    """Bytes of a table of little-endian numbers, of which ``entries`` are those from ``first`` on; then zeros."""
    assert entries.itemsize == _ENTRY_BYTES
    if sys.byteorder == "big":
        entries.byteswap()
    offset = first * _ENTRY_BYTES
    return entries.tobytes()[start - offset : stop - offset].ljust(stop - start, b"\0")
