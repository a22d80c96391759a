"""Linked clones: volumes whose image stands on another volume's, found from the images themselves.

A clone's header names its parent; the sweep reads it with everything else, so the index knows who stands on whom. What
the index may not know yet, or not at all, is looked for on disk before a parent is changed: clones that another server
has just made, that are in the bin, that are odd. So that this costs nothing for all the volumes that have none, a
parent has a file ``elemento.has-clones``, written before its first clone appears; it may be there for longer than the
clones, never for shorter.
"""

import logging

from elemento_storage.catalog import bin as recycle_bin
from elemento_storage.catalog.bin_names import BIN_DIRECTORY
from elemento_storage.catalog.catalog import Held
from elemento_storage.catalog.location import Location
from elemento_storage.catalog.volume_directory import unmark_as_parent
from elemento_storage.engine.image_header import BadHeader, read_header
from elemento_storage.errors import HasClones, ImageDamaged
from elemento_storage.model import Volume, VolumeFormat

log = logging.getLogger(__name__)


async def require_no_clones(held: Held) -> None:
    """Raises HasClones when other volumes stand on this one; how many is all that is told of them."""
    count = await count_clones(held)
    if count:
        raise HasClones(
            f"{count} linked clone{'s stand' if count > 1 else ' stands'} on the volume, those in the bin included: "
            "make them independent (overlay/compact) or destroy them first",
            volume_id=held.volume.volume_id,
            clones=count,
        )


async def count_clones(held: Held) -> int:
    """How many volumes stand on this one, those in the bin included; the disk is asked if there may be any."""
    location, volume = held.location, held.volume
    if not volume.has_clones and volume.volume_id not in location.children:
        return 0
    await location.sweep(max_age_s=0.0)
    clones = set(location.children.get(volume.volume_id, ()))
    unlisted = await location.disk.run(_unlisted_clones, location.path, list(location.odd), volume.volume_id)
    count = len(clones) + unlisted
    if not count and volume.has_clones:
        await location.disk.run(unmark_as_parent, held.place.directory)
        await held.reload()
    return count


def _unlisted_clones(location_path: str, odd: list[str], parent_id: str) -> int:
    binned = [f"{BIN_DIRECTORY}/{entry.directory_name}" for entry in recycle_bin.entries(location_path)]
    return sum(_stands_on(f"{location_path}/{name}", parent_id) for name in (*binned, *odd))


def _stands_on(directory: str, parent_id: str) -> bool:
    try:
        header = read_header(f"{directory}/{VolumeFormat.QCOW2.data_file}", VolumeFormat.QCOW2, 0)
    except (OSError, BadHeader):
        return False
    return header.parent is not None and header.parent.volume_id == parent_id


def ancestors(location: Location, volume: Volume) -> list[Volume]:
    """The volumes that this one stands on, nearest first, as the index has them. Raises ImageDamaged."""
    found: list[Volume] = []
    seen = {volume.volume_id}
    while volume.parent is not None:
        entry = location.entries.get(volume.parent)
        if entry is None or volume.parent in seen:
            # Whose volumes those are is nobody's business here; the operator finds them in the log and by rescan.
            log.error("volume %s stands on %s, which is missing or stands on it", volume.volume_id, volume.parent)
            raise ImageDamaged("a volume that this linked clone stands on is missing: put it back, then rescan")
        volume = entry.volume
        seen.add(volume.volume_id)
        found.append(volume)
    return found


def allocated_bytes(location: Location, volume: Volume) -> int:
    """What a copy of all that a guest sees takes at the most."""
    return min(
        volume.size_bytes + (volume.size_bytes >> 10) + (1 << 20),
        volume.allocated_bytes + sum(one.allocated_bytes for one in ancestors(location, volume)),
    )
