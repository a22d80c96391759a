"""Which server an export belongs to: an id in the state directory, which outlives processes, reboots and addresses."""

import os

from elemento_storage.durable import replace
from elemento_storage.errors import ConfigurationError
from elemento_storage.model import new_uid, normalise_uid


def server_identity(state_directory: str) -> str:
    """The id of this server, made when there is none yet. Blocks. Raises ConfigurationError, OSError."""
    path = f"{state_directory}/server-id"
    try:
        with open(path, encoding="ascii") as file:
            identity = file.read().strip()
    except FileNotFoundError:
        os.makedirs(state_directory, mode=0o700, exist_ok=True)
        identity = new_uid()
        replace(path, identity.encode() + b"\n", mode=0o600)
    if normalise_uid(identity) != identity:
        raise ConfigurationError(f"{path} is damaged: it has to hold 32 hex digits; take it from a backup")
    return identity
