"""Where a new volume goes: the rules, as functions of facts (contract, section 2)."""

import os
from dataclasses import dataclass

from elemento_storage.catalog.settings import LocationSettings


@dataclass(frozen=True)
class Space:
    """What the file system below a location says."""

    total_bytes: int
    free_bytes: int
    is_mount_point: bool


@dataclass(frozen=True)
class Usage:
    """What is in a location, reservations included."""

    volume_count: int
    virtual_bytes: int


def read_space(path: str, *, look_for_mount: bool = True) -> Space:
    """Blocks. Raises OSError. Without ``look_for_mount`` it is not known to be a mount point, and cheaper."""
    status = os.statvfs(path)
    return Space(
        total_bytes=status.f_blocks * status.f_frsize,
        free_bytes=status.f_bavail * status.f_frsize,
        is_mount_point=look_for_mount and _is_mount_point(path),
    )


def _is_mount_point(path: str) -> bool:
    if os.path.ismount(path):
        return True
    # os.path.ismount compares device numbers and misses a bind mount from the same file system.
    escaped = path.replace("\\", "\\134").replace(" ", "\\040").replace("\t", "\\011").replace("\n", "\\012")
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as mounts:
        return any(line.split(" ", 5)[4] == escaped for line in mounts)


def creation_problem(*, unique: bool, space: Space) -> str | None:
    """Why nothing at all can be created there now."""
    if unique and not space.is_mount_point:
        return "not mounted: the location is said to be a file system of its own, and none is mounted there"
    return None


def quota_problem(
    settings: LocationSettings,
    usage: Usage,
    space: Space,
    *,
    unique: bool,
    more_bytes: int,
    more_volumes: int,
    largest_bytes: int,
) -> str | None:
    """Why the limits forbid ``more_volumes`` with ``more_bytes`` in all, in a sentence; None when they do not.

    ``largest_bytes`` is the size of the largest volume among them as it will be.
    """
    if settings.max_volumes is not None and more_volumes and usage.volume_count + more_volumes > settings.max_volumes:
        return f"max-volumes is {settings.max_volumes} and there are {usage.volume_count}"
    if settings.max_volume_bytes is not None and largest_bytes > settings.max_volume_bytes:
        return f"max-volume-size is {settings.max_volume_bytes} bytes, {largest_bytes} are asked for"
    if settings.max_total_bytes is not None and usage.virtual_bytes + more_bytes > settings.max_total_bytes:
        left = max(0, settings.max_total_bytes - usage.virtual_bytes)
        return f"max-total-size leaves {left} bytes, {more_bytes} are asked for"
    if unique and usage.virtual_bytes + more_bytes > space.total_bytes:
        left = max(0, space.total_bytes - usage.virtual_bytes)
        return f"the file system's size leaves {left} bytes, {more_bytes} are asked for"
    return None


def space_problem(space: Space, *, overcommit: float, more_bytes: int) -> str | None:
    """Why the file system's free space does not allow it: the only reason that emptying a bin can remove."""
    if overcommit and more_bytes > space.free_bytes * overcommit:
        return f"the file system has {space.free_bytes} bytes free, {more_bytes} are asked for"
    return None


def free_quota(settings: LocationSettings, usage: Usage, space: Space) -> int:
    """Bytes of quota left; a location without a limit has what its file system has free."""
    if settings.max_total_bytes is None:
        return space.free_bytes
    return settings.max_total_bytes - usage.virtual_bytes
