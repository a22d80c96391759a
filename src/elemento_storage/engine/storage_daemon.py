"""qemu-storage-daemon: one process that has one volume open and serves it (qemu-storage-daemon(1)).

The process outlives this one. All that is needed to talk to it again is its directory: ``qmp`` (its monitor), ``pid``,
``log``. Every question opens the monitor, asks and closes it again, so that nothing is kept that could be stale.
"""

import asyncio
import contextlib
import logging
import os
from collections.abc import Mapping
from typing import Any, Final

import msgspec
from qemu.qmp import ConnectError, ExecuteError, QMPClient, QMPError

from elemento_storage import process
from elemento_storage.engine.block_node import VOLUME_NODE, BlockNode
from elemento_storage.engine.image_lock import lock_image
from elemento_storage.errors import ExportFailed, ImageDamaged, ImageInUse

log = logging.getLogger(__name__)

_ANSWER_S: Final = 10.0
_START_S: Final = 10.0
_END_S: Final = 10.0
_LOG_KEPT: Final = 4096
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

    @property
    def pid(self) -> int | None:
        """The process, if it lives."""
        return process.daemon_pid(self._pid_file, self._monitor)

    # -- life ----------------------------------------------------------------------------------------------

    async def start(self, node: BlockNode) -> None:
        """Start the daemon with the volume open. Raises ImageInUse, ImageDamaged, ExportFailed, ToolMissing."""
        for name in (self._monitor, self._log_file):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name)
        argv = [
            "qemu-storage-daemon",
            "--chardev",
            f"socket,id=monitor,path={self._monitor.replace(',', ',,')},server=on,wait=off",
            "--monitor",
            "chardev=monitor,mode=control",
        ]
        for layer in node.layers:
            argv += ["--blockdev", msgspec.json.encode(layer).decode()]
        lock = None if node.lock_path is None else lock_image(node.lock_path, read_only=node.read_only)
        try:
            await process.start_daemon(
                argv,
                pid_file=self._pid_file,
                log_file=self._log_file,
                address_space_bytes=_ADDRESS_SPACE,
                inherit=() if lock is None else (lock,),
            )
        finally:
            if lock is not None:
                os.close(lock)
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

    async def execute(self, command: str, arguments: Mapping[str, object] | None = None) -> Any:
        """One command of the QMP reference. Raises ExportFailed, also when there is no answer in time."""
        async with self._one_at_a_time:
            client = QMPClient(os.path.basename(self.directory))
            try:
                async with asyncio.timeout(_ANSWER_S):
                    await client.connect(self._monitor)
                    return await client.execute(command, dict(arguments) if arguments else None)
            except ExecuteError as error:
                raise ExportFailed(f"the storage daemon refuses {command}: {error}") from error
            except (ConnectError, QMPError, OSError, EOFError, TimeoutError) as error:
                if command == "quit" and not isinstance(error, ConnectError | TimeoutError):
                    return None
                raise ExportFailed(f"the storage daemon does not answer to {command}") from error
            finally:
                with contextlib.suppress(QMPError, OSError, EOFError, TimeoutError):
                    async with asyncio.timeout(1.0):
                        await client.disconnect()

    async def exports(self) -> set[str]:
        """Ids of what it exports now, exports that are about to go included."""
        return {str(export["id"]) for export in await self.execute("query-block-exports")}

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
        """Serve a node under an NBD export name; the server has to listen already."""
        await self.execute(
            "block-export-add",
            {"type": "nbd", "id": export_id, "node-name": node, "name": name, "writable": writable},
        )

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
