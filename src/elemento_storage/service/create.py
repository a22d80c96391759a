"""Creating volumes: reserve, make, and give each its name in one rename."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from elemento_storage.catalog.locations import os_errors
from elemento_storage.catalog.room import Demand, Reservation
from elemento_storage.catalog.volume_directory import Entry
from elemento_storage.durable import create as create_file
from elemento_storage.errors import FormatUnsupported, InvalidValue, VolumeNotFound
from elemento_storage.faultpoints import reached
from elemento_storage.model import Bus, CloneAlgorithm, Preallocation, Volume, VolumeFormat, VolumeMeta, new_uid
from elemento_storage.progress import Progress
from elemento_storage.service.access import INFRASTRUCTURE
from elemento_storage.service.core import Core
from elemento_storage.service.staged import Staged
from elemento_storage.undo import Reverter


@dataclass(frozen=True, kw_only=True)
class NewVolume:
    """What a volume to be created shall be."""

    creator_id: str
    name: str
    size_bytes: int
    format: VolumeFormat = VolumeFormat.RAW
    private: bool = False
    readonly: bool = False
    shareable: bool = False
    bootable: bool = False
    clonable: bool | None = None
    alg: CloneAlgorithm | None = None
    bus: Bus = Bus.VIRTIO
    preallocation: Preallocation = Preallocation.OFF
    volume_id: str | None = None  #: of an earlier try that may have made it before its server died


class _AtOnce:
    """A volume that is made from its reservation to its name without a pause, all in one thread."""

    def __init__(
        self, meta: VolumeMeta, write_image: Callable[[str], None], progress: Progress, files: Mapping[str, bytes]
    ) -> None:
        self._meta = meta
        self._files = files
        self._write_image = write_image
        self._progress = progress
        self._entry: Entry | None = None
        self._error: BaseException | None = None

    @property
    def is_over(self) -> bool:
        """Whether ``make`` was called and has come back."""
        return self._entry is not None or self._error is not None

    def make(self, reservation: Reservation) -> None:
        """Do it. Raises nothing: what went wrong is kept for ``entry``. Blocks."""
        try:
            reached("create.reserved")
            self._write_image(reservation.path)
            reached("create.allocated")
            self._progress.commit()
            self._entry = Staged(reservation, self._meta, self._files).publish()
        except BaseException as error:  # noqa: BLE001  it is raised where somebody waits for it
            self._error = error

    def entry(self) -> Entry:
        """What was made. Raises JobCancelled, NoRoom, VolumeExists, OSError."""
        if self._error is not None:
            raise self._error
        assert self._entry is not None
        return self._entry


class Creating:
    """Creates empty volumes."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._catalog = core.catalog

    async def create(self, spec: NewVolume, progress: Progress) -> Volume:
        """A new, empty volume; on disk when this returns.

        Raises InvalidValue, FormatUnsupported, NoRoom, JobCancelled, VolumeExists.
        """
        write_image = self._core.store(spec.format).image_at_hand(spec.format, spec.size_bytes, spec.preallocation)
        if write_image is None:
            return (await self.create_many([spec], progress))[0]
        meta = self._new_meta(spec)
        progress.check()
        if (made := await self.made_before(spec.volume_id)) is not None:
            progress.commit()
            return made
        return await self._make_at_once(_demand(spec, meta), meta, write_image, progress)

    async def create_waiting(self, meta: VolumeMeta, files: Mapping[str, bytes], progress: Progress) -> Volume:
        """A new volume whose image is a hole of ``size`` bytes, for what will come. ``files`` go beside meta.json.

        Raises NoRoom, JobCancelled, VolumeExists.
        """
        assert isinstance(meta.size, int)
        write_image = self._core.store(meta.format).image_at_hand(meta.format, meta.size, Preallocation.OFF)
        assert write_image is not None, "what is not qcow2 needs no template"
        return await self._make_at_once(Demand(meta.volume_id, meta.size), meta, write_image, progress, files)

    async def create_small(
        self, meta: VolumeMeta, image: bytes, files: Mapping[str, bytes], progress: Progress
    ) -> Volume:
        """A new volume whose image is at hand, all of it. ``files`` go beside meta.json.

        Raises NoRoom, JobCancelled, VolumeExists.
        """

        def write_image(directory: str) -> None:
            create_file(f"{directory}/{meta.format.data_file}", image)

        return await self._make_at_once(Demand(meta.volume_id, len(image)), meta, write_image, progress, files)

    async def _make_at_once(
        self,
        demand: Demand,
        meta: VolumeMeta,
        write_image: Callable[[str], None],
        progress: Progress,
        files: Mapping[str, bytes] | None = None,
    ) -> Volume:
        at_once = _AtOnce(meta, write_image, progress, files or {})
        async with Reverter() as revert:
            reservation = await self._catalog.room.reserve_new(demand, at_once.make)
            revert.add(reservation.release)
            location = reservation.location
            with os_errors(location):
                if not at_once.is_over:
                    await location.disk.run(at_once.make, reservation)
                entry = at_once.entry()
            location.record(entry)
            reservation.forget()
            revert.commit()
        return entry.volume

    async def create_many(self, specs: Sequence[NewVolume], progress: Progress) -> list[Volume]:
        """All of them or, if one cannot be made, none.

        A crash in the middle of publishing may leave some: each a whole volume, none acknowledged.
        """
        metas = [self._new_meta(spec) for spec in specs]
        async with Reverter() as revert:
            prepared: list[Staged | Volume] = []
            for spec, meta in zip(specs, metas, strict=True):
                progress.check()
                made = await self.made_before(spec.volume_id)
                prepared.append(made or await self._prepare(spec, meta, progress, revert))
            if len(prepared) > 1:
                # All of them are whole and durable but for their names before the first one shows.
                await asyncio.gather(*(self._finish(one) for one in prepared if isinstance(one, Staged)))
            progress.commit()
            volumes = [one if isinstance(one, Volume) else await self._publish(one, revert) for one in prepared]
            revert.commit()
        return volumes

    async def made_before(self, volume_id: str | None) -> Volume | None:
        """What an earlier try made of this id before its server died."""
        if volume_id is None:
            return None
        try:
            return (await self._catalog.find(volume_id, INFRASTRUCTURE.require_see))[1]
        except VolumeNotFound:
            return None

    def _new_meta(self, spec: NewVolume) -> VolumeMeta:
        capabilities = self._core.store(spec.format).capabilities
        if spec.format not in capabilities.creates:
            raise FormatUnsupported(f"an empty volume cannot be of format {spec.format}")
        if spec.preallocation not in capabilities.preallocates[spec.format]:
            allowed = ", ".join(sorted(capabilities.preallocates[spec.format]))
            raise InvalidValue(f"'preallocation' of a {spec.format} volume is one of {allowed}", key="preallocation")
        refuse_bootable_and_shareable(bootable=spec.bootable, shareable=spec.shareable)
        clonable, alg = clone_settings(spec.clonable, spec.alg)
        return VolumeMeta(
            volume_id=spec.volume_id or new_uid(),
            creator_id=spec.creator_id,
            size=spec.size_bytes,
            name=spec.name,
            format=spec.format,
            private=spec.private,
            bootable=spec.bootable,
            readonly=spec.readonly,
            shareable=spec.shareable,
            clonable=clonable,
            alg=alg,
            bus=spec.bus,
            ceph=spec.format is VolumeFormat.RBD,
        )

    async def _prepare(self, spec: NewVolume, meta: VolumeMeta, progress: Progress, revert: Reverter) -> Staged:
        reservation = await self._catalog.room.reserve_new(_demand(spec, meta))
        revert.add(reservation.release)
        reached("create.reserved")
        location = reservation.location
        with os_errors(location):
            await self._core.store(spec.format).allocate(
                reservation.place, spec.format, spec.size_bytes, spec.preallocation, progress
            )
        reached("create.allocated")
        return Staged(reservation, meta)

    async def _finish(self, staged: Staged) -> None:
        with os_errors(staged.reservation.location):
            await staged.reservation.location.disk.run(staged.finish)

    async def _publish(self, staged: Staged, revert: Reverter) -> Volume:
        location = staged.reservation.location
        with os_errors(location):
            entry = await location.disk.run(staged.publish)
        revert.add(lambda: self._take_back(staged))
        location.record(entry)
        staged.reservation.forget()
        return entry.volume

    async def _take_back(self, staged: Staged) -> None:
        location = staged.reservation.location
        await location.disk.run(staged.take_back)
        location.forget(staged.meta.volume_id)


def _demand(spec: NewVolume, meta: VolumeMeta) -> Demand:
    allocated = spec.preallocation in (Preallocation.FALLOC, Preallocation.FULL)
    return Demand(meta.volume_id, spec.size_bytes, allocated=allocated, in_pool=spec.format is VolumeFormat.RBD)


def refuse_bootable_and_shareable(*, bootable: bool, shareable: bool) -> None:
    """A bootable volume cannot be shareable (the document's rule). Raises InvalidValue."""
    if bootable and shareable:
        raise InvalidValue("a volume cannot be both 'bootable' and 'shareable'", key="shareable")


def clone_settings(clonable: bool | None, alg: CloneAlgorithm | None) -> tuple[bool, CloneAlgorithm]:
    """``clonable: false`` goes with ``alg: "no"``; one of the two given decides the other. Raises InvalidValue."""
    if clonable is None:
        clonable = alg is not CloneAlgorithm.NO
    if not clonable:
        return False, CloneAlgorithm.NO
    if alg is CloneAlgorithm.NO:
        raise InvalidValue("'alg' is no and 'clonable' is true: a clonable volume needs cp, rsync or rclone", key="alg")
    return True, alg or CloneAlgorithm.CP
