"""A qcow2 image of a disk, put together while it is sent (QEMU, docs/interop/qcow2.txt).

    header | refcount table | refcount blocks | L1 table | L2 tables | data clusters

Where everything lies follows from which clusters hold data. So the image's length is known before, any stretch of it
can be made at any time, and neither a program nor a byte of room is needed. Every cluster is used once.
"""

import struct
import sys
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterator
from typing import Final

from elemento_storage.engine.cluster_map import ClusterMap
from elemento_storage.engine.content import Content, Part
from elemento_storage.errors import FormatUnsupported
from elemento_storage.model import round_up_to_sector

_HEADER: Final = struct.Struct(">4sIQIIQIIQQIIQQQQII")
_HEADER_BYTES: Final = 104
_REFCOUNT_ORDER: Final = 4  # 16 bits
_ONCE: Final = b"\0\1"
_COPIED: Final = 1 << 63  # "used once": may be written in place
_ENTRY_BYTES: Final = 8
_LEAST_CLUSTER_BITS, _MOST_CLUSTER_BITS = 16, 21
_MOST_CLUSTERS: Final = 2**22  #: as long as larger clusters can avoid more
_MOST_DISK_BYTES: Final = 2**46  #: 64 TiB; QEMU opens images of 16 times that
_PIECE_BYTES: Final = 65536


class Qcow2Layout:
    """See above. A Readable."""

    def __init__(self, content: Content) -> None:
        """Look through the content. Blocks. Raises FormatUnsupported, OSError."""
        if content.size_bytes > _MOST_DISK_BYTES:
            raise FormatUnsupported(f"a disk of more than {_MOST_DISK_BYTES} bytes is not sent as qcow2: ask for raw")
        bits = _LEAST_CLUSTER_BITS
        while bits < _MOST_CLUSTER_BITS and content.size_bytes >> bits > _MOST_CLUSTERS:
            bits += 1
        self._bits = bits
        self._cluster = cluster = 1 << bits
        self._disk_bytes = round_up_to_sector(content.size_bytes)
        self._map = ClusterMap(content, cluster)
        entries = cluster // _ENTRY_BYTES
        self._tables = self._map.tables(entries)
        self._l1_entries = -(-self._disk_bytes // (cluster * entries))
        l1_clusters = -(-self._l1_entries // entries)
        others = 1 + l1_clusters + len(self._tables) + self._map.count
        blocks = refcount_tables = 0
        # What counts the clusters takes clusters itself.
        while (needed := -(-(others + blocks + refcount_tables) // (cluster // len(_ONCE)))) > blocks:
            blocks, refcount_tables = needed, -(-needed // entries)
        self._blocks, self._refcount_tables = blocks, refcount_tables
        self._clusters = others + blocks + refcount_tables
        self._blocks_at = (1 + refcount_tables) * cluster
        self._l1_at = self._blocks_at + blocks * cluster
        self._l2_at = self._l1_at + l1_clusters * cluster
        self._data_at = self._l2_at + len(self._tables) * cluster

    @property
    def size_bytes(self) -> int:
        """See Readable."""
        return self._clusters * self._cluster

    @property
    def digest(self) -> str:
        """What tells this image from others of the same bytes."""
        return self._map.digest

    def parts(self, start: int, stop: int) -> Iterator[Part]:
        """See Readable."""
        makers: tuple[tuple[int, Callable[[int, int], bytes]], ...] = (
            (self._cluster, self._header),
            (self._blocks_at, self._refcount_table),
            (self._l1_at, self._refcount_blocks),
            (self._l2_at, self._l1_table),
            (self._data_at, self._l2_tables),
        )
        region = 0
        for region_stop, make in makers:
            while start < min(stop, region_stop):
                piece_stop = min(stop, region_stop, start + _PIECE_BYTES)
                yield make(start - region, piece_stop - region)
                start = piece_stop
            region = region_stop
        if start < stop:
            yield from self._map.parts(start - self._data_at, stop - self._data_at)

    # -- the regions: bytes from start to stop, counted from where they begin -----------------------------------

    def _header(self, start: int, stop: int) -> bytes:
        header = _HEADER.pack(
            b"QFI\xfb",
            3,  # version
            *(0, 0),  # backing file
            self._bits,
            self._disk_bytes,
            0,  # encryption
            self._l1_entries,
            self._l1_at,
            self._cluster,  # where the refcount table is
            self._refcount_tables,
            *(0, 0),  # snapshots
            *(0, 0, 0),  # features
            _REFCOUNT_ORDER,
            _HEADER_BYTES,
        )
        return header.ljust(self._cluster, b"\0")[start:stop]

    def _refcount_table(self, start: int, stop: int) -> bytes:
        def entries(first: int, after: int) -> "array[int]":
            used = min(after, self._blocks)
            at = array(
                "Q",
                range(self._blocks_at + first * self._cluster, self._blocks_at + used * self._cluster, self._cluster),
            )
            return at + _no_entries(after - first - len(at))

        return _table(start, stop, entries)

    def _refcount_blocks(self, start: int, stop: int) -> bytes:
        ones = max(0, min(stop, self._clusters * len(_ONCE)) - start)
        return (_ONCE * (ones // 2 + 1))[start % 2 :][:ones].ljust(stop - start, b"\0")

    def _l1_table(self, start: int, stop: int) -> bytes:
        def entries(first: int, after: int) -> "array[int]":
            made = _no_entries(after - first)
            for rank in range(bisect_left(self._tables, first), bisect_left(self._tables, after)):
                made[self._tables[rank] - first] = (self._l2_at + rank * self._cluster) | _COPIED
            return made

        return _table(start, stop, entries)

    def _l2_tables(self, start: int, stop: int) -> bytes:
        made = []
        per_table = self._cluster // _ENTRY_BYTES
        while start < stop:
            rank, within = divmod(start, self._cluster)
            table_stop = min(stop - rank * self._cluster, self._cluster)
            base = self._tables[rank] * per_table

            def entries(first: int, after: int, base: int = base) -> "array[int]":
                found = _no_entries(after - first)
                for cluster, count, number in self._map.runs(base + first, base + after):
                    at = (self._data_at + number * self._cluster) | _COPIED
                    position = cluster - base - first
                    found[position : position + count] = array(
                        "Q", range(at, at + count * self._cluster, self._cluster)
                    )
                return found

            made.append(_table(within, table_stop, entries))
            start += table_stop - within
        return b"".join(made)


def _no_entries(count: int) -> "array[int]":
    return array("Q", bytes(count * _ENTRY_BYTES))


def _table(start: int, stop: int, entries: "Callable[[int, int], array[int]]") -> bytes:
    """Bytes of a table of big-endian numbers, of which ``entries`` makes those from first to after."""
    first, after = start // _ENTRY_BYTES, -(-stop // _ENTRY_BYTES)
    made = entries(first, after)
    if sys.byteorder == "little":
        made.byteswap()
    return made.tobytes()[start - first * _ENTRY_BYTES : stop - first * _ENTRY_BYTES]
