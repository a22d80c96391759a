"""The ISO library: installers, live systems and tools, with what isoinfo.json says of each."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from elemento_storage.catalog.volume_directory import ISOINFO_FILE
from elemento_storage.errors import VolumeWaiting
from elemento_storage.model import (
    GIGABYTE,
    Bus,
    CloneAlgorithm,
    IsoInfo,
    IsoType,
    Volume,
    VolumeFormat,
    VolumeMeta,
    new_uid,
)
from elemento_storage.progress import Progress
from elemento_storage.service.create import Creating, clone_settings

#: Room that is kept where the caller names none. What arrives may be larger: its real size counts in the end.
DEFAULT_ROOM_BYTES: Final = {IsoType.TOOL: 2 * GIGABYTE, IsoType.OS_GENERIC: 15 * GIGABYTE}


@dataclass(frozen=True, kw_only=True)
class NewIso:
    """What an ISO volume to be created shall be."""

    creator_id: str
    name: str
    iso_type: IsoType
    info: IsoInfo
    private: bool = False
    clonable: bool | None = None
    alg: CloneAlgorithm | None = None
    size_bytes: int | None = None  #: the room to keep; None: what is usual for the type
    volume_id: str | None = None  #: of an earlier try that may have made it before its server died

    @property
    def room_bytes(self) -> int:
        """The room to keep for what will come."""
        return DEFAULT_ROOM_BYTES[self.iso_type] if self.size_bytes is None else self.size_bytes

    def meta(self) -> VolumeMeta:
        """Its meta.json: read-only on a SATA bus, and bootable unless it is a tool. Raises InvalidValue."""
        clonable, alg = clone_settings(self.clonable, self.alg)
        return VolumeMeta(
            volume_id=self.volume_id or new_uid(),
            creator_id=self.creator_id,
            size=self.room_bytes,
            name=self.name,
            format=VolumeFormat.ISO,
            private=self.private,
            bootable=self.iso_type is IsoType.OS_GENERIC,
            readonly=True,
            clonable=clonable,
            alg=alg,
            bus=Bus.SATA,
        )

    def files(self) -> Mapping[str, bytes]:
        """The files beside meta.json."""
        return {ISOINFO_FILE: self.info.encode()}


class IsoLibrary:
    """Makes ISO volumes that wait for their content."""

    def __init__(self, creating: Creating) -> None:
        self._creating = creating

    async def create(self, new: NewIso, progress: Progress) -> Volume:
        """A new ISO volume that keeps room for its content; on disk when this returns.

        Raises InvalidValue, NoRoom, JobCancelled, VolumeExists.
        """
        meta = new.meta()
        progress.check()
        if (made := await self._creating.made_before(new.volume_id)) is not None:
            progress.commit()
            return made
        return await self._creating.create_waiting(meta, new.files(), progress)


def require_content(volume: Volume) -> None:
    """Refuse a volume that has nothing to read yet. Raises VolumeWaiting."""
    if not volume.waiting:
        return
    if volume.meta.cloudinit:
        todo = "send the files that are missing with cloudinit/metadata; any file sent again builds the seed anew"
    else:
        todo = "upload it with iso/create/upload, or have it fetched with iso/create/url"
    raise VolumeWaiting(f"the volume waits for its content: {todo}", volume_id=volume.volume_id)
