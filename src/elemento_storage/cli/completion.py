"""``elemento-storage completion``."""

import click

from elemento_storage.cli.session import HELP


@click.command(context_settings=HELP)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the completion of a SHELL.

    \b
    bash:  elemento-storage completion bash > /etc/bash_completion.d/elemento-storage
    zsh:   elemento-storage completion zsh > "${fpath[1]}/_elemento-storage"
    fish:  elemento-storage completion fish > ~/.config/fish/completions/elemento-storage.fish
    """
    from click.shell_completion import get_completion_class  # noqa: PLC0415  only here

    from elemento_storage.cli.main import cli  # noqa: PLC0415  it imports this module by its name

    kind = get_completion_class(shell)
    if kind is None:
        raise click.UsageError(f"no completion for {shell}")
    made = kind(cli, {}, "elemento-storage", "_ELEMENTO_STORAGE_COMPLETE")
    # Not made.source(): that starts the shell to learn its version, which need not be there.
    click.echo(made.source_template % made.source_vars())
