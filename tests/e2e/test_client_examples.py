"""The examples of docs/client.md, run as they stand, and the names that the page gives."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from elemento_storage import client
from elemento_storage.client import Client
from elemento_storage.client.errors import ClientError
from elemento_storage.client.exchange import iteration, long_operation, operation
from tests.live import LiveServer

PAGE = (Path(__file__).parents[2] / "docs" / "client.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_an_example_runs(running: LiveServer, number: int) -> None:
    program = EXAMPLES[number].replace("http://127.0.0.1:7772", running.address.removesuffix("/api/v1.0/"))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=30)
    assert done.returncode == 0, done.stderr


def test_the_page_names_every_method() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| (`.+`) \|$", PAGE, re.MULTILINE))
    with Client() as one:
        groups = {name: value for name, value in vars(one).items() if hasattr(value, "runner")}
    found = {}
    for name, group in groups.items():
        kinds = (operation, long_operation, iteration)
        methods = {
            method for kind in type(group).__mro__ for method, value in vars(kind).items() if isinstance(value, kinds)
        }
        found[name] = methods
    assert {name: set(re.findall(r"`(\w+)`", row)) for name, row in rows.items()} == found


def test_the_page_names_every_error() -> None:
    for name in client.__all__:
        kind = getattr(client, name)
        if isinstance(kind, type) and issubclass(kind, ClientError):
            assert f"`{name}`" in PAGE, name
