"""``elemento-storage volume``."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

import click

from elemento_storage.cli import output
from elemento_storage.cli.session import HELP, SIZE, UID, Session, connected, wait_option, yes_option
from elemento_storage.model import parse_size

if TYPE_CHECKING:
    from elemento_storage.client.types import Created, Volume

_FLAGS: Final = ("private", "readonly", "shareable", "bootable")
_BUSES: Final = click.Choice(["virtio", "scsi", "sata", "ide"])
_ALGS: Final = click.Choice(["cp", "rclone", "rsync", "no"])
_FORMATS: Final = click.Choice(["raw", "qcow2"])


@click.group(context_settings=HELP)
def volume() -> None:
    """Create, list, change and destroy volumes. VOLUME is an id, or a name that only one has."""


def described(command: Callable[..., None]) -> Callable[..., None]:
    """Flags of commands that make or change a volume."""
    for option in reversed(
        (
            click.option("--private/--public", default=None, help="whether others can see it"),
            click.option("--readonly/--writable", default=None),
            click.option(
                "--shareable/--exclusive", default=None, help="exported to several clients at once, or to one"
            ),
            click.option("--bootable/--data", default=None),
            click.option("--alg", type=_ALGS, help="how it is cloned; no: not at all"),
            click.option("--bus", type=_BUSES, help="the bus a guest sees it on"),
        )
    ):
        command = option(command)
    return command


@volume.command()
@click.argument("name")
@click.argument("size", type=SIZE, required=False)
@click.option("--format", "image_format", type=_FORMATS, help="raw if not said")
@click.option("--ceph", is_flag=True, default=None, help="an image of a Ceph pool")
@click.option("--preallocation", type=click.Choice(["off", "metadata", "falloc", "full"]))
@click.option("--from-url", metavar="URL", help="fetch an image from the web; SIZE is what it is grown to")
@click.option("--checksum", metavar="sha256:…", help="with --from-url: what the image has to be")
@described
@wait_option
@connected
def create(
    session: Session,
    name: str,
    size: int | None,
    image_format: str | None,
    preallocation: str | None,
    from_url: str | None,
    checksum: str | None,
    *,
    ceph: bool | None,
    wait: bool,
    **flags: Any,
) -> None:
    """Create a volume called NAME of SIZE, such as 20G (10^9 bytes each) or 20GiB (2^30)."""
    volumes = session.named().volumes
    made: Created | None
    if from_url:
        fetch = session.long(volumes.create_from_url, wait=wait)
        made = fetch(name, from_url, size=size, checksum=checksum, format=image_format, **flags)
    elif size is None:
        raise click.UsageError("say how large: SIZE, such as 20G")
    else:
        make = session.long(volumes.create, wait=wait)
        made = make(name, size, format=image_format, preallocation=preallocation, ceph=ceph, **flags)
    show_new(session, made)


def show_new(session: Session, made: "Created | None") -> None:
    """A new volume: its id, for a shell to take."""
    if made is not None:
        session.show(made, lambda: click.echo(made.volume_id))


@volume.command("list")
@click.option("--name", metavar="PATTERN", help="with * and ?")
@click.option("--format", "image_format", type=click.Choice(["raw", "qcow2", "iso", "rbd"]))
@click.option("--sort", metavar="KEY", help="name, size, sizeOnDisk, lastUpdated or volumeID; -KEY: descending")
@click.option("--ids", is_flag=True, help="nothing but ids")
@connected
def list_(session: Session, name: str | None, image_format: str | None, sort: str | None, *, ids: bool) -> None:
    """List the volumes that the client can see."""
    found = list(session.everything().volumes.list(name=name, format=image_format, sort=sort or "name"))
    if ids and not session.as_json:
        for one in found:
            click.echo(one.volume_id)
        return
    session.show(found, lambda: show_volumes(found, session.uid))


def show_volumes(volumes: "Sequence[Volume]", uid: str | None) -> None:
    """A table of volumes."""
    output.table(
        ("ID", "NAME", "SIZE", "ON DISK", "FORMAT", "OWNER", "STATE", "LOCATION"),
        [
            (
                one.volume_id,
                one.name,
                output.size(one.size),
                output.size(one.size_on_disk),
                one.format,
                "me" if one.owner == uid else one.owner,
                state_of(one),
                one.location,
            )
            for one in volumes
        ],
        right=frozenset({2, 3}),
    )


def state_of(one: "Volume") -> str:
    """What there is to know of a volume in a few words."""
    told = [flag for flag in _FLAGS if getattr(one, flag)]
    told += [word for word in ("exported", "linked", "waiting") if getattr(one, word)]
    if one.snapshots:
        told.append(f"{one.snapshots} snapshot" + "s" * (one.snapshots > 1))
    if one.locked is not None:
        done = "" if one.locked.progress is None else f" {one.locked.progress:.0%}"
        told.append(f"locked: {one.locked.purpose}{done}")
    return ", ".join(told)


@volume.command()
@click.argument("volume_name", metavar="VOLUME")
@connected
def show(session: Session, volume_name: str) -> None:
    """Show one volume."""
    one = session.client.volumes.get(session.volume(volume_name))
    session.show(one, lambda: show_volume(one))


def show_volume(one: "Volume") -> None:
    """One volume, all of it."""
    facts: dict[str, object] = {
        "id": one.volume_id,
        "name": one.name,
        "owner": one.owner,
        "size": f"{output.size(one.size)} ({one.size} bytes)",
        "on disk": output.size(one.size_on_disk),
        "format": one.format,
        "bus": one.bus,
        "location": one.location,
        "state": state_of(one),
        "clonable": f"yes, by {one.alg}" if one.clonable else "no",
        "snapshots": f"{one.snapshots}, {output.size(one.snapshots_on_disk)}" if one.snapshots else None,
        "last updated": f"{one.last_updated} UTC",
    }
    for key in ("iso_type", "os_family", "os_flavour", "os_version", "tool_scope", "tool_version"):
        facts[key.replace("_", " ")] = getattr(one, key)
    if one.locked is not None:
        facts["locked"] = f"{one.locked.purpose}, job {one.locked.job}, since {one.locked.since}, on {one.locked.host}"
    output.facts({name: value for name, value in facts.items() if value not in (None, "")})


@volume.command()
@click.argument("volume_name", metavar="VOLUME")
@click.argument("size")
@connected
def resize(session: Session, volume_name: str, size: str) -> None:
    """Grow a volume to SIZE, or by +SIZE. Also while it is exported."""
    vid = session.volume(volume_name)
    by = size.startswith("+")
    wanted = SIZE.convert(size.removeprefix("+"), None, None)
    if by:
        wanted += session.client.volumes.get(vid).size
    answer = session.client.volumes.resize(vid, wanted)
    session.show(answer, lambda: click.echo(output.size(parse_size(wanted))))


@volume.command()
@click.argument("volume_name", metavar="VOLUME")
@click.argument("image_format", metavar="FORMAT", type=_FORMATS)
@wait_option
@connected
def convert(session: Session, volume_name: str, image_format: str, *, wait: bool) -> None:
    """Convert a volume to raw or qcow2."""
    answer = session.long(session.client.volumes.convert, wait=wait)(session.volume(volume_name), image_format)
    if answer is not None:
        session.show(answer, lambda: click.echo(answer.format))


@volume.command()
@click.argument("volume_name", metavar="VOLUME")
@click.option("--name", help="of the clone; the source's if not said")
@click.option("--private/--public", default=None)
@click.option("--format", "image_format", type=_FORMATS)
@click.option("--location", help="where to put it")
@click.option("--linked", is_flag=True, default=None, help="in an instant, standing on its source")
@wait_option
@connected
def clone(
    session: Session,
    volume_name: str,
    name: str | None,
    image_format: str | None,
    location: str | None,
    *,
    private: bool | None,
    linked: bool | None,
    wait: bool,
) -> None:
    """Clone a volume; the client owns the clone."""
    make = session.long(session.named().volumes.clone, wait=wait)
    vid = session.volume(volume_name)
    show_new(session, make(vid, name=name, private=private, format=image_format, location=location, linked=linked))


@volume.command()
@click.argument("volume_name", metavar="VOLUME")
@click.argument("new_owner", type=UID)
@connected
def transfer(session: Session, volume_name: str, new_owner: str) -> None:
    """Give a volume to another client."""
    answer = session.client.volumes.transfer(session.volume(volume_name), new_owner)
    session.show(answer, lambda: click.echo(f"{answer.volume_id} belongs to {answer.owner}"))


@volume.command()
@click.argument("volume_name", metavar="VOLUME")
@click.option("--name", help="the new name")
@described
@click.option("--clonable/--not-clonable", default=None)
@connected
def update(session: Session, volume_name: str, name: str | None, **flags: Any) -> None:
    """Change a volume's name or flags."""
    if name is None and all(value is None for value in flags.values()):
        raise click.UsageError("say what to change: --name, --private, …")
    answer = session.client.volumes.update(session.volume(volume_name), name=name, **flags)
    session.show(answer, lambda: output.facts(_named(answer)))


def _named(answer: Any) -> dict[str, object]:
    return {name.replace("_", " "): getattr(answer, name) for name in answer.__struct_fields__}


@volume.command()
@click.argument("volumes", metavar="VOLUME…", nargs=-1, required=True)
@yes_option
@connected
def destroy(session: Session, volumes: tuple[str, ...], *, yes: bool) -> None:
    """Move volumes into the bin. `restore` brings them back, for a while."""
    ids = [session.volume(one) for one in volumes]
    session.confirm(f"Destroy {', '.join(volumes)}?", yes=yes)
    answers = [session.client.volumes.destroy(vid) for vid in ids]
    session.show(answers, lambda: click.echo("\n".join(one.volume_id for one in answers)))


@volume.command("bin")
@connected
def bin_(session: Session) -> None:
    """List destroyed volumes that can be restored."""
    found = session.client.volumes.binned()
    session.show(
        found,
        lambda: output.table(
            ("ID", "NAME", "SIZE", "FORMAT", "LOCATION", "DESTROYED", "PURGED AFTER"),
            [
                (one.volume_id, one.name, output.size(one.size), one.format, one.location, one.destroyed, one.purge_at)
                for one in found
            ],
            right=frozenset({2}),
        ),
    )


@volume.command()
@click.argument("volume_id", metavar="ID", type=UID)
@connected
def restore(session: Session, volume_id: str) -> None:
    """Bring a volume back from the bin."""
    one = session.client.volumes.restore(volume_id)
    session.show(one, lambda: click.echo(one.volume_id))


@volume.command()
@click.argument("volume_name", metavar="VOLUME")
@yes_option
@wait_option
@connected
def reset(session: Session, volume_name: str, *, yes: bool, wait: bool) -> None:
    """Throw away what a volume holds, for good."""
    vid = session.volume(volume_name)
    session.confirm(f"Throw away what {volume_name} holds? It cannot be restored.", yes=yes)
    answer = session.long(session.client.volumes.reset, wait=wait)(vid)
    if answer is not None:
        session.show(answer, lambda: click.echo(answer.volume_id))


@volume.command()
@click.argument("volume_name", metavar="VOLUME")
@wait_option
@connected
def compact(session: Session, volume_name: str, *, wait: bool) -> None:
    """Make a linked clone independent of what it stands on."""
    answer = session.long(session.client.volumes.compact, wait=wait)(session.volume(volume_name))
    if answer is not None:
        session.show(answer, lambda: click.echo(answer.volume_id))


@volume.command("import")
@click.argument("path")
@click.option("--name")
@click.option("--private/--public", default=None)
@click.option("--bootable/--data", default=None)
@click.option("--bus", type=_BUSES)
@click.option("--format", "image_format", type=click.Choice(["raw", "qcow2", "iso"]))
@wait_option
@connected
def import_(session: Session, path: str, image_format: str | None, *, wait: bool, **told: Any) -> None:
    """Make a volume of what lies in a location's elemento-import. For admins."""
    show_new(session, session.long(session.named().volumes.import_, wait=wait)(path, format=image_format, **told))


@volume.command()
@click.argument("volume_name", metavar="VOLUME")
@click.option("--algorithm", type=click.Choice(["sha256", "blake2b"]), default="sha256")
@click.option("--method", type=click.Choice(["blocks", "plain"]), default="blocks")
@wait_option
@connected
def checksum(session: Session, volume_name: str, algorithm: Any, method: Any, *, wait: bool) -> None:
    """A checksum of what a guest sees."""
    take = session.long(session.client.volumes.checksum, wait=wait)
    answer = take(session.volume(volume_name), algorithm=algorithm, method=method)
    if answer is not None:
        session.show(answer, lambda: click.echo(answer.checksum))
