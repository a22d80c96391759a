"""Which directories below the root are locations."""

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass

from elemento_storage.catalog.settings import SETTINGS_FILE
from elemento_storage.model import VOLUME_SUFFIX, printable


@dataclass(frozen=True)
class FoundLocation:
    """A directory with a ``settings.json``; ``name`` is its path below the root (``.`` for the root itself)."""

    name: str
    path: str
    identity: tuple[int, int]  #: (st_dev, st_ino) of the directory


def find_locations(root: str, depth: int) -> list[FoundLocation]:
    """Locations at the root and down to ``depth`` levels below it; of nested ones only the highest counts.

    Symbolic links are followed only to directories inside the root, and a directory reached twice counts once.
    Sorted by name. Blocks. Raises OSError when the root itself cannot be read.
    """
    real_root = os.path.realpath(root)
    os.listdir(real_root)
    found: dict[tuple[int, int], FoundLocation] = {}
    # Breadth first with plain directories before links, so that a location has its own path as its name.
    level = [real_root]
    for _ in range(depth + 1):
        below: list[str] = []
        for path in level:
            try:
                status = os.stat(path)
                is_location = stat.S_ISREG(os.lstat(f"{path}/{SETTINGS_FILE}").st_mode)
            except FileNotFoundError:
                is_location = False
            except OSError:
                continue  # a level we may not read, or a dead mount: it shows up as missing if it was one
            if not is_location:
                below.extend(_subdirectories(path, real_root))
                continue
            name = printable(os.path.relpath(path, real_root))
            identity = (status.st_dev, status.st_ino)
            found.setdefault(identity, FoundLocation(name, path, identity))
        level = below
    highest = [
        location
        for location in found.values()
        if not any(location.path.startswith(f"{other.path}/") for other in found.values())
    ]
    return sorted(highest, key=lambda location: location.name)


def _subdirectories(path: str, real_root: str) -> Iterator[str]:
    links = []
    try:
        entries = sorted(os.scandir(path), key=lambda entry: entry.name)
    except OSError:
        return
    for entry in entries:
        if entry.name.startswith(".") or entry.name.endswith(VOLUME_SUFFIX):
            continue
        try:
            if entry.is_dir(follow_symlinks=False):
                yield entry.path
            elif entry.is_symlink() and entry.is_dir():
                links.append(os.path.realpath(entry.path))
        except OSError:
            continue
    for target in links:
        if target.startswith(real_root.rstrip("/") + "/"):
            yield target
