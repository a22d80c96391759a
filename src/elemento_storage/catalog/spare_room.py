"""Free space for a second copy of something that counts once: while it is made, and for no quota."""

import contextlib
from collections.abc import AsyncIterator

from elemento_storage.catalog.bin import RecycleBin
from elemento_storage.catalog.location import Location
from elemento_storage.catalog.locations import os_errors
from elemento_storage.catalog.placement import read_space
from elemento_storage.catalog.room import no_room


async def require_space(bins: RecycleBin, location: Location, size_bytes: int, what_for: str) -> None:
    """Raises NoRoom when the file system has not so much free, and emptying the bin would not help.

    ``what_for`` ends the sentence "… bytes are free and …".
    """
    with os_errors(location):
        for may_empty in (True, False):
            promised = sum(location.own_allocations.values())
            free_bytes = (await location.disk.run(read_space, location.path)).free_bytes - promised
            if size_bytes <= free_bytes:
                return
            if may_empty:
                await bins.make_room(location, size_bytes - free_bytes)
    raise no_room({location.name: f"{max(free_bytes, 0)} bytes are free and {what_for}: {size_bytes}"})


@contextlib.asynccontextmanager
async def spare_room(
    bins: RecycleBin, location: Location, key: str, size_bytes: int, what_for: str
) -> AsyncIterator[None]:
    """The space, kept from what is preallocated here meanwhile. ``key`` is a uid. Raises NoRoom."""
    await require_space(bins, location, size_bytes, what_for)
    location.own_allocations[key] = size_bytes
    try:
        yield
    finally:
        location.own_allocations.pop(key, None)
