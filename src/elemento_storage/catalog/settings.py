"""``settings.json``: what makes a directory a location, and its limits (contract, section 2)."""

import os
import stat
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

import msgspec

from elemento_storage.ceph.connection import PoolSettings
from elemento_storage.model import parse_size, round_up_to_sector

SETTINGS_FILE: Final = "settings.json"
_LARGEST_BYTES: Final = 1 << 20
_EXAMPLE: Final = '{"pool": "elemento", "user": "elemento"}'


class FileSystemKind(StrEnum):
    """``default``: a directory on some file system. ``unique``: the location *is* a mounted file system."""

    DEFAULT = "default"
    UNIQUE = "unique"


@dataclass(frozen=True)
class LocationSettings:
    """The limits of a location; None is "no limit"."""

    max_volumes: int | None = None
    max_volume_bytes: int | None = None
    max_total_bytes: int | None = None
    file_system: FileSystemKind = FileSystemKind.DEFAULT
    ceph: PoolSettings | None = None  #: the location stands for a pool


class BrokenSettings(ValueError):
    """The file cannot be believed; the text says why. The location's volumes stay usable."""


def read_settings(directory: str) -> LocationSettings:
    """The settings of a location. Raises BrokenSettings, OSError."""
    path = f"{directory}/{SETTINGS_FILE}"
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise BrokenSettings("settings.json is not a regular file")
        content = os.read(descriptor, _LARGEST_BYTES)
    finally:
        os.close(descriptor)
    return parse_settings(content)


def parse_settings(content: bytes) -> LocationSettings:
    """Settings from the file's bytes. Raises BrokenSettings."""
    try:
        values = msgspec.json.decode(content)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise BrokenSettings(f"settings.json is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise BrokenSettings("settings.json is not a JSON object")
    max_volumes = values.get("max-volumes")
    if max_volumes is not None and (
        isinstance(max_volumes, bool) or not isinstance(max_volumes, int) or max_volumes < 0
    ):
        raise BrokenSettings(f"max-volumes in settings.json is {max_volumes!r}, it has to be a whole number")
    kind = values.get("file-system", "default")
    if kind not in list(FileSystemKind):
        raise BrokenSettings(f"file-system in settings.json is {kind!r}, it has to be default or unique")
    max_volume_bytes = _size(values, "max-volume-size")
    return LocationSettings(
        max_volumes=max_volumes,
        # A volume of exactly this many GB is allowed though it is rounded up to whole sectors.
        max_volume_bytes=None if max_volume_bytes is None else round_up_to_sector(max_volume_bytes),
        max_total_bytes=_size(values, "max-total-size"),
        file_system=FileSystemKind(kind),
        ceph=_pool(values),
    )


def _pool(values: dict[str, object]) -> PoolSettings | None:
    value = values.get("ceph")
    if value is None:
        return None
    try:
        pool = msgspec.convert(value, PoolSettings)
    except msgspec.ValidationError as error:
        raise BrokenSettings(f"ceph in settings.json: {error}; it has to name a pool, such as {_EXAMPLE}") from error
    if not (pool.pool and pool.user and pool.conf) or pool.user.startswith("client."):
        raise BrokenSettings(f"ceph in settings.json: pool, user (without client.) and conf, such as {_EXAMPLE}")
    return pool


def _size(values: dict[str, object], key: str) -> int | None:
    value = values.get(key)
    if value is None:
        return None
    if not isinstance(value, str | int | float):
        raise BrokenSettings(f"{key} in settings.json is {value!r}, it has to be a size such as 50G")
    try:
        return parse_size(value)
    except ValueError as error:
        raise BrokenSettings(f"{key} in settings.json: {error}") from error
