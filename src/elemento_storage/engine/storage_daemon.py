"""qemu-storage-daemon: one process that has one volume open and serves it (qemu-storage-daemon(1)).

The process outlives this one. All that is needed to talk to it again is its directory: ``qmp`` (its monitor), ``pid``,
``log``. A question opens the monitor, asks and closes it again, so that nothing is kept that could be stale. Questions
that belong together share a ``conversation``, because opening the monitor costs several times what a question does.
"""

import asyncio
import contextlib
import logging
import os
import shutil
import socket
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, Final

import msgspec
from qemu.qmp import ConnectError, ExecuteError, QMPClient, QMPError

from elemento_storage import process
from elemento_storage.engine import qemu_img
from elemento_storage.engine.block_node import VOLUME_NODE, BlockNode
from elemento_storage.errors import ExportFailed, ImageDamaged, ImageInUse, ToolMissing

log = logging.getLogger(__name__)

_ANSWER_S: Final = 10.0
_QUERY_S: Final = 8.0  # measured: more than 3 s after a load of writes on a disk that others wrote to as well
_START_S: Final = 10.0
_END_S: Final = 10.0
_END_MONITOR_S: Final = 1.0
_DIALS: Final = 3
_LOG_KEPT: Final = 4096
OLDEST_SAFE: Final = 10  # measured: 7.2 loses data, 10.0 does not; nothing in between was tried
# Exports are served by a thread that waits for requests in a tight loop for a moment before it sleeps, and that the
# monitor does not hold up: 1.2 to 1.6 times the requests of the main loop (`python -m bench.byhand`).
_THREAD: Final = "io"
# They stay there: QEMU 10.0.2 moves an export to the monitor's thread when a node is put above the one it serves, and
# then hangs, or dies of an assertion in bdrv_insert_node.
_IN_THREAD: Final = {"iothread": _THREAD, "fixed-iothread": True}
_VHOST_QUEUES: Final = 16  # tgtd has as many threads for each LUN, and each waits for one request
# Measured: 12 MB resident with one qcow2 export; the rest is room for caches of large images and many connections.
_ADDRESS_SPACE: Final = 4 * 2**30


class StorageDaemon:
    """One daemon, running or not, in one directory."""

    def __init__(self, directory: str) -> None:
        self.directory = directory
        self._monitor = f"{directory}/qmp"
        self._pid_file = f"{directory}/pid"
        self._log_file = f"{directory}/log"
        self._one_at_a_time = asyncio.Lock()
        self._client: QMPClient | None = None  # only in a conversation
        self._conversations = 0
        self._sockets: list[socket.socket] = []

    @property
    def pid(self) -> int | None:
        """The process, if it lives."""
        return process.daemon_pid(self._pid_file, self._monitor)

    # -- life ----------------------------------------------------------------------------------------------

    async def start(
        self, node: BlockNode, objects: Sequence[Mapping[str, object]] = (), *, inherit: Sequence[int] = ()
    ) -> None:
        """Start the daemon with the volume open, and these objects; it keeps the descriptors of ``inherit`` open.

        Raises ImageInUse, ImageDamaged, ExportFailed, ToolMissing.
        """
        program = await safe_program()
        await self._hang_up()
        for name in (self._monitor, self._log_file):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name)
        argv = [
            program,
            "--chardev",
            f"socket,id=monitor,path={self._monitor.replace(',', ',,')},server=on,wait=off",
            "--monitor",
            "chardev=monitor,mode=control",
            "--object",
            f"iothread,id={_THREAD}",
        ]
        for one in objects:
            argv += ["--object", msgspec.json.encode(one).decode()]
        for layer in node.layers:
            argv += ["--blockdev", msgspec.json.encode(layer).decode()]
        await process.start_daemon(
            argv,
            pid_file=self._pid_file,
            log_file=self._log_file,
            address_space_bytes=_ADDRESS_SPACE,
            inherit=inherit,
        )
        deadline = asyncio.get_running_loop().time() + _START_S
        while True:
            try:
                # The client logs every connection that is refused; a daemon that is not ready yet is no news.
                self._require_monitor()
                await self.execute("query-block-exports")
            except ExportFailed:
                if self.pid is None:
                    raise self._start_failure() from None
                if asyncio.get_running_loop().time() > deadline:
                    await self.kill()
                    raise
                await asyncio.sleep(0.002)
            else:
                return

    def _require_monitor(self) -> None:
        if not os.path.exists(self._monitor):
            raise ExportFailed("the storage daemon has no monitor")

    def _start_failure(self) -> ImageInUse | ImageDamaged | ExportFailed:
        said = self.log_tail()
        if "Failed to get" in said and "lock" in said:
            return ImageInUse("another program has the image open: end it first")
        if "--blockdev" in said:
            reason = said.rpartition("--blockdev")[2].partition(": ")[2].strip() or said
            log.error("a storage daemon could not open its image: %s", said)
            return ImageDamaged(f"the image cannot be opened: {reason.partition(self.directory)[0][:300]}")
        log.error("a storage daemon did not start: %s", said)
        return ExportFailed("the storage daemon did not start; the server's log has the reason")

    def log_tail(self) -> str:
        """The end of what the daemon has said."""
        try:
            with open(self._log_file, "rb") as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - _LOG_KEPT))
                return file.read().decode("utf-8", "replace")
        except FileNotFoundError:
            return ""

    async def stop(self) -> None:
        """End the daemon in good order: exports closed, caches written. Raises ExportFailed when it does not end."""
        pid = self.pid
        if pid is None:
            return
        try:
            descriptor = os.pidfd_open(pid)
        except ProcessLookupError:
            return
        try:
            with contextlib.suppress(ExportFailed):
                await self.execute("quit")
            if await process.wait_for_end(descriptor, _END_S):
                return
        finally:
            os.close(descriptor)
        await self.kill()

    async def kill(self) -> None:
        """End a daemon that does not answer. Raises ExportFailed when even that fails."""
        pid = self.pid
        if pid is not None and not await process.end_daemon(pid, grace_s=1.0):
            raise ExportFailed(f"the storage daemon {pid} does not end; its file system probably hangs")

    # -- the monitor ---------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def conversation(self) -> AsyncIterator[None]:
        """All commands until the end go over one connection, which the first of them opens."""
        self._conversations += 1
        try:
            yield
        finally:
            self._conversations -= 1
            if not self._conversations:
                async with self._one_at_a_time:  # somebody else may be asking something just now
                    if not self._conversations:
                        await self._hang_up()

    async def _connect(self) -> None:
        """Open the monitor. An event that nobody was there to hear may come in place of the greeting: once more."""
        for attempt in range(_DIALS):
            try:
                await self._dial()
            except ConnectError:
                await self._hang_up()
                if attempt == _DIALS - 1:
                    raise
            else:
                return

    async def _dial(self) -> None:
        # Our own socket, so that it is closed whatever becomes of the client: the monitor takes one at a time, and one
        # that is left open keeps all later questions waiting.
        monitor = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        self._sockets = [monitor, monitor.dup()]
        self._client = QMPClient(os.path.basename(self.directory))
        await asyncio.get_running_loop().sock_connect(monitor, self._monitor)
        await self._client.connect(monitor)

    async def _hang_up(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            with contextlib.suppress(QMPError, OSError, EOFError, TimeoutError):
                async with asyncio.timeout(_END_MONITOR_S):
                    await client.disconnect()
        for one in reversed(self._sockets):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()
        self._sockets = []

    async def execute(
        self, command: str, arguments: Mapping[str, object] | None = None, *, timeout_s: float = _ANSWER_S
    ) -> Any:
        """One command of the QMP reference. Raises ExportFailed, also when there is no answer in time."""
        async with self._one_at_a_time:
            keep = False
            try:
                async with asyncio.timeout(_QUERY_S if command.startswith("query-") else timeout_s):
                    if self._client is None:
                        await self._connect()
                    assert self._client is not None
                    answer = await self._client.execute(command, dict(arguments) if arguments else None)
                    keep = self._conversations > 0
                    return answer
            except ExecuteError as error:
                keep = self._conversations > 0
                raise ExportFailed(f"the storage daemon refuses {command}: {error}") from error
            except (ConnectError, QMPError, OSError, EOFError, TimeoutError) as error:
                if command == "quit" and not isinstance(error, ConnectError | TimeoutError):
                    return None
                raise ExportFailed(f"the storage daemon does not answer to {command}") from error
            finally:
                if not keep:
                    await self._hang_up()

    async def exports(self) -> dict[str, str]:
        """Ids of what it exports now, exports that are about to go included, and the node of each."""
        return {str(export["id"]): str(export["node-name"]) for export in await self.execute("query-block-exports")}

    async def has_node(self, name: str) -> bool:
        """Whether a node of that name exists."""
        nodes = await self.execute("query-named-block-nodes", {"flat": True})
        return any(node["node-name"] == name for node in nodes)

    async def size_bytes(self, node: str = VOLUME_NODE) -> int:
        """The virtual size of a node."""
        for found in await self.execute("query-named-block-nodes", {"flat": True}):
            if found["node-name"] == node:
                return int(found["image"]["virtual-size"])
        raise ExportFailed(f"the storage daemon has no node {node}")

    async def add_nbd(self, export_id: str, name: str, *, node: str = VOLUME_NODE, writable: bool) -> None:
        """Serve a node under an NBD export name; the server has to listen already.

        Not beside an export of ``add_vhost``, which keeps the image in another thread: QEMU refuses.
        """
        options = {"type": "nbd", "id": export_id, "node-name": node, "name": name, "writable": writable}
        await self.execute("block-export-add", {**options, **_IN_THREAD})

    async def add_vhost(self, export_id: str, socket_path: str, *, node: str, writable: bool) -> None:
        """Serve a node to one client at a time, over memory that both share (vhost-user-blk).

        By the monitor's thread, and it stays there (``fixed-iothread``): with a client of it in any other thread, or on
        the way to one, QEMU 10.0.2 hangs or dies of an assertion when a node is put above the image or taken away.
        Nothing is lost by it: a request costs the daemon as much there (docs/decisions/0019-luns-in-shared-memory.md).
        """
        options = {
            "type": "vhost-user-blk",
            "id": export_id,
            "fixed-iothread": True,
            "node-name": node,
            "writable": writable,
            "addr": {"type": "unix", "path": socket_path},
            "num-queues": _VHOST_QUEUES,
        }
        await self.execute("block-export-add", options)

    async def add_fuse(self, export_id: str, mount_point: str, *, node: str, writable: bool, everybody: bool) -> None:
        """Show a node as the content of an existing file.

        ``everybody``: insist on it that other users can be let in. If FUSE allows it they can be in any case, because
        who else will want the file is not known yet; the kernel then goes by owner and mode, which are root and 0600.
        """
        await self.execute(
            "block-export-add",
            {
                "type": "fuse",
                "id": export_id,
                **_IN_THREAD,
                "node-name": node,
                "mountpoint": mount_point,
                "writable": writable,
                "allow-other": "on" if everybody else "auto",
            },
        )

    async def remove_export(self, export_id: str) -> None:
        """Close an export and its connections; when this returns, nothing of it is under way. Idempotent."""
        if export_id not in await self.exports():
            return
        await self.execute("block-export-del", {"id": export_id, "mode": "hard"})
        deadline = asyncio.get_running_loop().time() + _END_S
        # It is gone only when its last request is: query-block-exports lists it for so long, "shutting-down".
        while export_id in await self.exports():
            if asyncio.get_running_loop().time() > deadline:
                raise ExportFailed("an export does not close: a request in it hangs in the file system")
            await asyncio.sleep(0.002)

    async def remove_node(self, name: str) -> None:
        """Close a node whose export is gone; the export may hold it a moment longer than it is listed. Idempotent."""
        deadline = asyncio.get_running_loop().time() + _END_S
        while await self.has_node(name):
            try:
                await self.execute("blockdev-del", {"node-name": name})
            except ExportFailed as error:
                if "in use" not in str(error) or asyncio.get_running_loop().time() > deadline:
                    raise
                await asyncio.sleep(0.002)

    async def remove_object(self, object_id: str) -> None:
        """Delete an object that nothing uses any more. Idempotent."""
        try:
            await self.execute("object-del", {"id": object_id})
        except ExportFailed as error:
            if "not found" not in str(error):
                raise


async def safe_program() -> str:
    """The path of qemu-storage-daemon. Raises ToolMissing, ExportFailed for a version that is known to lose data."""
    path = shutil.which("qemu-storage-daemon")
    if path is None:
        raise ToolMissing("qemu-storage-daemon is not installed; `make setup` installs it, the package is qemu-utils")
    found = await qemu_img.version(path)
    if int(found.partition(".")[0]) < OLDEST_SAFE:
        raise ExportFailed(
            f"qemu-storage-daemon is {found}: before {OLDEST_SAFE}.0 it reports holes as punched and keeps the old "
            "bytes, and stalls over TCP; install a newer one (Debian 12: from bookworm-backports)"
        )
    return path
