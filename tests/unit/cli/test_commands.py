"""The table of commands is true, the page names them all, and nothing is imported before its time."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from elemento_storage.cli import output
from elemento_storage.cli.main import COMMANDS, cli, exit_code_of
from elemento_storage.client import errors
from elemento_storage.client.types import Progress

PAGE = (Path(__file__).parents[3] / "docs" / "command-line.md").read_text(encoding="utf-8")


def every_command(group: click.Group, path: str = "") -> Iterator[tuple[str, click.Command]]:
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        if isinstance(command, click.Group):
            yield from every_command(command, f"{path}{name} ")
        yield f"{path}{name}", command


@pytest.mark.parametrize("name", COMMANDS)
def test_the_table_says_what_a_command_says_of_itself(name: str) -> None:
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    assert command.help


def test_the_page_names_every_command_and_flag() -> None:
    for path, command in every_command(cli):
        if not isinstance(command, click.Group):
            assert f"`{path}`" in PAGE, path
    for flag in ("--server", "--profile", "--client", "--token-file", "--ca", "--patience", "--json"):
        assert f"`{flag}" in PAGE


def test_the_page_names_every_exit_code() -> None:
    codes = {
        value for name, value in vars(sys.modules["elemento_storage.cli.main"]).items() if name.startswith("EXIT_")
    }
    rows = {
        int(line.split("|")[1])
        for line in PAGE.splitlines()
        if line.startswith("| ") and line.split("|")[1].strip().isdigit()
    }
    assert rows == codes | {0}


def kinds(base: type[errors.ClientError]) -> Iterator[type[errors.ClientError]]:
    yield base
    for kind in base.__subclasses__():
        yield from kinds(kind)


def test_every_error_has_a_code_that_the_page_names() -> None:
    for kind in kinds(errors.ClientError):
        made = kind("x", status=1, code="x") if issubclass(kind, errors.ApiError) else kind("x")
        assert exit_code_of(made) in range(1, 12)


def test_help_imports_neither_the_library_nor_the_server() -> None:
    program = (
        "import sys\nfrom elemento_storage.cli.main import cli\n"
        "cli.main(['--help'], standalone_mode=False)\n"
        "heavy = {'httpx', 'msgspec.json', 'starlette', 'elemento_storage.client', 'elemento_storage.server'}\n"
        "sys.exit(str(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_library_imports_nothing_of_the_server() -> None:
    program = (
        "import sys, elemento_storage.client\n"
        "ours = {one for one in sys.modules if one.startswith('elemento_storage.')}\n"
        "rest = {one for one in ours if not one.startswith('elemento_storage.client')} - {'elemento_storage.model'}\n"
        "sys.exit(str(rest) if rest else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("given", "told"),
    [(0, "0"), (999, "999"), (1000, "1K"), (1_500_000, "1.5M"), (20 * 10**9, "20G"), (999_999, "1M"), (None, "-")],
)
def test_sizes_for_people(given: int | None, told: str) -> None:
    assert output.size(given) == told


def test_a_bar_fits_its_line() -> None:
    progress = Progress("sending", 0.5, 10**9, 2 * 10**9, 10**8, 3725.0)
    whole = output.line(progress, 100)
    assert "sending   50%" in whole
    assert "1G of 2G  100MB/s  1:02:05 left" in whole
    assert "[#####" in whole
    for columns in range(1, 100):
        assert len(output.line(progress, columns)) <= columns
    assert output.line(Progress("looking\x1b[2J"), 80) == "looking\N{REPLACEMENT CHARACTER}[2J"


def test_tables_are_as_wide_as_they_have_to_be(capsys: pytest.CaptureFixture[str]) -> None:
    output.table(("A", "NUMBER"), [("long name", 1), (None, 22)], right=frozenset({1}))
    assert capsys.readouterr().out == "A          NUMBER\nlong name       1\n-              22\n"
