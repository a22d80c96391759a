"""Volumes as files in a directory, on whatever file system holds it."""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Final

from elemento_storage.disk import Disk, Place
from elemento_storage.durable import fsync_file
from elemento_storage.engine import copy_tools, qemu_img, sparse_copy
from elemento_storage.engine.block_node import BlockNode, file_node
from elemento_storage.engine.image_header import Parent, read_header
from elemento_storage.engine.templates import Qcow2Templates
from elemento_storage.model import CloneAlgorithm, Preallocation, VolumeFormat
from elemento_storage.progress import Progress
from elemento_storage.stores.base import Image, SnapshotImage, StoreCapabilities
from elemento_storage.stores.directory_snapshots import DirectorySnapshots

_RAW_QCOW2: Final = frozenset({VolumeFormat.RAW, VolumeFormat.QCOW2})
_POLL_S: Final = 0.2
_STEP_BYTES: Final = 32 << 20  #: of a copy; a tenth of a second, until somebody can cancel it
_COPIED: Final = 0.98  #: of a conversion or preallocation, when all that is left is to sync


class DirectoryStore(DirectorySnapshots):
    """raw, qcow2 and ISO images as ``data.img``, ``data.qcow2`` and ``data.iso``."""

    capabilities = StoreCapabilities(
        creates=_RAW_QCOW2,
        grows=_RAW_QCOW2,
        converts=_RAW_QCOW2,
        preallocates={
            VolumeFormat.RAW: frozenset({Preallocation.OFF, Preallocation.FALLOC, Preallocation.FULL}),
            VolumeFormat.QCOW2: frozenset(Preallocation),
        },
        copies=_RAW_QCOW2 | {VolumeFormat.ISO},
        parents=_RAW_QCOW2,
        link_format=VolumeFormat.QCOW2,
        snapshots=_RAW_QCOW2,
        snapshots_inside=frozenset({VolumeFormat.QCOW2}),
    )

    def __init__(self, *, job_timeout_s: float) -> None:
        self._job_timeout_s = job_timeout_s
        self._templates = Qcow2Templates()

    async def allocate(
        self,
        place: Place,
        image_format: VolumeFormat,
        size_bytes: int,
        preallocation: Preallocation,
        progress: Progress,
    ) -> None:
        """See Store.allocate."""
        path = f"{place.directory}/{image_format.data_file}"
        with qemu_img.full_is_no_room():
            if preallocation is Preallocation.OFF and image_format is VolumeFormat.QCOW2:
                await self._templates.get(size_bytes)
            write_image = self.image_at_hand(image_format, size_bytes, preallocation)
            if write_image is not None:
                await place.disk.run(write_image, place.directory)
                return
            progress.advance(0.0, "allocating")
            async with _watch_growth(place.disk, path, size_bytes, progress, up_to=_COPIED):
                await qemu_img.create(
                    path,
                    image_format,
                    size_bytes,
                    preallocation=preallocation,
                    timeout_s=self._job_timeout_s,
                    cancel=progress.cancelled,
                )
            # A large image's bytes go to disk here, where the caller sees progress and can still cancel.
            await place.disk.run(fsync_file, path)

    def image_at_hand(
        self, image_format: VolumeFormat, size_bytes: int, preallocation: Preallocation
    ) -> Callable[[str], None] | None:
        """See Store.image_at_hand."""
        if preallocation is not Preallocation.OFF:
            return None
        template = None
        if image_format is VolumeFormat.QCOW2:
            template = self._templates.at_hand(size_bytes)
            if template is None:
                return None

        def write(directory: str) -> None:
            path = f"{directory}/{image_format.data_file}"
            with qemu_img.full_is_no_room():
                if template is None:
                    _create_sparse(path, size_bytes)
                else:
                    template.write(path)

        return write

    async def grow(self, place: Place, image_format: VolumeFormat, size_bytes: int) -> None:
        """See Store.grow."""
        path = f"{place.directory}/{image_format.data_file}"
        with qemu_img.full_is_no_room():
            if image_format is VolumeFormat.RAW:
                await place.disk.run(_grow_sparse, path, size_bytes)
            else:
                await qemu_img.grow(path, image_format, size_bytes)
                await place.disk.run(fsync_file, path)

    async def size_bytes(self, place: Place, image_format: VolumeFormat) -> int:
        """See Store.size_bytes."""
        path = f"{place.directory}/{image_format.data_file}"
        status = await place.disk.run(os.stat, path)
        return (await place.disk.run(read_header, path, image_format, status.st_size)).size_bytes

    async def convert_beside(
        self, place: Place, source: VolumeFormat, target: VolumeFormat, copy_path: str, progress: Progress
    ) -> None:
        """See Store.convert_beside."""
        progress.advance(0.0, "converting")
        with qemu_img.full_is_no_room():
            source_path = f"{place.directory}/{source.data_file}"
            await self._convert(place.disk, source_path, source, copy_path, target, progress)
            progress.advance(_COPIED, "syncing")
            await place.disk.run(fsync_file, copy_path)
        progress.advance(0.99)

    async def _convert(
        self,
        disk: Disk,
        source_path: str,
        source: VolumeFormat,
        target_path: str,
        target: VolumeFormat,
        progress: Progress,
        options: Sequence[str] = (),
    ) -> None:
        data_bytes = (await disk.run(os.stat, source_path)).st_blocks * 512
        # qemu-img says something at every whole percent, which takes long for a large image.
        async with _watch_growth(disk, target_path, data_bytes, progress, up_to=_COPIED):
            await qemu_img.convert(
                source_path,
                source,
                target_path,
                target,
                on_fraction=lambda fraction: progress.advance(max(progress.fraction, fraction * _COPIED)),
                timeout_s=self._job_timeout_s,
                cancel=progress.cancelled,
                options=options,
            )

    async def copy_from(
        self, place: Place, target: VolumeFormat, source: Image, alg: CloneAlgorithm, progress: Progress
    ) -> None:
        """See Store.copy_from."""
        source_path = f"{source.place.directory}/{source.format.data_file}"
        await self._copy(place, target, _File(source_path, source.format, source.place.disk), alg, progress)

    async def _copy(
        self, place: Place, target: VolumeFormat, source: "_File", alg: CloneAlgorithm, progress: Progress
    ) -> None:
        source_path, disk = source.path, source.disk
        target_path = f"{place.directory}/{target.data_file}"
        progress.advance(0.0, "copying")
        status = await disk.run(os.stat, source_path)
        header = await disk.run(read_header, source_path, source.format, status.st_size)
        with qemu_img.full_is_no_room():
            if target is not source.format or header.parent is not None or header.has_history:
                await self._convert(disk, source_path, source.format, target_path, target, progress)
                progress.advance(_COPIED, "syncing")
                await place.disk.run(fsync_file, target_path)
            elif alg in (CloneAlgorithm.RSYNC, CloneAlgorithm.RCLONE):
                await self._copy_by_tool(place, disk, source_path, target_path, alg, progress)
                progress.advance(_COPIED, "syncing")
                await place.disk.run(fsync_file, target_path)
            elif not await place.disk.run(sparse_copy.share_blocks, source_path, target_path):
                await _copy_data(place.disk, source_path, target_path, status.st_blocks * 512, progress)
                progress.advance(_COPIED, "syncing")
                await place.disk.run(fsync_file, target_path)
        progress.advance(0.99)

    async def _copy_by_tool(
        self, place: Place, source: Disk, source_path: str, target_path: str, alg: CloneAlgorithm, progress: Progress
    ) -> None:
        tool = copy_tools.rsync if alg is CloneAlgorithm.RSYNC else copy_tools.rclone
        digging = asyncio.create_task(_dig_behind(place.disk, source_path, target_path))
        try:
            await tool(
                source_path,
                target_path,
                on_fraction=lambda fraction: progress.advance(max(progress.fraction, fraction * _COPIED)),
                timeout_s=self._job_timeout_s,
                cancel=progress.cancelled,
            )
        finally:
            digging.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await digging
        if alg is CloneAlgorithm.RCLONE:
            size_bytes = (await source.run(os.stat, source_path)).st_size
            await place.disk.run(sparse_copy.dig_like, source_path, target_path, 0, size_bytes)

    async def copy_snapshot(
        self, place: Place, target: VolumeFormat, source: SnapshotImage, alg: CloneAlgorithm, progress: Progress
    ) -> None:
        """See Store.copy_snapshot."""
        if source.key is None:
            await self._copy(place, target, _File(source.path, source.format, source.disk), alg, progress)
            return
        target_path = f"{place.directory}/{target.data_file}"
        progress.advance(0.0, "copying")
        key = source.key.replace(",", ",,")
        # -U: whoever serves the image goes on. What the snapshot holds is changed by nobody: QEMU writes elsewhere.
        inside = ("-U", "-l", f"snapshot.id={key}")
        with qemu_img.full_is_no_room():
            await self._convert(source.disk, source.path, source.format, target_path, target, progress, inside)
            await qemu_img.cut(target_path, target, source.size_bytes)  # it is as long as the image is now
            progress.advance(_COPIED, "syncing")
            await place.disk.run(fsync_file, target_path)
        progress.advance(0.99)

    async def shares_blocks(self, place: Place) -> bool:
        """See Store.shares_blocks."""
        return await place.disk.run(sparse_copy.can_share_blocks, place.directory)

    async def link_to(self, place: Place, parent_id: str, parent: VolumeFormat, size_bytes: int) -> None:
        """See Store.link_to."""
        path = f"{place.directory}/{VolumeFormat.QCOW2.data_file}"
        with qemu_img.full_is_no_room():
            await qemu_img.create_overlay(path, Parent(parent_id, parent), size_bytes)

    def node(
        self, place: Place, image_format: VolumeFormat, *, read_only: bool, below: Sequence[Image] = ()
    ) -> BlockNode:
        """See Store.node."""
        path = f"{place.directory}/{image_format.data_file}"
        lower = [(f"{one.place.directory}/{one.format.data_file}", one.format) for one in below]
        return file_node(path, image_format, read_only=read_only, below=lower)

    def plain_file(self, place: Place, image_format: VolumeFormat) -> str | None:
        """See Store.plain_file."""
        return None if image_format is VolumeFormat.QCOW2 else f"{place.directory}/{image_format.data_file}"


@dataclass(frozen=True)
class _File:
    """An image, wherever it is."""

    path: str
    format: VolumeFormat
    disk: Disk


def _create_sparse(path: str, size_bytes: int) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    try:
        os.ftruncate(descriptor, size_bytes)
    finally:
        os.close(descriptor)


def _grow_sparse(path: str, size_bytes: int) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        if os.fstat(descriptor).st_size < size_bytes:
            os.ftruncate(descriptor, size_bytes)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


async def _copy_data(disk: Disk, source_path: str, target_path: str, data_bytes: int, progress: Progress) -> None:
    size_bytes = await disk.run(sparse_copy.create_like, source_path, target_path)
    offset = copied = 0
    while offset < size_bytes:
        progress.check()
        step = await disk.run(sparse_copy.copy_some, source_path, target_path, offset, _STEP_BYTES)
        offset, copied = step.offset, copied + step.copied_bytes
        progress.advance(min(copied / max(data_bytes, 1), 1.0) * _COPIED)


async def _dig_behind(disk: Disk, source_path: str, target_path: str) -> None:
    """Dig the holes of what rclone has written, so that the copy never takes much more room than it will need.

    (rsync leaves holes by itself; for it this finds nothing to do.)
    """
    dug = 0
    while True:
        await asyncio.sleep(_POLL_S)
        with contextlib.suppress(OSError):  # the program has not made the file yet
            written = (await disk.run(os.stat, target_path)).st_size
            dug = await disk.run(sparse_copy.dig_like, source_path, target_path, dug, max(dug, written - _STEP_BYTES))


@contextlib.asynccontextmanager
async def _watch_growth(
    disk: Disk, path: str, expected_bytes: int, progress: Progress, *, up_to: float
) -> AsyncIterator[None]:
    """Read the progress off a file that another program fills."""

    async def poll() -> None:
        while True:
            await asyncio.sleep(_POLL_S)
            with contextlib.suppress(OSError):  # the program has not made the file yet
                status = await disk.run(os.stat, path)
                fraction = min(status.st_blocks * 512 / max(expected_bytes, 1), 1.0) * up_to
                progress.advance(max(progress.fraction, fraction))

    task = asyncio.create_task(poll())
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
