"""The names of destroyed volumes in a location's bin: ``elemento-bin/vid.<volume_uid>.elimg.<time>``."""

import os
from datetime import UTC, datetime
from typing import Final

from elemento_storage.model import volume_directory_name, volume_id_of_directory

BIN_DIRECTORY: Final = "elemento-bin"
_TIME_FORMAT: Final = "%Y%m%dT%H%M%S.%fZ"


def name_in_bin(volume_id: str, destroyed: datetime) -> str:
    """Where a volume goes that is destroyed now, from the location's directory."""
    stamp = destroyed.astimezone(UTC).strftime(_TIME_FORMAT)
    return f"{BIN_DIRECTORY}/{volume_directory_name(volume_id)}.{stamp}"


def read_stamp(stamp: str) -> datetime:
    """When it was destroyed. Raises ValueError."""
    return datetime.strptime(stamp, _TIME_FORMAT).replace(tzinfo=UTC)


def by_volume(location_path: str, volume_id: str = "") -> dict[str, list[str]]:
    """What is in the bin, of one volume or of all, oldest first, from the location's directory.

    Blocks. Raises OSError.
    """
    prefix = volume_directory_name(volume_id) if volume_id else ""
    found: dict[str, list[str]] = {}
    try:
        names = os.listdir(f"{location_path}/{BIN_DIRECTORY}")
    except FileNotFoundError:
        return found
    for name in sorted(names):
        binned = volume_id_of_directory(name[: len(volume_directory_name("0" * 32))])
        if binned is not None and name.startswith(prefix):
            found.setdefault(binned, []).append(f"{BIN_DIRECTORY}/{name}")
    return found
