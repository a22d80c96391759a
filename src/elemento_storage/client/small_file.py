"""Small JSON files of the client's own: what a new process has to know to go on."""

import contextlib
import os
from collections.abc import Mapping
from typing import Any

import msgspec


def read_json(path: str) -> dict[str, Any] | None:
    """What a file says; None when there is none, or no JSON object in it."""
    try:
        with open(path, "rb") as file:
            said = msgspec.json.decode(file.read(2**20))
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        return None
    return said if isinstance(said, dict) else None


def write_json(path: str, said: Mapping[str, Any]) -> None:
    """Replace a file in one step; it survives a power failure. Its directory is made."""
    directory = os.path.dirname(os.path.abspath(path))
    os.makedirs(directory, mode=0o700, exist_ok=True)
    temporary = f"{path}.{os.getpid()}.tmp"
    with open(temporary, "wb") as file:
        file.write(msgspec.json.encode(said))
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_directory(directory)


def remove(path: str) -> None:
    """Remove a file that may be gone already."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def sync_directory(path: str) -> None:
    """Make what was renamed in a directory last."""
    descriptor = os.open(path or ".", os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
