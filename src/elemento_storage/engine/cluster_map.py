"""Which clusters of a disk hold data, for images that are put together while they are sent."""

import hashlib
from array import array
from bisect import bisect_right
from collections.abc import Iterator
from typing import Final

from elemento_storage.engine.content import Content, Part, Zeros, coarse
from elemento_storage.errors import FormatUnsupported

_MOST_RUNS: Final = 2**22  #: 64 MB of memory


class ClusterMap:
    """Runs of clusters with data. Data cluster number *n* is the *n*-th of them, counted through all runs."""

    def __init__(self, content: Content, cluster_bytes: int) -> None:
        """Look through the content. Blocks. Raises FormatUnsupported when it is in too many pieces, OSError."""
        self.content = content
        self.cluster_bytes = cluster_bytes
        self.starts = array("Q")  #: the first cluster of each run
        self.before = array("Q")  #: how many data clusters are before it
        self.count = 0  #: data clusters in all
        stop = 0
        for extent in coarse(content.extents(0, content.size_bytes)):
            if extent.zero:
                continue
            first, after = extent.start // cluster_bytes, -(-extent.stop // cluster_bytes)
            if not self.starts or first > stop:
                if len(self.starts) == _MOST_RUNS:
                    raise FormatUnsupported("the disk's data is in too many pieces for this format: ask for raw")
                self.starts.append(first)
                self.before.append(self.count)
            else:
                first = stop
            self.count += max(0, after - first)
            stop = max(stop, after)
        self.digest = self._digest()  #: two maps with the same one make the same image of the same bytes

    def _digest(self) -> str:
        hashed = hashlib.blake2b(self.cluster_bytes.to_bytes(8), digest_size=8)
        hashed.update(self.starts)
        hashed.update(self.before)
        hashed.update(self.count.to_bytes(8))
        return hashed.hexdigest()

    def runs(self, first: int, after: int) -> Iterator[tuple[int, int, int]]:
        """Runs, or parts of them, among the clusters from ``first``: first cluster, how many, first data cluster."""
        index = max(bisect_right(self.starts, first) - 1, 0)
        while index < len(self.starts) and self.starts[index] < after:
            start, before, length = self.starts[index], self.before[index], self._length(index)
            cut = max(0, first - start)
            count = min(start + length, after) - start - cut
            if count > 0:
                yield start + cut, count, before + cut
            index += 1

    def _length(self, index: int) -> int:
        return (self.before[index + 1] if index + 1 < len(self.before) else self.count) - self.before[index]

    def tables(self, entries: int) -> "array[int]":
        """Which tables of so many clusters each are not empty, in order."""
        found = array("Q")
        for index, start in enumerate(self.starts):
            first, last = start // entries, (start + self._length(index) - 1) // entries
            if found and found[-1] == first:
                first += 1
            found.extend(range(first, last + 1))
        return found

    def parts(self, start: int, stop: int) -> Iterator[Part]:
        """Bytes of the data clusters, one after the other: the last one of the disk is filled up with zeros."""
        size = self.cluster_bytes
        index = bisect_right(self.before, start // size) - 1
        while start < stop:
            shift = (self.starts[index] - self.before[index]) * size
            run_stop = min((self.before[index] + self._length(index)) * size, stop)
            on_disk_stop = min(run_stop + shift, self.content.size_bytes)
            if start + shift < on_disk_stop:
                yield from self.content.parts(start + shift, on_disk_stop)
            if missing := run_stop + shift - max(on_disk_stop, start + shift):
                yield Zeros(missing)
            start, index = run_stop, index + 1
