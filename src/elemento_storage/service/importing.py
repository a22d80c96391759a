"""Taking in what somebody has put beside the volumes: ``import`` of a volume's directory, or of a bare image.

A location's directory ``elemento-import/`` is where an operator puts them, on the file system where they will stay, so
that nothing has to be copied. A directory becomes the volume in one rename. An image gets a second name in a reserved
directory and goes the way of every image from outside (``intake``) from there; its first name goes when it is a volume.
Whatever fails, what was put there is still there.
"""

import contextlib
import os
import stat
from dataclasses import dataclass
from typing import Final

from elemento_storage.catalog.location import Location
from elemento_storage.catalog.locations import os_errors, require_presence
from elemento_storage.catalog.room import Demand
from elemento_storage.catalog.volume_directory import (
    META_FILE,
    Entry,
    OddDirectory,
    VolumeVanished,
    read_entry,
    rewrite_meta,
)
from elemento_storage.durable import fsync_directory, fsync_file
from elemento_storage.engine import foreign_image
from elemento_storage.engine.image_lock import lock_image
from elemento_storage.errors import (
    Conflict,
    FormatUnsupported,
    ImageRefused,
    ImportNotFound,
    InvalidValue,
    LocationUnavailable,
    VolumeExists,
    VolumeNotFound,
)
from elemento_storage.faultpoints import reached
from elemento_storage.images.headers import read_header
from elemento_storage.images.incoming import ImageFormat, Incoming
from elemento_storage.images.optical import require_optical
from elemento_storage.keyed_locks import KeyedLocks
from elemento_storage.model import (
    Bus,
    Volume,
    VolumeFormat,
    new_uid,
    normalise_uid,
    printable,
    volume_directory_name,
    volume_id_of_directory,
)
from elemento_storage.progress import Progress
from elemento_storage.service.access import INFRASTRUCTURE
from elemento_storage.service.core import Core
from elemento_storage.service.intake import Intake

IMPORT_DIRECTORY: Final = "elemento-import"
_FORMAT_OF_ENDING: Final = {
    ".img": (VolumeFormat.RAW, ImageFormat.RAW),
    ".raw": (VolumeFormat.RAW, ImageFormat.RAW),
    ".iso": (VolumeFormat.ISO, ImageFormat.ISO),
    ".qcow2": (VolumeFormat.QCOW2, ImageFormat.QCOW2),
    ".vmdk": (VolumeFormat.RAW, ImageFormat.VMDK),
    ".vdi": (VolumeFormat.RAW, ImageFormat.VDI),
    ".vhd": (VolumeFormat.RAW, ImageFormat.VHD),
    ".vhdx": (VolumeFormat.RAW, ImageFormat.VHDX),
}


@dataclass(frozen=True, kw_only=True)
class NewImport:
    """What is to become of something in a directory for imports.

    None: as it says of itself, or as a new volume has it.
    """

    creator_id: str
    path: str
    name: str | None = None
    private: bool | None = None
    bootable: bool | None = None
    bus: Bus | None = None
    format: VolumeFormat | None = None  #: of a bare image
    volume_id: str | None = None  #: of an earlier try that may have made it before its server died


@dataclass(frozen=True)
class _Found:
    location: Location
    name: str

    @property
    def path(self) -> str:
        return f"{self.location.path}/{IMPORT_DIRECTORY}/{self.name}"


class Importing:
    """Makes volumes of what lies in the directories for imports."""

    def __init__(self, core: Core, intake: Intake) -> None:
        self._core = core
        self._catalog = core.catalog
        self._intake = intake
        self._one_at_a_time = KeyedLocks()

    async def import_volume(self, spec: NewImport, progress: Progress) -> Volume:
        """A volume of what is there; on disk and visible when this returns, and gone from where it was.

        Raises InvalidValue, ImportNotFound, Conflict, ImageRefused, ImageDamaged, VolumeExists, NoRoom, JobCancelled …
        """
        found = self._find(spec.path)
        require_presence(found.location)
        if found.location.pool is not None:
            raise FormatUnsupported(
                "the location stands for a Ceph pool, and files are not imported into one yet: import into another one"
            )
        async with self._one_at_a_time.hold(found.path):
            with os_errors(found.location):
                kind = await found.location.disk.run(_kind, found.path)
            if kind is None:
                return await self._imported_before(spec, found)
            if stat.S_ISDIR(kind.st_mode):
                return await self._import_directory(spec, found, progress)
            if not stat.S_ISREG(kind.st_mode):
                raise InvalidValue("'path' names neither a directory nor a regular file", key="path")
            return await self._import_image(spec, found, kind, progress)

    def _find(self, path: str) -> _Found:
        if "\0" not in path:
            whole = os.path.normpath(os.path.join(self._core.settings.root, path))
            for location in self._catalog.locations.by_name.values():
                prefix = f"{location.path}/{IMPORT_DIRECTORY}/"
                name = whole.removeprefix(prefix)
                if whole.startswith(prefix) and "/" not in name and not name.startswith("."):
                    if location.missing is not None:
                        raise LocationUnavailable(
                            f"location {location.name} does not answer: {location.missing}", location=location.name
                        )
                    return _Found(location, name)
        raise InvalidValue(
            f"'path' has to be <location>/{IMPORT_DIRECTORY}/<name>, absolute or from the server's root: something in "
            "a location's directory for imports",
            key="path",
        )

    async def _imported_before(self, spec: NewImport, found: _Found) -> Volume:
        """An earlier try with the same key may have come to its end and died before it answered."""
        known = volume_id_of_directory(found.name) if spec.volume_id else None
        for volume_id in (known, spec.volume_id):
            if volume_id is not None:
                with contextlib.suppress(VolumeNotFound):
                    _, volume = await self._catalog.find(volume_id, INFRASTRUCTURE.require_see)
                    if volume.meta.creator_id == spec.creator_id:
                        return volume
        raise ImportNotFound(f"there is no {printable(found.name)} in {found.location.name}'s {IMPORT_DIRECTORY}")

    # -- a volume's directory ------------------------------------------------------------------------------

    async def _import_directory(self, spec: NewImport, found: _Found, progress: Progress) -> Volume:
        location = found.location
        with os_errors(location):
            entry = await location.disk.run(self._read_directory, found, spec)
        volume = entry.volume
        volume_id = volume.volume_id
        progress.advance(0.1, "inspecting")
        await self._inspect(found, volume)
        reached("import.inspected")
        async with self._catalog.guard(location, volume_id):
            with contextlib.suppress(VolumeNotFound):
                await self._catalog.find(volume_id, INFRASTRUCTURE.require_see)
                raise VolumeExists(f"volume {volume_id} exists already", volume_id=volume_id)
            demand = Demand(volume_id, volume.size_bytes, on_disk_bytes=volume.allocated_bytes)
            reservation = await self._catalog.room.reserve_in(location, demand)
            try:
                progress.commit()
                with os_errors(location):
                    await location.disk.run(_move_in, found, volume, _changes(spec, volume))
                    moved = await location.reload(volume_id)
            finally:
                await reservation.release()
        if moved is None:
            raise VolumeNotFound(volume_id)
        return moved

    def _read_directory(self, found: _Found, spec: NewImport) -> Entry:
        """What is there, as a volume of the id that it will have. Blocks.

        Raises InvalidValue, FormatUnsupported, Conflict, ImageRefused.
        """
        for item in os.scandir(found.path):
            if not item.is_file(follow_symlinks=False) and not item.is_dir(follow_symlinks=False):
                raise InvalidValue(
                    f"'path' holds {printable(item.name)}, which is neither a file nor a directory", key="path"
                )
        location, lease_s = found.location, self._core.settings.lease
        relative = f"{IMPORT_DIRECTORY}/{found.name}"
        try:
            volume_id = volume_id_of_directory(found.name)
            if volume_id is None:
                claimed = read_entry(
                    location.path, location.name, "", lease_s=lease_s, directory_name=relative
                ).claimed_id
                volume_id = normalise_uid(claimed) or spec.volume_id or new_uid()
            entry = read_entry(location.path, location.name, volume_id, lease_s=lease_s, directory_name=relative)
        except (OddDirectory, VolumeVanished) as error:
            raise InvalidValue(f"'path' is no volume: {error}", key="path") from error
        volume = entry.volume
        if volume.meta.format not in (VolumeFormat.RAW, VolumeFormat.QCOW2, VolumeFormat.ISO):
            raise FormatUnsupported(f"a {volume.meta.format} volume cannot be imported")
        if volume.parent is not None:
            raise ImageRefused("the image names a backing file: make a whole image of it first (qemu-img convert)")
        if volume.locks or volume.markers:
            found_in_it = ", ".join(printable(name) for name in (*volume.locks, *volume.markers))
            raise Conflict(
                f"there are lock files or export markers in it ({found_in_it}): make sure that no server works with "
                "it, then remove them"
            )
        return entry

    async def _inspect(self, found: _Found, volume: Volume) -> None:
        """The image is from outside, whoever wrote its meta.json."""
        disk, image_format = found.location.disk, volume.meta.format
        path = f"{found.path}/{image_format.data_file}"
        with os_errors(found.location):
            os.close(await disk.run(lock_image, path, read_only=False))
            if image_format is VolumeFormat.ISO:
                if not volume.waiting:
                    await disk.run(require_optical, path)
            else:
                await disk.run(read_header, path, ImageFormat(image_format.value))
        await foreign_image.require_sound(path, image_format.value)

    # -- a bare image --------------------------------------------------------------------------------------

    async def _import_image(self, spec: NewImport, found: _Found, kind: os.stat_result, progress: Progress) -> Volume:
        stem, ending = os.path.splitext(found.name)
        if ending.lower() not in _FORMAT_OF_ENDING:
            known = ", ".join(sorted(_FORMAT_OF_ENDING))
            raise InvalidValue(f"'path' has to end in one of {known}: by that its format is known", key="path")
        usual, image_format = _FORMAT_OF_ENDING[ending.lower()]
        if (made := await self._made_of(found, kind)) is not None:
            progress.commit()
            return made
        target = spec.format or usual
        is_iso = target is VolumeFormat.ISO
        incoming = Incoming(
            volume_id=spec.volume_id or new_uid(),
            creator_id=spec.creator_id,
            name=printable(stem) if spec.name is None else spec.name,
            private=bool(spec.private),
            bootable=bool(spec.bootable),
            readonly=is_iso,
            bus=spec.bus or (Bus.SATA if is_iso else Bus.VIRTIO),
            format=target,
            image_format=image_format,
        )
        demand = Demand(incoming.volume_id, kind.st_size)
        arrival = self._intake.arrival(await self._catalog.room.reserve_new(demand, only=found.location))
        try:
            with os_errors(found.location):
                await found.location.disk.run(_link, found.path, arrival.content)
            reached("import.linked")
            volume = await self._intake.finish(arrival, incoming, progress)
        except BaseException:
            await arrival.release()
            raise
        with os_errors(found.location):
            await found.location.disk.run(_unlink, found.path)
        reached("import.unlinked")
        return volume

    async def _made_of(self, found: _Found, kind: os.stat_result) -> Volume | None:
        """The volume whose image this file is already, by another name: an earlier try died in between."""
        if kind.st_nlink == 1:
            return None
        location = found.location
        with os_errors(location):
            volumes = [entry.volume for entry in location.entries.values()]
            same = await location.disk.run(_same_file, location.path, volumes, kind)
            if same is None:
                raise Conflict("the file has another name, under which it could be changed: copy it, import the copy")
            await location.disk.run(_unlink, found.path)
        return same


def _changes(spec: NewImport, volume: Volume) -> dict[str, object]:
    changes: dict[str, object] = {"volumeID": volume.volume_id, "creatorID": spec.creator_id, "size": volume.size_bytes}
    asked = {"name": spec.name, "private": spec.private, "bootable": spec.bootable, "bus": spec.bus}
    changes |= {key: value for key, value in asked.items() if value is not None}
    if changes.get("bootable", volume.meta.bootable) and volume.meta.shareable:
        raise InvalidValue("a volume cannot be both 'bootable' and 'shareable'", key="bootable")
    return changes


def _kind(path: str) -> os.stat_result | None:
    try:
        return os.lstat(path)
    except FileNotFoundError:
        return None


def _move_in(found: _Found, volume: Volume, changes: dict[str, object]) -> None:
    """Make it ours and whole on disk, then give it its place in one rename. Blocks."""
    image = f"{found.path}/{volume.meta.format.data_file}"
    for path in (found.path, image, f"{found.path}/{META_FILE}"):
        with contextlib.suppress(PermissionError):  # a server that is not root owns what it may take in
            os.chown(path, os.geteuid(), os.getegid())
            os.chmod(path, 0o700 if path == found.path else 0o600)
    rewrite_meta(found.path, changes)
    fsync_file(image)
    fsync_directory(found.path)
    reached("import.prepared")
    os.rename(found.path, f"{found.location.path}/{volume_directory_name(volume.volume_id)}")
    reached("import.renamed")
    fsync_directory(found.location.path)
    fsync_directory(f"{found.location.path}/{IMPORT_DIRECTORY}")


def _link(source: str, target: str) -> None:
    os.close(lock_image(source, read_only=False))
    os.link(source, target, follow_symlinks=False)
    with contextlib.suppress(PermissionError):
        os.chown(target, os.geteuid(), os.getegid())
        os.chmod(target, 0o600)


def _unlink(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    fsync_directory(os.path.dirname(path))


def _same_file(location_path: str, volumes: list[Volume], kind: os.stat_result) -> Volume | None:
    for volume in volumes:
        with contextlib.suppress(FileNotFoundError):
            data = os.lstat(f"{location_path}/{volume.directory_name}/{volume.meta.format.data_file}")
            if (data.st_dev, data.st_ino) == (kind.st_dev, kind.st_ino):
                return volume
    return None
