"""The commands of the gateway: run it, hash a password for it, look for servers on the network."""

import asyncio
import json
import sys

import click

_DEFAULT = "/etc/elemento-storage-gateway.toml"
_SHORTEST_PASSWORD = 8


@click.group(invoke_without_command=True)
@click.option(
    "--config",
    "config_file",
    metavar="FILE",
    default=_DEFAULT,
    show_default=True,
    envvar="ELEMENTO_STORAGE_GATEWAY_CONFIG_FILE",
    help="TOML configuration",
)
@click.pass_context
def gateway(ctx: click.Context, config_file: str) -> None:
    """Serve the vendor's clients on this machine; run in the foreground."""
    if ctx.invoked_subcommand is None:
        from elemento_storage.gateway import configuration, daemon  # noqa: PLC0415  other commands need not wait

        daemon.run(configuration.load(config_file))


@gateway.command()
def password() -> None:
    """Read a password and print what the configuration keeps of it."""
    from elemento_storage.gateway.passwords import hash_password  # noqa: PLC0415

    if sys.stdin.isatty():
        given = click.prompt("Password", hide_input=True, confirmation_prompt=True, err=True)
    else:
        given = sys.stdin.readline().rstrip("\n")
    if len(given) < _SHORTEST_PASSWORD:
        raise click.UsageError(f"a password has at least {_SHORTEST_PASSWORD} characters")
    click.echo(hash_password(given))


@gateway.command()
@click.option("--seconds", default=3.0, show_default=True, help="how long to listen")
@click.option("--interface", "interfaces", metavar="ADDRESS", multiple=True, help="only on this address's network")
@click.option("--json", "as_json", is_flag=True, help="for programs")
def servers(seconds: float, interfaces: tuple[str, ...], *, as_json: bool) -> None:
    """Show the servers that announce themselves, and the fingerprints of their certificates.

    Nothing of it is proven: compare a fingerprint with the server's own certificate before you believe it.
    """
    rows = asyncio.run(_look(seconds, list(interfaces)))
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    for row in rows:
        click.echo(f"{row['name']}  {row['url']}  {row['fingerprint'] or '-'}")


async def _look(seconds: float, interfaces: list[str]) -> list[dict[str, str | None]]:
    from elemento_storage.errors import Unavailable  # noqa: PLC0415
    from elemento_storage.gateway.trust import certificate_at, fingerprint_of  # noqa: PLC0415
    from elemento_storage.mdns import Announcement, Finder  # noqa: PLC0415

    found: set[Announcement] = set()
    finder = Finder(interfaces, found.add, lambda name: None)
    await finder.start()
    await asyncio.sleep(seconds)
    await finder.close()
    rows: list[dict[str, str | None]] = []
    for one in sorted(found, key=lambda one: (one.name, one.host, one.port)):
        fingerprint = None
        if one.tls:
            try:
                fingerprint = fingerprint_of(await certificate_at(one.host, one.port, 3.0))
            except Unavailable as error:
                fingerprint = error.message
        host = f"[{one.host}]" if ":" in one.host else one.host
        rows.append(
            {
                "name": one.name,
                "url": f"{'https' if one.tls else 'http'}://{host}:{one.port}",
                "fingerprint": fingerprint,
            }
        )
    return rows
