"""What is not well, in sentences an operator can act on."""

from elemento_storage.disk import within
from elemento_storage.service.backup_schedules import BackupSchedules
from elemento_storage.service.core import Core
from elemento_storage.service.exporting import Exporting
from elemento_storage.service.migration import Migrating


async def health_problems(
    core: Core, exporting: Exporting, migrating: Migrating, schedules: BackupSchedules
) -> list[str]:
    """Empty when all is well."""
    return [
        *await _location_problems(core),
        *_export_problems(exporting),
        *[
            f"live migration {one.migration_id} of {', '.join(one.volumes)} is overdue: conclude or revert it"
            for one in await migrating.under_way()
            if one.overdue
        ],
        *schedules.problems(),
    ]


def _export_problems(exporting: Exporting) -> list[str]:
    if exporting.problem and exporting.watched():
        return [exporting.problem]
    problems = [
        f"volume {record.volume_id} is not served to {record.client} over {record.protocol}: {status.reason}"
        for record, status in exporting.watched()
        if not status.healthy
    ]
    return problems + [
        f"{one.protocol or 'something'} served {one.name}, which no marker asks for; it is withdrawn"
        for one in exporting.orphans()
    ]


async def _location_problems(core: Core) -> list[str]:
    locations = core.catalog.locations
    problems = []
    if locations.problem:
        problems.append(locations.problem)
    elif not locations.by_name:
        problems.append(f"no location below {core.settings.root}: put a settings.json into a directory there")
    for location in locations.by_name.values():
        if location.problem:
            problems.append(f"location {location.name}: {location.problem}")
        if location.missing is not None:
            continue
        if location.odd:
            problems.append(f"location {location.name}: {len(location.odd)} directories are no volumes, see rescan")
        try:
            space = await within(locations.patience_s, location.disk.run(location.read_space))
        except OSError as error:
            problems.append(f"location {location.name}: {error.strerror or error}")
            continue
        if location.is_unique and not space.is_mount_point:
            problems.append(f"location {location.name}: not mounted")
        if space.free_bytes < space.total_bytes * 0.05:
            problems.append(
                f"location {location.name}: only {space.free_bytes} bytes free; sparse volumes may fail to grow"
            )
    problems += [f"volume {volume_id} is in more than one location" for volume_id in sorted(locations.duplicates)]
    return problems
