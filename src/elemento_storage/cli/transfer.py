"""``elemento-storage upload`` and ``elemento-storage download``."""

import hashlib
import os
from collections.abc import Callable
from typing import Any, TypeVar

import click

from elemento_storage.cli import output
from elemento_storage.cli.profile import state_directory
from elemento_storage.cli.session import HELP, SIZE, Session, connected
from elemento_storage.cli.volume import described

T = TypeVar("T")


def resume_file(session: Session, path: str, purpose: str) -> str:
    """Where an upload is noted, so that the same command goes on with it after it was interrupted."""
    about = "\0".join((session.server, session.uid or "", os.path.abspath(path), purpose))
    name = hashlib.sha256(about.encode("utf-8", "surrogateescape")).hexdigest()[:32]
    return os.path.join(state_directory(os.environ), "uploads", f"{name}.json")


def with_bar(session: Session, method: Callable[..., T]) -> Callable[..., T]:
    """A transfer that shows how far it is."""

    def run(*args: Any, **kwargs: Any) -> T:
        bar = output.Bar(quiet=session.as_json)
        try:
            return method(*args, on_progress=bar, **kwargs)
        finally:
            bar.end()

    return run


@click.command(context_settings=HELP)
@click.argument("path", metavar="FILE", type=click.Path(exists=True, dir_okay=False, readable=True))
@click.argument("name", required=False)
@click.option("--size", type=SIZE, help="a smaller image is grown to it")
@click.option("--format", "image_format", type=click.Choice(["raw", "qcow2"]), help="the volume's; raw if not said")
@click.option(
    "--source-format",
    type=click.Choice(["raw", "qcow2", "vmdk", "vdi", "vhd", "vhdx"]),
    help="the file's; found from its bytes if not said",
)
@click.option(
    "--compression", type=click.Choice(["none", "gzip", "xz", "zstd"]), help="around the file; found if not said"
)
@click.option("--checksum", metavar="sha256:…", help="what the file has to be")
@click.option("--no-verify", is_flag=True, help="do not read the file first for its checksum")
@described
@connected
def upload(
    session: Session,
    path: str,
    name: str | None,
    image_format: str | None,
    *,
    no_verify: bool,
    **told: Any,
) -> None:
    """Make a volume called NAME of an image FILE. Run again, it goes on where it was interrupted."""
    name = name or os.path.basename(path)
    send = with_bar(session, session.named().volumes.upload)
    record = resume_file(session, path, name)
    made = send(path, name, format=image_format, verify=not no_verify, resume_file=record, **told)
    session.show(made, lambda: click.echo(made.volume_id))


@click.command(context_settings=HELP)
@click.argument("volume_name", metavar="VOLUME")
@click.argument("path", metavar="FILE", type=click.Path(dir_okay=False))
@click.option("--format", "image_format", type=click.Choice(["raw", "qcow2", "vmdk"]), default="raw", show_default=True)
@click.option("--verify", is_flag=True, help="compare with the server's checksum; raw only")
@click.option("--overwrite", is_flag=True, help="replace FILE if it is there")
@connected
def download(
    session: Session, volume_name: str, path: str, image_format: str, *, verify: bool, overwrite: bool
) -> None:
    """Save a volume as an image FILE. Run again, it goes on where it was interrupted."""
    if verify and image_format != "raw":
        raise click.UsageError("--verify compares what a guest sees: it goes with raw only")
    fetch = with_bar(session, session.client.volumes.download)
    vid = session.volume(volume_name)
    got = fetch(vid, path, format=image_format, verify=verify, overwrite=overwrite)
    answer = {"path": got.path, "size": got.size, "etag": got.etag, "checksum": got.checksum}
    session.show(answer, lambda: click.echo(f"{output.clean(got.path)}  {output.size(got.size)}"))
