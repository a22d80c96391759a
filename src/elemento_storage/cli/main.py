"""The command ``elemento-storage``: finds the command that is meant, and turns errors into sentences and exit codes.

Commands are imported when they are called, so that ``--help`` and completion need not wait for what they use.
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, NoReturn

import click

from elemento_storage import __version__
from elemento_storage.errors import ConfigurationError, NotFound, StorageError

if TYPE_CHECKING:
    from elemento_storage.client import ClientError

# Exit codes (docs/command-line.md). 2 is click's, 130 the shell's word for Ctrl-C.
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_CONFIGURATION = 3
EXIT_NOT_FOUND = 4
EXIT_NOT_ALLOWED = 5
EXIT_STATE = 6
EXIT_LOCKED = 7
EXIT_NO_ROOM = 8
EXIT_UNAVAILABLE = 9
EXIT_UNKNOWN = 10
EXIT_REFUSED = 11
EXIT_INTERRUPTED = 130

#: Every command: its module below ``cli``, and what ``--help`` says of it.
COMMANDS = {
    "volume": ("volume", "Create, list, change and destroy volumes."),
    "iso": ("image", "The ISO library."),
    "cloudinit": ("image", "Cloud images and seeds for cloud-init."),
    "upload": ("transfer", "Make a volume of an image file."),
    "download": ("transfer", "Save a volume as an image file."),
    "snapshot": ("protection", "Keep, restore and forget states of a volume."),
    "backup": ("protection", "Back volumes up, restore them, on a schedule."),
    "export": ("export", "Put a volume within reach of a client."),
    "unexport": ("export", "Take an export away."),
    "exports": ("export", "List exports and how they are."),
    "migrate": ("export", "Live migration of guests between clients."),
    "location": ("server", "Where volumes are, and what room is left."),
    "job": ("server", "Long operations: list, wait, cancel."),
    "status": ("server", "What runs there and how it is."),
    "events": ("server", "What happens, as it happens."),
    "serve": ("host", "Run the server in the foreground."),
    "config": ("host", "Show the effective settings and where each came from."),
    "token": ("host", 'Make, list and revoke tokens (for auth = "tokens").'),
    "gateway": ("gateway", "Serve the vendor's clients on this machine."),
    "doctor": ("doctor", "Check this host, and say what to do."),
    "completion": ("completion", "Print the completion of a shell."),
}


class LazyGroup(click.Group):
    """A group whose commands are imported when they are called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """See click.Group: in the order of the table."""
        del ctx
        return [*COMMANDS]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """See click.Group."""
        del ctx
        if cmd_name not in COMMANDS:
            return None
        module = import_module(f"elemento_storage.cli.{COMMANDS[cmd_name][0]}")
        command: click.Command = getattr(module, cmd_name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """See click.Group: without importing anything."""
        del ctx
        with formatter.section("Commands"):
            formatter.write_dl([(name, told) for name, (_, told) in COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="elemento-storage")
def cli() -> None:
    """Keeps the disks of virtual machines.

    Commands that talk to a server take --server, --client and more: see `elemento-storage volume list --help`.
    """


def main() -> NoReturn:
    """The console script."""
    try:
        code = cli.main(standalone_mode=False)
    except (click.exceptions.Abort, KeyboardInterrupt):
        click.echo("interrupted; what the server has begun it carries on with: `elemento-storage job list`", err=True)
        sys.exit(EXIT_INTERRUPTED)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except StorageError as error:
        click.echo(f"elemento-storage: {error.message}", err=True)
        sys.exit({ConfigurationError: EXIT_CONFIGURATION, NotFound: EXIT_NOT_FOUND}.get(type(error), EXIT_FAILED))
    except BrokenPipeError:
        # `| head` has seen enough. What is left in the buffer must not be written at exit.
        sys.stdout = None
        sys.exit(0)
    except (OSError, ValueError) as error:
        click.echo(f"elemento-storage: {error}", err=True)
        sys.exit(EXIT_FAILED)
    except Exception as error:
        # The client library is imported only if a command has done so.
        library = sys.modules.get("elemento_storage.client")
        if library is None or not isinstance(error, library.ClientError):
            raise
        _say(error)
        sys.exit(exit_code_of(error))
    sys.exit(code if isinstance(code, int) else 0)


def exit_code_of(error: "ClientError") -> int:
    """The exit code of an error of the client library."""
    from elemento_storage.client import errors  # noqa: PLC0415  it is there already

    for families, code in (
        ((errors.NotFound, errors.Gone), EXIT_NOT_FOUND),
        ((errors.Unauthenticated, errors.Forbidden), EXIT_NOT_ALLOWED),
        ((errors.Conflict, errors.PreconditionFailed), EXIT_STATE),
        ((errors.Locked,), EXIT_LOCKED),
        ((errors.NoRoom,), EXIT_NO_ROOM),
        ((errors.Unreachable, errors.ConnectionBroken, errors.Unavailable, errors.DownloadFailed), EXIT_UNAVAILABLE),
        ((errors.OutcomeUnknown, errors.StillRunning), EXIT_UNKNOWN),
        ((errors.Refused, errors.Corrupted, errors.FileChanged, errors.Interrupted), EXIT_REFUSED),
        ((errors.InvalidRequest,), EXIT_USAGE),
    ):
        if isinstance(error, families):
            return code
    return EXIT_FAILED


#: What to try, by the error's code or its class.
_HINTS = {
    "Unreachable": "is the server running, and --server its address? `elemento-storage doctor` looks, on its machine",
    "unauthenticated": "give a token: --token-file, ELEMENTO_TOKEN, or `token-file` in the profile",
    "forbidden": "this is for the owner or an admin: another --client, or an admin's token",
    "not-owner": "only the owner may: --client has to be the owner's",
    "volume-not-found": "`elemento-storage volume list` shows what --client can see; `volume bin` what was destroyed",
    "job-not-found": "jobs are forgotten an hour after their end; a restarted server knows none from before",
    "volume-exported": "`elemento-storage exports VOLUME` shows to whom; take it away with `unexport`",
    "volume-locked": "wait for it with --patience SECONDS; `elemento-storage volume show` says what holds it",
    "volume-waiting": "give it its content: `elemento-storage iso fill`",
    "no-room": "`elemento-storage location list` shows limits and what is left; `volume bin` what could be purged",
    "has-clones": "destroy the linked clones, or make them independent: `elemento-storage volume compact`",
    "has-snapshots": "delete its snapshots first: `elemento-storage snapshot delete`",
    "cannot-shrink": "a volume only grows; make a smaller one and copy inside a guest",
    "protocols-exclude": "nbd and local are one path, iscsi and smb another: `unexport` the others first",
    "missing-key": "where the key is creatorID or client_uid: say who you are by --client or in the profile",
    "not-exportable": "it is exported already: `unexport` it there, or `volume update --shareable`",
    "migration-conflict": "`elemento-storage migrate list` shows what is under way",
}


def _say(error: "ClientError") -> None:
    click.echo(f"elemento-storage: {error.message}", err=True)
    hint = _HINTS.get(getattr(error, "code", "")) or _HINTS.get(type(error).__name__)
    if hint:
        click.echo(f"  try: {hint}", err=True)
    request_id = getattr(error, "request_id", "")
    if request_id and getattr(error, "status", 0) >= 500:
        click.echo(f"  the server's log has more under request {request_id}", err=True)
