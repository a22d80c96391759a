"""A connection to one pool, with an end to every wait."""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeVar

from elemento_storage.ceph.faults import FENCED, CephFault, NotInstalled, ceph_faults

if TYPE_CHECKING:
    import rados

T = TypeVar("T")

# Without them a client waits for ever for a cluster that is down. ``connect(timeout=)`` is ignored (Ceph 16).
_WAITS: Final = {
    "client_mount_timeout": "5",
    "rados_mon_op_timeout": "10",
    "rados_osd_op_timeout": "15",
    "rbd_default_clone_format": "2",  # the snapshot below a clone needs no protection, and may go before it
}


@dataclass(frozen=True)
class PoolSettings:
    """How a pool is found: ``ceph`` in a location's settings.json."""

    pool: str
    user: str = "admin"  #: without ``client.``
    conf: str = "/etc/ceph/ceph.conf"  #: it says where the user's key is, too


@dataclass(frozen=True)
class Handle:
    """One connected client of the cluster."""

    cluster: "rados.Rados"
    ioctx: "rados.Ioctx"
    index: "rados.Ioctx"  #: this one and the next for those who ask for the version of an answer, one at a time
    claims: "rados.Ioctx"
    address: str  #: by which the cluster knows it, and others can have it shut out


class Connection:
    """Connects when it is first used, and again when the cluster has shut the client out."""

    def __init__(self, settings: PoolSettings) -> None:
        self.settings = settings
        self.generation = 0  #: grows with every new client: what the one before held is lost
        self._handle: Handle | None = None
        self._connecting = threading.Lock()

    def run(self, work: Callable[[Handle], T]) -> T:
        """Do something with the pool. Raises CephFault."""
        handle = self._connect()
        try:
            with ceph_faults():
                return work(handle)
        except CephFault as fault:
            if fault.errno == FENCED:
                self._drop(handle)
            raise

    def _connect(self) -> Handle:
        if (handle := self._handle) is not None:
            return handle
        with self._connecting:
            if self._handle is None:
                self._handle = _new_handle(self.settings)
                self.generation += 1
            return self._handle

    def _drop(self, handle: Handle) -> None:
        # Not shut down: other threads are in calls on it, which end by themselves.
        with self._connecting:
            if self._handle is handle:
                self._handle = None

    def close(self) -> None:
        """End the connection."""
        with self._connecting:
            handle, self._handle = self._handle, None
        if handle is not None:
            for one in (handle.ioctx, handle.index, handle.claims):
                one.close()
            handle.cluster.shutdown()


def _new_handle(settings: PoolSettings) -> Handle:
    try:
        import rados  # noqa: PLC0415  a server without pools does without the packages
        import rbd  # noqa: F401, PLC0415
    except ImportError as error:
        raise NotInstalled from error
    with ceph_faults():
        cluster = rados.Rados(rados_id=settings.user, conffile=settings.conf, conf=_WAITS)
        try:
            cluster.connect()
            ioctx, index, claims = (cluster.open_ioctx(settings.pool) for _ in range(3))
        except BaseException:
            cluster.shutdown()
            raise
        return Handle(cluster, ioctx, index, claims, cluster.get_addrs())
