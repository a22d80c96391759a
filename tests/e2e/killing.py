"""A server that is killed at a named step, without a start of its own for each: its fault point is what a file says."""

import contextlib
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.live import LiveServer


def armed(directory: Path) -> dict[str, str]:
    """The environment of a server that ``die_at`` can kill; ``directory`` is the one that its root is in."""
    return {"ELEMENTO_STORAGE_FAULTPOINT": f"file:{directory / 'faultpoint'}"}


def start_armed(server: LiveServer) -> None:
    """Start it again."""
    server.start(armed(server.root.parent))


def die_at(server: LiveServer, step: str, path: str, body: dict[str, Any], **headers: str) -> Any:
    """Ask an armed server for something that kills it at a step; what it answered before, if it did not wait.

    When this returns it is dead and may be started again.
    """
    fault = server.root.parent / "faultpoint"
    fault.write_text(f"kill:{step}")
    answer = None
    with contextlib.suppress(httpx.HTTPError):
        response = server.post(path, body, **headers)
        answer = response.json()
        if response.status_code != 202:
            pytest.fail(f"{step} was not reached: {response.status_code} {response.text}")
    server.wait_dead()
    fault.unlink()
    return answer
