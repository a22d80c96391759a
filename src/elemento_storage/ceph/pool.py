"""A pool as the catalog and the store see it: one per ``ceph`` in a settings.json, however many locations name it."""

import contextlib
import errno
import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeVar

import msgspec

from elemento_storage.ceph import images
from elemento_storage.ceph.claims import Claims
from elemento_storage.ceph.connection import Connection, Handle, PoolSettings
from elemento_storage.ceph.faults import CephFault, ImageGone
from elemento_storage.ceph.index import Change, Index, Record, State
from elemento_storage.errors import VolumeExists
from elemento_storage.faultpoints import reached
from elemento_storage.model import normalise_uid

T = TypeVar("T")

_SPACE_AGE_S: Final = 5.0


@dataclass(frozen=True)
class PoolSpace:
    """What the cluster says of a pool, in bytes of data: copies are taken into account."""

    total_bytes: int
    free_bytes: int


class ImageRef(msgspec.Struct, frozen=True, kw_only=True):
    """``data.rbd``: where a volume's image is."""

    pool: str
    image: str
    user: str
    conf: str

    def encode(self) -> bytes:
        """The file's bytes: one line of JSON."""
        return msgspec.json.encode(self) + b"\n"

    @property
    def settings(self) -> PoolSettings:
        """How its pool is found."""
        return PoolSettings(self.pool, self.user, self.conf)


Limit = Callable[[int, int], None]  #: volumes and bytes that there are already; raises NoRoom


class Pool:
    """Volumes in a pool. Every method blocks; all raise CephFault."""

    def __init__(self, settings: PoolSettings, server_id: str, lease_s: float) -> None:
        self.settings = settings
        self.connection = Connection(settings)
        self.index = Index(self.connection)
        self.claims = Claims(self.connection, server_id, lease_s)
        self._server_id = server_id
        self._space: tuple[float, PoolSpace] | None = None
        self._measuring = threading.Lock()

    def ref(self, volume_id: str) -> ImageRef:
        """Where a volume's image is."""
        settings = self.settings
        return ImageRef(pool=settings.pool, image=volume_id, user=settings.user, conf=settings.conf)

    # -- making --------------------------------------------------------------------------------------------

    def begin(self, volume_id: str, size_bytes: int, limit: Limit) -> None:
        """Say that a volume will be made, and reserve its room among all servers. Raises VolumeExists, NoRoom."""

        def announce(before: Record | None) -> Record:
            if before is not None:
                raise VolumeExists(f"volume {volume_id} exists already", volume_id=volume_id)
            limit(self.index.volume_count, self.index.virtual_bytes)
            return Record(state=State.CREATING, size=size_bytes, server=self.claims.cookie)

        self.index.change(volume_id, announce)
        reached("ceph.begun")

    def publish(self, volume_id: str, meta: bytes, size_bytes: int) -> None:
        """Make it a volume, in one step for all servers: it exists. Raises VolumeExists."""
        self.run(lambda handle: images.set_meta(handle, volume_id, meta))
        reached("ceph.described")

        def finish(before: Record | None) -> Record:
            if before is None or before.state is not State.CREATING:
                raise VolumeExists(f"volume {volume_id} was made by somebody else", volume_id=volume_id)
            return Record(state=State.READY, size=size_bytes, meta=msgspec.Raw(meta))

        self.index.change(volume_id, finish)
        reached("ceph.published")

    def take_back(self, volume_id: str) -> None:
        """Undo ``publish`` before anybody was told."""
        self.index.change(
            volume_id,
            lambda record: record and msgspec.structs.replace(record, state=State.CREATING, server=self.claims.cookie),
        )

    def abandon(self, volume_id: str) -> None:
        """Remove what was being made; nothing if it is a volume. Idempotent."""
        self.index.refresh()
        record = self.index.records.get(volume_id)
        if record is None or record.state is State.CREATING:
            self.run(lambda handle: images.remove(handle, volume_id))
            self.index.change(volume_id, lambda now: None if now and now.state is State.CREATING else now)

    # -- changing, under the claim -------------------------------------------------------------------------

    def rewrite(self, volume_id: str, meta: bytes, size_bytes: int) -> None:
        """Another meta.json for a volume; in the index first, which is what counts. Raises ImageGone."""

        def change(before: Record | None) -> Record:
            if before is None:
                raise ImageGone(volume_id)
            return msgspec.structs.replace(before, size=size_bytes, reserved=0, meta=msgspec.Raw(meta))

        self._change_claimed(volume_id, change)
        reached("ceph.rewritten")

        def describe(handle: Handle) -> None:
            self.claims.require(handle, volume_id)
            images.set_meta(handle, volume_id, meta)

        self.run(describe)

    def reserve(self, volume_id: str, size_bytes: int, limit: Limit) -> None:
        """Room for a volume that is to grow, among all servers. Raises NoRoom, ImageGone."""

        def change(before: Record | None) -> Record:
            if before is None:
                raise ImageGone(volume_id)
            limit(self.index.volume_count, self.index.virtual_bytes - before.counted_bytes)
            return msgspec.structs.replace(before, reserved=size_bytes)

        self._change_claimed(volume_id, change)

    def _change_claimed(self, volume_id: str, change: Change) -> None:
        self.index.change(volume_id, change, lambda handle: self.claims.require(handle, volume_id))

    def unreserve(self, volume_id: str) -> None:
        """Give it back; nothing when ``rewrite`` has used it."""
        self.index.change(volume_id, lambda record: record and msgspec.structs.replace(record, reserved=0))

    def bin(self, volume_id: str, since: str) -> None:
        """Destroy, for all servers: it can be restored."""
        self._change_claimed(
            volume_id, lambda record: record and msgspec.structs.replace(record, state=State.BINNED, since=since)
        )
        reached("ceph.binned")

    def restore(self, volume_id: str) -> None:
        """Take it out of the bin."""
        self._change_claimed(
            volume_id,
            lambda record: record and msgspec.structs.replace(record, state=State.READY, since="", reserved=0),
        )
        reached("ceph.restored")

    def doom(self, volume_id: str) -> None:
        """A destroyed volume cannot be restored from here on; ``abandon`` deletes it. Idempotent."""

        def doom(record: Record | None) -> Record | None:
            if record is None or record.state is State.READY:
                return record
            return msgspec.structs.replace(record, state=State.CREATING, server=self.claims.cookie, since="")

        self._change_claimed(volume_id, doom)
        reached("ceph.doomed")

    # -- what others left, and made ------------------------------------------------------------------------

    def half_made(self) -> list[str]:
        """Volumes in the making whose server is dead, or was this one's process before."""
        return [
            volume_id
            for volume_id, record in list(self.index.records.items())
            if record.state is State.CREATING and record.server != self.claims.cookie
            if self.claims.is_dead(record.server)
        ]

    def rebuild(self) -> None:
        """Make the index from what the images say, where there is none."""
        known = dict(self.index.records)

        def look(handle: Handle) -> dict[str, Record]:
            found = {}
            for name in images.names(handle):
                if normalise_uid(name) == name:
                    record = known.get(name) or read_record(handle, name)
                    if record is not None:
                        found[name] = record
            return found

        self.index.make(self.run(look))

    def compare(self) -> tuple[list[str], list[str]]:
        """Look at all images: which volumes have none, and which images were taken in because the index lacked them."""
        self.index.refresh()
        names = set(self.run(images.names))
        missing = [
            volume_id
            for volume_id, record in list(self.index.records.items())
            if record.state is not State.CREATING and volume_id not in names
        ]
        adopted = []
        for name in names - self.index.records.keys():
            if normalise_uid(name) != name:
                continue
            with contextlib.suppress(ImageGone):
                record = self.run(lambda handle, name=name: read_record(handle, name))  # type: ignore[misc]
                if record is not None:
                    self.index.change(name, lambda before, record=record: before or record)  # type: ignore[misc]
                    adopted.append(name)
        return missing, adopted

    # -- facts ---------------------------------------------------------------------------------------------

    def space(self) -> PoolSpace:
        """How much room the cluster has for this pool, as of the last few seconds."""
        with self._measuring:
            if self._space is None or time.monotonic() - self._space[0] > _SPACE_AGE_S:
                self._space = (time.monotonic(), self.run(self._read_space))
            return self._space[1]

    def _read_space(self, handle: Handle) -> PoolSpace:
        status, answer, said = handle.cluster.mon_command(json.dumps({"prefix": "df", "format": "json"}), b"")
        if status:
            raise CephFault(abs(status), said or None)
        for pool in json.loads(answer)["pools"]:
            if pool["name"] == self.settings.pool:
                free_bytes = int(pool["stats"]["max_avail"])
                return PoolSpace(free_bytes + int(pool["stats"]["stored"]), free_bytes)
        raise CephFault(errno.EAGAIN, "the cluster has not measured the pool yet: is a manager (ceph-mgr) running?")

    def run(self, work: Callable[[Handle], T]) -> T:
        """Do something with the pool."""
        return self.connection.run(work)

    def close(self) -> None:
        """Say goodbye, and disconnect."""
        with contextlib.suppress(CephFault):
            self.claims.leave()
        self.connection.close()


class Pools:
    """The pools of this server."""

    def __init__(self, server_id: str, lease_s: float) -> None:
        self._server_id = server_id
        self._lease_s = lease_s
        self._pools: dict[PoolSettings, Pool] = {}
        self._lock = threading.Lock()

    def get(self, settings: PoolSettings) -> Pool:
        """The pool of these settings, connected when it is first asked."""
        with self._lock:
            if settings not in self._pools:
                self._pools[settings] = Pool(settings, self._server_id, self._lease_s)
            return self._pools[settings]

    def close(self) -> None:
        """Leave all of them. Blocks."""
        for pool in self._pools.values():
            pool.close()


def read_record(handle: Handle, name: str) -> Record | None:
    """What an image says of the volume that it is; None when it is none of ours. Raises ImageGone, CephFault."""
    meta = images.read_meta(handle, name)
    if meta is None:
        return None
    try:
        msgspec.json.decode(meta, type=dict[str, msgspec.Raw])
    except msgspec.DecodeError:
        return None
    return Record(state=State.READY, size=images.size_bytes(handle, name), meta=msgspec.Raw(meta))


def read_ref(directory: str) -> ImageRef:
    """What the ``data.rbd`` in a volume's directory says. Raises OSError."""
    with open(f"{directory}/data.rbd", "rb") as file:
        content = file.read(65536)
    try:
        return msgspec.json.decode(content, type=ImageRef)
    except msgspec.DecodeError as error:
        raise CephFault(errno.EINVAL, f"data.rbd does not say where the image is: {error}") from error
