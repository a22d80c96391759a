"""One volume's directory: reading it, and rewriting its meta.json (contract, section 3; docs/on-disk-format.md)."""

import contextlib
import hashlib
import os
import stat
import time
from collections.abc import Mapping
from typing import Final

import msgspec

from elemento_storage.durable import TEMPORARY_PREFIX, create, fsync_directory, fsync_file, replace
from elemento_storage.engine.image_header import BadHeader, ImageHeader, Parent, read_header
from elemento_storage.engine.snapshot_files import SNAPSHOTS_DIRECTORY, snapshot_images
from elemento_storage.faultpoints import reached
from elemento_storage.model import (
    MARKER_SUFFIX,
    TARGET_PREFIX,
    IsoInfo,
    Volume,
    VolumeFormat,
    VolumeMeta,
    decode_iso_info,
    normalise_uid,
    volume_directory_name,
)

META_FILE: Final = "meta.json"
ISOINFO_FILE: Final = "isoinfo.json"
CLONES_FILE: Final = "elemento.has-clones"
SCHEDULE_FILE: Final = "backup-schedule.json"
LOCK_PREFIX: Final = "elemento."
LOCK_SUFFIX: Final = ".ignore"
LIVE_LOCKS: Final = ("elemento.backup.", "elemento.backup-session.")  #: of those who see every write, whoever makes it
_LARGEST_META_BYTES: Final = 1 << 20

# A directory changed twice within one tick of the file system's clock has the same mtime both times. Younger than
# this, an mtime proves nothing and the directory is read again (as git does with its index). Network file systems
# keep whole seconds at worst.
RACY_NS: Final = 2 * 10**9


class OddDirectory(Exception):
    """Looks like a volume and is not one; the text says why. It is reported and never touched."""


class VolumeVanished(Exception):
    """The directory is not there (any more)."""


class Entry(msgspec.Struct, frozen=True, gc=False):
    """A volume and what its directory looked like when it was read."""

    volume: Volume
    directory_mtime_ns: int  #: 0: too young to be believed
    meta_identity: int  #: hash of meta.json's inode, mtime and length; 0: too young to be believed
    claimed_bytes: int | None  #: ``size`` in meta.json
    claimed_id: str  #: ``volumeID`` in meta.json
    leftovers: bool  #: temporary files of a writer that died
    iso_identity: int | None = None  #: of the isoinfo.json of an ISO volume, as ``meta_identity``
    parent_file: str = ""  #: the image that this one stands on, from the location's directory


class _Sharing(msgspec.Struct):
    shared: bool = False


_meta_decoder = msgspec.json.Decoder(VolumeMeta)


def read_entry(
    location_path: str, location_name: str, volume_id: str, *, lease_s: float, directory_name: str | None = None
) -> Entry:
    """Read a volume directory. Blocks. Raises OddDirectory, VolumeVanished, OSError (the location is ill)."""
    directory = f"{location_path}/{directory_name or volume_directory_name(volume_id)}"
    try:
        directory_status = os.lstat(directory)
        if not stat.S_ISDIR(directory_status.st_mode):
            raise OddDirectory("not a directory")
        names = os.listdir(directory)
    except FileNotFoundError:
        raise VolumeVanished(volume_id) from None

    locks: list[str] = []
    markers: list[str] = []
    leftovers = False
    for name in names:
        if name.startswith(LOCK_PREFIX) and name.endswith(LOCK_SUFFIX):
            locks.append(name)
        elif name.startswith(TARGET_PREFIX) and name.endswith(MARKER_SUFFIX):
            markers.append(name)
        elif name.startswith(TEMPORARY_PREFIX):
            leftovers = True

    content, meta_identity = _read_small(directory, META_FILE)
    try:
        meta = _meta_decoder.decode(content)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise OddDirectory(f"meta.json cannot be read: {error}") from error
    owner = normalise_uid(meta.creator_id)
    if owner is not None and owner != meta.creator_id:
        meta = msgspec.structs.replace(meta, creator_id=owner)

    data_path = f"{directory}/{meta.format.data_file}"
    try:
        data = os.lstat(data_path)
    except FileNotFoundError:
        raise OddDirectory(f"{meta.format.data_file} is missing, and meta.json says {meta.format}") from None
    if not stat.S_ISREG(data.st_mode):
        raise OddDirectory(f"{meta.format.data_file} is not a regular file")
    snapshots, snapshot_bytes = 0, 0
    if meta.format is VolumeFormat.RBD:
        header = ImageHeader(int(meta.size or 0))
    else:
        try:
            header = read_header(data_path, meta.format, data.st_size)
        except BadHeader as error:
            raise OddDirectory(f"{meta.format.data_file} cannot be used: {error}") from error
        if header.parent is not None:
            _require_parent(location_path, header.parent)
        snapshots = header.snapshots
    if meta.format is VolumeFormat.RAW and SNAPSHOTS_DIRECTORY in names:
        images = snapshot_images(directory).values()
        snapshots, snapshot_bytes = len(images), sum(min(one.st_size, one.st_blocks * 512) for one in images)

    iso, iso_identity = None, None
    if meta.format is VolumeFormat.ISO and ISOINFO_FILE in names:
        iso, iso_identity = _read_iso_info(directory)
    return Entry(
        volume=Volume(
            meta=meta,
            volume_id=volume_id,
            location=location_name,
            size_bytes=header.size_bytes,
            allocated_bytes=min(data.st_size, data.st_blocks * 512),
            modified_ns=data.st_mtime_ns,
            iso=iso,
            locks=tuple(sorted(locks)),
            hidden=any(not name.startswith(LIVE_LOCKS) and not _is_shared(directory, name) for name in locks),
            markers=tuple(sorted(markers)),
            exported=any_fresh(directory, markers, lease_s),
            scheduled=SCHEDULE_FILE in names,
            meta_digest=_digest(content),
            parent=header.parent.volume_id if header.parent else None,
            has_clones=CLONES_FILE in names,
            snapshots=snapshots,
            snapshot_bytes=snapshot_bytes,
        ),
        directory_mtime_ns=believable(directory_status.st_mtime_ns),
        meta_identity=meta_identity,
        claimed_bytes=None if meta.size is None else int(meta.size),
        claimed_id=meta.volume_id,
        leftovers=leftovers,
        iso_identity=iso_identity,
        parent_file=_parent_file(header),
    )


def refresh_entry(entry: Entry, location_path: str, *, lease_s: float, location_descriptor: int | None = None) -> Entry:
    """The entry as the disk says now: ``entry`` itself when nothing changed. Three stat calls when so, four of ISOs.

    With the location's directory open, a name is two steps for the kernel and not as many as the path has: a third of
    the time. Raises what ``read_entry`` raises.
    """
    volume = entry.volume
    name, at = volume.directory_name, location_descriptor
    directory = name if at is not None else f"{location_path}/{name}"
    try:
        directory_mtime_ns = os.stat(directory, dir_fd=at, follow_symlinks=False).st_mtime_ns
        meta_identity = _identity(os.stat(f"{directory}/{META_FILE}", dir_fd=at, follow_symlinks=False))
        data = os.stat(f"{directory}/{volume.meta.format.data_file}", dir_fd=at, follow_symlinks=False)
        iso_identity = entry.iso_identity
        if iso_identity is not None:
            iso_identity = _identity(os.stat(f"{directory}/{ISOINFO_FILE}", dir_fd=at, follow_symlinks=False))
        if entry.parent_file:
            # It is the one thing that can go missing without a trace in this directory.
            os.stat(entry.parent_file if at is not None else f"{location_path}/{entry.parent_file}", dir_fd=at)
    except FileNotFoundError:
        return read_entry(location_path, volume.location, volume.volume_id, lease_s=lease_s)
    allocated_bytes = min(data.st_size, data.st_blocks * 512)
    unchanged = directory_mtime_ns == entry.directory_mtime_ns and meta_identity == entry.meta_identity
    unchanged = unchanged and iso_identity == entry.iso_identity
    if not unchanged or not meta_identity or iso_identity == 0:
        return read_entry(location_path, volume.location, volume.volume_id, lease_s=lease_s)
    if data.st_mtime_ns != volume.modified_ns:
        if volume.meta.format is not VolumeFormat.RBD:
            # Whoever wrote to the image may have grown it.
            return read_entry(location_path, volume.location, volume.volume_id, lease_s=lease_s)
    elif allocated_bytes == volume.allocated_bytes and not volume.markers:
        return entry
    return msgspec.structs.replace(
        entry,
        volume=msgspec.structs.replace(
            volume,
            allocated_bytes=allocated_bytes,
            modified_ns=data.st_mtime_ns,
            exported=any_fresh(f"{location_path}/{name}", volume.markers, lease_s),
        ),
    )


def believable(mtime_ns: int) -> int:
    """A directory's mtime if it is old enough to prove that nothing changed since, else 0."""
    return mtime_ns if time.time_ns() - mtime_ns > RACY_NS else 0


def _parent_file(header: ImageHeader) -> str:
    return header.parent.backing_file.removeprefix("../") if header.parent else ""


def _require_parent(location_path: str, parent: Parent) -> None:
    try:
        os.lstat(f"{location_path}/{parent.backing_file.removeprefix('../')}")
    except FileNotFoundError:
        raise OddDirectory(f"it stands on volume {parent.volume_id}, which is not here") from None


def any_fresh(directory: str, markers: tuple[str, ...] | list[str], lease_s: float) -> bool:
    """Whether an export marker was touched within the lease."""
    horizon = time.time() - lease_s
    for name in markers:
        try:
            if os.lstat(f"{directory}/{name}").st_mtime >= horizon:
                return True
        except FileNotFoundError:
            continue
    return False


def finish_staging(
    staging: str,
    location_name: str,
    meta: VolumeMeta,
    files: Mapping[str, bytes] | None = None,
    *,
    is_copy: bool = False,
) -> Entry:
    """Make a staging directory with an image whole and durable: all but its name. Blocks. Raises OSError, BadHeader.

    ``files`` are small ones that the volume has beside meta.json, maybe in directories of their own. ``is_copy``: what
    is written here is kept somewhere else, and need not survive a power failure.

    What the volume will look like is known here; reading it back once it has its name would tell nothing new.
    """
    content = msgspec.json.encode(meta)
    image = f"{staging}/{meta.format.data_file}"
    # meta.json first: ext4 finds room for its bytes only now, and the commit of the journal that this takes holds the
    # image's inode and both names as well. Begun with the image, there would be two commits.
    directories = {f"{staging}/{name.rpartition('/')[0]}" for name in files or {} if "/" in name}
    for directory in directories:
        os.mkdir(directory, 0o755)
    for name, bytes_of_file in (files or {}).items():
        create(f"{staging}/{name}", bytes_of_file, sync=True)
    for directory in directories:
        fsync_directory(directory)
    create(f"{staging}/{META_FILE}", content, sync=not is_copy)
    if not is_copy:
        fsync_file(image)
        fsync_directory(staging)
    reached("create.staged")
    data = os.lstat(image)
    if meta.format is VolumeFormat.RBD:
        header = ImageHeader(int(meta.size or 0))
    else:
        header = read_header(image, meta.format, data.st_size)
    return Entry(
        volume=Volume(
            meta=meta,
            volume_id=meta.volume_id,
            location=location_name,
            size_bytes=header.size_bytes,
            allocated_bytes=min(data.st_size, data.st_blocks * 512),
            modified_ns=data.st_mtime_ns,
            iso=decode_iso_info(files[ISOINFO_FILE]) if files and ISOINFO_FILE in files else None,
            meta_digest=_digest(content),
            parent=header.parent.volume_id if header.parent else None,
        ),
        directory_mtime_ns=0,
        meta_identity=0,
        claimed_bytes=None if meta.size is None else int(meta.size),
        claimed_id=meta.volume_id,
        leftovers=False,
        parent_file=_parent_file(header),
    )


def publish(staging: str, location_path: str, volume_id: str) -> None:
    """Make a finished staging directory a volume, in one rename; durable when it returns. Blocks.

    Raises OSError; ENOTEMPTY or EEXIST when a volume of this id exists.
    """
    os.rename(staging, f"{location_path}/{volume_directory_name(volume_id)}")
    reached("create.renamed")
    try:
        fsync_directory(location_path)
    except BaseException:
        take_back(staging, location_path, volume_id)
        raise
    reached("create.durable")


def take_back(staging: str, location_path: str, volume_id: str) -> None:
    """Undo ``publish`` before anybody was told of the volume. Blocks."""
    os.rename(f"{location_path}/{volume_directory_name(volume_id)}", staging)
    fsync_directory(location_path)


def image_size(directory: str, image_format: VolumeFormat) -> int:
    """The virtual size that a file image says. Blocks. Raises BadHeader, OSError."""
    path = f"{directory}/{image_format.data_file}"
    return read_header(path, image_format, os.lstat(path).st_size).size_bytes


def read_format(directory: str) -> VolumeFormat:
    """The format that meta.json says. Blocks. Raises OddDirectory, OSError."""
    content, _ = _read_small(directory, META_FILE)
    try:
        return _meta_decoder.decode(content).format
    except msgspec.DecodeError as error:
        raise OddDirectory(f"meta.json cannot be read: {error}") from error


def read_meta_values(directory: str) -> dict[str, msgspec.Raw]:
    """Everything that meta.json says, known or not. Blocks. Raises OddDirectory, OSError."""
    content, _ = _read_small(directory, META_FILE)
    return msgspec.json.decode(content, type=dict[str, msgspec.Raw])


def read_image_size(directory: str) -> int:
    """The virtual size that the image of the format in meta.json says. Blocks."""
    return image_size(directory, read_format(directory))


def rewrite_meta(directory: str, changes: Mapping[str, object]) -> None:
    """Change keys of meta.json in one durable step; keys we do not know stay. Blocks.

    Only under the volume's guard. Raises OddDirectory, OSError.
    """
    replace(f"{directory}/{META_FILE}", changed_meta(directory, changes))


def changed_meta(directory: str, changes: Mapping[str, object]) -> bytes:
    """What meta.json is with these changes. Blocks. Raises OddDirectory, OSError."""
    content, _ = _read_small(directory, META_FILE)
    # Values we do not change go out as the bytes they came in: 1e999 or twenty digits survive.
    values: dict[str, object] = dict(msgspec.json.decode(content, type=dict[str, msgspec.Raw]))
    values.update(changes)
    rewritten = msgspec.json.encode(values)
    _meta_decoder.decode(rewritten)
    return rewritten


def mark_as_parent(directory: str) -> None:
    """Note durably that linked clones of the volume may exist. Only under its guard. Blocks."""
    path = f"{directory}/{CLONES_FILE}"
    with contextlib.suppress(FileExistsError):
        create(path, b"", sync=True)
    fsync_directory(directory)


def unmark_as_parent(directory: str) -> None:
    """Note that there are none any more. Only under its guard. Blocks."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(f"{directory}/{CLONES_FILE}")
    fsync_directory(directory)


def _read_small(directory: str, name: str) -> tuple[bytes, int]:
    """A small file's bytes and identity. Raises OddDirectory."""
    try:
        descriptor = os.open(f"{directory}/{name}", os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        if not os.path.isdir(directory):
            raise VolumeVanished(directory) from None
        raise OddDirectory(f"{name} is missing") from None
    except OSError as error:
        raise OddDirectory(f"{name} cannot be opened: {error.strerror}") from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OddDirectory(f"{name} is not a regular file")
        if status.st_size > _LARGEST_META_BYTES:
            raise OddDirectory(f"{name} has {status.st_size} bytes")
        return os.read(descriptor, status.st_size + 1), _identity(status)
    finally:
        os.close(descriptor)


def _is_shared(directory: str, lock_name: str) -> bool:
    """Whether a lock file says that its operation only reads; ``locks.py`` writes them."""
    try:
        return msgspec.json.decode(_read_small(directory, lock_name)[0], type=_Sharing).shared
    except (OddDirectory, VolumeVanished):
        return True  # it is gone again
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        return False


def read_isoinfo(directory: str) -> bytes | None:
    """What a volume's isoinfo.json holds; None when it has none that can be read. Blocks. Raises OSError."""
    try:
        return _read_small(directory, ISOINFO_FILE)[0]
    except OddDirectory:
        return None


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def _identity(status: os.stat_result) -> int:
    if not believable(status.st_mtime_ns):
        return 0
    # The change time too: tools that copy in place set the modification time back.
    return hash((status.st_ino, status.st_mtime_ns, status.st_ctime_ns, status.st_size)) or 1


def _read_iso_info(directory: str) -> tuple[IsoInfo | None, int]:
    """What isoinfo.json says and its identity. What cannot be read says nothing: the volume itself is sound."""
    try:
        content, identity = _read_small(directory, ISOINFO_FILE)
    except OddDirectory:
        return None, 0
    return decode_iso_info(content), identity
