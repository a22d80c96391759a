"""What QEMU's block layer opens: a chain of nodes, described as data (QMP reference, BlockdevOptions).

A store describes a volume's bytes with one of these; the storage daemon opens it; nobody else knows what is below.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from elemento_storage.model import VolumeFormat

VOLUME_NODE: Final = "volume"  #: the node whose content is what a guest sees
_FILE_NODE: Final = "file"


@dataclass(frozen=True)
class BlockNode:
    """Block devices from the lowest to the one called ``volume``."""

    layers: Sequence[Mapping[str, object]]
    read_only: bool
    lock_path: str | None = None  #: a file that has to be locked before, because QEMU does not lock it well enough


def file_node(path: str, image_format: VolumeFormat, *, read_only: bool) -> BlockNode:
    """An image in a file.

    A qcow2 image is locked by QEMU itself; for a raw one see ``image_lock``. Writes go through the page cache, so that
    what a guest was told is written survives the end of the daemon; a guest's flush is an fdatasync.
    """
    is_raw = image_format is not VolumeFormat.QCOW2
    file: dict[str, object] = {
        "driver": "file",
        "node-name": _FILE_NODE,
        "filename": path,
        "locking": "off" if is_raw else "on",
        "discard": "unmap",
        "read-only": read_only,
    }
    volume: dict[str, object] = {
        "driver": "raw" if is_raw else "qcow2",
        "node-name": VOLUME_NODE,
        "file": _FILE_NODE,
        "discard": "unmap",
        "read-only": read_only,
    }
    return BlockNode((file, volume), read_only, path if is_raw else None)


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
