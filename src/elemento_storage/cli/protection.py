"""``elemento-storage snapshot`` and ``elemento-storage backup``."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from elemento_storage.cli import output
from elemento_storage.cli.session import HELP, UID, Session, connected, wait_option, yes_option

if TYPE_CHECKING:
    from elemento_storage.client.types import Backup, Schedule


@click.group(context_settings=HELP)
def snapshot() -> None:
    """States of a volume that are kept. SNAPSHOT is the id that `list` shows."""


@snapshot.command("create")
@click.argument("volume_name", metavar="VOLUME")
@click.option("--name")
@click.option("--description")
@wait_option
@connected
def snapshot_create(session: Session, volume_name: str, *, wait: bool, **told: Any) -> None:
    """Keep what a volume holds now, also while guests write to it."""
    made = session.long(session.client.snapshots.create, wait=wait)(session.volume(volume_name), **told)
    if made is not None:
        session.show(made, lambda: click.echo(made.snapshot))


@snapshot.command("list")
@click.argument("volume_name", metavar="VOLUME")
@connected
def snapshot_list(session: Session, volume_name: str) -> None:
    """List a volume's snapshots, oldest first."""
    found = session.client.snapshots.list(session.volume(volume_name))
    session.show(
        found,
        lambda: output.table(
            ("SNAPSHOT", "NAME", "CREATED", "SIZE", "ON DISK", "DESCRIPTION"),
            [
                (
                    one.snapshot,
                    one.name,
                    one.created,
                    output.size(one.size),
                    output.size(one.size_on_disk),
                    one.description,
                )
                for one in found
            ],
            right=frozenset({3, 4}),
        ),
    )


@snapshot.command("restore")
@click.argument("volume_name", metavar="VOLUME")
@click.argument("snapshot_id", metavar="SNAPSHOT", type=UID)
@click.option("--keep", is_flag=True, help="make a snapshot of what it holds now first")
@yes_option
@wait_option
@connected
def snapshot_restore(
    session: Session, volume_name: str, snapshot_id: str, *, keep: bool, yes: bool, wait: bool
) -> None:
    """Make a volume what it was."""
    vid = session.volume(volume_name)
    if not keep:
        session.confirm(f"Throw away what {volume_name} holds now? (--keep would make a snapshot of it.)", yes=yes)
    answer = session.long(session.client.snapshots.restore, wait=wait)(vid, snapshot_id, keep=keep)
    if answer is not None:
        session.show(answer, lambda: click.echo(answer.kept or answer.snapshot))


@snapshot.command("clone")
@click.argument("volume_name", metavar="VOLUME")
@click.argument("snapshot_id", metavar="SNAPSHOT", type=UID)
@click.option("--name")
@click.option("--format", type=click.Choice(["raw", "qcow2"]))
@click.option("--location")
@wait_option
@connected
def snapshot_clone(session: Session, volume_name: str, snapshot_id: str, *, wait: bool, **told: Any) -> None:
    """Make a new volume that holds what a snapshot does."""
    made = session.long(session.client.snapshots.clone, wait=wait)(session.volume(volume_name), snapshot_id, **told)
    if made is not None:
        session.show(made, lambda: click.echo(made.volume_id))


@snapshot.command("delete")
@click.argument("volume_name", metavar="VOLUME")
@click.argument("snapshot_id", metavar="SNAPSHOT", type=UID)
@yes_option
@wait_option
@connected
def snapshot_delete(session: Session, volume_name: str, snapshot_id: str, *, yes: bool, wait: bool) -> None:
    """Forget a snapshot."""
    vid = session.volume(volume_name)
    session.confirm(f"Delete snapshot {snapshot_id} of {volume_name}?", yes=yes)
    answer = session.long(session.client.snapshots.delete, wait=wait)(vid, snapshot_id)
    if answer is not None:
        session.show(answer, lambda: click.echo(answer.snapshot))


@click.group(context_settings=HELP)
def backup() -> None:
    """Copies of volumes in another place. BACKUP is the id that `list` shows."""


@backup.command("create")
@click.argument("volume_name", metavar="VOLUME")
@click.option("--mode", type=click.Choice(["auto", "full", "incremental"]))
@click.option("--name")
@wait_option
@connected
def backup_create(session: Session, volume_name: str, *, wait: bool, **told: Any) -> None:
    """Back a volume up as it is now, also while guests write to it."""
    made = session.long(session.client.backups.create, wait=wait)(session.volume(volume_name), **told)
    if made is not None:
        session.show(made, lambda: click.echo(made.backup))


@backup.command("list")
@click.argument("volume_name", metavar="VOLUME", required=False)
@connected
def backup_list(session: Session, volume_name: str | None) -> None:
    """List backups, oldest first."""
    found = session.client.backups.list(None if volume_name is None else session.volume(volume_name))
    session.show(found, lambda: _show_backups(found))


def _show_backups(backups: "Sequence[Backup]") -> None:
    output.table(
        ("BACKUP", "VOLUME", "NAME", "CREATED", "MODE", "SIZE", "ON DISK", "LOCATION", "STATE"),
        [
            (
                one.backup,
                one.volume_id,
                one.name,
                one.created,
                one.mode,
                output.size(one.size),
                output.size(one.size_on_disk),
                one.location,
                f"damaged: {one.damaged}" if one.damaged else "scheduled" if one.scheduled else "",
            )
            for one in backups
        ],
        right=frozenset({5, 6}),
    )


@backup.command("restore")
@click.argument("backup_id", metavar="BACKUP", type=UID)
@click.option("--over", "volume_name", metavar="VOLUME", help="over what this volume holds, instead of as a new one")
@click.option("--name", help="of the new volume")
@yes_option
@wait_option
@connected
def backup_restore(
    session: Session, backup_id: str, volume_name: str | None, name: str | None, *, yes: bool, wait: bool
) -> None:
    """Make a volume of a backup."""
    vid = None if volume_name is None else session.volume(volume_name)
    if vid is not None:
        session.confirm(f"Throw away what {volume_name} holds now?", yes=yes)
    made = session.long(session.client.backups.restore, wait=wait)(backup_id, volume_id=vid, name=name)
    if made is not None:
        session.show(made, lambda: click.echo(made.volume_id))


@backup.command("delete")
@click.argument("backup_id", metavar="BACKUP", type=UID)
@yes_option
@connected
def backup_delete(session: Session, backup_id: str, *, yes: bool) -> None:
    """Forget a backup; those that were made after it stay whole."""
    session.confirm(f"Delete backup {backup_id}?", yes=yes)
    answer = session.client.backups.delete(backup_id)
    session.show(answer, lambda: click.echo(answer.backup))


@backup.command("verify")
@click.argument("backup_id", metavar="BACKUP", type=UID)
@wait_option
@connected
def backup_verify(session: Session, backup_id: str, *, wait: bool) -> None:
    """Read a backup and all that it needs, and compare with what was written."""
    one = session.long(session.client.backups.verify, wait=wait)(backup_id)
    if one is not None:
        session.show(one, lambda: click.echo(f"{one.backup} is whole"))


@backup.command("schedule")
@click.argument("volume_name", metavar="VOLUME")
@click.argument("every", metavar="PERIOD")
@click.option("--at", metavar="HH:MM", help="the time of day in UTC at which periods begin")
@click.option("--keep", type=click.IntRange(min=1), help="how many are kept")
@click.option("--keep-days", type=float, help="how long they are kept")
@click.option("--full-every", type=click.IntRange(min=1), help="one of so many is a full one")
@connected
def backup_schedule(session: Session, volume_name: str, every: str, **told: Any) -> None:
    """Back a volume up every PERIOD, such as 24h; `off` ends it."""
    one = session.client.backups.schedule(session.volume(volume_name), every, **told)
    session.show(one, lambda: _show_schedules([one]))


@backup.command("schedules")
@connected
def backup_schedules(session: Session) -> None:
    """List schedules."""
    found = session.client.backups.schedules()
    session.show(found, lambda: _show_schedules(found))


def _show_schedules(schedules: "Sequence[Schedule]") -> None:
    output.table(
        ("VOLUME", "EVERY", "AT", "KEEP", "LAST", "NEXT", "FAILURES", "REASON"),
        [
            (one.volume_id, one.every, one.at, one.keep, one.last, one.next, one.failures, one.reason)
            for one in schedules
        ],
    )
