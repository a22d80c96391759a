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


def branches(root: str) -> list[str]:
    """Where to search separately: the root if it is a location, else each directory in it.

    Touches nothing but the root itself, so that a dead mount in it holds up only the search of its own branch. Blocks.
    Raises OSError.
    """
    if _is_location(root):
        return [root]
    with os.scandir(root) as entries:
        return sorted(
            entry.path
            for entry in entries
            if _may_hold_locations(entry) and (entry.is_dir(follow_symlinks=False) or entry.is_symlink())
        )


def find_locations(root: str, depth: int, branch: str | None = None) -> list[FoundLocation]:
    """Locations at the root and down to ``depth`` levels below it; of nested ones only the highest counts.

    ``branch`` limits the search to one of ``branches(root)``. Symbolic links are followed only to directories inside
    the root, and a directory reached twice counts once. Sorted by name. Blocks. Raises OSError when the root itself
    cannot be read.
    """
    real_root = os.path.realpath(root)
    if branch is None:
        starts = branches(real_root)
        return highest([found for start in starts for found in find_locations(root, depth, start)])
    start = os.path.realpath(branch)
    if start != real_root and not _is_searched(start, real_root, depth):
        return []
    level = [start]
    found: dict[tuple[int, int], FoundLocation] = {}
    # Breadth first with plain directories before links, so that a location has its own path as its name.
    for _ in range(depth + 1 if start == real_root else depth):
        below: list[str] = []
        for path in level:
            try:
                if not _is_location(path):
                    below.extend(_subdirectories(path, real_root, depth))
                    continue
                status = os.stat(path)
            except OSError:
                continue  # a level we may not read, or a dead mount: it shows up as missing if it was one
            name = printable(os.path.relpath(path, real_root))
            identity = (status.st_dev, status.st_ino)
            found.setdefault(identity, FoundLocation(name, path, identity))
        level = below
    return highest(list(found.values()))


def highest(found: list[FoundLocation]) -> list[FoundLocation]:
    """Without those inside others and those found twice, by name."""
    once = {location.identity: location for location in reversed(found)}.values()
    return sorted(
        (
            location
            for location in once
            if not any(location.path.startswith(f"{other.path}/") for other in once if other is not location)
        ),
        key=lambda location: location.name,
    )


def _is_location(path: str) -> bool:
    try:
        return stat.S_ISREG(os.lstat(f"{path}/{SETTINGS_FILE}").st_mode)
    except FileNotFoundError:
        return False


def _may_hold_locations(entry: "os.DirEntry[str]") -> bool:
    return not entry.name.startswith(".") and not entry.name.endswith(VOLUME_SUFFIX)


def _subdirectories(path: str, real_root: str, depth: int) -> Iterator[str]:
    links = []
    for entry in sorted(os.scandir(path), key=lambda entry: entry.name):
        if not _may_hold_locations(entry):
            continue
        try:
            if entry.is_dir(follow_symlinks=False):
                yield entry.path
            elif entry.is_symlink() and entry.is_dir():
                links.append(os.path.realpath(entry.path))
        except OSError:
            continue
    yield from (target for target in links if _is_searched(target, real_root, depth))


def _is_searched(path: str, real_root: str, depth: int) -> bool:
    """Whether a directory that a link leads to is one that the search would meet without the link."""
    below = os.path.relpath(path, real_root).split("/")
    hidden = any(part.startswith(".") or part.endswith(VOLUME_SUFFIX) for part in below)
    return len(below) <= depth and not hidden
