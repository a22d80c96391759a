"""Exports of a launched server, as its clients and its operator see them."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from elemento_storage.model import marker_name, utc_now
from tests.clients import SLOW_S, QemuIo, eventually
from tests.live import ALICE, LiveServer

PROTOCOLS = ("iscsi", "nbd", "local")
MIB = 1 << 20
STRANGER = "iqn.2001-04.com.example:stranger"


def new_volume(server: LiveServer, mebibytes: int = 8, **more: Any) -> str:
    """A volume of a size that a client prints exactly."""
    return server.create(size=mebibytes * MIB / 1e9, **more)


def export(server: LiveServer, vid: str, client: str = ALICE, **more: Any) -> dict[str, Any]:
    """Export, and insist on success."""
    answer: dict[str, Any] = server.call("export", {"volume_id": vid, "client_uid": client, **more})
    return answer


def unexport(server: LiveServer, vid: str, client: str = ALICE) -> None:
    server.call("unexport", {"volume_id": vid, "client_uid": client})


def refusal(server: LiveServer, path: str, body: Mapping[str, Any]) -> tuple[int, str, str]:
    """Status, code and sentence of what is refused."""
    response = server.post(path, body)
    answer = response.json()
    assert response.status_code >= 400, answer
    return response.status_code, answer["code"], answer["error"]


def refused_export(server: LiveServer, vid: str, client: str = ALICE, **more: Any) -> tuple[int, str, str]:
    return refusal(server, "export", {"volume_id": vid, "client_uid": client, **more})


def unexport_everything(server: LiveServer) -> None:
    """Leave a server that several tests share as the next one expects it."""
    for one in server.call("exports")["exports"]:
        unexport(server, one["vid"], one["client_uid"])


def listed_exports(server: LiveServer, **body: Any) -> dict[tuple[str, str], dict[str, Any]]:
    """What ``exports`` shows, by volume and client."""
    return {(one["vid"], one["client_uid"]): one for one in server.call("exports", body)["exports"]}


def orphans(server: LiveServer) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = server.call("exports")["orphans"]
    return found


def state(server: LiveServer, vid: str, client: str = ALICE) -> dict[str, Any]:
    """One export as it is listed."""
    return listed_exports(server)[vid, client]


def is_healthy(server: LiveServer, vid: str, client: str = ALICE) -> bool:
    return bool(state(server, vid, client)["state"] == "healthy")


def wait_healthy(server: LiveServer, *vids: str, timeout_s: float = SLOW_S) -> None:
    """Until every export of these volumes was seen to serve, after this was called."""
    asked = utc_now()

    def all_are() -> bool:
        found = [one for one in server.call("exports")["exports"] if one["vid"] in vids]
        healthy = [one["vid"] for one in found if one["state"] == "healthy" and one["last_probe"] > asked]
        return set(healthy) == set(vids) and len(healthy) == len(found)

    eventually(all_are, timeout_s)


def client_of(answer: Mapping[str, Any], *, readonly: bool = False) -> QemuIo:
    """A guest that has pasted what the export answered."""
    return QemuIo(answer["qemu"], readonly=readonly)


def identity(answer: Mapping[str, Any]) -> dict[str, Any]:
    """What must not change as long as the export exists."""
    return {key: answer[key] for key in ("iqn", "endpoint", "credentials", "qemu", "libvirt", "protocol")}


def marker(server: LiveServer, vid: str, client: str = ALICE) -> Path:
    """The marker's file, there or not."""
    return server.directory(vid) / marker_name(client, vid)


def foreign_marker(server: LiveServer, vid: str, client: str, *, age_s: float = 0, **more: Any) -> Path:
    """A marker as another server of ours would have left it."""
    path = marker(server, vid, client)
    record = {"volumeID": vid, "client": client, "protocol": "nbd", "server": "9" * 32, "host": "other", **more}
    path.write_text(json.dumps(record) + "\n")
    if age_s:
        then = path.stat().st_mtime - age_s
        os.utime(path, (then, then))
    return path


def volume_pids(server: LiveServer, vid: str) -> set[int]:
    """The storage daemons of a volume."""
    return set(server.daemons(f"/v/{vid}/"))


def tgtd_pids(server: LiveServer) -> set[int]:
    return set(server.daemons("/tgt/"))
