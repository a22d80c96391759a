"""The index of a pool's volumes: one object, which every server reads in one go and changes by compare-and-swap.

The object's omap holds ``v.<volume id>`` → a ``Record``, and ``c.<version>`` → which record the change of that version
was about: so who has read version 1000 reads the changes since then, and not all. A change asserts the version it was
made of (stale: errno 34), adds its own ``c.`` key and takes an old one away.

The images carry the same metadata (``images.set_meta``): an index that is lost is made again from them.
"""

import contextlib
import errno
import random
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from enum import StrEnum
from typing import Final

import msgspec

from elemento_storage.ceph.connection import Connection, Handle
from elemento_storage.ceph.faults import CephFault, ceph_faults

INDEX_OBJECT: Final = "elemento.index"
_VOLUME: Final = "v."
_CHANGE: Final = "c."
_CHANGES_KEPT: Final = 1000  # versions are numbers of the placement group: some of them are of other objects
_TRIMMED: Final = 0.02  # of the changes take old ones away
_PAGE: Final = 1024  # an OSD answers no more keys at once
_STALE: Final = errno.ERANGE
_PATIENCE_S: Final = 10.0


class State(StrEnum):
    """What a record stands for."""

    CREATING = "creating"  #: an image in the making, or not even that; ``server`` makes it
    READY = "ready"  #: a volume
    BINNED = "binned"  #: destroyed at ``since``, and can be restored


class Record(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One volume as the index knows it."""

    state: State
    size: int  #: bytes
    reserved: int = 0  #: bytes that it is about to grow to
    server: str = ""
    since: str = ""
    meta: msgspec.Raw = msgspec.Raw(b"{}")  #: its meta.json

    @property
    def counted_bytes(self) -> int:
        """What counts against the limits."""
        return 0 if self.state is State.BINNED else max(self.size, self.reserved)


Change = Callable[[Record | None], Record | None]
Allowed = Callable[[Handle], None]
_decoder = msgspec.json.Decoder(Record)


class Index:
    """One server's copy of a pool's index."""

    def __init__(self, connection: Connection) -> None:
        self.records: dict[str, Record] = {}
        self.volume_count = 0  #: those in the making included
        self.virtual_bytes = 0
        self.exists = False
        self._connection = connection
        self._version = 0
        self._changed: set[str] = set()
        self._lock = threading.RLock()

    # -- reading -------------------------------------------------------------------------------------------

    def refresh(self) -> None:
        """Read what was changed since the last time: one request when nothing was. Raises CephFault."""
        with self._lock:
            self._connection.run(self._refresh)

    def take_changes(self) -> set[str]:
        """Ids of the volumes whose records were changed, by whomever, since this was asked last."""
        with self._lock:
            changed, self._changed = self._changed, set()
            return changed

    def give_back(self, volume_ids: Iterable[str]) -> None:
        """These changes could not be dealt with: hand them out again the next time."""
        with self._lock:
            self._changed.update(volume_ids)

    def _refresh(self, handle: Handle) -> None:
        import rados  # noqa: PLC0415

        deadline = time.monotonic() + _PATIENCE_S
        while True:
            try:
                # The first change since our version was made of our version, so it is the key that has its number.
                changes = self._read(handle, f"{_CHANGE}{max(self._version - 1, 0):020d}", _CHANGE)
            except rados.ObjectNotFound:
                # That says nothing of the volumes: what we know stays, until the index is made again.
                self.exists, self._version = False, 0
                return
            version = handle.index.get_last_version()
            self.exists = True
            if version == self._version:
                return
            is_known = self._version and f"{_CHANGE}{self._version:020d}" in changes and len(changes) < _PAGE
            if not is_known or time.monotonic() > deadline:
                self._read_all(handle)
                return
            volume_ids = {content.decode() for content in changes.values()}
            found, version_of_records = self._read_records(handle, volume_ids)
            if version_of_records == version:
                break
        for volume_id in volume_ids:
            self._put(volume_id, found.get(volume_id))
        self._version = version

    def _read_all(self, handle: Handle) -> None:
        deadline = time.monotonic() + _PATIENCE_S
        while True:
            found: dict[str, Record] = {}
            versions = set()
            after = ""
            while True:
                page = self._read(handle, after, _VOLUME)
                versions.add(handle.index.get_last_version())
                for key, content in page.items():
                    found[key[len(_VOLUME) :]] = _decoder.decode(content)
                if len(page) < _PAGE:
                    break
                after = max(page)
            if len(versions) == 1:
                break
            if time.monotonic() > deadline:
                raise CephFault(errno.ETIMEDOUT, "the pool's index is changed faster than it can be read")
        for volume_id in self.records.keys() - found.keys():
            self._put(volume_id, None)
        for volume_id, record in found.items():
            self._put(volume_id, record)
        self._version = versions.pop()

    def _read(self, handle: Handle, after: str, prefix: str) -> dict[str, bytes]:
        import rados  # noqa: PLC0415

        with rados.ReadOpCtx() as operation:
            pairs, _ = handle.index.get_omap_vals(operation, after, prefix, _PAGE)
            handle.index.operate_read_op(operation, INDEX_OBJECT)
            return dict(pairs)

    def _read_records(self, handle: Handle, volume_ids: Iterable[str]) -> tuple[dict[str, Record], int]:
        import rados  # noqa: PLC0415

        with rados.ReadOpCtx() as operation:
            keys = tuple(f"{_VOLUME}{volume_id}" for volume_id in volume_ids)
            pairs, _ = handle.index.get_omap_vals_by_keys(operation, keys)
            handle.index.operate_read_op(operation, INDEX_OBJECT)
            found = {key[len(_VOLUME) :]: _decoder.decode(content) for key, content in pairs}
        return found, handle.index.get_last_version()

    def _put(self, volume_id: str, record: Record | None) -> None:
        before = self.records.get(volume_id)
        if before == record:
            return
        for one, sign in ((before, -1), (record, 1)):
            if one is not None:
                self.virtual_bytes += sign * one.counted_bytes
                self.volume_count += sign * (one.state is not State.BINNED)
        if record is None:
            del self.records[volume_id]
        else:
            self.records[volume_id] = record
        self._changed.add(volume_id)

    # -- changing ------------------------------------------------------------------------------------------

    def change(self, volume_id: str, change: Change, allowed: Allowed = lambda _: None) -> Record | None:
        """Replace one record by what ``change`` makes of it as it is now; None removes it. On disk when this returns.

        ``change`` may be called several times, and what it raises is raised; ``allowed`` is told which client will send
        it. Raises CephFault; after a time-out it is not known whether it was made.
        """
        with self._lock:
            return self._connection.run(lambda handle: self._change(handle, volume_id, change, allowed))

    def _change(self, handle: Handle, volume_id: str, change: Change, allowed: Allowed) -> Record | None:
        allowed(handle)
        deadline = time.monotonic() + _PATIENCE_S
        if not self.exists:
            self._refresh(handle)
        if not self.exists:
            raise CephFault(errno.ENOENT, "the pool has no index of its volumes yet: it is made by the next look")
        while True:
            before = self.records.get(volume_id)
            after = change(before)
            if after == before:
                return after
            try:
                with ceph_faults():
                    self._write(handle, volume_id, after)
            except CephFault as fault:
                if fault.errno != _STALE or time.monotonic() > deadline:
                    raise
                self._refresh(handle)
                time.sleep(random.uniform(0, 0.003))  # noqa: S311  so that two who collide do not again
                continue
            self._put(volume_id, after)
            return after

    def make(self, records: Mapping[str, Record]) -> None:
        """Make the index, where there is none, in one step: nobody sees half of it. Raises CephFault."""
        with self._lock:
            self._connection.run(lambda handle: self._make(handle, records))

    def _make(self, handle: Handle, records: Mapping[str, Record]) -> None:
        import rados  # noqa: PLC0415

        with contextlib.suppress(rados.ObjectExists), rados.WriteOpCtx() as operation:
            operation.new(rados.LIBRADOS_CREATE_EXCLUSIVE)
            if records:
                keys = tuple(f"{_VOLUME}{volume_id}" for volume_id in records)
                handle.index.set_omap(operation, keys, tuple(msgspec.json.encode(one) for one in records.values()))
            handle.index.operate_write_op(operation, INDEX_OBJECT)
        self._read_all(handle)
        self.exists = True

    def _write(self, handle: Handle, volume_id: str, record: Record | None) -> None:
        import rados  # noqa: PLC0415

        key, version = f"{_VOLUME}{volume_id}", self._version
        with rados.WriteOpCtx() as operation:
            operation.assert_version(version)
            names, values = [f"{_CHANGE}{version:020d}"], [volume_id.encode()]
            if record is None:
                handle.index.remove_omap_keys(operation, (key,))
            else:
                names.append(key)
                values.append(msgspec.json.encode(record))
            handle.index.set_omap(operation, tuple(names), tuple(values))
            if version > _CHANGES_KEPT and random.random() < _TRIMMED:  # noqa: S311
                handle.index.remove_omap_range2(operation, _CHANGE, f"{_CHANGE}{version - _CHANGES_KEPT:020d}")
            handle.index.operate_write_op(operation, INDEX_OBJECT)
        self._version = handle.index.get_last_version()
