"""Snapshots of a volume that its storage daemon serves, while clients write to it (docs/decisions/0016).

qcow2, inside the image: QEMU holds requests up, copies tables and goes on.

raw, a copy of one moment: a node is put between the clients and the image that copies every block aside before it is
changed first; what the volume held when that node went in is then read at leisure. A client never waits for more than
the one block, and none of its writes can fail because of it: when a block cannot be put aside, the copy is given up.

All of this needs exports that stay in their thread (``fixed-iothread``): QEMU 10.0.2 otherwise hangs or dies when a
node is put above one that is served.
"""

import asyncio
import os
from typing import Any, Final

from elemento_storage.disk import Disk
from elemento_storage.engine import qemu_img
from elemento_storage.engine.block_node import LIMIT_NODES, VOLUME_NODE, has_io_uring
from elemento_storage.engine.qcow2_snapshots import InternalSnapshot
from elemento_storage.engine.storage_daemon import StorageDaemon
from elemento_storage.engine.volume_engine import VolumeEngine
from elemento_storage.errors import ExportFailed, NoRoom, VolumeExported
from elemento_storage.model import VolumeFormat
from elemento_storage.progress import Progress

_OVERWRITTEN: Final = "overwritten"
_KEEPER: Final = "keeper"  # copies aside what clients are about to overwrite
_MOMENT: Final = "moment"  # shows what the volume held when the keeper came
_COPY: Final = "copy"  # the new file; and the job that fills it
_TABLES_S: Final = 120.0  # measured: 2 to 4 s for 100 GB of data
_POLL_S: Final = 0.05
_END_S: Final = 30.0
_OVER: Final = frozenset({"concluded", "null"})


# -- inside a qcow2 image --------------------------------------------------------------------------------------


async def take_internal(engine: VolumeEngine, tag: str) -> None:
    """Add an internal snapshot; on disk when it returns. Raises VolumeExported, ExportFailed."""
    nodes = set((await engine.daemon.exports()).values())
    if len(nodes) > 1 or VOLUME_NODE in nodes:
        # QEMU holds up those above the node that it is told; there is none above which all of them are.
        raise VolumeExported(
            "the volume is exported to several clients, and QEMU cannot hold those of a qcow2 image still together: "
            "unexport it from all but one, or convert it to raw",
            volume_id=engine.volume_id,
        )
    [device] = nodes or {LIMIT_NODES[0]}
    action = {"type": "blockdev-snapshot-internal-sync", "data": {"device": device, "name": tag}}
    await engine.daemon.execute("transaction", {"actions": [action]}, timeout_s=_TABLES_S)


async def remove_internal(engine: VolumeEngine, snapshot: InternalSnapshot) -> None:
    """Take an internal snapshot away. Raises ExportFailed."""
    # Any node that has none above it will do: for this command QEMU holds up all who use the image itself.
    device = next(iter((await engine.daemon.exports()).values()), LIMIT_NODES[0])
    which = {"device": device, "id": snapshot.key, "name": snapshot.tag}
    await engine.daemon.execute("blockdev-snapshot-delete-internal-sync", which, timeout_s=_TABLES_S)


# -- a copy of one moment --------------------------------------------------------------------------------------


async def begin_copy(engine: VolumeEngine, disk: Disk, image: str, overwritten: str) -> None:
    """Begin to copy what the volume holds at one moment of the call into a new file.

    ``overwritten`` is a file for what clients change meanwhile. Raises VolumeExported, ExportFailed, OSError.
    """
    daemon = engine.daemon
    if VOLUME_NODE in (await daemon.exports()).values():
        raise VolumeExported(
            f"more than {len(LIMIT_NODES)} clients have the volume: unexport it from some of them",
            volume_id=engine.volume_id,
        )
    await end_copy(engine)
    size_bytes = await daemon.size_bytes()
    await qemu_img.create(overwritten, VolumeFormat.QCOW2, size_bytes)
    await disk.run(_create, image, size_bytes)
    await daemon.execute("blockdev-add", _node(_OVERWRITTEN, "qcow2", overwritten))
    keeper = {"driver": "copy-before-write", "node-name": _KEEPER, "file": VOLUME_NODE, "target": _OVERWRITTEN}
    await daemon.execute("blockdev-add", {**keeper, "on-cbw-error": "break-snapshot"})
    await engine.put_between(_KEEPER)  # the moment
    await daemon.execute("blockdev-add", {"driver": "snapshot-access", "node-name": _MOMENT, "file": _KEEPER})
    await daemon.execute("blockdev-add", _node(_COPY, "raw", image))
    job = {"job-id": _COPY, "device": _MOMENT, "target": _COPY, "sync": "full", "auto-dismiss": False}
    await daemon.execute("blockdev-mirror", job)


async def wait_for_copy(engine: VolumeEngine, progress: Progress, *, up_to: float) -> None:
    """Until the file has all its bytes. Raises JobCancelled, NoRoom, ExportFailed; the job may still be there then."""
    while True:
        progress.check()
        job = await _job(engine.daemon)
        if job is None:
            raise ExportFailed("the storage daemon ended while it copied: no snapshot was made, make it again")
        progress.advance(job["current-progress"] / max(job["total-progress"], 1) * up_to, "copying")
        if job["status"] == "ready":  # nobody writes to a moment: it stays as complete as it is
            return
        if job["status"] in _OVER:
            raise _failure(str(job.get("error", "it was cancelled")))
        await asyncio.sleep(_POLL_S)


async def end_copy(engine: VolumeEngine) -> None:
    """Leave nothing of a copy in the daemon, in whatever state it is. Idempotent. Raises ExportFailed."""
    daemon = engine.daemon
    if daemon.pid is None:
        return
    deadline = asyncio.get_running_loop().time() + _END_S
    asked = False
    while (job := await _job(daemon)) is not None:
        if job["status"] in _OVER:
            await daemon.execute("job-dismiss", {"id": _COPY})
        elif not asked:
            await daemon.execute("job-cancel", {"id": _COPY})
            asked = True
        elif asyncio.get_running_loop().time() > deadline:
            raise ExportFailed("the storage daemon does not end a copy: its file system probably hangs")
        await asyncio.sleep(0.005)
    await daemon.remove_node(_COPY)
    await daemon.remove_node(_MOMENT)
    if await daemon.has_node(_KEEPER):
        await engine.put_between(VOLUME_NODE)
        await daemon.remove_node(_KEEPER)
    await daemon.remove_node(_OVERWRITTEN)


def _failure(said: str) -> ExportFailed | NoRoom:
    # A copy that was given up, because a block could not be put aside, answers "Permission denied" to its reader.
    if "No space left" in said or "Permission denied" in said:
        return NoRoom("the file system ran full while clients wrote; no snapshot was made, nothing else has changed")
    return ExportFailed(f"the storage daemon could not copy the volume: {said}")


def _node(name: str, driver: str, path: str) -> dict[str, object]:
    file = {
        "driver": "file",
        "node-name": f"{name}-file",
        "filename": path,
        "discard": "unmap",
        "aio": "io_uring" if has_io_uring() else "threads",
    }
    return {"driver": driver, "node-name": name, "discard": "unmap", "file": file}


def _create(path: str, size_bytes: int) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        os.ftruncate(descriptor, size_bytes)
    finally:
        os.close(descriptor)


async def _job(daemon: StorageDaemon) -> dict[str, Any] | None:
    jobs: list[dict[str, Any]] = await daemon.execute("query-jobs")
    return next((job for job in jobs if job["id"] == _COPY), None)
