"""What QEMU's block layer opens: a chain of nodes, described as data (QMP reference, BlockdevOptions).

A store describes a volume's bytes with one of these; the storage daemon opens it; nobody else knows what is below.
"""

import ctypes
import functools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from elemento_storage.model import VolumeFormat

VOLUME_NODE: Final = "volume"  #: the node whose content is what a guest sees
LIMIT_NODES: Final = tuple(f"limit-{number}" for number in range(8))  #: the volume with limits; one for each export
VIEW_LIMIT_NODE: Final = "limit-view"  #: the same of the file that FUSE shows
_FILE_NODE: Final = "file"
_IO_URING_SETUP: Final = 425  # the same number on every architecture but alpha
_IO_URING_PARAMS_BYTES: Final = 120


@dataclass(frozen=True)
class BlockNode:
    """Block devices from the lowest to the one called ``volume``."""

    layers: Sequence[Mapping[str, object]]
    read_only: bool
    lock_path: str | None = None  #: a file that has to be locked before, because QEMU does not lock it well enough
    below_paths: tuple[str, ...] = ()  #: the same, of files that are only read and that nobody may write to
    write_through: bool = False  #: what a guest was told is written is safe, flushed or not
    problem: str = ""  #: why it cannot be opened, known before QEMU is asked


def file_node(
    path: str, image_format: VolumeFormat, *, read_only: bool, below: Sequence[tuple[str, VolumeFormat]] = ()
) -> BlockNode:
    """An image in a file, and the paths and formats of the images it stands on, nearest first.

    What an image stands on is said here, and never looked up in its header.

    A qcow2 image is locked by QEMU itself; for a raw one see ``image_lock``. Writes go through the page cache, so that
    what a guest was told is written survives the end of the daemon; a guest's flush is an fdatasync. (A qcow2 cluster's
    first write is the exception: it is found again only when the tables are written too, which a flush sees to.)

    Why io_uring: what the page cache holds is read at once, where QEMU's threads are woken for every single request.
    (NBD, 4 KiB: 1.5 to 4 times the reads of threads; ``python -m bench.byhand``.) ``cache.direct`` would go to the disk
    for every read, a tenth of the reads at depth 1, and a host that dies loses what was not flushed all the same.
    """
    layers: list[dict[str, object]] = []
    lower: str | None = None
    for depth, (lower_path, lower_format) in reversed(list(enumerate(below, 1))):
        name, file_name = f"below-{depth}", f"below-{depth}-file"
        layers.append(_file(file_name, lower_path, locking=False, read_only=True))
        layers.append(_image(name, file_name, lower_format, lower, read_only=True))
        lower = name
    is_raw = image_format is not VolumeFormat.QCOW2
    if is_raw:
        # No node of the format above it: it would change nothing, and each node costs a request 0.2 to 0.3 us.
        layers.append(_file(VOLUME_NODE, path, locking=False, read_only=read_only))
    else:
        layers.append(_file(_FILE_NODE, path, locking=True, read_only=read_only))
        layers.append(_image(VOLUME_NODE, _FILE_NODE, image_format, lower, read_only=read_only))
    return BlockNode(tuple(layers), read_only, path if is_raw else None, tuple(one for one, _ in below))


def _file(name: str, path: str, *, locking: bool, read_only: bool) -> dict[str, object]:
    return {
        "driver": "file",
        "node-name": name,
        "filename": path,
        "locking": "on" if locking else "off",
        "discard": "unmap",
        "aio": "io_uring" if has_io_uring() else "threads",
        "read-only": read_only,
    }


def _image(
    name: str, file_name: str, image_format: VolumeFormat, lower: str | None, *, read_only: bool
) -> dict[str, object]:
    image: dict[str, object] = {
        "driver": "qcow2" if image_format is VolumeFormat.QCOW2 else "raw",
        "node-name": name,
        "file": file_name,
        "discard": "unmap",
        "read-only": read_only,
    }
    if image_format is VolumeFormat.QCOW2:
        image["backing"] = lower
        # QEMU 10.0.2 frees tables that were not used for ten minutes in the thread of the exports, also while its
        # monitor works on them for a snapshot. They are 32 MB at the most.
        image["cache-clean-interval"] = 0
    return image


@functools.cache
def has_io_uring() -> bool:
    """Whether the kernel lets us: administrators and container engines often do not, and QEMU would refuse to start."""
    libc = ctypes.CDLL(None, use_errno=True)
    parameters = ctypes.create_string_buffer(_IO_URING_PARAMS_BYTES)
    descriptor = libc.syscall(ctypes.c_long(_IO_URING_SETUP), ctypes.c_uint(1), parameters)
    if descriptor < 0:
        return False
    os.close(descriptor)
    return True


def nbd_layer(node_name: str, server: Mapping[str, object], export: str, *, read_only: bool) -> dict[str, object]:
    """The volume as another daemon serves it; flushes and discards pass through."""
    return {
        "driver": "nbd",
        "node-name": node_name,
        "server": server,
        "export": export,
        "read-only": read_only,
        "discard": "unmap",
    }


def limit_group(node_name: str) -> str:
    """The throttle group of one of these nodes."""
    return f"{node_name}-group"


def limit_layers(*, read_only: bool, file: str = VOLUME_NODE) -> list[dict[str, object]]:
    """All that is above the volume, or a filter above that: every export goes through one of these."""
    return [
        {
            "driver": "throttle",
            "node-name": name,
            "throttle-group": limit_group(name),
            "file": file,
            "discard": "unmap",
            "read-only": read_only,
        }
        for name in (*LIMIT_NODES, VIEW_LIMIT_NODE)
    ]
