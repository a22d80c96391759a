"""Volumes as files in a directory, on whatever file system holds it."""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable
from typing import Final

from elemento_storage.disk import Disk, Place
from elemento_storage.durable import fsync_file
from elemento_storage.engine import qemu_img
from elemento_storage.engine.block_node import BlockNode, file_node
from elemento_storage.engine.templates import Qcow2Templates
from elemento_storage.model import Preallocation, VolumeFormat
from elemento_storage.progress import Progress
from elemento_storage.stores.base import StoreCapabilities

_RAW_QCOW2: Final = frozenset({VolumeFormat.RAW, VolumeFormat.QCOW2})
_POLL_S: Final = 0.2
_COPIED: Final = 0.98  #: of a conversion or preallocation, when all that is left is to sync


class DirectoryStore:
    """raw, qcow2 and ISO images as ``data.img``, ``data.qcow2`` and ``data.iso``."""

    capabilities = StoreCapabilities(
        creates=_RAW_QCOW2,
        grows=_RAW_QCOW2,
        converts=_RAW_QCOW2,
        preallocates={
            VolumeFormat.RAW: frozenset({Preallocation.OFF, Preallocation.FALLOC, Preallocation.FULL}),
            VolumeFormat.QCOW2: frozenset(Preallocation),
        },
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

    async def convert_beside(
        self, place: Place, source: VolumeFormat, target: VolumeFormat, copy_path: str, progress: Progress
    ) -> None:
        """See Store.convert_beside."""
        progress.advance(0.0, "converting")
        source_path = f"{place.directory}/{source.data_file}"
        data_bytes = (await place.disk.run(os.stat, source_path)).st_blocks * 512
        with qemu_img.full_is_no_room():
            # qemu-img says something at every whole percent, which takes long for a large image.
            async with _watch_growth(place.disk, copy_path, data_bytes, progress, up_to=_COPIED):
                await qemu_img.convert(
                    source_path,
                    source,
                    copy_path,
                    target,
                    on_fraction=lambda fraction: progress.advance(max(progress.fraction, fraction * _COPIED)),
                    timeout_s=self._job_timeout_s,
                    cancel=progress.cancelled,
                )
            progress.advance(_COPIED, "syncing")
            await place.disk.run(fsync_file, copy_path)
        progress.advance(0.99)

    def node(self, place: Place, image_format: VolumeFormat, *, read_only: bool) -> BlockNode:
        """See Store.node."""
        return file_node(f"{place.directory}/{image_format.data_file}", image_format, read_only=read_only)

    def plain_file(self, place: Place, image_format: VolumeFormat) -> str | None:
        """See Store.plain_file."""
        return None if image_format is VolumeFormat.QCOW2 else f"{place.directory}/{image_format.data_file}"


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
