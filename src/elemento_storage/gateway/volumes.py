"""Many servers' volumes as the vendor's clients want to see them: each volume once, with the servers that have it."""

from collections.abc import Iterable
from typing import Any

from elemento_storage.gateway.storage_server import StorageServer

Json = dict[str, Any]


def merged(lists: Iterable[tuple[StorageServer, Iterable[Json]]], client: str) -> list[Json]:
    """The volumes of all lists. Of one that several servers have, the first in the servers' order tells the details."""
    first: dict[str, Json] = {}
    holders: dict[str, list[StorageServer]] = {}
    for server, volumes in lists:
        for volume in volumes:
            volume_id = volume["volumeID"]
            first.setdefault(volume_id, volume)
            holders.setdefault(volume_id, []).append(server)
    return [described(volume, holders[volume_id], client) for volume_id, volume in first.items()]


def described(volume: Json, holders: list[StorageServer], client: str) -> Json:
    """A volume with what the vendor's clients want to know beyond what a server says."""
    return {
        **volume,
        "own": volume.get("creatorID") == client,
        "nservers": len(holders),
        "servers": [server.address for server in holders],
        "server": holders[0].address,
        "serverurl": holders[0].url,
    }


def is_volume(value: object) -> bool:
    """Whether a server's answer can be taken for a volume."""
    return isinstance(value, dict) and isinstance(value.get("volumeID"), str)


def is_list_of_volumes(value: object) -> bool:
    """Whether a server's answer can be taken for a list of them."""
    return isinstance(value, list) and all(map(is_volume, value))
