"""A full look at the disk, and a report of everything strange. Touches nothing but what dead servers left."""

from dataclasses import dataclass, field

from elemento_storage.catalog.catalog import Catalog
from elemento_storage.catalog.location import Location, SweepReport
from elemento_storage.catalog.locations import os_errors
from elemento_storage.ceph.pool import Pool
from elemento_storage.model import printable, volume_directory_name


@dataclass
class RescanReport:
    """What a full look at the disk found."""

    volumes: int = 0
    sweep: SweepReport = field(default_factory=SweepReport)
    odd: list[dict[str, str]] = field(default_factory=list)
    differences: list[dict[str, str | int]] = field(default_factory=list)
    foreign_locks: list[dict[str, str]] = field(default_factory=list)


async def rescan(catalog: Catalog) -> RescanReport:
    """Compare everything with the disk now."""
    report = RescanReport(sweep=await catalog.look_around(max_age_s=0.0))
    for location in catalog.locations.answering():
        if location.pool is not None:
            report.odd += await _compare_pool(location, location.pool, report)
        report.volumes += len(location.entries)
        report.odd += [
            {"location": location.name, "directory": name, "reason": reason}
            for name, reason in sorted(location.odd.items())
        ]
        for volume_id in location.entries.keys() & catalog.locations.duplicates:
            report.odd.append(
                {
                    "location": location.name,
                    "directory": location.entries[volume_id].volume.directory_name,
                    "reason": "the same volume id is in another location too",
                }
            )
        report.differences += _differences(location)
        for volume_id, entry in list(location.entries.items()):
            for lock in await catalog.read_locks(location, entry.volume) if entry.volume.locks else []:
                if not catalog.can_resolve(lock):
                    report.foreign_locks.append({"vid": volume_id, "lock": printable(lock.file_name)})
    return report


async def _compare_pool(location: Location, pool: Pool, report: RescanReport) -> list[dict[str, str]]:
    """Take in images that the index lacks; what is odd: volumes that have no image any more."""
    with os_errors(location):
        missing, adopted = await location.disk.run(pool.compare)
        await location.follow_pool()
    report.sweep.added += [volume_id for volume_id in adopted if volume_id not in report.sweep.added]
    reason = "its image is not in the pool any more: somebody removed or renamed it"
    return [
        {"location": location.name, "directory": volume_directory_name(volume_id), "reason": reason}
        for volume_id in missing
    ]


def _differences(location: Location) -> list[dict[str, str | int]]:
    """Where meta.json says something else than the image or the directory's name, which win."""
    found: list[dict[str, str | int]] = []
    for volume_id, entry in location.entries.items():
        size = entry.volume.size_bytes
        if entry.claimed_bytes is not None and entry.claimed_bytes != size:
            found.append({"vid": volume_id, "key": "size", "meta": entry.claimed_bytes, "disk": size})
        if entry.claimed_id not in ("", volume_id):
            found.append({"vid": volume_id, "key": "volumeID", "meta": entry.claimed_id, "disk": volume_id})
    return found
