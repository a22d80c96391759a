"""iso/create, word for word as the document shows it, and the library that comes of it."""

import json
import os
from typing import Any

import pytest

from tests.clients import eventually
from tests.live import ALICE, BOB, LiveServer

NOBODY = "f" * 32
TOOL: dict[str, Any] = {
    "alg": "cp",
    "clonable": True,
    "creatorID": NOBODY,
    "isotype": "tool",
    "name": "virtio-win-driver",
    "os_family": "windows",
    "os_flavour": None,
    "os_version": None,
    "private": False,
    "tool_scope": "drivers",
    "tool_version": "2021",
}
INSTALLER: dict[str, Any] = {
    "creatorID": NOBODY,
    "name": "dabian-iso",
    "private": False,
    "clonable": True,
    "alg": "cp",
    "isotype": "os_generic",
    "os_family": "linux",
    "os_flavour": "debian",
    "os_version": "12.10",
    "size": 15,
}


def test_a_tool_answers_as_the_document_shows(running: LiveServer) -> None:
    answer = running.call("iso/create", TOOL)
    assert answer == {**TOOL, "vid": answer["vid"]}
    volume = running.info(answer["vid"])
    assert (volume["format"], volume["readonly"], volume["bus"], volume["bootable"]) == ("iso", True, "sata", False)
    assert (volume["iso_type"], volume["waiting"], volume["tool_scope"]) == ("tool", True, "drivers")
    assert (volume["size"], volume["sizeOnDisk"], volume["cloudinit"]) == (2 * 10**9, 0, False)


def test_a_tool_in_the_words_of_the_documents_table(running: LiveServer) -> None:
    payload = {key: value for key, value in TOOL.items() if not key.startswith(("tool_", "os_f", "os_v"))}
    payload |= {"os_family": "windows", "scope": "drivers", "version": "2021", "size": 15}
    answer = running.call("iso/create", payload)
    assert answer == {**TOOL, "vid": answer["vid"]}
    said = json.loads((running.directory(answer["vid"]) / "isoinfo.json").read_text())
    assert said == {"isotype": "tool", "os_family": "windows", "scope": "drivers", "version": "2021"}


def test_an_installer_answers_as_the_document_shows(running: LiveServer) -> None:
    response = running.post("iso/create/", {**INSTALLER, "servers": ["one"]})
    assert response.status_code == 200
    assert response.headers["x-ignored-keys"] == "servers"
    answer = response.json()
    shown = {key: value for key, value in INSTALLER.items() if key != "size"}
    assert answer == {**shown, "tool_scope": None, "tool_version": None, "vid": answer["vid"]}
    volume = running.info(answer["vid"])
    assert (volume["format"], volume["readonly"], volume["bus"], volume["bootable"]) == ("iso", True, "sata", True)
    assert (volume["iso_type"], volume["os_flavour"], volume["os_version"]) == ("os_generic", "debian", "12.10")
    assert (volume["size"], volume["waiting"]) == (15 * 10**9, True)
    assert "tool_scope" not in volume
    said = json.loads((running.directory(answer["vid"]) / "isoinfo.json").read_text())
    assert said == {"isotype": "os_generic", "os_family": "linux", "os_flavour": "debian", "os_version": "12.10"}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"isotype": None}, "'isotype'"),
        ({"isotype": "game"}, "'isotype' is 'game', it has to be one of tool, os_generic"),
        ({"os_family": None}, "'os_family'"),
        ({"os_family": 5}, "'os_family' is 5, it has to be a text of at most 255 characters"),
        ({"os_version": 12.1}, "'os_version' is 12.1"),
        ({"os_flavour": "x" * 300}, "'os_flavour' is"),
        ({"name": None}, "'name'"),
        ({"creatorID": None}, "'creatorID'"),
        ({"size": 0}, "'size' is 0"),
        ({"alg": "no"}, "'alg' is no and 'clonable' is true"),
    ],
)
def test_what_is_wrong_is_said(running: LiveServer, changes: dict[str, Any], told: str) -> None:
    before = running.listed(NOBODY)
    response = running.post("iso/create", {**INSTALLER, **changes})
    assert response.status_code == 400
    assert response.json()["error"].startswith(f"request was badly formatted. {told}")
    assert running.listed(NOBODY) == before


def test_what_waits_cannot_be_exported_or_changed_into_something_else(running: LiveServer) -> None:
    vid = running.call("iso/create", INSTALLER)["vid"]
    response = running.post("export", {"volume_id": vid, "client_uid": NOBODY})
    assert (response.status_code, response.json()["code"]) == (409, "volume-waiting")
    assert "iso/create/upload" in response.json()["error"]
    assert not list(running.directory(vid).glob("*.exported"))
    for path, body in (("update/resize", {"size": 20}), ("update/convert", {"format": "raw"})):
        response = running.post(path, {"vid": vid, "creatorID": NOBODY, **body})
        assert (response.status_code, response.json()["code"]) == (409, "format-unsupported")
    assert running.call("update", {"vid": vid, "creatorID": NOBODY, "name": "renamed"})["name"] == "renamed"
    assert running.call("destroy", {"volume_id": vid, "creatorID": NOBODY}) == {"vid": vid}
    assert running.call("restore", {"volume_id": vid})["waiting"]


def test_a_private_one_is_its_owners(running: LiveServer) -> None:
    vid = running.call("iso/create", {**INSTALLER, "creatorID": ALICE, "private": True})["vid"]
    assert vid in running.listed(ALICE, iso_type="os_generic")
    assert vid not in running.listed(BOB, iso_type="os_generic")
    response = running.post("export", {"volume_id": vid, "client_uid": BOB})
    assert (response.status_code, response.json()["code"]) == (404, "volume-not-found")


def test_the_same_key_makes_one_volume(running: LiveServer) -> None:
    first = running.post("iso/create", INSTALLER, Idempotency_Key="the-iso")
    again = running.post("iso/create", INSTALLER, Idempotency_Key="the-iso")
    assert again.json() == first.json()
    assert again.headers["idempotency-replayed"] == "true"


def test_the_library_is_listed_by_what_is_in_it(server: LiveServer) -> None:
    debian = server.call("iso/create", INSTALLER)["vid"]
    drivers = server.call("iso/create", TOOL)["vid"]
    other = server.call("iso/create", {**INSTALLER, "os_flavour": "fedora", "os_version": "41"})["vid"]
    disk = server.create(owner=NOBODY)
    assert set(server.listed(NOBODY)) == {debian, drivers, other, disk}
    assert set(server.listed(NOBODY, iso_type="os_generic")) == {debian, other}
    assert set(server.listed(NOBODY, os_flavour="debian", os_version="12.10")) == {debian}
    assert set(server.listed(NOBODY, scope="drivers", version="2021")) == {drivers}
    assert set(server.listed(NOBODY, os_family="windows", os_flavour="debian")) == set()
    query = f"accessible?client_uid={NOBODY}&os_flavour=fedora"
    assert [volume["volumeID"] for volume in server.http.get(query).json()] == [other]

    # Edited in place behind the server's back, the directory's mtime as it was.
    path = server.directory(other) / "isoinfo.json"
    before = os.stat(server.directory(other))
    path.write_text(json.dumps({"isotype": "os_generic", "os_family": "linux", "os_flavour": "arch"}))
    os.utime(server.directory(other), ns=(before.st_atime_ns, before.st_mtime_ns))
    eventually(lambda: set(server.listed(NOBODY, os_flavour="arch")) == {other})
    assert "os_version" not in server.info(other)
