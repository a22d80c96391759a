"""Reading a volume for longer than a moment: as the source of a clone, of a download, of a backup."""

import contextlib
import os
from collections.abc import AsyncIterator, Callable

from elemento_storage.catalog.catalog import Held, Reading
from elemento_storage.catalog.location import Location
from elemento_storage.catalog.locations import os_errors
from elemento_storage.engine.image_lock import lock_image
from elemento_storage.errors import FormatUnsupported, VolumeExported
from elemento_storage.model import Volume, VolumeFormat
from elemento_storage.service.core import Core
from elemento_storage.service.iso_library import require_content


@contextlib.asynccontextmanager
async def reading(
    core: Core,
    volume_id: str,
    check: Callable[[Volume], None],
    purpose: str,
    operation_id: str,
    *,
    client: str | None = None,
    journal: dict[str, str | int] | None = None,
) -> AsyncIterator[Reading]:
    """A volume whose data file stays as it is until the end, for as many as read it at a time.

    ``check`` says whether the caller may, such as ``actor.require_see``. QEMU's own lock on the image is held as well,
    so no program that respects it writes meanwhile. Ask ``confirm`` when all is read, before anybody is told. Raises
    VolumeNotFound, VolumeLocked, VolumeExported (somebody may be writing), VolumeWaiting, ImageInUse,
    LocationUnavailable. A location where nothing can be written is read without a lock file (``Reading``).
    """

    async def require(held: Held) -> None:
        await require_still(core, held)

    async with core.catalog.reading(
        volume_id, check, purpose, operation_id, client=client, journal=journal, require=require
    ) as source:
        path = f"{source.place.directory}/{source.volume.meta.format.data_file}"
        with os_errors(source.location):
            descriptor = await source.place.disk.run(lock_image, path, read_only=True)
        try:
            yield source
        finally:
            await source.place.disk.run(os.close, descriptor)


async def require_still(core: Core, held: Held) -> None:
    """Raises VolumeExported when a client may be writing to the volume. Served read-only, it may be read.

    Raises VolumeWaiting when there is nothing to read yet.
    """
    require_content(held.volume)
    image_format = held.volume.meta.format
    if not core.store(image_format).capabilities.files:
        raise FormatUnsupported(f"a {image_format} volume cannot be read, cloned or downloaded here yet: export it")
    if await may_be_written(core, held.location, held.volume):
        raise VolumeExported(
            "the volume is exported and its client may be writing: unexport it first",
            volume_id=held.volume.volume_id,
        )


async def may_be_written(core: Core, location: Location, volume: Volume) -> bool:
    """Whether somebody has the volume who may write to it. Raises LocationUnavailable."""
    meta = volume.meta
    if meta.readonly or meta.format is VolumeFormat.ISO:
        return False
    with os_errors(location):
        return any(core.markers.counts(marker) for marker in await core.markers.read(location, volume))
