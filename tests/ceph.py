"""A real Ceph cluster to throw away: one monitor, a manager without modules, three OSDs on files, cephx.

The tests use ``ceph_cluster``; ``python -m tests.ceph VAR -- COMMAND`` runs a server with one beside it, for a demo.

What makes it start in two seconds, all measured: ``bdev_aio_poll_ms`` of 10 (250 costs 3 s at the start), no module of
the manager, the bindings in place of the ``ceph`` program, and nothing that waits longer than for what it needs.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import rados
import rbd

OSDS = 3
POOL = "elemento"
_CONF = """\
[global]
fsid = {fsid}
mon_host = [v2:127.0.0.1:{port}/0]
mon_initial_members = a
public_addr = 127.0.0.1
cluster_addr = 127.0.0.1
ms_bind_port_min = {first_port}
ms_bind_port_max = {last_port}
ms_bind_msgr1 = false
auth_cluster_required = cephx
auth_service_required = cephx
auth_client_required = cephx
auth_allow_insecure_global_id_reclaim = false
keyring = {directory}/keyring
run_dir = {directory}/run
admin_socket = {directory}/run/$name.asok
crash_dir = {directory}/crash
log_file = {directory}/log/$name.log
mon_cluster_log_file = {directory}/log/cluster.log
mon_data = {directory}/mon.a
mgr_data = {directory}/mgr.x
osd_data = {directory}/osd.$id
osd_pool_default_size = 2
osd_pool_default_min_size = 1
osd_pool_default_pg_num = 8
osd_pool_default_pgp_num = 8
osd_pool_default_pg_autoscale_mode = off
osd_crush_chooseleaf_type = 0
mon_allow_pool_delete = true
mon_warn_on_pool_no_redundancy = false
mon_data_avail_warn = 2
mon_data_avail_crit = 1
mon_client_hunt_interval = 0.3
mon_client_hunt_interval_max_multiple = 3
ms_initial_backoff = 0.05
ms_max_backoff = 1
[client]
admin_socket =
log_file =
objecter_tick_interval = 0.5
[mon]
mon_osd_down_out_interval = 3600
paxos_propose_interval = 0.05
paxos_min_wait = 0.01
mon_election_timeout = 1
mon_tick_interval = 1
[mgr]
mgr_module_path = {directory}/no-modules
mgr_stats_period = 1
[osd]
osd_objectstore = bluestore
osd_crush_initial_weight = 1
osd_memory_target = 939524096
osd_op_num_shards = 2
osd_op_num_threads_per_shard = 1
osd_heartbeat_interval = 1
osd_heartbeat_grace = 5
osd_client_watch_timeout = 4
osd_class_dir = {class_directory}
bluestore_block_size = 8G
bluestore_block_create = true
bluestore_block_wal_create = false
bluestore_block_db_create = false
bluestore_cache_size = 67108864
bluestore_cache_autotune = false
bdev_aio_poll_ms = 10
"""
_START_S = 60.0


class CephCluster:
    """One cluster below one directory, on ports of its own."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory  #: a short path: the names of Unix sockets have at most 107 characters
        self.port = _free_ports(100)
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def conf(self) -> str:
        """The configuration file, which names the key of the administrator as well."""
        return str(self.directory / "ceph.conf")

    @property
    def settings(self) -> dict[str, str]:
        """What a location's settings.json says of it."""
        return {"pool": POOL, "user": "admin", "conf": self.conf}

    # -- life ----------------------------------------------------------------------------------------------

    def start(self) -> "CephCluster":
        """From nothing to a pool that images can be made in."""
        for name in ("run", "log", "crash", "mon.a", "mgr.x", "no-modules"):
            (self.directory / name).mkdir(parents=True)
        fsid = str(uuid.uuid4())
        class_directory = next(Path("/usr/lib").glob("*/rados-classes"))
        Path(self.conf).write_text(
            _CONF.format(
                fsid=fsid,
                port=self.port,
                first_port=self.port + 1,
                last_port=self.port + 99,
                directory=self.directory,
                class_directory=class_directory,
            )
        )
        self._make_keys()
        monmap = str(self.directory / "monmap")
        address = f"[v2:127.0.0.1:{self.port}/0]"
        _run("monmaptool", "--create", "--clobber", "--fsid", fsid, "--addv", "a", address, monmap)
        osds = [str(uuid.uuid4()) for _ in range(OSDS)]
        making = [
            self._begin(
                f"osd.{number}.mkfs", "ceph-osd", "-i", f"{number}", "--mkfs", "--osd-uuid", one, "--monmap", monmap
            )
            for number, one in enumerate(osds)
        ]
        _run(
            "ceph-mon",
            "-c",
            self.conf,
            "-i",
            "a",
            "--mkfs",
            "--monmap",
            monmap,
            "--keyring",
            f"{self.directory}/keyring",
        )
        self.start_mon()
        with self.client() as cluster:
            for number, one in enumerate(osds):
                _command(cluster, prefix="osd new", uuid=one, id=number)
            for made in making:
                assert made.wait(_START_S) == 0, f"see {self.directory}/log"
            for number in range(OSDS):
                self.start_osd(number, wait=False)
            self._daemons["mgr.x"] = self._begin("mgr.x", "ceph-mgr", "-i", "x", "-f")
            _until(lambda: json.loads(_command(cluster, prefix="osd stat", format="json"))["num_up_osds"] == OSDS)
            self.make_pool(POOL, cluster)
        return self

    def _make_keys(self) -> None:
        keyring = str(self.directory / "keyring")
        everything = ("--cap", "osd", "allow *", "--cap", "mds", "allow *")
        _run("ceph-authtool", "-C", keyring, "-n", "mon.", "--gen-key", "--cap", "mon", "allow *")
        admin = ("--gen-key", "--cap", "mon", "allow *", "--cap", "mgr", "allow *", *everything)
        _run("ceph-authtool", keyring, "-n", "client.admin", *admin)
        _run("ceph-authtool", keyring, "-n", "mgr.x", "--gen-key", "--cap", "mon", "allow profile mgr", *everything)
        for number in range(OSDS):
            (self.directory / f"osd.{number}").mkdir()
            caps = ("--cap", "mon", "allow profile osd", "--cap", "mgr", "allow profile osd", "--cap", "osd", "allow *")
            _run("ceph-authtool", keyring, "-n", f"osd.{number}", "--gen-key", *caps)

    def _begin(self, name: str, *argv: str) -> subprocess.Popen[bytes]:
        with (self.directory / "log" / f"{name}.out").open("ab") as log:
            return subprocess.Popen(
                [argv[0], "-c", self.conf, *argv[1:]],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def stop(self) -> None:
        """End every daemon and leave nothing."""
        for name in list(self._daemons):
            self._kill(name)
        shutil.rmtree(self.directory, ignore_errors=True)

    # -- daemons -------------------------------------------------------------------------------------------

    def start_mon(self) -> None:
        """Start the monitor and wait until it listens."""
        self._daemons["mon.a"] = self._begin("mon.a", "ceph-mon", "-i", "a", "-f")

        def listens() -> bool:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                return True
            assert self._daemons["mon.a"].poll() is None, (self.directory / "log" / "mon.a.out").read_text()
            return False

        _until(listens)

    def start_osd(self, number: int, *, wait: bool = True) -> None:
        """Start an OSD; ``wait``: until it serves."""
        asok = self.directory / "run" / f"osd.{number}.asok"
        asok.unlink(missing_ok=True)
        self._daemons[f"osd.{number}"] = self._begin(f"osd.{number}", "ceph-osd", "-i", f"{number}", "-f")
        if wait:
            _until(lambda: _state(asok) == "active")

    def kill_mon(self) -> None:
        """SIGKILL to the monitor."""
        self._kill("mon.a")

    def kill_osd(self, number: int) -> None:
        """SIGKILL to an OSD."""
        self._kill(f"osd.{number}")

    def pause(self, *, paused: bool) -> None:
        """Stop the whole cluster in its tracks, or let it go on: what a client sees when the network is cut."""
        for daemon in self._daemons.values():
            daemon.send_signal(signal.SIGSTOP if paused else signal.SIGCONT)

    def _kill(self, name: str) -> None:
        daemon = self._daemons.pop(name, None)
        if daemon is not None:
            daemon.kill()
            daemon.wait()

    # -- content -------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def client(self) -> Iterator[rados.Rados]:
        """The administrator's connection."""
        waits = {"rados_mon_op_timeout": "20", "rados_osd_op_timeout": "30", "client_mount_timeout": "20"}
        cluster = rados.Rados(conffile=self.conf, rados_id="admin", conf=waits)
        cluster.connect()
        try:
            yield cluster
        finally:
            cluster.shutdown()

    @contextlib.contextmanager
    def pool(self, name: str = POOL) -> Iterator[rados.Ioctx]:
        """A pool, to look at it past the server."""
        with self.client() as cluster, cluster.open_ioctx(name) as ioctx:
            yield ioctx

    def make_pool(self, name: str, cluster: rados.Rados | None = None) -> None:
        """Another pool for images."""
        if cluster is None:
            with self.client() as own:
                self.make_pool(name, own)
            return
        _command(cluster, prefix="osd pool create", pool=name, pg_num=8, pgp_num=8, size=2)
        with cluster.open_ioctx(name) as ioctx:
            rbd.RBD().pool_init(ioctx, True)
        _until(lambda: name in _command(cluster, prefix="df", format="json"))

    def remove_pool(self, name: str) -> None:
        """Remove a pool with all that is in it."""
        with self.client() as cluster:
            cluster.delete_pool(name)

    def command(self, **arguments: object) -> str:
        """A command to the monitors."""
        with self.client() as cluster:
            return _command(cluster, **arguments)

    def make_user(self, name: str, *, mon: str, osd: str) -> str:
        """A user with these capabilities; the path of its keyring."""
        key = self.command(prefix="auth get-or-create", entity=f"client.{name}", caps=["mon", mon, "osd", osd])
        path = self.directory / f"client.{name}.keyring"
        path.write_text(key)
        path.chmod(0o600)
        return str(path)


@contextlib.contextmanager
def ceph_cluster(parent: Path | None = None) -> Iterator[CephCluster]:
    """A running cluster, gone afterwards."""
    directory = Path(tempfile.mkdtemp(prefix="ceph-", dir=parent))
    cluster = CephCluster(directory)
    try:
        yield cluster.start()
    finally:
        cluster.stop()


def _run(*argv: str) -> None:
    done = subprocess.run(argv, check=False, capture_output=True, text=True, timeout=_START_S)
    assert done.returncode == 0, done


def _command(cluster: rados.Rados, **arguments: object) -> str:
    status, output, said = cluster.mon_command(json.dumps(arguments), b"")
    assert status == 0, (arguments, status, said)
    return output.decode()


def _until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _START_S
    while not is_so():
        assert time.monotonic() < deadline, "the cluster does not get on"
        time.sleep(0.03)


def _state(admin_socket: Path) -> str | None:
    """What an OSD says of itself: the map may still show one as up that was killed a moment ago."""
    with contextlib.suppress(OSError, struct.error, ValueError), socket.socket(socket.AF_UNIX) as asked:
        asked.settimeout(2)
        asked.connect(str(admin_socket))
        asked.sendall(b'{"prefix":"status"}\0')
        with asked.makefile("rb") as answer:
            state: str = json.loads(answer.read(struct.unpack(">I", answer.read(4))[0]))["state"]
            return state
    return None


def _free_ports(count: int) -> int:
    """The first of so many ports that nobody listens on, below those that the kernel gives away."""
    for first in range(20000 + os.getpid() % 97 * 110, 32000, 110):
        with contextlib.suppress(OSError), socket.socket() as one, socket.socket() as last:
            one.bind(("127.0.0.1", first))
            last.bind(("127.0.0.1", first + count - 1))
            return first
    raise AssertionError("no free ports")


def _demo(var: Path, command: list[str]) -> int:
    """Run a command with a cluster beside it, and a location that stands for its pool."""
    with ceph_cluster() as cluster:
        location = var / "mnt" / "pool"
        location.mkdir(parents=True, exist_ok=True)
        (location / "settings.json").write_text(json.dumps({"max-total-size": "200G", "ceph": cluster.settings}))
        print(f"a Ceph cluster to try, which is gone with the server: {cluster.conf}", file=sys.stderr)
        with subprocess.Popen(command) as server:
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, lambda number, _: server.send_signal(number))
            return server.wait()


if __name__ == "__main__":
    sys.exit(_demo(Path(sys.argv[1]), sys.argv[3:]))
