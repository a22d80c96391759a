"""The directory ``snapshots`` in a volume's directory: what people call its snapshots, and the images of raw ones.

    snapshots/<uid>.json   name, description, time: one line of JSON
    snapshots/<uid>.img    the image of a raw volume at that time; a qcow2 image keeps its snapshots inside

A snapshot is there when its bytes are: the image file, or the entry in the qcow2 image's own table. The JSON is written
before them and removed after them; one without a snapshot means nothing. All functions block.
"""

import contextlib
import errno
import os
import stat
from collections.abc import Callable
from typing import Final

import msgspec

from elemento_storage.durable import TEMPORARY_PREFIX, fsync_directory, fsync_file, keep_owner_and_mode, replace
from elemento_storage.engine.image_lock import lock_image
from elemento_storage.engine.sparse_copy import copy_some, create_like, share_blocks
from elemento_storage.faultpoints import reached
from elemento_storage.model import normalise_uid

SNAPSHOTS_DIRECTORY: Final = "snapshots"
_IMAGE_SUFFIX: Final = ".img"
_JSON_SUFFIX: Final = ".json"
_LARGEST_JSON: Final = 65536
_PIECE_BYTES: Final = 32 << 20  # between two looks whether it was cancelled
_NO_LINKS: Final = {errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK, errno.ENOSYS}


Step = Callable[[int], None]


class Description(msgspec.Struct, frozen=True, kw_only=True):
    """What its maker said of a snapshot."""

    name: str = ""
    description: str = ""
    created: str = ""


# -- descriptions ----------------------------------------------------------------------------------------------


def write_description(directory: str, snapshot_id: str, description: Description) -> None:
    """Durable when it returns. Raises OSError."""
    _make_directory(directory)
    replace(_path(directory, snapshot_id, _JSON_SUFFIX), msgspec.json.encode(description) + b"\n")
    reached("snapshot.described")


def remove_description(directory: str, snapshot_id: str) -> None:
    """The last trace of a snapshot. Idempotent. Raises OSError."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(_path(directory, snapshot_id, _JSON_SUFFIX))
        fsync_directory(f"{directory}/{SNAPSHOTS_DIRECTORY}")


def read_descriptions(directory: str) -> dict[str, Description]:
    """By the snapshot's uid; those that cannot be read are left out."""
    found: dict[str, Description] = {}
    for snapshot_id in _uids(directory, _JSON_SUFFIX):
        with contextlib.suppress(msgspec.DecodeError, RecursionError, UnicodeDecodeError, OSError):
            found[snapshot_id] = _read(_path(directory, snapshot_id, _JSON_SUFFIX))
    return found


# -- images ----------------------------------------------------------------------------------------------------


def snapshot_images(directory: str) -> dict[str, os.stat_result]:
    """Uids of the snapshots that are files, and the status of each. Raises OSError."""
    found = {}
    for snapshot_id in _uids(directory, _IMAGE_SUFFIX):
        with contextlib.suppress(FileNotFoundError):
            status = os.lstat(image_path(directory, snapshot_id))
            if stat.S_ISREG(status.st_mode):
                found[snapshot_id] = status
    return found


def image_path(directory: str, snapshot_id: str) -> str:
    """The image of a raw volume's snapshot."""
    return _path(directory, snapshot_id, _IMAGE_SUFFIX)


def unfinished_path(directory: str, snapshot_id: str) -> str:
    """The image as long as it is not whole."""
    return f"{directory}/{SNAPSHOTS_DIRECTORY}/{TEMPORARY_PREFIX}{snapshot_id}"


def overwritten_path(directory: str, snapshot_id: str) -> str:
    """What clients have overwritten since, as long as the image is copied while they write."""
    return f"{unfinished_path(directory, snapshot_id)}.overwritten"


def share_image(directory: str, data_file: str, snapshot_id: str, commit: Callable[[], None]) -> bool:
    """A snapshot that shares the image's extents, also while somebody writes; False where that cannot be.

    ``commit`` is called when all is there but its name. On disk when it returns. Raises OSError, and what it raises.
    """
    _make_directory(directory)
    unfinished = unfinished_path(directory, snapshot_id)
    # One moment, whoever writes: "Clones are atomic with regards to concurrent writes, so no locks need to be taken to
    # obtain a consistent cloned copy" (ioctl_ficlonerange(2)). What is in memory only is in it too.
    shared = share_blocks(f"{directory}/{data_file}", unfinished)
    if shared:
        publish_image(directory, data_file, snapshot_id, commit)
    return shared


def copy_image(directory: str, data_file: str, snapshot_id: str, step: Step, commit: Callable[[], None]) -> None:
    """A snapshot that is a copy of an image, which nobody else may write to. On disk when it returns.

    Raises ImageInUse, OSError, what ``step`` and ``commit`` raise.
    """
    _make_directory(directory)
    lock = lock_image(f"{directory}/{data_file}", read_only=True)
    try:
        copy_data(f"{directory}/{data_file}", unfinished_path(directory, snapshot_id), step)
    finally:
        os.close(lock)
    publish_image(directory, data_file, snapshot_id, commit)


def copy_data(source: str, target: str, step: Step) -> None:
    """Copy an image into a new file, the data and not the holes; ``step`` is told the bytes of each piece.

    Raises OSError, and what ``step`` raises.
    """
    size_bytes, offset = create_like(source, target), 0
    while offset < size_bytes:
        copied = copy_some(source, target, offset, _PIECE_BYTES)
        offset = copied.offset
        step(copied.copied_bytes)


def publish_image(directory: str, data_file: str, snapshot_id: str, commit: Callable[[], None]) -> None:
    """Make the unfinished image, which has all its bytes, the snapshot. On disk when it returns.

    Raises OSError, what ``commit`` raises.
    """
    unfinished = unfinished_path(directory, snapshot_id)
    with contextlib.suppress(PermissionError):  # a server that is not root owns what it writes
        keep_owner_and_mode(f"{directory}/{data_file}", unfinished)
    fsync_file(unfinished)
    reached("snapshot.copied")
    commit()
    os.rename(unfinished, image_path(directory, snapshot_id))
    reached("snapshot.renamed")
    with contextlib.suppress(FileNotFoundError):
        os.unlink(overwritten_path(directory, snapshot_id))
    fsync_directory(f"{directory}/{SNAPSHOTS_DIRECTORY}")


def set_image_aside(directory: str, data_file: str, snapshot_id: str) -> bool:
    """Make a snapshot of the image itself, which is about to be replaced: it gets a second name.

    False where the file system knows no second names. On disk when it returns. Raises OSError.
    """
    _make_directory(directory)
    try:
        os.link(f"{directory}/{data_file}", image_path(directory, snapshot_id), follow_symlinks=False)
    except OSError as error:
        if error.errno in _NO_LINKS:
            return False
        raise
    fsync_directory(f"{directory}/{SNAPSHOTS_DIRECTORY}")
    return True


def remove_image(directory: str, snapshot_id: str) -> None:
    """Delete a snapshot that is a file. Idempotent. On disk when it returns. Raises OSError."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(image_path(directory, snapshot_id))
        fsync_directory(f"{directory}/{SNAPSHOTS_DIRECTORY}")


def move_image(directory: str, snapshot_id: str, target: str) -> bool:
    """Make the file of a snapshot another file, ``target``; False where that is on another file system.

    The snapshot is gone for good when it returns; the new name is the caller's to sync. Raises OSError.
    """
    try:
        os.rename(image_path(directory, snapshot_id), target)
    except OSError as error:
        if error.errno == errno.EXDEV:
            return False
        raise
    fsync_directory(f"{directory}/{SNAPSHOTS_DIRECTORY}")
    return True


def remove_unfinished(directory: str, snapshot_id: str) -> None:
    """Delete what is left of a snapshot that was not finished. Idempotent. Raises OSError."""
    for path in (unfinished_path(directory, snapshot_id), overwritten_path(directory, snapshot_id)):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)


def _make_directory(directory: str) -> None:
    with contextlib.suppress(FileExistsError):
        os.mkdir(f"{directory}/{SNAPSHOTS_DIRECTORY}", 0o755)
        fsync_directory(directory)


def _uids(directory: str, suffix: str) -> list[str]:
    path = f"{directory}/{SNAPSHOTS_DIRECTORY}"
    try:
        # Not through a link: what it points to is not the volume's.
        if not stat.S_ISDIR(os.lstat(path).st_mode):
            return []
        names = os.listdir(path)
    except FileNotFoundError:
        return []
    uids = (name.removesuffix(suffix) for name in names if name.endswith(suffix))
    return [uid for uid in uids if normalise_uid(uid) == uid]


def _path(directory: str, snapshot_id: str, suffix: str) -> str:
    return f"{directory}/{SNAPSHOTS_DIRECTORY}/{snapshot_id}{suffix}"


def _read(path: str) -> Description:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        return msgspec.json.decode(os.read(descriptor, _LARGEST_JSON), type=Description)
    finally:
        os.close(descriptor)
