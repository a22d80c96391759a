"""Commands that run on the server's own machine: serve, config, token."""

import json
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import click

from elemento_storage.config import Settings, load
from elemento_storage.model import normalise_uid


def with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command a flag for every setting, and ``--config``."""
    for spec in reversed(fields(Settings)):
        name = f"--{spec.name.replace('_', '-')}"
        command = click.option(name, spec.name, metavar="VALUE", help=spec.metadata["doc"])(command)
    return click.option(
        "--config", "config_file", metavar="FILE", envvar="ELEMENTO_STORAGE_CONFIG_FILE", help="TOML settings file"
    )(command)


@click.command()
@with_settings
def serve(config_file: str | None, **flags: object) -> None:
    """Run the server in the foreground."""
    from elemento_storage import server  # noqa: PLC0415  the other commands need not wait for it

    settings, _ = load(config_file, flags)
    server.run(settings)


@click.command()
@click.option("--json", "as_json", is_flag=True, help="for programs")
@with_settings
def config(config_file: str | None, *, as_json: bool, **flags: object) -> None:
    """Show the effective settings and where each came from."""
    _, origins = load(config_file, flags)
    if as_json:
        click.echo(json.dumps({o.name: {"value": o.value, "source": o.source} for o in origins}, indent=2))
        return
    width = max(len(o.name) for o in origins)
    value_width = max(len(str(o.value)) for o in origins)
    for o in origins:
        click.echo(f"{o.name:<{width}}  {o.value!s:<{value_width}}  {o.source}")


@click.group()
def token() -> None:
    """Make, list and revoke tokens (for auth = "tokens")."""


@token.command("create")
@click.argument("client")
@click.option("--admin", is_flag=True, help="may do everything, for every client")
@click.option("--note", default="", help="what the token is for")
@click.option("--json", "as_json", is_flag=True, help="for programs")
@with_settings
def token_create(
    client: str, *, admin: bool, note: str, as_json: bool, config_file: str | None, **flags: object
) -> None:
    """Make a token for CLIENT (32 hex digits). It is shown this once only."""
    from elemento_storage.service.tokens import Role  # noqa: PLC0415

    uid = normalise_uid(client)
    if uid is None:
        raise click.BadParameter("a client is named by 32 hex digits, or a UUID with dashes", param_hint="CLIENT")
    made, text = _tokens(config_file, flags).create(uid, Role.ADMIN if admin else Role.USER, note)
    if as_json:
        click.echo(json.dumps({"id": made.token_id, "client": made.client, "role": made.role, "token": text}))
    else:
        click.echo(text)
        click.echo(f"{made.role} token {made.token_id} for {made.client}; it cannot be shown again", err=True)


@token.command("list")
@click.option("--json", "as_json", is_flag=True, help="for programs")
@with_settings
def token_list(*, as_json: bool, config_file: str | None, **flags: object) -> None:
    """List the tokens, without their secrets."""
    rows = [
        {"id": t.token_id, "client": t.client, "role": t.role.value, "created": t.created, "note": t.note}
        for t in _tokens(config_file, flags).tokens()
    ]
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    for row in rows:
        click.echo(f"{row['id']}  {row['client']}  {row['role']:<5}  {row['created']}  {row['note']}")


@token.command("revoke")
@click.argument("token_id", metavar="ID")
@with_settings
def token_revoke(token_id: str, *, config_file: str | None, **flags: object) -> None:
    """Revoke a token; a running server notices at once."""
    _tokens(config_file, flags).revoke(token_id)


def _tokens(config_file: str | None, flags: dict[str, Any]) -> Any:
    from elemento_storage.service.tokens import TokenStore  # noqa: PLC0415

    settings, _ = load(config_file, flags)
    return TokenStore(settings.state_dir)
