"""The engine of one exported volume: its storage daemon, and the two ways to its bytes.

A volume has one path at a time (docs/decisions/0008-one-path.md):

* *socket*: NBD exports of one node, on a Unix socket or a TCP port. Two of them always see the same data. Where both a
  socket and a port are wanted, the second is a bridge: a daemon that is an NBD client of the first.
* *file*: one file that shows the content, for programs that serve files. A raw image is that file itself, while the
  daemon keeps it locked; any other format, or one with limits, is shared with tgtd by vhost-user-blk, or shown to
  others over FUSE.

Everything is found again in the volume's run directory by whichever process looks:

    engine.json      which volume this is, and what was published of it
    qmp pid log      the daemon;  bridge/… the same of the bridge
    listener.json    what the daemon listens on;  bridge/listener.json
    nbd              the Unix socket
    vu…              the Unix socket of one iSCSI LUN, for our tgtd only
    view-<pid>       the directory of nothing but disk.img, where FUSE shows the content, of the daemon with that pid
    lun-<pid>-<size> a link to the file; a new name whenever the file behind it, or its size, is another one
"""

import asyncio
import base64
import contextlib
import hashlib
import os
import shutil
from collections.abc import AsyncIterator, Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Final

import msgspec

from elemento_storage import process
from elemento_storage.disk import Disk
from elemento_storage.engine.block_node import (
    LIMIT_NODES,
    VIEW_LIMIT_NODE,
    VOLUME_NODE,
    BlockNode,
    limit_group,
    limit_layers,
    nbd_layer,
)
from elemento_storage.engine.frozen import FROZEN_EXPORT, drop_dead_bitmaps
from elemento_storage.engine.image_lock import lock_image
from elemento_storage.engine.nbd_probe import NbdAnswer, probe_greeting, probe_nbd
from elemento_storage.engine.storage_daemon import StorageDaemon
from elemento_storage.errors import ExportFailed, ImageDamaged

_FIXED_NODE: Final = "fixed"
_VIEW_EXPORT: Final = "view"
VIEWED_FILE: Final = "disk.img"  #: what the content is called where FUSE shows it
_EXPORT: Final = "export-"  # QEMU's ids begin with a letter
_LUN: Final = "lun-"
_BRIDGE_EXPORT: Final = "bridge-"  # the same for an export that the bridge is the client of
_TLS: Final = "tls"
_KEYS_FILE: Final = "keys.psk"
_SOCKET_KEY: Final = 9
_NODE_KEY: Final = 24  # of an export's id: QEMU's node names have at most 31 characters
_NO_LIMITS: Final = {
    f"{unit}-{direction}{burst}": 0
    for unit in ("iops", "bps")
    for direction in ("total", "read", "write")
    for burst in ("", "-max")
}
_PROBE_S: Final = 5.0
_SIZE_S: Final = 5.0
_UNMOUNT_LIMITS: Final = process.Limits(timeout_s=10.0)


class Transport(StrEnum):
    """Where NBD listens."""

    UNIX = "unix"
    TCP = "tcp"


class Listener(msgspec.Struct, frozen=True):
    """What a daemon's NBD server listens on; of no daemon but the one with that pid."""

    pid: int
    transport: Transport
    host: str = ""
    port: int = 0


@dataclass(frozen=True)
class Source:
    """A volume as its engine needs it."""

    volume_id: str
    directory: str
    node: BlockNode
    plain_file: str | None  #: the path of the image if its bytes are those a guest sees
    size_bytes: int
    disk: Disk  #: the threads that may touch the location, and files that show what is in it: either may hang


@dataclass(frozen=True)
class NbdExport:
    """One NBD export that shall be."""

    export_id: str
    name: str
    writable: bool
    transport: Transport
    host: str = ""
    port: int = 0
    limits: Mapping[str, int] = field(default_factory=dict)  #: ThrottleLimits of the QMP reference
    tls: "Tls | None" = None  #: over TCP


@dataclass(frozen=True)
class Lun:
    """The volume as our tgtd shall have it (native/tgt_vhost.c)."""

    export_id: str
    writable: bool
    limits: Mapping[str, int] = field(default_factory=dict)  #: as of an NbdExport


@dataclass(frozen=True)
class Tls:
    """How clients over TCP prove themselves, and the server to them."""

    credentials: Mapping[str, object]  #: TlsCredsX509Properties or TlsCredsPskProperties of the QMP reference
    key: str | None = None  #: this export's line of the keys file, ``identity:hex``


class VolumeEngine:
    """What serves one volume, running or not. Calls on one volume are made one after the other by the caller."""

    def __init__(self, directory: str, volume_id: str) -> None:
        self.directory = directory
        self.volume_id = volume_id
        self.daemon = StorageDaemon(directory)
        self._bridge = StorageDaemon(f"{directory}/bridge")
        self._limits: dict[
            str, tuple[int | None, Mapping[str, int]]
        ] = {}  # of nodes, as last set in the daemon of a pid

    @property
    def socket_path(self) -> str:
        """The Unix socket of the NBD server."""
        return f"{self.directory}/nbd"

    @property
    def pids(self) -> list[int]:
        """The processes that live."""
        return [pid for pid in (self.daemon.pid, self._bridge.pid) if pid is not None]

    @property
    def has_died(self) -> bool:
        """Whether there was a daemon in this run directory that was not ended in good order."""
        return self.daemon.pid is None and os.path.exists(f"{self.directory}/pid")

    @contextlib.asynccontextmanager
    async def conversation(self) -> AsyncIterator[None]:
        """Held around several calls: their commands share connections."""
        async with self.daemon.conversation(), self._bridge.conversation():
            yield

    # -- life ----------------------------------------------------------------------------------------------

    async def start(self, source: Source) -> None:
        """Have the daemon running with the volume open. Raises ImageInUse, ImageDamaged, ExportFailed."""
        if self.daemon.pid is not None:
            return
        if source.node.problem:
            raise ImageDamaged(source.node.problem)
        os.makedirs(f"{self.directory}/bridge", mode=0o700, exist_ok=True)
        await self._bridge.stop()  # what it was a client of is gone
        await self._unmount_views()
        throttles = limit_layers(read_only=source.node.read_only)
        groups = [{"qom-type": "throttle-group", "id": limit_group(node)} for node in (*LIMIT_NODES, VIEW_LIMIT_NODE)]
        node = replace(source.node, layers=(*source.node.layers, *throttles))
        locks: list[int] = []
        try:
            if node.lock_path is not None:
                locks.append(await source.disk.run(lock_image, node.lock_path, read_only=node.read_only))
            for path in node.below_paths:
                locks.append(await source.disk.run(lock_image, path, read_only=True))  # noqa: PERF401  one may fail
            await self.daemon.start(node, groups, inherit=tuple(locks))
            if not node.read_only:
                await drop_dead_bitmaps(self.daemon)
        finally:
            for lock in locks:
                os.close(lock)

    async def stop(self) -> None:
        """End everything and leave nothing."""
        await self._bridge.stop()
        await self.daemon.stop()
        with contextlib.suppress(FileNotFoundError):
            await self._unmount_views()
            shutil.rmtree(self.directory)

    # -- the socket path -----------------------------------------------------------------------------------

    async def serve_nbd(self, source: Source, wanted: Iterable[NbdExport]) -> None:
        """Serve exactly these exports; those that are served already notice nothing."""
        await self.start(source)
        wanted = list(wanted)
        by_transport: dict[Transport, list[NbdExport]] = {}
        for export in wanted:
            by_transport.setdefault(export.transport, []).append(export)
        listener = self._listener(self.daemon)
        if listener is None:
            # TCP first: what goes over a bridge pays for a second hop, and over a Unix socket that is the cheaper one.
            # With TLS the bridge does the encryption, so that a local guest need not.
            first = (by_transport.get(Transport.TCP) or by_transport[Transport.UNIX])[0]
            if first.tls is not None:
                first = replace(first, transport=Transport.UNIX)
            listener = await self._listen(self.daemon, first)
        own = by_transport.pop(listener.transport, [])
        names: dict[str, NbdExport | Lun] = {f"{_EXPORT}{export.export_id}": export for export in own}
        for others in by_transport.values():
            names |= {f"{_BRIDGE_EXPORT}{export.export_id}": export for export in others}
        await self._set_exports(names)
        if not by_transport:
            await self._bridge.stop()
            return
        [bridged] = by_transport.values()
        await self._serve_bridged(listener, bridged)

    async def serve_nothing(self) -> None:
        """Close every export of the volume; it stays open, and who reads a moment of it over a socket goes on."""
        await self._bridge.stop()
        await self._set_exports({})
        listener = self._listener(self.daemon)
        if listener is not None and listener.transport is Transport.TCP:
            # The next export may have another port. (A Unix socket is always the same.)
            await self.daemon.execute("nbd-server-stop")
            os.unlink(f"{self.daemon.directory}/listener.json")

    async def listen(self) -> str:
        """Have the NBD server listening somewhere; the URI of its exports, with ``{}`` in place of their names."""
        listener = self._listener(self.daemon)
        if listener is None:
            listener = await self._listen(self.daemon, NbdExport("", "", writable=False, transport=Transport.UNIX))
        if listener.transport is Transport.UNIX:
            return f"nbd+unix:///{{}}?socket={self.socket_path}"
        return f"nbd://{f'[{listener.host}]' if ':' in listener.host else listener.host}:{listener.port}/{{}}"

    async def _set_exports(self, wanted: Mapping[str, NbdExport | Lun]) -> None:
        present = await self._own_exports()
        for name in present.keys() - wanted.keys():
            await self.daemon.remove_export(name)
            del present[name]
        free = sorted(set(LIMIT_NODES) - set(present.values()))
        for name, export in wanted.items():
            node = present.get(name) or (free.pop(0) if free else VOLUME_NODE)
            await self._limit(node, export.limits)
            if name in present:
                continue
            if isinstance(export, Lun):
                await self.daemon.add_vhost(name, self._lun_socket(export), node=node, writable=export.writable)
            else:
                await self.daemon.add_nbd(name, export.name, node=node, writable=export.writable)

    async def _own_exports(self) -> dict[str, str]:
        """Exports of the volume as it is, not of a moment of it: their ids and nodes."""
        present = await self.daemon.exports()
        return {name: node for name, node in present.items() if not name.startswith(FROZEN_EXPORT)}

    # -- limits --------------------------------------------------------------------------------------------
    #
    # Every daemon starts with some throttle nodes above the volume, one for each export; without limits they cost
    # nothing that could be measured. They cannot be added when they are wanted: an export that is served already would
    # have to move to one, and cannot.

    async def _limit(self, node: str, limits: Mapping[str, int]) -> None:
        if node == VOLUME_NODE:
            if limits:
                raise ExportFailed(f"no more than {len(LIMIT_NODES)} exports of a volume can have limits at once")
            return
        if self._limits.get(node) != (self.daemon.pid, limits):
            # All that are not named are zero, which is none.
            value = {**_NO_LIMITS, **limits}
            await self.daemon.execute(
                "qom-set", {"path": f"/objects/{node}-group", "property": "limits", "value": value}
            )
            self._limits[node] = (self.daemon.pid, dict(limits))

    async def put_between(self, node: str) -> None:
        """Have all that clients ask go through another node above the volume; VOLUME_NODE: straight to it again."""
        layers = limit_layers(read_only=False, file=node)
        await self.daemon.execute("blockdev-reopen", {"options": layers})

    async def _serve_bridged(self, listener: Listener, wanted: list[NbdExport]) -> None:
        server = self._address(listener)
        if self._bridge.pid is None:
            await self._bridge.start(BlockNode((), read_only=True))
        if wanted[0].tls is not None:
            await self._write_keys(wanted)
        if self._listener(self._bridge) is None:
            await self._listen(self._bridge, wanted[0])
        present = await self._bridge.exports()
        names = {f"{_EXPORT}{export.export_id}": export for export in wanted}
        for export_id in present.keys() - names.keys():
            await self._bridge.remove_export(export_id)
            await self._bridge.remove_node(_remote_node(export_id))
        for export_id in names.keys() - present.keys():
            export = names[export_id]
            await self._bridge.remove_node(_remote_node(export_id))
            layer = nbd_layer(_remote_node(export_id), server, export.name, read_only=not export.writable)
            await self._bridge.execute("blockdev-add", layer)
            await self._bridge.add_nbd(export_id, export.name, node=_remote_node(export_id), writable=export.writable)

    async def _write_keys(self, wanted: list[NbdExport]) -> None:
        """The pre-shared keys of these exports and no others; GnuTLS reads the file anew for every connection."""
        lines = [export.tls.key for export in wanted if export.tls is not None and export.tls.key is not None]
        if lines:
            path = f"{self.directory}/bridge/{_KEYS_FILE}"
            content = "".join(f"{line}\n" for line in sorted(lines)).encode()
            await asyncio.to_thread(_replace_file, path, content)

    @property
    def keys_directory(self) -> str:
        """Where the server finds its pre-shared keys."""
        return f"{self.directory}/bridge"

    def _listener(self, daemon: StorageDaemon) -> Listener | None:
        try:
            with open(f"{daemon.directory}/listener.json", "rb") as file:
                listener = msgspec.json.decode(file.read(), type=Listener)
        except (FileNotFoundError, msgspec.DecodeError):
            return None
        return listener if listener.pid == daemon.pid else None

    async def _listen(self, daemon: StorageDaemon, export: NbdExport) -> Listener:
        pid = daemon.pid
        assert pid is not None
        if export.transport is Transport.UNIX:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.socket_path)
            listener = Listener(pid, Transport.UNIX)
        else:
            listener = Listener(pid, Transport.TCP, export.host, export.port)
        address = self._address(listener)
        data = {key: value for key, value in address.items() if key != "type"}
        # max-connections 0: the default of 100 is for all exports of the daemon, and a guest may open 16.
        options: dict[str, object] = {"addr": {"type": address["type"], "data": data}, "max-connections": 0}
        if export.tls is not None and export.transport is Transport.TCP:
            await daemon.remove_object(_TLS)
            await daemon.execute("object-add", {"id": _TLS, "endpoint": "server", **export.tls.credentials})
            options["tls-creds"] = _TLS
        # One that listens although nothing says so was started by a process that died before it could write it down.
        with contextlib.suppress(ExportFailed):
            await daemon.execute("nbd-server-stop")
        await daemon.execute("nbd-server-start", options)
        _write(f"{daemon.directory}/listener.json", listener)
        return listener

    def _address(self, listener: Listener) -> dict[str, object]:
        """A SocketAddress of the QMP reference."""
        if listener.transport is Transport.UNIX:
            return {"type": "unix", "path": self.socket_path}
        return {"type": "inet", "host": listener.host, "port": str(listener.port)}

    def address(self, transport: Transport) -> str | None:
        """The path or port at which NBD is served over a transport; None when it is not."""
        for daemon in (self.daemon, self._bridge):
            listener = self._listener(daemon)
            if listener is not None and listener.transport is transport:
                return self.socket_path if transport is Transport.UNIX else str(listener.port)
        return None

    async def nbd_exports(self) -> Mapping[str, Transport]:
        """Ids of the exports that clients can reach now, and where. Raises ExportFailed."""
        found: dict[str, Transport] = {}
        for daemon in (self.daemon, self._bridge):
            listener = self._listener(daemon)
            if listener is not None and daemon.pid is not None:
                present = await daemon.exports()
                found |= {one.removeprefix(_EXPORT): listener.transport for one in present if one.startswith(_EXPORT)}
        return found

    async def remove_nbd(self, export_id: str) -> None:
        """Close an export and its connections; nothing of it is under way when this returns. Idempotent."""
        own = f"{_EXPORT}{export_id}"
        if self._bridge.pid is not None and own in await self._bridge.exports():
            await self._bridge.remove_export(own)
            await self._bridge.remove_node(_remote_node(own))
        if self.daemon.pid is not None:
            for name in (f"{_BRIDGE_EXPORT}{export_id}", own):
                await self.daemon.remove_export(name)

    async def probe_nbd(self, export: NbdExport) -> NbdAnswer:
        """Read from an export as its client would. Raises ExportFailed."""
        if export.transport is Transport.UNIX:
            return await probe_nbd(export.name, path=self.socket_path, timeout_s=_PROBE_S)
        if export.tls is not None:
            # What is behind the encryption, and that there is somebody who would encrypt.
            await probe_greeting(export.host, export.port, timeout_s=_PROBE_S)
            return await probe_nbd(export.name, path=self.socket_path, timeout_s=_PROBE_S)
        return await probe_nbd(export.name, host=export.host, port=export.port, timeout_s=_PROBE_S)

    # -- the file path -------------------------------------------------------------------------------------

    async def is_viewed(self) -> bool:
        """Whether FUSE shows the volume now; it does until all its exports are withdrawn."""
        return self.daemon.pid is not None and _VIEW_EXPORT in await self.daemon.exports()

    async def is_serving(self) -> bool:
        """Whether the daemon has any export."""
        return self.daemon.pid is not None and bool(await self._own_exports())

    async def show_plain(self, source: Source) -> str:
        """The path of a raw image, which the daemon keeps locked; a new name when the image has grown."""
        assert source.plain_file is not None
        await self.start(source)
        size_bytes = await source.disk.run(os.path.getsize, source.plain_file)
        return self._link(f"lun-0-{size_bytes}", source.plain_file)

    async def serve_luns(self, source: Source, wanted: Iterable[Lun]) -> Mapping[str, str]:
        """For each LUN what our tgtd opens (native/tgt_vhost.c); a new name when the volume has grown."""
        await self.start(source)
        luns = {f"{_LUN}{lun.export_id}": lun for lun in wanted}
        await self._set_exports(luns)
        size_bytes = await self.daemon.size_bytes()
        # A raw node keeps nothing in memory: what it acknowledged is in the page cache, and survives the daemon.
        kept = "&unflushed=kept" if source.plain_file is not None or source.node.write_through else ""
        return {
            lun.export_id: f"vhost-user-blk:///{lun.export_id}?socket={self._lun_socket(lun)}{kept}&size={size_bytes}"
            for lun in luns.values()
        }

    def _lun_socket(self, lun: Lun) -> str:
        # As long as bridge/qmp at most (config.py). 54 bits: nobody finds an export whose socket is another's.
        digest = base64.urlsafe_b64encode(hashlib.sha256(lun.export_id.encode()).digest())
        return f"{self.directory}/vu{digest[:_SOCKET_KEY].decode()}"

    async def show_view(self, source: Source, *, everybody: bool, limits: Mapping[str, int]) -> str:
        """The path of a file in which FUSE shows the content; a new one when the daemon or the size is another.

        ``everybody``: programs of other users may open it. ``limits`` are those of the file, however many use it.
        """
        await self.start(source)
        viewed = await self.is_viewed()
        pid = self.daemon.pid
        view = f"{self.directory}/view-{pid}/{VIEWED_FILE}"
        if not viewed:
            await self._set_exports({})  # QEMU allows no NBD export of a node that FUSE shows
            await self.daemon.remove_node(_FIXED_NODE)  # left by a start that was cut off
        await self._limit(VIEW_LIMIT_NODE, limits)
        if not viewed:
            await self._show_view(source, view, everybody=everybody)
        size_bytes = await self.daemon.size_bytes(_FIXED_NODE)
        await _wait_for_size(source.disk, view, size_bytes)
        return self._link(f"lun-{pid}-{size_bytes}", view)

    async def _show_view(self, source: Source, view: str, *, everybody: bool) -> None:
        # A raw node of a fixed size: QEMU's FUSE export lets a client truncate the image, this node does not.
        size_bytes = await self.daemon.size_bytes()
        await self.daemon.execute("blockdev-add", _fixed(size_bytes, read_only=source.node.read_only))
        # In a directory of its own, because smbd shares directories. The empty file below the mount stays ours: when
        # the daemon has ended, no client of smbd writes into that instead of the volume.
        os.makedirs(os.path.dirname(view), mode=0o700, exist_ok=True)
        os.close(os.open(view, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))
        writable = not source.node.read_only
        await self.daemon.add_fuse(_VIEW_EXPORT, view, node=_FIXED_NODE, writable=writable, everybody=everybody)

    def _link(self, name: str, target: str) -> str:
        path = f"{self.directory}/{name}"
        if not os.path.islink(path):
            for old in os.listdir(self.directory):
                if old.startswith("lun-"):
                    os.unlink(f"{self.directory}/{old}")
            os.symlink(target, path)
        return path

    async def _unmount_views(self) -> None:
        for mount_point in mounts_below(self.directory):
            await process.run(["fusermount3", "-u", "-z", "--", mount_point], _UNMOUNT_LIMITS)
        for name in os.listdir(self.directory):
            if name.startswith("view-"):
                shutil.rmtree(f"{self.directory}/{name}")
            elif name.startswith("lun-"):
                os.unlink(f"{self.directory}/{name}")

    # -- growing -------------------------------------------------------------------------------------------

    async def grow(self, size_bytes: int) -> None:
        """Make the volume larger while it is open; who has it open over NBD is disconnected for a moment."""
        if await self.daemon.size_bytes() >= size_bytes:
            return
        present = await self.daemon.exports()
        if _VIEW_EXPORT in present:
            await self.daemon.execute("blockdev-reopen", {"options": [_fixed(None, read_only=False)]})
            await self.daemon.execute("block_resize", {"node-name": _FIXED_NODE, "size": size_bytes})
            await self.daemon.execute("blockdev-reopen", {"options": [_fixed(size_bytes, read_only=False)]})
            return
        # An NBD export forbids a resize (its protocol has no way to tell). They are added again by whoever wants them.
        await self._bridge.stop()
        for name in present:
            await self.daemon.remove_export(name)
        for node in (*LIMIT_NODES, VIEW_LIMIT_NODE):
            # The first one grows the image. A throttle node keeps the size that it has seen last, so each is told.
            await self.daemon.execute("block_resize", {"node-name": node, "size": size_bytes})


async def _wait_for_size(disk: Disk, view: str, size_bytes: int) -> None:
    """FUSE lets the kernel believe the old size for up to a second."""
    deadline = asyncio.get_running_loop().time() + _SIZE_S
    while view not in mounts_below(os.path.dirname(view)) or await disk.run(os.path.getsize, view) != size_bytes:
        if asyncio.get_running_loop().time() > deadline:
            raise ExportFailed("the storage daemon does not show the image as a file: is FUSE there (/dev/fuse)?")
        await asyncio.sleep(0.02)


def _bridge_node(export_id: str) -> str:
    """A node's name has 31 characters at most; 28 hex digits of the export's id are as good as all."""
    return f"b-{export_id.removeprefix(_EXPORT)[:28]}"


def _fixed(size_bytes: int | None, *, read_only: bool) -> dict[str, object]:
    options: dict[str, object] = {
        "driver": "raw",
        "node-name": _FIXED_NODE,
        "file": VIEW_LIMIT_NODE,
        "discard": "unmap",
        "read-only": read_only,
    }
    return options if size_bytes is None else {**options, "size": size_bytes}


def _remote_node(export_name: str) -> str:
    return f"remote-{export_name.partition('-')[2][:_NODE_KEY]}"


def mounts_below(directory: str) -> list[str]:
    """Mount points in a directory, those included that nobody serves any more (proc(5), mountinfo)."""
    prefix = f"{os.path.realpath(directory)}/"
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        points = [line.split(" ")[4].replace("\\040", " ") for line in file]
    return [point for point in points if point.startswith(prefix)]


def _write(path: str, value: object) -> None:
    _replace_file(path, msgspec.json.encode(value))


def _replace_file(path: str, content: bytes) -> None:
    """In one step, not durably: nothing in a run directory outlives a boot."""
    with open(f"{path}.new", "wb") as file:
        file.write(content)
    os.rename(f"{path}.new", path)
