"""The backups of one volume in one location (docs/on-disk-format.md, "Backups").

    elemento-backup/<volume uid>/lock                      locked by whoever works on the backups of the volume
    elemento-backup/<volume uid>/<backup uid>/data.qcow2   all of the volume, or what changed since its backing file
    elemento-backup/<volume uid>/<backup uid>/backup.json  written last: without it there is no backup

Which backup an increment needs is said by the header of its image and by nothing else. Backups outlive their volume.
All functions block.
"""

import contextlib
import fcntl
import hashlib
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

import msgspec

from elemento_storage.catalog.guard import try_lock
from elemento_storage.catalog.location import TRASH_DIRECTORY
from elemento_storage.durable import fsync_directory, fsync_file, replace
from elemento_storage.engine.image_header import BadHeader, qcow2_virtual_size
from elemento_storage.faultpoints import reached
from elemento_storage.model import VolumeFormat, new_uid, normalise_uid

BACKUP_DIRECTORY: Final = "elemento-backup"
DATA_FILE: Final = "data.qcow2"
RECORD_FILE: Final = "backup.json"
_LOCK_FILE: Final = "lock"
_LARGEST_RECORD: Final = 1 << 20
_BACKING: Final = struct.Struct(">4xIQI")  # of the qcow2 header: version, where the backing file's name is, its length
_PIECE: Final = 1 << 20
_LONGEST_NAME: Final = 1023  # of a backing file, as the specification says


class BackupMode(StrEnum):
    """What a backup's image holds."""

    FULL = "full"
    INCREMENTAL = "incremental"


class BackupRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What ``backup.json`` says."""

    backup_id: str = msgspec.field(name="backupID")
    volume_id: str = msgspec.field(name="volumeID")
    creator_id: str = msgspec.field(name="creatorID")  #: who owned the volume then, and owns the backup
    number: int  #: grows by one with every backup of the volume
    created: str
    moment: float  #: the same in seconds since the epoch: the content is that of this moment
    mode: BackupMode  #: as it was made
    reason: str = ""  #: why it is a full one
    name: str = ""
    size: int  #: virtual bytes
    format: VolumeFormat  #: of the volume
    sha256: str = ""  #: of the image file
    sha256_after: str = ""  #: the same after a merge that is under way
    tracked: bool = False  #: the volume has a bitmap of what was written since
    scheduled: bool = False
    increments: int = 0  #: since the last full one was made
    deleted: bool = False  #: it is kept only until the next one does not need it any more
    damaged: str = ""  #: what ``verify`` found
    meta: dict[str, msgspec.Raw] = {}  #: the volume's meta.json


@dataclass(frozen=True)
class Backup:
    """A backup as it is on disk."""

    record: BackupRecord
    location: str
    directory: str
    parent: str | None  #: the backup that it needs, as its image says
    file_bytes: int  #: what it occupies
    problem: str = ""  #: why its image cannot be used, as far as its header tells

    @property
    def backup_id(self) -> str:
        """The uid."""
        return self.record.backup_id

    @property
    def image(self) -> str:
        """The path of the image."""
        return f"{self.directory}/{DATA_FILE}"


class BrokenChain(Exception):
    """A backup that another one needs is not there, or no backup; the text says which."""


class StoreBusy(Exception):
    """Somebody else works on the volume's backups."""


def store_path(location_path: str, volume_id: str) -> str:
    """Where a location keeps the backups of a volume."""
    return f"{location_path}/{BACKUP_DIRECTORY}/{volume_id}"


def volumes_with_backups(location_path: str) -> list[str]:
    """Uids of the volumes that have backups there. Raises OSError."""
    try:
        names = os.listdir(f"{location_path}/{BACKUP_DIRECTORY}")
    except FileNotFoundError:
        return []
    return sorted(name for name in names if normalise_uid(name) == name)


def lock_store(location_path: str, volume_id: str, *, exclusive: bool) -> int:
    """Keep others from the backups of a volume until the descriptor is closed; a dead process has none.

    Exclusive: nobody else may read or change them. Raises StoreBusy, OSError.
    """
    directory = store_path(location_path, volume_id)
    path = f"{directory}/{_LOCK_FILE}"
    os.makedirs(directory, mode=0o700, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        locked = try_lock(descriptor, kind=fcntl.F_WRLCK if exclusive else fcntl.F_RDLCK)
        # The file may have been removed with the last backup in the meantime: its lock keeps nobody away.
        if not locked or not os.path.exists(path) or not os.path.samestat(os.fstat(descriptor), os.lstat(path)):
            raise StoreBusy(volume_id)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def read_backups(location_path: str, location_name: str, volume_id: str) -> list[Backup]:
    """The backups of a volume in a location, oldest first, those included that are only kept for others."""
    directory = store_path(location_path, volume_id)
    try:
        names = os.listdir(directory)
    except FileNotFoundError:
        return []
    found = [read_backup(f"{directory}/{name}", location_name) for name in names if normalise_uid(name) == name]
    return sorted((one for one in found if one is not None), key=lambda one: (one.record.number, one.record.created))


def read_backup(directory: str, location_name: str) -> Backup | None:
    """One backup; None when it is none (any more), or not whole yet. Raises OSError."""
    backup_id = os.path.basename(directory)
    volume_id = os.path.basename(os.path.dirname(directory))
    try:
        descriptor = os.open(f"{directory}/{RECORD_FILE}", os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        record = msgspec.json.decode(os.read(descriptor, _LARGEST_RECORD), type=BackupRecord)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        return None
    finally:
        os.close(descriptor)
    # Names are what others are excluded by: a content that says something else is not believed.
    if (record.backup_id, record.volume_id) != (backup_id, volume_id):
        return None
    parent, file_bytes, problem = None, 0, ""
    try:
        file_bytes = os.lstat(f"{directory}/{DATA_FILE}").st_blocks * 512
        parent, size_bytes = read_header(f"{directory}/{DATA_FILE}")
        if size_bytes != record.size:
            problem = f"the image has {size_bytes} bytes, and it was {record.size}"
    except (BadHeader, OSError) as error:
        problem = str(error)
    return Backup(record, location_name, directory, parent, file_bytes, problem)


def read_header(path: str) -> tuple[str | None, int]:
    """The backup that an image needs, and its virtual size. Raises BadHeader for what is no image of ours; OSError.

    Nothing else than ``../<uid>/data.qcow2`` is believed: QEMU would open whatever file is named there.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        header = os.pread(descriptor, 104, 0)
        if len(header) < 104:
            raise BadHeader("the file is too short for a qcow2 header")
        _, offset, length = _BACKING.unpack_from(header)
        size_bytes = qcow2_virtual_size(header[:8] + bytes(12) + header[20:])
        if not offset:
            return None, size_bytes
        if length > _LONGEST_NAME:
            raise BadHeader("the name of its backing file is too long")
        name = os.pread(descriptor, length, offset).decode("utf-8", "replace")
    finally:
        os.close(descriptor)
    up, _, rest = name.partition("/")
    parent, _, file_name = rest.partition("/")
    if up != ".." or file_name != DATA_FILE or normalise_uid(parent) != parent:
        raise BadHeader("its backing file is none of ours")
    return parent, size_bytes


def chain_of(backups: list[Backup], backup_id: str) -> list[Backup]:
    """A backup and all that it needs, the full one first. Raises BrokenChain."""
    by_id = {one.backup_id: one for one in backups}
    chain: list[Backup] = []
    wanted: str | None = backup_id
    while wanted is not None:
        one = by_id.get(wanted)
        if one is None:
            raise BrokenChain(f"the backup {wanted}, which it needs, is missing")
        if one.problem or one.record.damaged:
            raise BrokenChain(f"the backup {wanted} is damaged: {one.problem or one.record.damaged}")
        if one in chain:
            raise BrokenChain("the backups need each other in a circle")
        chain.insert(0, one)
        wanted = one.parent
    return chain


def backing_name(backup_id: str) -> str:
    """What an increment's image calls the backup that it needs: the same wherever the location is mounted."""
    return f"../{backup_id}/{DATA_FILE}"


def make_directory(location_path: str, volume_id: str, backup_id: str) -> str:
    """The directory of a backup in the making; it is none before it has its record. Raises OSError."""
    directory = f"{store_path(location_path, volume_id)}/{backup_id}"
    os.mkdir(directory, 0o700)
    return directory


def publish(directory: str, record: BackupRecord) -> None:
    """Make a backup of a directory whose image is whole; durable when it returns. Raises OSError."""
    fsync_file(f"{directory}/{DATA_FILE}")
    reached("backup.synced")
    write_record(directory, record)
    # The names above are durable before anybody is told: the store's, and that of the directory of all stores.
    store = os.path.dirname(directory)
    for parent in (store, os.path.dirname(store), os.path.dirname(os.path.dirname(store))):
        fsync_directory(parent)
    reached("backup.published")


def write_record(directory: str, record: BackupRecord) -> None:
    """Change what a backup says of itself, in one durable step. Raises OSError."""
    replace(f"{directory}/{RECORD_FILE}", msgspec.json.encode(record), mode=0o600)


def remove(location_path: str, directory: str) -> str | None:
    """Take a backup away in one rename, to be deleted later; where it is then. Raises OSError."""
    target = f"{location_path}/{TRASH_DIRECTORY}/{new_uid()}"
    try:
        os.rename(directory, target)
    except FileNotFoundError:
        return None
    reached("backup.removed")
    with contextlib.suppress(FileNotFoundError):
        fsync_directory(os.path.dirname(directory))
    return target


def find_backup(location_path: str, backup_id: str) -> str | None:
    """The directory of a backup of whichever volume; None when there is none. Raises OSError."""
    for volume_id in volumes_with_backups(location_path):
        directory = f"{store_path(location_path, volume_id)}/{backup_id}"
        if os.path.lexists(f"{directory}/{RECORD_FILE}"):
            return directory
    return None


def digest(path: str, step: Callable[[], None] = lambda: None) -> str:
    """The SHA-256 of a file, as sha256sum(1) prints it. ``step`` is called now and then, and may raise to end it."""
    found = hashlib.sha256()
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        while piece := os.read(descriptor, _PIECE):
            step()
            found.update(piece)
    finally:
        os.close(descriptor)
    return found.hexdigest()


def sync_image(path: str) -> None:
    """Make an image durable that another program wrote. Raises OSError."""
    fsync_file(path)


def take_place(directory: str, following: str) -> None:
    """Give the image of a deleted backup, which holds all of the following one by now, to that one. Raises OSError."""
    os.rename(f"{directory}/{DATA_FILE}", f"{following}/{DATA_FILE}")
    reached("backup.image-taken")
    fsync_directory(following)
    fsync_directory(directory)


def half_made(location_path: str, volume_id: str) -> list[str]:
    """Directories of backups that were never finished. Only with the store's lock, exclusively."""
    directory = store_path(location_path, volume_id)
    try:
        names = [name for name in os.listdir(directory) if normalise_uid(name) == name]
    except FileNotFoundError:
        return []
    return [f"{directory}/{name}" for name in names if not os.path.lexists(f"{directory}/{name}/{RECORD_FILE}")]


def forget_empty(location_path: str, volume_id: str) -> None:
    """Remove the directory of a volume that has no backups left. Only with the store's lock, exclusively."""
    directory = store_path(location_path, volume_id)
    with contextlib.suppress(OSError):
        if os.listdir(directory) == [_LOCK_FILE]:
            os.unlink(f"{directory}/{_LOCK_FILE}")
            os.rmdir(directory)
