"""``elemento-storage export``, ``unexport``, ``exports`` and ``migrate``."""

import shlex
from typing import TYPE_CHECKING, Any

import click

from elemento_storage.cli import output
from elemento_storage.cli.session import HELP, UID, Session, connected

if TYPE_CHECKING:
    from elemento_storage.client.types import Exported, Limits, Migration

_PROTOCOLS = click.Choice(["iscsi", "nbd", "smb", "local"])
_LIMITS = (
    "iops",
    "iops_read",
    "iops_write",
    "iops_burst",
    "bps",
    "bps_read",
    "bps_write",
    "bps_burst",
    "burst_seconds",
)


@click.command(context_settings=HELP)
@click.argument("volume_name", metavar="VOLUME")
@click.option("--to", type=UID, help="the client it is for; --client if not said")
@click.option("--protocol", type=_PROTOCOLS, help="iscsi if not said")
@click.option("--readonly", is_flag=True, default=None)
@click.option("--initiator", metavar="IQN", help="iscsi: the one name that may log in")
@click.option(
    "--address", "addresses", metavar="NETWORK", multiple=True, help="iscsi, smb: from where; may be repeated"
)
@click.option("--limit", "limits", metavar="KEY=NUMBER", multiple=True, help=f"{', '.join(_LIMITS)}; may be repeated")
@click.option("--qemu", "only", flag_value="qemu", help="print nothing but arguments of qemu-system")
@click.option("--libvirt", "only", flag_value="libvirt", help="print nothing but the <disk> element")
@click.option("--uri", "only", flag_value="uri", help="print nothing but the URI")
@connected
def export(
    session: Session,
    volume_name: str,
    addresses: tuple[str, ...],
    limits: tuple[str, ...],
    only: str | None,
    **told: Any,
) -> None:
    """Put a volume within reach of a client, and show how to attach it. What is printed holds secrets."""
    vid = session.volume(volume_name)
    answer = session.named().exports.create(vid, addresses=[*addresses] or None, limits=_limits(limits), **told)
    session.show(answer, lambda: _show(answer, only))


def _limits(told: tuple[str, ...]) -> "Limits | None":
    from elemento_storage.client import Limits  # noqa: PLC0415  --help need not wait

    values = {}
    for one in told:
        key, _, number = one.partition("=")
        if key not in _LIMITS or not number.isdigit():
            raise click.BadParameter(f"{one!r} is no limit: KEY=NUMBER, and KEY one of {', '.join(_LIMITS)}")
        values[key] = int(number)
    return Limits(**values) if values else None


def _show(answer: "Exported", only: str | None) -> None:
    if only == "libvirt":
        click.echo(answer.libvirt)
    elif only == "qemu":
        click.echo(shlex.join(answer.qemu))
    elif only == "uri":
        click.echo(answer.endpoint["uri"])
    else:
        output.facts(
            {
                "volume": answer.volume_id,
                "client": answer.client,
                "protocol": answer.protocol + (", read-only" if answer.readonly else ""),
                **answer.endpoint,
                **answer.credentials,
            }
        )
        if answer.prepare:
            click.echo("\nOn the client's host, before:")
            for command in answer.prepare:
                click.echo(f"  {command}")
        click.echo(f"\nQEMU:\n  {shlex.join(answer.qemu)}")
        if answer.libvirt:
            click.echo("\nlibvirt: `elemento-storage export … --libvirt`")


@click.command(context_settings=HELP)
@click.argument("volume_name", metavar="VOLUME")
@click.option("--to", type=UID, help="the client it was for; --client if not said")
@connected
def unexport(session: Session, volume_name: str, to: str | None) -> None:
    """Take an export away. When this ends the client can no longer write."""
    answer = session.named().exports.delete(session.volume(volume_name), to=to)
    session.show(answer, lambda: click.echo(answer.volume_id))


@click.command(context_settings=HELP)
@click.argument("volume_name", metavar="VOLUME", required=False)
@connected
def exports(session: Session, volume_name: str | None) -> None:
    """List exports and how they are, of one volume or of all."""
    answer = session.client.exports.list(None if volume_name is None else session.volume(volume_name))

    def for_people() -> None:
        output.table(
            ("VOLUME", "CLIENT", "PROTOCOL", "STATE", "SESSIONS", "WHERE", "REASON"),
            [
                (
                    one.volume_id,
                    one.client,
                    one.protocol,
                    one.state,
                    one.sessions,
                    one.endpoint.get("uri", one.host),
                    one.reason,
                )
                for one in answer.exports
            ],
        )
        for orphan in answer.orphans:
            click.echo(f"orphan: {output.clean(orphan.name)}", err=True)

    session.show(answer, for_people)


@click.group(context_settings=HELP)
def migrate() -> None:
    """A guest moves between two clients while it runs: prepare, move it, conclude. Or revert."""


@migrate.command("prepare")
@click.argument("volumes", metavar="VOLUME…", nargs=-1, required=True)
@click.option("--from", "source", type=UID, required=True, help="the client it runs on")
@click.option("--to", "destination", type=UID, required=True, help="the client it moves to")
@click.option("--protocol", type=_PROTOCOLS, help="the source's if not said")
@click.option("--deadline", "deadline_s", metavar="SECONDS", type=float, help="after which it is called overdue")
@connected
def migrate_prepare(session: Session, volumes: tuple[str, ...], source: str, destination: str, **told: Any) -> None:
    """Give the destination an export of each volume beside the source's."""
    ids = [session.volume(one) for one in volumes]
    answer = session.client.migrations.prepare(ids, source, destination, **told)
    session.show(answer, lambda: _show_migration(answer))


@migrate.command("conclude")
@click.argument("migration", type=UID)
@connected
def migrate_conclude(session: Session, migration: str) -> None:
    """The guest runs on the destination: take the source's exports away."""
    answer = session.client.migrations.conclude(migration=migration)
    session.show(answer, lambda: _show_migration(answer))


@migrate.command("revert")
@click.argument("migration", type=UID)
@connected
def migrate_revert(session: Session, migration: str) -> None:
    """The guest runs on the source still: take the destination's exports away."""
    answer = session.client.migrations.revert(migration=migration)
    session.show(answer, lambda: _show_migration(answer))


@migrate.command("list")
@connected
def migrate_list(session: Session) -> None:
    """List migrations that are not over. For admins."""
    found = session.client.migrations.list()
    session.show(
        found,
        lambda: output.table(
            ("MIGRATION", "STATE", "FROM", "TO", "VOLUMES", "DEADLINE"),
            [
                (
                    one.migration,
                    f"{one.state}, overdue" if one.overdue else one.state,
                    one.source,
                    one.destination,
                    len(one.volumes),
                    one.deadline,
                )
                for one in found
            ],
        ),
    )


def _show_migration(answer: "Migration") -> None:
    click.echo(f"{answer.migration}  {answer.state}")
    for one in answer.exports:
        click.echo(f"\n{one.volume_id}:\n  {shlex.join(one.qemu)}")
