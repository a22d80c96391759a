"""A volume's content at one moment, to be read while its guests go on writing.

    guests --limit nodes--> before --copies what is overwritten--> scratch
                              |  \
                            volume frozen <-- who reads the moment: a job that copies it, a client over NBD

``before`` is QEMU's copy-before-write filter. It is put below all that serves guests by one ``blockdev-reopen``: that
is the moment. A guest waits for the scratch file, which lies beside the volume, and never for who reads; where the
scratch file fails, because the disk is full or too slow, the reader fails and the guest's write succeeds
(``break-snapshot``). (The filter that ``blockdev-backup`` puts in itself fails the guest's write; QEMU 10.0 knows no
choice there.)

*Bitmaps* record what was written since an earlier moment. They live in a qcow2 image, which QEMU marks while it has it
open: one that was not closed in good order has bitmaps that are known to be worthless. A new bitmap begins before the
moment and the old one ends after it, so each of them has every write on its side of the moment; what both have is
copied once more than needed, with the right content.
"""

import asyncio
import contextlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from elemento_storage.engine.block_jobs import end_job, run_job
from elemento_storage.engine.block_node import VOLUME_NODE, limit_layers
from elemento_storage.engine.storage_daemon import StorageDaemon
from elemento_storage.errors import ExportFailed
from elemento_storage.faultpoints import reached
from elemento_storage.model import VolumeFormat

FROZEN_EXPORT: Final = "frozen-"  #: how the ids of exports begin that are none of the volume's own
GRANULARITY: Final = 65536  #: bytes per bit, and per cluster of a backup: an increment never holds half a cluster
_BEFORE_NODE: Final = "before"
_FROZEN_NODE: Final = "frozen"
_SCRATCH_NODES: Final = ("scratch", "scratch-file")
_TARGET_NODES: Final = ("backup", "backup-file")
_JOB: Final = "backup"
_SCRATCH_PATIENCE_S: Final = 20  # a guest's disk driver gives up after 30 s


@dataclass(frozen=True)
class Bitmap:
    """A record of what was written, as the daemon describes it."""

    name: str
    recording: bool
    inconsistent: bool
    dirty_bytes: int


class FrozenVolume:
    """The moment that the daemon of one volume keeps; there is one at a time. All steps may be done again."""

    def __init__(self, daemon: StorageDaemon, *, read_only: bool) -> None:
        self._daemon = daemon
        self._read_only = read_only

    @property
    def node(self) -> str:
        """The node that shows the moment. Nobody writes to what is open read-only: every moment is the same there."""
        return VOLUME_NODE if self._read_only else _FROZEN_NODE

    # -- the moment ----------------------------------------------------------------------------------------

    async def freeze(self, scratch: str, *, begin: str | None, end: str | None) -> None:
        """Keep this moment. ``scratch`` is an empty qcow2 image of the volume's size.

        ``begin`` is the name of a bitmap that records what is written from now on, ``end`` of one that stops doing so.
        Raises ExportFailed.
        """
        if self._read_only:
            return
        execute = self._daemon.execute
        await _open_qcow2(self._daemon, _SCRATCH_NODES, scratch)
        if begin is not None:
            await execute(
                "block-dirty-bitmap-add",
                {"node": VOLUME_NODE, "name": begin, "persistent": True, "granularity": GRANULARITY},
            )
        await execute(
            "blockdev-add",
            {
                "driver": "copy-before-write",
                "node-name": _BEFORE_NODE,
                "file": VOLUME_NODE,
                "target": _SCRATCH_NODES[0],
                "on-cbw-error": "break-snapshot",
                "cbw-timeout": _SCRATCH_PATIENCE_S,
            },
        )
        reached("backup.filter-made")
        await self._lead_writes_over(_BEFORE_NODE)
        reached("backup.frozen")
        if end is not None:
            await execute("block-dirty-bitmap-disable", {"node": VOLUME_NODE, "name": end})
        await execute("blockdev-add", {"driver": "snapshot-access", "node-name": _FROZEN_NODE, "file": _BEFORE_NODE})

    async def _lead_writes_over(self, node: str) -> None:
        layers = limit_layers(read_only=self._read_only, file=node)
        await self._daemon.execute("blockdev-reopen", {"options": layers})

    async def thaw(self) -> None:
        """Forget the moment and all that reads it. Idempotent; nothing where the daemon does not run."""
        if self._daemon.pid is None:
            return
        await end_job(self._daemon, _JOB)
        for export_id in await self._daemon.exports():
            if export_id.startswith(FROZEN_EXPORT):
                await self._daemon.remove_export(export_id)
        for node in (*_TARGET_NODES, _FROZEN_NODE):
            await self._daemon.remove_node(node)
        if await self._daemon.has_node(_BEFORE_NODE):
            await self._lead_writes_over(VOLUME_NODE)
        for node in (_BEFORE_NODE, *_SCRATCH_NODES):
            await self._daemon.remove_node(node)

    # -- reading it ----------------------------------------------------------------------------------------

    async def copy(
        self,
        target: str,
        *,
        changed: str | None,
        on_fraction: Callable[[float], None],
        cancel: asyncio.Event,
    ) -> None:
        """Copy the moment into a qcow2 image: all of it, or the clusters of a bitmap. The image is not yet synced.

        Raises JobCancelled, NoRoom, ExportFailed.
        """
        await _open_qcow2(self._daemon, _TARGET_NODES, target)
        try:
            how: dict[str, object] = {"sync": "full"}
            if changed is not None:
                # Of the moment's own node, because a job looks for it nowhere else.
                bitmap = {"node": self.node, "name": changed}
                await self._daemon.execute(
                    "block-dirty-bitmap-add", {**bitmap, "granularity": GRANULARITY, "disabled": True}
                )
                source = [{"node": VOLUME_NODE, "name": changed}]
                await self._daemon.execute(
                    "block-dirty-bitmap-merge", {"node": self.node, "target": changed, "bitmaps": source}
                )
                how = {"sync": "bitmap", "bitmap": changed, "bitmap-mode": "never"}
            await run_job(
                self._daemon,
                "blockdev-backup",
                {"device": self.node, "target": _TARGET_NODES[0], **how},
                job_id=_JOB,
                on_fraction=on_fraction,
                cancel=cancel,
            )
        finally:
            for node in _TARGET_NODES:
                with contextlib.suppress(ExportFailed):
                    await self._daemon.remove_node(node)

    async def publish(self, name: str, *, changed: str | None) -> None:
        """Serve the moment read-only under an NBD export name, with a bitmap of what changed before it."""
        options: dict[str, object] = {
            "type": "nbd",
            "id": f"{FROZEN_EXPORT}{name[:24]}",
            "node-name": self.node,
            "name": name,
            "writable": False,
        }
        if changed is not None:
            options["bitmaps"] = [{"node": VOLUME_NODE, "name": changed}]
        await self._daemon.execute("block-export-add", options)

    async def is_published(self, name: str) -> bool:
        """Whether clients can still read it, and what they read is still the moment."""
        return self._daemon.pid is not None and f"{FROZEN_EXPORT}{name[:24]}" in await self._daemon.exports()

    # -- bitmaps -------------------------------------------------------------------------------------------

    async def can_record(self) -> bool:
        """Whether a bitmap can outlive the daemon: in a qcow2 image of the present version, open for writing."""
        if self._read_only:
            return False
        image = (await _volume_node(self._daemon))["image"]
        return bool(image.get("format-specific", {}).get("data", {}).get("compat") == "1.1")

    def why_not(self, image_format: VolumeFormat) -> str:
        """In words, where it cannot."""
        if image_format is not VolumeFormat.QCOW2:
            return f"a {image_format} image cannot record what is written: convert the volume to qcow2 for increments"
        if self._read_only:
            return "the volume is read-only, and so is the record of what was written"
        return "the image is of the old qcow2 version, which cannot record what is written"

    async def bitmaps(self) -> dict[str, Bitmap]:
        """Those of the volume. Raises ExportFailed."""
        return await bitmaps_of(self._daemon)

    async def settle_bitmaps(self, prefix: str, current: str | None) -> str | None:
        """Of the bitmaps whose names begin with ``prefix`` have that of ``current`` alone, whole and recording.

        None if it is so. Else why it cannot be, in words, and there is none of them any more. What a moment that came
        to nothing had begun to record goes back into the bitmap that it was to take the place of.
        """
        found = {name: one for name, one in (await self.bitmaps()).items() if name.startswith(prefix)}
        wanted = found.pop(f"{prefix}{current}", None)
        reason = None
        if wanted is None:
            reason = "nothing recorded what was written since the last backup"
        elif wanted.inconsistent:
            reason = "what was recorded since the last backup was not put away in good order: a daemon or the host died"
        elif not wanted.recording:
            following = [one for one in found.values() if one.recording and not one.inconsistent]
            if len(following) == 1:
                await self._take_back(wanted.name, following[0].name)
            else:
                reason = "the record of what was written since the last backup has a gap"
        if reason is not None and wanted is not None:
            found[wanted.name] = wanted
        for name in found:
            await self._daemon.execute("block-dirty-bitmap-remove", {"node": VOLUME_NODE, "name": name})
        return reason

    async def sole_bitmap(self, prefix: str, *, besides: str) -> str | None:
        """Of the bitmaps of a kind, but one: what follows the prefix in the name of the only one, if it is that."""
        known = (await self.bitmaps()).values()
        names = [one.name for one in known if one.name.startswith(prefix) and not one.inconsistent]
        found = [name.removeprefix(prefix) for name in names if name != f"{prefix}{besides}"]
        return found[0] if len(found) == 1 else None

    async def _take_back(self, name: str, following: str) -> None:
        actions = [
            {"type": "block-dirty-bitmap-enable", "data": {"node": VOLUME_NODE, "name": name}},
            {
                "type": "block-dirty-bitmap-merge",
                "data": {"node": VOLUME_NODE, "target": name, "bitmaps": [following]},
            },
        ]
        await self._daemon.execute("transaction", {"actions": actions})


async def bitmaps_of(daemon: StorageDaemon) -> dict[str, Bitmap]:
    """The bitmaps of the volume that a daemon has open. Raises ExportFailed."""
    return {
        str(one["name"]): Bitmap(
            name=str(one["name"]),
            recording=bool(one["recording"]),
            inconsistent=bool(one.get("inconsistent", False)),
            dirty_bytes=int(one["count"]),
        )
        for one in (await _volume_node(daemon)).get("dirty-bitmaps", ())
        if "name" in one
    }


async def _volume_node(daemon: StorageDaemon) -> Mapping[str, Any]:
    for node in await daemon.execute("query-named-block-nodes", {"flat": True}):
        if node["node-name"] == VOLUME_NODE:
            return dict(node)
    raise ExportFailed("the storage daemon does not have the volume open")


async def drop_dead_bitmaps(daemon: StorageDaemon) -> None:
    """Remove bitmaps that are known to be worthless: QEMU grows no image that has one. Raises ExportFailed."""
    for name, bitmap in (await bitmaps_of(daemon)).items():
        if bitmap.inconsistent:
            await daemon.execute("block-dirty-bitmap-remove", {"node": VOLUME_NODE, "name": name})


async def _open_qcow2(daemon: StorageDaemon, nodes: tuple[str, str], path: str) -> None:
    """Open an image without what may be below it: nothing is read of that. Zeros become holes."""
    image, file = nodes
    await daemon.execute(
        "blockdev-add", {"driver": "file", "node-name": file, "filename": path, "discard": "unmap", "aio": "threads"}
    )
    await daemon.execute(
        "blockdev-add",
        {
            "driver": "qcow2",
            "node-name": image,
            "file": file,
            "backing": None,
            "discard": "unmap",
            "detect-zeroes": "unmap",
        },
    )


def remove_scratch(path: str) -> None:
    """Remove a scratch image. Idempotent. Blocks."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
