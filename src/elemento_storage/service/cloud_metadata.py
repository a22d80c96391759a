"""cloud-init metadata volumes: files arrive one by one, and when all are there they become the seed.

A file is on disk before its sender hears of it. The seed is built from what the directory holds then, so whatever was
changed there by hand goes in as well when any file is sent again. It takes the old one's place in one rename; a lock
file covers the moment in which meta.json does not say its size yet.
"""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import msgspec

from elemento_storage.catalog.catalog import Held, Operation
from elemento_storage.catalog.locations import os_errors
from elemento_storage.catalog.locks import LockRecord, remove_lock
from elemento_storage.catalog.metadata_directory import (
    METADATA_DIRECTORY,
    MetadataFiles,
    expected_file,
    is_file_name,
    list_files,
    put_files,
    put_seed,
    read_files,
)
from elemento_storage.catalog.room import Demand
from elemento_storage.catalog.volume_directory import read_image_size, rewrite_meta
from elemento_storage.disk import Place
from elemento_storage.engine.seed_iso import build_seed
from elemento_storage.errors import BodyTooLarge, Conflict, InvalidValue, TooManyFiles
from elemento_storage.faultpoints import reached
from elemento_storage.model import Bus, CloneAlgorithm, Volume, VolumeFormat, VolumeMeta, new_uid
from elemento_storage.progress import Progress
from elemento_storage.service.access import Actor
from elemento_storage.service.core import Core
from elemento_storage.service.create import Creating, clone_settings, refuse_bootable_and_shareable
from elemento_storage.service.seed_files import check_file, seed_files

PURPOSE: Final = "metadata"
MOST_FILES: Final = 64
LARGEST_FILE_BYTES: Final = 4 * 2**20
MOST_BYTES: Final = 16 * 2**20
#: Room that is kept until all files are there: for as many bytes as they may have, and what the image adds.
_ROOM_BYTES: Final = MOST_BYTES + 2**20


@dataclass(frozen=True, kw_only=True)
class NewMetadata:
    """What a metadata volume to be created shall be."""

    creator_id: str
    name: str
    expected: int
    private: bool = False
    bootable: bool = False
    clonable: bool | None = None
    alg: CloneAlgorithm | None = None
    volume_id: str | None = None  #: of an earlier try that may have made it before its server died

    def meta(self, size_bytes: int) -> VolumeMeta:
        """Its meta.json. Raises InvalidValue.

        The bus is virtio, which whoever can boot a cloud image has: Debian's kernel for clouds knows no SATA.
        """
        clonable, alg = clone_settings(self.clonable, self.alg)
        return VolumeMeta(
            volume_id=self.volume_id or new_uid(),
            creator_id=self.creator_id,
            size=size_bytes,
            name=self.name,
            format=VolumeFormat.ISO,
            private=self.private,
            bootable=self.bootable,
            readonly=True,
            clonable=clonable,
            alg=alg,
            bus=Bus.VIRTIO,
            cloudinit=True,
        )


@dataclass(frozen=True)
class MetadataState:
    """A metadata volume after a call: what it has, and what the caller should know."""

    volume: Volume
    names: tuple[str, ...]
    expected: int
    warnings: tuple[str, ...]

    @property
    def complete(self) -> bool:
        """Whether all files are there, and in the seed."""
        return len(self.names) >= self.expected


class CloudMetadata:
    """Makes metadata volumes and takes in their files."""

    def __init__(self, core: Core, creating: Creating) -> None:
        self._core = core
        self._catalog = core.catalog
        self._creating = creating
        core.catalog.resolvers[PURPOSE] = self.resolve

    async def create(self, new: NewMetadata, files: Mapping[str, bytes], progress: Progress) -> MetadataState:
        """A new metadata volume, with its first files if there are any; on disk when this returns.

        Raises InvalidValue, TooManyFiles, BodyTooLarge, NoRoom, JobCancelled, VolumeExists.
        """
        _require_fitting({}, files, new.expected)
        refuse_bootable_and_shareable(bootable=new.bootable, shareable=False)
        beside = {f"{METADATA_DIRECTORY}/{name}": content for name, content in files.items()}
        beside[expected_file(new.expected)] = b""
        meta = new.meta(_ROOM_BYTES)
        progress.check()
        volume = await self._creating.made_before(new.volume_id)
        if volume is not None:
            progress.commit()
            warnings: list[str] = []
        elif len(files) == new.expected:
            image, warnings = await asyncio.to_thread(_build, meta.volume_id, files, files)
            meta = msgspec.structs.replace(meta, size=len(image))
            volume = await self._creating.create_small(meta, image, beside, progress)
        else:
            warnings = await asyncio.to_thread(_check, files)
            volume = await self._creating.create_waiting(meta, beside, progress)
        return MetadataState(volume, tuple(sorted(files)), new.expected, tuple(warnings))

    async def add(self, actor: Actor, volume_id: str, files: Mapping[str, bytes]) -> MetadataState:
        """Add files, or replace those of the same names, and build the seed once all are there.

        Raises VolumeNotFound, NotOwner, Conflict (no metadata volume), VolumeExported, TooManyFiles, BodyTooLarge,
        InvalidValue, NoRoom, VolumeLocked.
        """
        async with (
            self._catalog.operation(volume_id, new_uid()) as operation,
            self._catalog.hold(volume_id, actor.require_change) as held,
        ):
            with os_errors(held.location):
                present = await self._require_metadata(held)
                await self._core.markers.require_unexported(held)
                names = sorted({*present.lengths, *files})
                expected = len(names) if present.expected is None else present.expected
                _require_fitting(present.lengths, files, MOST_FILES if present.expected is None else expected)
                warnings = [f"{name} is no file of a seed and is left out" for name in present.left_out]
                if len(names) < expected:
                    warnings += await held.place.disk.run(_check, files)
                    await held.place.disk.run(put_files, held.place.directory, files)
                else:
                    warnings += await self._complete(operation, held, actor.client, names, files)
                volume = await held.reload()
            return MetadataState(volume, tuple(names), expected, tuple(warnings))

    async def _require_metadata(self, held: Held) -> MetadataFiles:
        meta = held.volume.meta
        if meta.cloudinit and meta.format is VolumeFormat.ISO:
            present = await held.place.disk.run(list_files, held.place.directory)
            if present is not None:
                return present
        raise Conflict(
            "the volume takes no metadata files: cloudinit/metadata with creatorID, name and expectedFiles makes one "
            "that does",
            volume_id=held.volume.volume_id,
        )

    async def _complete(
        self, operation: Operation, held: Held, client: str | None, names: list[str], files: Mapping[str, bytes]
    ) -> list[str]:
        """Put the files there and the seed into its place. Nothing is changed before there is room for it."""
        place, volume_id = held.place, held.volume.volume_id

        def build() -> tuple[bytes, list[str]]:
            present = read_files(place.directory, [name for name in names if name not in files], MOST_BYTES)
            return _build(volume_id, {**present, **files}, files)

        image, warnings = await place.disk.run(build)
        reservation = None
        if len(image) > held.volume.size_bytes:
            demand = Demand(volume_id, len(image), new_volume=False)
            reservation = await self._catalog.room.reserve_in(held.location, demand)
        try:
            await place.disk.run(put_files, place.directory, files)
            lock = await operation.lock_volume(held, PURPOSE, client, {"size": len(image)})
            await place.disk.run(put_seed, f"{place.directory}/{VolumeFormat.ISO.data_file}", image)
            await place.disk.run(rewrite_meta, place.directory, {"size": len(image)})
            reached("metadata.recorded")
            await place.disk.run(remove_lock, place.directory, lock)
            await held.reload()
        finally:
            if reservation is not None:
                await reservation.release()
        return warnings

    async def resolve(self, place: Place, lock: LockRecord) -> None:
        """After a crash: the old seed or the new one is there, and meta.json is made to say its size."""
        size_bytes = await place.disk.run(read_image_size, place.directory)
        await place.disk.run(rewrite_meta, place.directory, {"size": size_bytes})
        reached("metadata.resolved")


def _build(volume_id: str, contents: Mapping[str, bytes], sent: Mapping[str, bytes]) -> tuple[bytes, list[str]]:
    """The seed of all files, and warnings about those that were sent and about the whole. Blocks."""
    seed, warnings = seed_files(volume_id, contents)
    return build_seed(seed), [*_check(sent), *warnings]


def _check(files: Mapping[str, bytes]) -> list[str]:
    return [warning for name, content in files.items() for warning in check_file(name, content)]


def _require_fitting(present: Mapping[str, int], files: Mapping[str, bytes], most_files: int) -> None:
    """Refuse files that cannot join those that are there. Raises InvalidValue, BodyTooLarge, TooManyFiles."""
    for name, content in files.items():
        if not is_file_name(name):
            raise InvalidValue(
                f"'file' has the name {name[:80]!r}: 1 to 64 letters, digits, '.', '_' and '-' are allowed, no dot in "
                "front, and not what begins with elemento.",
                key="file",
            )
        if len(content) > LARGEST_FILE_BYTES:
            raise BodyTooLarge(f"{name} has {len(content)} bytes, a file may have {LARGEST_FILE_BYTES}")
    lengths = {**present, **{name: len(content) for name, content in files.items()}}
    if len(lengths) > max(most_files, len(present)):
        raise TooManyFiles(
            f"{most_files} files were announced and {len(present)} are there, {', '.join(sorted(present)) or 'none'}: "
            "send one of the same name to replace it, or make another volume",
            expected=most_files,
            received=len(present),
        )
    if sum(lengths.values()) > MOST_BYTES:
        raise BodyTooLarge(f"the files would have {sum(lengths.values())} bytes together, they may have {MOST_BYTES}")
