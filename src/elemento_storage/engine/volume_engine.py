"""The engine of one exported volume: its storage daemon, and the two ways to its bytes.

A volume has one path at a time (docs/decisions/0008-one-path.md):

* *socket*: NBD exports of one node, on a Unix socket or a TCP port. Two of them always see the same data. Where both a
  socket and a port are wanted, the second is a bridge: a daemon that is an NBD client of the first.
* *file*: one file that shows the content, for programs that serve files. A raw image is that file itself, while the
  daemon keeps it locked; any other format is shown over FUSE.

Everything is found again in the volume's run directory by whichever process looks:

    engine.json      which volume this is, and what was published of it
    qmp pid log      the daemon;  bridge/… the same of the bridge
    listener.json    what the daemon listens on;  bridge/listener.json
    nbd              the Unix socket
    view-<pid>       the directory of nothing but disk.img, where FUSE shows the content, of the daemon with that pid
    lun-<pid>-<size> a link to the file; a new name whenever the file behind it, or its size, is another one
"""

import asyncio
import contextlib
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

import msgspec

from elemento_storage import process
from elemento_storage.engine.block_node import VOLUME_NODE, BlockNode, nbd_layer
from elemento_storage.engine.nbd_probe import NbdAnswer, probe_nbd
from elemento_storage.engine.storage_daemon import StorageDaemon
from elemento_storage.errors import ExportFailed

_FIXED_NODE: Final = "fixed"
_VIEW_EXPORT: Final = "view"
VIEWED_FILE: Final = "disk.img"  #: what the content is called where FUSE shows it
_EXPORT: Final = "export-"  # QEMU's ids begin with a letter
_BRIDGE_EXPORT: Final = "bridge-"  # the same for an export that the bridge is the client of
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


@dataclass(frozen=True)
class NbdExport:
    """One NBD export that shall be."""

    export_id: str
    name: str
    writable: bool
    transport: Transport
    host: str = ""
    port: int = 0


class VolumeEngine:
    """What serves one volume, running or not. Calls on one volume are made one after the other by the caller."""

    def __init__(self, directory: str, volume_id: str) -> None:
        self.directory = directory
        self.volume_id = volume_id
        self.daemon = StorageDaemon(directory)
        self._bridge = StorageDaemon(f"{directory}/bridge")

    @property
    def socket_path(self) -> str:
        """The Unix socket of the NBD server."""
        return f"{self.directory}/nbd"

    @property
    def pids(self) -> list[int]:
        """The processes that live."""
        return [pid for pid in (self.daemon.pid, self._bridge.pid) if pid is not None]

    # -- life ----------------------------------------------------------------------------------------------

    async def start(self, source: Source) -> None:
        """Have the daemon running with the volume open. Raises ImageInUse, ImageDamaged, ExportFailed."""
        if self.daemon.pid is not None:
            return
        os.makedirs(f"{self.directory}/bridge", mode=0o700, exist_ok=True)
        await self._bridge.stop()  # what it was a client of is gone
        await self._unmount_views()
        await self.daemon.start(source.node)

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
            first = (by_transport.get(Transport.TCP) or by_transport[Transport.UNIX])[0]
            listener = await self._listen(self.daemon, first)
        own = by_transport.pop(listener.transport, [])
        names = {f"{_EXPORT}{export.export_id}": (export.name, export.writable) for export in own}
        for others in by_transport.values():
            for export in others:
                names[f"{_BRIDGE_EXPORT}{export.export_id}"] = (export.name, export.writable)
        await self._set_exports(self.daemon, names)
        if not by_transport:
            await self._bridge.stop()
            return
        [bridged] = by_transport.values()
        await self._serve_bridged(source, listener, bridged)

    async def _set_exports(self, daemon: StorageDaemon, wanted: Mapping[str, tuple[str, bool]]) -> None:
        present = await daemon.exports()
        for export_id in present - wanted.keys():
            await daemon.remove_export(export_id)
        for export_id in wanted.keys() - present:
            name, writable = wanted[export_id]
            await daemon.add_nbd(export_id, name, writable=writable)

    async def _serve_bridged(self, source: Source, listener: Listener, wanted: list[NbdExport]) -> None:
        server = self._address(listener)
        if self._bridge.pid is None:
            await self._bridge.start(BlockNode((), read_only=True))
            await self._listen(self._bridge, wanted[0])
        present = await self._bridge.exports()
        names = {f"{_EXPORT}{export.export_id}": export for export in wanted}
        for export_id in present - names.keys():
            await self._bridge.remove_export(export_id)
            await self._bridge.execute("blockdev-del", {"node-name": export_id})
        for export_id in names.keys() - present:
            export = names[export_id]
            layer = nbd_layer(export_id, server, export.name, read_only=not export.writable)
            await self._bridge.execute("blockdev-add", layer)
            await self._bridge.add_nbd(export_id, export.name, node=export_id, writable=export.writable)

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
        await daemon.execute(
            "nbd-server-start", {"addr": {"type": address["type"], "data": data}, "max-connections": 0}
        )
        _write(f"{daemon.directory}/listener.json", listener)
        return listener

    def _address(self, listener: Listener) -> dict[str, object]:
        """A SocketAddress of the QMP reference."""
        if listener.transport is Transport.UNIX:
            return {"type": "unix", "path": self.socket_path}
        return {"type": "inet", "host": listener.host, "port": str(listener.port)}

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
            await self._bridge.execute("blockdev-del", {"node-name": own})
        if self.daemon.pid is not None:
            for name in (f"{_BRIDGE_EXPORT}{export_id}", own):
                await self.daemon.remove_export(name)

    async def probe_nbd(self, export: NbdExport) -> NbdAnswer:
        """Read from an export as its client would. Raises ExportFailed."""
        if export.transport is Transport.UNIX:
            return await probe_nbd(export.name, path=self.socket_path, timeout_s=_PROBE_S)
        return await probe_nbd(export.name, host=export.host, port=export.port, timeout_s=_PROBE_S)

    # -- the file path -------------------------------------------------------------------------------------

    async def show_file(self, source: Source, *, plain: bool, everybody: bool) -> str:
        """A path to a file that holds what a guest sees. It changes when what is behind it has changed.

        ``plain``: a raw image may be given away itself. ``everybody``: programs of other users may open it.
        """
        await self.start(source)
        viewed = _VIEW_EXPORT in await self.daemon.exports()
        if plain and source.plain_file is not None and not viewed:
            return self._link(f"lun-0-{os.stat(source.plain_file).st_size}", source.plain_file)
        pid = self.daemon.pid
        view = f"{self.directory}/view-{pid}/{VIEWED_FILE}"
        if not viewed:
            await self._show_view(source, view, everybody=everybody)
        size_bytes = await self.daemon.size_bytes(_FIXED_NODE)
        await _wait_for_size(view, size_bytes)
        return self._link(f"lun-{pid}-{size_bytes}", view)

    async def _show_view(self, source: Source, view: str, *, everybody: bool) -> None:
        # A raw node of a fixed size: QEMU's FUSE export lets a client truncate the image, this node does not.
        if not await self.daemon.has_node(_FIXED_NODE):
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
        for export_id in present:
            await self.daemon.remove_export(export_id)
        await self.daemon.execute("block_resize", {"node-name": VOLUME_NODE, "size": size_bytes})


async def _wait_for_size(view: str, size_bytes: int) -> None:
    """FUSE lets the kernel believe the old size for up to a second."""
    deadline = asyncio.get_running_loop().time() + _SIZE_S
    while view not in mounts_below(os.path.dirname(view)) or os.stat(view).st_size != size_bytes:
        if asyncio.get_running_loop().time() > deadline:
            raise ExportFailed("the storage daemon does not show the image as a file: is FUSE there (/dev/fuse)?")
        await asyncio.sleep(0.02)


def _fixed(size_bytes: int | None, *, read_only: bool) -> dict[str, object]:
    options: dict[str, object] = {
        "driver": "raw",
        "node-name": _FIXED_NODE,
        "file": VOLUME_NODE,
        "discard": "unmap",
        "read-only": read_only,
    }
    return options if size_bytes is None else {**options, "size": size_bytes}


def mounts_below(directory: str) -> list[str]:
    """Mount points in a directory, those included that nobody serves any more (proc(5), mountinfo)."""
    prefix = f"{os.path.realpath(directory)}/"
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        points = [line.split(" ")[4].replace("\\040", " ") for line in file]
    return [point for point in points if point.startswith(prefix)]


def _write(path: str, value: object) -> None:
    with open(f"{path}.new", "wb") as file:
        file.write(msgspec.json.encode(value))
    os.rename(f"{path}.new", path)
