"""``elemento-storage location``, ``job``, ``status`` and ``events``: the server, as its clients see it."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from elemento_storage.cli import output
from elemento_storage.cli.session import HELP, UID, Session, connected

if TYPE_CHECKING:
    from elemento_storage.client.types import Job, Location


@click.group(context_settings=HELP)
def location() -> None:
    """Directories in which volumes may be created."""


@location.command("list")
@connected
def location_list(session: Session) -> None:
    """List locations, their limits and what is left. For admins."""
    found = session.client.server.locations()
    session.show(found, lambda: _show_locations(found))


def _show_locations(locations: "Sequence[Location]") -> None:
    output.table(
        ("NAME", "VOLUMES", "OF", "VIRTUAL", "OF", "FREE", "OF", "STATE"),
        [
            (
                one.name,
                one.volumes,
                one.max_volumes,
                output.size(one.virtual_bytes),
                output.size(one.max_total_size),
                output.size(one.free_bytes),
                output.size(one.total_bytes),
                "ok" if one.usable else one.reason,
            )
            for one in locations
        ],
        right=frozenset(range(1, 7)),
    )
    for one in locations:
        for odd in one.odd:
            said = f"{one.name}/{odd.get('directory')}: {odd.get('reason')}"
            click.echo(f"odd: {output.clean(said)}", err=True)


@click.group(context_settings=HELP)
def job() -> None:
    """Long operations."""


@job.command("list")
@connected
def job_list(session: Session) -> None:
    """List jobs that run, or ended within the last hour."""
    found = session.client.jobs.list()
    session.show(found, lambda: _show_jobs(found))


@job.command("show")
@click.argument("job_id", metavar="JOB", type=UID)
@connected
def job_show(session: Session, job_id: str) -> None:
    """Show one job."""
    one = session.client.jobs.get(job_id)
    session.show(one, lambda: _show_jobs([one]))


@job.command("wait")
@click.argument("job_id", metavar="JOB", type=UID)
@click.option("--timeout", metavar="SECONDS", type=click.FloatRange(min=0), help="wait no longer than this")
@connected
def job_wait(session: Session, job_id: str, timeout: float | None) -> None:
    """Wait for the end of a job."""
    bar = output.Bar(quiet=session.as_json)
    try:
        one = session.client.jobs.wait(job_id, timeout_s=timeout, on_progress=bar)
    finally:
        bar.end()
    session.show(one, lambda: click.echo(one.state))


@job.command("cancel")
@click.argument("job_id", metavar="JOB", type=UID)
@connected
def job_cancel(session: Session, job_id: str) -> None:
    """Ask a job to stop; the volume is left as it was."""
    one = session.client.jobs.cancel(job_id)
    session.show(one, lambda: click.echo(one.state))


def _show_jobs(jobs: "Sequence[Job]") -> None:
    output.table(
        ("JOB", "PURPOSE", "STATE", "DONE", "VOLUME", "CREATED", "ENDED", "ERROR"),
        [
            (
                one.job,
                one.purpose,
                f"{one.state}: {one.phase}" if one.phase else one.state,
                f"{one.progress:.0%}",
                one.volume_id,
                one.created,
                one.ended,
                one.error.get("error") if one.error else None,
            )
            for one in jobs
        ],
        right=frozenset({3}),
    )


@click.command(context_settings=HELP)
@connected
def status(session: Session) -> None:
    """What runs there and how it is. Exits with 1 when something is not well."""
    version, health = session.client.server.version(), session.client.server.health()

    def for_people() -> None:
        output.facts(
            {
                "server": session.server,
                "version": version.version,
                "status": health.status,
                "locations": health.locations,
                "volumes": health.volumes,
                "exports": health.exports,
                "running jobs": health.running_jobs,
            }
        )
        for problem in health.problems:
            click.echo(f"problem: {output.clean(problem)}", err=True)

    session.show({"version": version, "health": health}, for_people)
    if health.status != "ok":
        raise click.exceptions.Exit(1)


@click.command(context_settings=HELP)
@click.option("--since", metavar="REVISION", type=int, help="begin after this one; now if not said")
@click.option("--volumes-only", is_flag=True)
@connected
def events(session: Session, since: int | None, *, volumes_only: bool) -> None:
    """What happens, as it happens, until Ctrl-C. With --json one object on each line."""
    for event in session.client.server.events(since, volumes_only=volumes_only):
        if session.as_json:
            output.as_json_line(event)
            continue
        told = " ".join(f"{key}={value}" for key, value in event.data.items())
        click.echo(output.clean(f"{event.time or '':<24}  {event.kind:<16}  {event.subject or '':<32}  {told}"))
