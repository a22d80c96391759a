"""Calls about the server itself: locations, rescan, jobs, what changed, health, version."""

import asyncio
from typing import Any

from elemento_storage import API_VERSION, __version__
from elemento_storage.api.call import Call, Context, Kind, Reply
from elemento_storage.api.errors import error_body
from elemento_storage.api.schemas import (
    ClientRequest,
    HealthAnswer,
    JobAnswer,
    LocationAnswer,
    Nothing,
    RescanAnswer,
    RevisionsAnswer,
    RevisionsRequest,
    VersionAnswer,
)
from elemento_storage.catalog.location import Location
from elemento_storage.catalog.rescan import rescan as rescan_catalog
from elemento_storage.disk import within
from elemento_storage.engine import qemu_img
from elemento_storage.errors import Forbidden, InvalidValue, ToolMissing
from elemento_storage.jobs import Job
from elemento_storage.model import printable
from elemento_storage.service.health import health_problems


async def locations(ctx: Context, request: Nothing) -> list[LocationAnswer]:
    """Every location with its limits, what is used of them, and why it takes no new volumes if so."""
    known = ctx.services.core.catalog.locations
    await known.look()
    return list(await asyncio.gather(*(_location(location, known.patience_s) for location in known.by_name.values())))


async def _location(location: Location, patience_s: float) -> LocationAnswer:
    reason = location.problem
    space = None
    if location.missing is None:
        try:
            space = await within(patience_s, location.disk.run(location.read_space))
        except OSError as error:
            reason = error.strerror or str(error)
    settings = location.settings
    return LocationAnswer(
        name=location.name,
        path=printable(location.path),
        usable=reason is None,
        reason=reason,
        file_system=settings.file_system.value,
        max_volumes=settings.max_volumes,
        max_volume_size=settings.max_volume_bytes,
        max_total_size=settings.max_total_bytes,
        volumes=location.volume_count,
        virtual_bytes=location.virtual_bytes,
        total_bytes=space.total_bytes if space else None,
        free_bytes=space.free_bytes if space else None,
        odd=[{"directory": name, "reason": why} for name, why in sorted(location.odd.items())],
        pool=settings.ceph.pool if settings.ceph else None,
    )


async def rescan(ctx: Context, request: Nothing) -> RescanAnswer:
    """Compare everything with the disk now, and report everything strange. Only what dead servers left is put right."""
    report = await rescan_catalog(ctx.services.core.catalog)
    return RescanAnswer(
        volumes=report.volumes,
        added=report.sweep.added,
        changed=report.sweep.changed,
        removed=report.sweep.removed,
        odd=report.odd,
        differences=report.differences,
        foreign_locks=report.foreign_locks,
    )


async def jobs(ctx: Context, request: ClientRequest) -> list[JobAnswer]:
    """The jobs that run or ended within the last hour, oldest first."""
    visible = ctx.services.core.jobs.visible(ctx.actor(request.client_uid).client)
    return [job_answer(job) for job in visible]


def job_answer(job: Job) -> JobAnswer:
    """A job as the API shows it."""
    return JobAnswer(
        job=job.job_id,
        purpose=job.purpose,
        state=job.state.value,
        progress=round(job.progress.fraction, 4),
        phase=job.progress.phase,
        volume_id=job.volume_id,
        created=job.created,
        ended=job.ended,
        bytes=job.progress.transfer.done_bytes,
        total_bytes=job.progress.transfer.total_bytes,
        rate=job.progress.transfer.whole_rate,
        eta=job.progress.transfer.eta_s,
        result=job.result.answer if isinstance(job.result, Reply) else job.result,
        error=error_body(job.error, job.job_id, None)[1] if job.error else None,
    )


async def revisions(ctx: Context, request: RevisionsRequest) -> RevisionsAnswer:
    """Which volumes changed after revision `since`, as far as the client may see them."""
    feed = ctx.services.core.feed
    client = ctx.actor(request.client_uid).client
    events = feed.since(request.since)
    if events is None:
        return RevisionsAnswer(revision=feed.revision, complete=False, changed=[], removed=[])
    latest: dict[str, str] = {}
    for event in events:
        kind = event.seen_by(client)
        if kind is not None and kind.startswith("volume."):
            latest[event.subject] = kind
    return RevisionsAnswer(
        revision=feed.revision,
        complete=True,
        changed=[vid for vid, kind in latest.items() if kind != "volume.removed"],
        removed=[vid for vid, kind in latest.items() if kind == "volume.removed"],
    )


async def version(ctx: Context, request: Nothing) -> VersionAnswer:
    """What runs here."""
    try:
        found = await qemu_img.version()
    except ToolMissing:
        found = "missing"
    return VersionAnswer(version=__version__, api=API_VERSION, qemu_img=found)


async def health(ctx: Context, request: Nothing) -> HealthAnswer:
    """Whether all is well, and what is not, in words."""
    catalog = ctx.services.core.catalog
    services = ctx.services
    problems = await health_problems(services.core, services.exporting, services.migrating, services.backup_schedules)
    return HealthAnswer(
        status="degraded" if problems else "ok",
        problems=problems if ctx.caller.admin else [],
        locations=len(catalog.locations.answering()) if ctx.caller.admin else None,
        volumes=sum(len(one.entries) for one in catalog.locations.answering()) if ctx.caller.admin else None,
        exports=len(ctx.services.exporting.watched()) if ctx.caller.admin else None,
        running_jobs=ctx.services.core.jobs.running_count() if ctx.caller.admin else None,
    )


SERVER_CALLS: tuple[Call[Any], ...] = (
    Call("locations", Nothing, list[LocationAnswer], locations, Kind.READ, (Forbidden,), admin_only=True),
    Call("rescan", Nothing, RescanAnswer, rescan, Kind.CHANGE, (Forbidden,), admin_only=True),
    Call("jobs", ClientRequest, list[JobAnswer], jobs, Kind.READ),
    Call("revisions", RevisionsRequest, RevisionsAnswer, revisions, Kind.READ, (InvalidValue,)),
    Call("version", Nothing, VersionAnswer, version, Kind.READ),
    Call("health", Nothing, HealthAnswer, health, Kind.READ),
)
