"""``elemento-storage iso`` and ``elemento-storage cloudinit``."""

import os
from typing import Any, Final

import click

from elemento_storage.cli import output
from elemento_storage.cli.session import HELP, SIZE, Session, connected, wait_option
from elemento_storage.cli.transfer import resume_file, with_bar
from elemento_storage.cli.volume import show_new, show_volumes

_FILE: Final = click.Path(exists=True, dir_okay=False, readable=True)


@click.group(context_settings=HELP)
def iso() -> None:
    """The ISO library: installers, live systems, tools."""


@iso.command("create")
@click.argument("name")
@click.option(
    "--type", "isotype", type=click.Choice(["os_generic", "tool"]), required=True, help="to boot from, or a tool"
)
@click.option("--os-family", required=True, help="linux, windows …")
@click.option("--os-flavour", help="debian …")
@click.option("--os-version", help="12.10 …")
@click.option("--tool-scope", help="drivers …")
@click.option("--tool-version")
@click.option("--private/--public", default=None)
@click.option("--size", type=SIZE, help="the room that is kept for the content that comes later")
@click.option("--file", "path", type=_FILE, help="the content, from here")
@click.option("--url", help="the content, from the web, fetched by the server")
@click.option("--checksum", metavar="sha256:…", help="with --url: what it has to be")
@connected
def iso_create(
    session: Session,
    name: str,
    isotype: str,
    os_family: str,
    size: int | None,
    path: str | None,
    url: str | None,
    checksum: str | None,
    **told: Any,
) -> None:
    """Make an ISO volume called NAME; without --file or --url it waits for its content (`iso fill`)."""
    isos = session.named().isos
    if path and url:
        raise click.UsageError("--file or --url, not both")
    if path:
        record = resume_file(session, path, name)
        send = with_bar(session, isos.upload)
        made = send(path, name, isotype, os_family, resume_file=record, verify=True, **told)
        session.show(made, lambda: click.echo(made.volume_id))
    elif url:
        fetched = session.long(isos.create_from_url, wait=True)(
            name, isotype, os_family, url, checksum=checksum, **told
        )
        show_new(session, fetched)  # type: ignore[arg-type]  # it has an id as well
    else:
        waiting = isos.create(name, isotype, os_family, size=size, **told)
        session.show(waiting, lambda: click.echo(waiting.volume_id))


@iso.command("fill")
@click.argument("volume_name", metavar="VOLUME")
@click.option("--file", "path", type=_FILE)
@click.option("--url")
@click.option("--checksum", metavar="sha256:…", help="with --url: what it has to be")
@connected
def iso_fill(session: Session, volume_name: str, path: str | None, url: str | None, checksum: str | None) -> None:
    """Give an ISO volume that waits its content."""
    vid = session.volume(volume_name)
    if bool(path) == bool(url):
        raise click.UsageError("say where the content is: --file or --url")
    if path:
        send = with_bar(session, session.named().isos.fill)
        send(vid, path, resume_file=resume_file(session, path, vid), verify=True)
    else:
        session.long(session.named().isos.fill_from_url, wait=True)(vid, url or "", checksum=checksum)
    one = session.client.volumes.get(vid)
    session.show(one, lambda: click.echo(one.volume_id))


@iso.command("list")
@click.option("--type", "iso_type", type=click.Choice(["os_generic", "tool"]))
@click.option("--os-family")
@connected
def iso_list(session: Session, iso_type: str | None, os_family: str | None) -> None:
    """List the ISO volumes that the client can see."""
    found = list(session.everything().volumes.list(format="iso", iso_type=iso_type, os_family=os_family, sort="name"))
    session.show(found, lambda: show_volumes(found, session.uid))


@click.group(context_settings=HELP)
def cloudinit() -> None:
    """Cloud images, and the seeds that tell cloud-init what to do."""


@cloudinit.command("create")
@click.argument("name")
@click.argument("url")
@click.argument("size", type=SIZE, required=False)
@click.option("--format", "image_format", type=click.Choice(["raw", "qcow2"]))
@click.option("--checksum", metavar="sha256:…", help="what the image has to be")
@click.option("--private/--public", default=None)
@click.option("--bus", type=click.Choice(["virtio", "scsi", "sata", "ide"]))
@wait_option
@connected
def cloudinit_create(
    session: Session, name: str, url: str, size: int | None, image_format: str | None, *, wait: bool, **told: Any
) -> None:
    """Make a bootable volume called NAME of the cloud image at URL, grown to SIZE."""
    make = session.long(session.named().cloudinit.create, wait=wait)
    show_new(session, make(name, url, size=size, format=image_format, **told))


@cloudinit.command("seed")
@click.argument("name")
@click.argument("files", metavar="FILE…", nargs=-1, required=True, type=_FILE)
@click.option("--private/--public", default=None)
@connected
def cloudinit_seed(session: Session, name: str, files: tuple[str, ...], *, private: bool | None) -> None:
    """Make a seed called NAME of files: user-data, meta-data, network-data, scripts."""
    made = session.named().cloudinit.create_seed(name, _contents(files), private=private)
    session.show(made, lambda: _show_metadata(made))


@cloudinit.command("add")
@click.argument("volume_name", metavar="VOLUME")
@click.argument("files", metavar="FILE…", nargs=-1, required=True, type=_FILE)
@connected
def cloudinit_add(session: Session, volume_name: str, files: tuple[str, ...]) -> None:
    """Put files into a seed; those that are there already are replaced."""
    answer = session.client.cloudinit.add_files(session.volume(volume_name), _contents(files))
    session.show(answer, lambda: _show_metadata(answer))


def _contents(files: tuple[str, ...]) -> dict[str, bytes]:
    contents = {}
    for path in files:
        with open(path, "rb") as file:
            contents[os.path.basename(path)] = file.read()
    if len(contents) < len(files):
        raise click.UsageError("two of the files have the same name")
    return contents


def _show_metadata(answer: Any) -> None:
    click.echo(answer.volume_id)
    for warning in answer.warnings:
        click.echo(f"warning: {output.clean(warning)}", err=True)
