"""Who works on a volume, of all servers that share the pool.

A *claim* is an object ``elemento.claim.<volume id>`` that says which server has it and at which address the cluster
knows that server. Making one is one request that fails when it is there (the OSD decides). It has no end of its own:
it goes when its server lets go, or when another server finds that one dead.

A server is alive as long as it renews the lock on its object ``elemento.server.<cookie>``, whose lease the OSD keeps.
A lease cannot stop a server that was only paused. So whoever takes over has the cluster shut its address out first
(blocklist): from then on whatever it still sends is refused, and it finds out that it holds nothing any more.
"""

import errno
import logging
import threading
from typing import Final

import msgspec

from elemento_storage.ceph import images
from elemento_storage.ceph.connection import Connection, Handle
from elemento_storage.ceph.faults import FENCED, CephFault, ImageGone
from elemento_storage.errors import ImageInUse, VolumeLocked
from elemento_storage.faultpoints import reached
from elemento_storage.model import new_uid

log = logging.getLogger(__name__)

_LOCK: Final = "alive"
_RENEW: Final = 1  # LIBRADOS_LOCK_FLAG_MAY_RENEW
_SHUT_OUT_S: Final = 3600


class _Claim(msgspec.Struct, frozen=True):
    server: str
    cookie: str
    address: str


class Claims:
    """The claims of one server on the volumes of one pool."""

    def __init__(self, connection: Connection, server_id: str, lease_s: float) -> None:
        self.cookie = ""  #: of this server's object; another one after every start, and after it was taken for dead
        self._connection = connection
        self._server_id = server_id
        self._lease_s = lease_s
        self._generation = 0
        self._held: dict[str, Handle] = {}  # volume id → the client that claimed it
        self._shut_out: set[str] = set()
        self._lock = threading.Lock()

    # -- being alive ---------------------------------------------------------------------------------------

    def renew(self) -> None:
        """Give a sign of life. Raises CephFault."""
        self._connection.run(self._renew)

    def _renew(self, handle: Handle) -> None:
        import rados  # noqa: PLC0415

        with self._lock:
            if self._generation != self._connection.generation or not self.cookie:
                # Another client of the cluster: what the one before held may be somebody else's by now.
                self._held.clear()
                self.cookie = f"{self._server_id}.{new_uid()}"
                self._generation = self._connection.generation
        try:
            self._sign(handle)
        except rados.ObjectBusy:
            # Somebody has found us dead, and was about to shut us out.
            with self._lock:
                self._held.clear()
                self.cookie = f"{self._server_id}.{new_uid()}"
            self._sign(handle)

    def _sign(self, handle: Handle) -> None:
        oid = f"elemento.server.{self.cookie}"
        handle.ioctx.lock_exclusive(oid, _LOCK, self.cookie, "", round(self._lease_s), _RENEW)

    def leave(self) -> None:
        """Say goodbye. What is exported stays claimed: its daemons go on without us. Raises CephFault."""
        if self.cookie:
            self._connection.run(lambda handle: _remove(handle, f"elemento.server.{self.cookie}"))

    def is_dead(self, cookie: str) -> bool:
        """Whether the server of this cookie gives no sign of life, or is a process of ours that was before this one."""
        if cookie.partition(".")[0] == self._server_id:
            return cookie != self.cookie
        return not self._connection.run(lambda handle: self._is_alive(handle, cookie))

    # -- claims --------------------------------------------------------------------------------------------

    def acquire(self, volume_id: str) -> None:
        """Claim a volume; nothing if we have it. Raises VolumeLocked, ImageInUse, CephFault."""
        self._connection.run(lambda handle: self._acquire(handle, volume_id))

    def _acquire(self, handle: Handle, volume_id: str) -> None:
        if self._generation != self._connection.generation or not self.cookie:
            self._renew(handle)
        if volume_id in self._held:
            return
        claim = _Claim(self._server_id, self.cookie, handle.address)
        oid = f"elemento.claim.{volume_id}"
        while True:
            if self._write(handle, oid, claim, None):
                break
            found = self._read(handle, oid)
            if found is None:
                continue
            other, version = found
            self._require_dead(handle, volume_id, other)
            if self._write(handle, oid, claim, version):
                log.warning("volume %s: taken over from server %s, which is dead", volume_id, other.server)
                break
        with self._lock:
            self._held[volume_id] = handle

    def holds(self, volume_id: str) -> bool:
        """Whether we have the volume, as far as we know."""
        return volume_id in self._held

    def require(self, handle: Handle, volume_id: str) -> None:
        """To be asked with the client that is about to change the volume. Raises CephFault.

        If it is the one that claimed it, the cluster refuses what it sends once another server has taken over. Another
        client of ours would not be refused, so it must not send anything.
        """
        if self._held.get(volume_id) is not handle:
            raise CephFault(FENCED)

    def release(self, volume_id: str) -> None:
        """Let go of a volume; nothing if we do not have it. Raises CephFault."""
        with self._lock:
            held = self._held.pop(volume_id, None)
        if held is not None:
            self._connection.run(lambda handle: self._remove_own(handle, volume_id))

    def _remove_own(self, handle: Handle, volume_id: str) -> None:
        oid = f"elemento.claim.{volume_id}"
        found = self._read(handle, oid)
        if found is not None and found[0].cookie == self.cookie:
            self._write(handle, oid, None, found[1])

    def _write(self, handle: Handle, oid: str, claim: _Claim | None, version: int | None) -> bool:
        """Make, replace or remove a claim; False when it is not any more as it was when it was looked at."""
        import rados  # noqa: PLC0415

        try:
            with rados.WriteOpCtx() as operation:
                if version is None:
                    operation.new(rados.LIBRADOS_CREATE_EXCLUSIVE)
                else:
                    operation.assert_version(version)
                if claim is None:
                    operation.remove()
                else:
                    operation.write_full(msgspec.json.encode(claim))
                handle.ioctx.operate_write_op(operation, oid)
        except (rados.ObjectExists, rados.ObjectNotFound):
            return False
        except rados.OSError as error:
            if error.errno is not None and abs(error.errno) in (errno.ERANGE, errno.EOVERFLOW):
                return False
            raise
        return True

    def _read(self, handle: Handle, oid: str) -> tuple[_Claim, int] | None:
        import rados  # noqa: PLC0415

        try:
            with self._lock:
                content = handle.claims.read(oid, 65536)
                version = handle.claims.get_last_version()
        except rados.ObjectNotFound:
            return None
        return msgspec.json.decode(content, type=_Claim), version

    def _require_dead(self, handle: Handle, volume_id: str, other: _Claim) -> None:
        """Whoever has the claim is dead, and shut out, when this returns. Raises VolumeLocked, ImageInUse."""
        ours = other.server == self._server_id  # of a process before this one: only one has the state directory
        if not ours and self._is_alive(handle, other.cookie):
            raise VolumeLocked(
                "another server works on the volume, or exports it: ask that one",
                locked={"purpose": "claim", "job": "", "since": None, "host": other.server, "shared": False},
            )
        if other.address != handle.address and other.address not in self._shut_out:
            shut_out(handle, other.address)
            self._shut_out.add(other.address)
        if not ours:
            try:
                users = images.users(handle, volume_id)
            except ImageGone:
                users = []
            if users:
                raise ImageInUse(
                    "the server that exported the volume gives no sign of life, but what serves it does: start that "
                    f"server again, or end its daemons ({', '.join(users)})"
                )
        reached("claim.shut-out")

    def _is_alive(self, handle: Handle, cookie: str) -> bool:
        import rados  # noqa: PLC0415

        oid = f"elemento.server.{cookie}"
        try:
            handle.ioctx.lock_exclusive(oid, _LOCK, self.cookie, "", round(self._lease_s), 0)
        except rados.ObjectBusy:
            return True
        except rados.ObjectExists:
            pass
        return False


def shut_out(handle: Handle, address: str) -> None:
    """Have the cluster refuse whatever the client at this address still sends. Raises CephFault."""
    handle.cluster.blocklist_add(address, _SHUT_OUT_S)
    # From here on every request of ours tells the OSD that it reaches of the list, before it does anything else.
    handle.cluster.wait_for_latest_osdmap()


def _remove(handle: Handle, oid: str) -> None:
    import rados  # noqa: PLC0415

    try:
        handle.ioctx.remove_object(oid)
    except rados.ObjectNotFound:
        return
