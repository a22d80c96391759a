"""A volume that is exported to one host and is to move to another: what the tests of live migration have in common."""

import contextlib
import json
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from elemento_storage.exports.record import export_id
from tests.clients import SLOW_S, discovered
from tests.live import BOB, CAROL, LiveServer

#: Formats and protocols: every way from a volume's bytes to a guest over a network.
ROUTES = (("raw", "iscsi"), ("qcow2", "nbd"), ("qcow2", "iscsi"), ("raw", "nbd"))


def exported(server: LiveServer, image_format: str = "raw", protocol: str = "iscsi", **more: Any) -> str:
    """A small volume that BOB's host has; its id."""
    vid = server.create(format=image_format, **{"size": 0.005, **more})
    export(server, vid, protocol=protocol)
    return vid


def export(server: LiveServer, vid: str, client: str = BOB, **more: Any) -> dict[str, Any]:
    """The answer to ``export``; the same again when it is exported already."""
    answer: dict[str, Any] = server.call("export", {"volume_id": vid, "client_uid": client, **more})
    return answer


def move(*vids: str, **more: Any) -> dict[str, Any]:
    """The body of ``prepare``: from BOB's host to CAROL's."""
    volumes: dict[str, Any] = {"volume_ids": list(vids)} if len(vids) > 1 else {"volume_id": vids[0]}
    return {**volumes, "source": BOB, "destination": CAROL, **more}


def prepare(server: LiveServer, *vids: str, **more: Any) -> dict[str, Any]:
    """The answer to ``livemigration/prepare``."""
    answer: dict[str, Any] = server.call("livemigration/prepare", move(*vids, **more))
    return answer


def end(server: LiveServer, how: str, vid: str) -> dict[str, Any]:
    """The answer to ``revert`` or ``conclude``."""
    answer: dict[str, Any] = server.call(f"livemigration/{how}", {"volume_id": vid})
    return answer


def clients(server: LiveServer, vid: str) -> dict[str, dict[str, Any]]:
    """Who has the volume, as ``exports`` tells."""
    found = server.call("exports", {"volume_id": vid})["exports"]
    return {one["client_uid"]: one for one in found}


def markers(server: LiveServer, vid: str) -> dict[str, dict[str, Any]]:
    """Who is to have the volume, as the disk tells: the records by client."""
    found = {}
    for path in server.directory(vid).glob("*.exported"):
        with contextlib.suppress(FileNotFoundError):  # taken away since it was listed
            record = json.loads(path.read_bytes())
            found[record["client"]] = record
    return found


def locks(server: LiveServer, vid: str) -> list[str]:
    """The names of a volume's lock files."""
    return [path.name for path in server.directory(vid).glob("*.ignore")]


def reachable(answer: Mapping[str, Any]) -> bool:
    """Whether the client of an export finds it where it was told."""
    endpoint = answer["endpoint"]
    if answer["protocol"] == "iscsi":
        return endpoint["target"] in discovered(endpoint["portal"], endpoint["initiator"])
    told = subprocess.run(["nbdinfo", "--size", endpoint["uri"]], capture_output=True, check=False, timeout=SLOW_S)
    return told.returncode == 0


def marker_path(server: LiveServer, vid: str, client: str) -> Path:
    """The file that says that a client has a volume."""
    return server.directory(vid) / f"iqn.2004-10.cloud.elemento:01:{export_id(client, vid)}.exported"


def data_file(server: LiveServer, vid: str) -> Path:
    """The volume's image."""
    (path,) = server.directory(vid).glob("data.*")
    return path


def taken_out(server: LiveServer, vid: str, client: str, directory: Path) -> Path:
    """A copy of the volume's image when its last client has let go."""
    server.call("unexport", {"volume_id": vid, "client_uid": client})
    return Path(shutil.copy(data_file(server, vid), directory / data_file(server, vid).name))
