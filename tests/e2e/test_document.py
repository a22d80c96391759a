"""The document's own examples, word for word."""

from pathlib import Path

from tests.live import LiveServer

NOBODY = "f" * 32

CREATE = {
    "creatorID": NOBODY,
    "name": "test-create",
    "private": False,
    "readonly": False,
    "shareable": False,
    "bootable": False,
    "clonable": False,
    "alg": "no",
    "format": "qcow2",
    "bus": "virtio",
    "size": 1,
}


def test_create_answers_as_the_document_shows(server: LiveServer) -> None:
    answer = server.call("create", CREATE)
    vid = answer.pop("vid")
    assert len(vid) == 32
    assert answer == {
        "alg": "no",
        "bootable": False,
        "bus": "virtio",
        "clonable": False,
        "creatorID": NOBODY,
        "img_format": "qcow2",
        "name": "test-create",
        "private": False,
        "readonly": False,
        "shareable": False,
        "size": 1,
    }


def test_accessible_and_info_answer_as_the_document_shows(server: LiveServer) -> None:
    vid = server.call("create", {**CREATE, "size": 4, "name": "test"})["vid"]
    (listed,) = server.call("accessible", {"client_uid": NOBODY})
    shown = {
        "volumeID": vid,
        "creatorID": NOBODY,
        "size": 4000000000,
        "name": "test",
        "format": "qcow2",
        "private": False,
        "bootable": False,
        "readonly": False,
        "shareable": False,
        "clonable": False,
        "alg": "no",
        "bus": "virtio",
        "cloudinit": False,
        "ceph": False,
        "exported": False,
    }
    assert {key: listed[key] for key in shown} == shown
    assert 0 < listed["sizeOnDisk"] <= 200704
    date, _, time = listed["lastUpdated"].partition(" ")
    assert len(date) == 10
    assert len(time) == len("23:34:07.1850")
    assert server.call("info", {"volume_id": vid}) == listed


def test_update_resize_convert_and_destroy_answer_as_the_document_shows(server: LiveServer) -> None:
    vid = server.call("create", CREATE)["vid"]
    body = {
        "vid": vid,
        "creatorID": NOBODY,
        "name": "test-update",
        "private": False,
        "readonly": False,
        "shareable": False,
        "bootable": False,
        "clonable": True,
        "alg": "cp",
        "bus": "sata",
    }
    assert server.call("update", body) == body
    body = {"vid": vid, "creatorID": NOBODY, "size": 10}
    assert server.call("update/resize", body) == body
    body = {"vid": vid, "creatorID": NOBODY, "format": "raw"}
    assert server.call("update/convert", body) == body
    assert server.info(vid)["size"] == 10**10
    assert server.call("destroy", {"volume_id": vid}) == {"vid": vid}
    assert server.post("info", {"volume_id": vid}).status_code == 404


def test_missing_key_is_answered_to_the_letter(server: LiveServer) -> None:
    response = server.post("create", {key: value for key, value in CREATE.items() if key != "name"})
    assert response.status_code == 400
    assert response.json()["error"] == "request was badly formatted. 'name'"
    response = server.post("info", {})
    assert (response.status_code, response.json()["error"]) == (400, "request was badly formatted. 'volume_id'")


def test_fault_of_the_server_returns_the_payload(server: LiveServer) -> None:
    """500 as the document shows it: the payload, and now also error, code and requestID."""
    vid = server.call("create", CREATE)["vid"]
    # Something no rule foresees: the volume directory holds a directory where the resized image belongs.
    data = server.directory(vid) / "data.qcow2"
    header = bytearray(data.read_bytes())
    header[40:48] = b"\xff" * 8  # the L1 table's offset: qemu-img refuses the image, the header's size is still good
    data.write_bytes(header)
    body = {"vid": vid, "creatorID": NOBODY, "size": 2}
    response = server.post("update/resize", body)
    assert response.status_code == 500
    answer = response.json()
    assert {key: answer[key] for key in body} == body
    assert answer["code"] == "tool-failed"
    assert answer["requestID"] == response.headers["x-request-id"]
    assert "data.qcow2" not in answer["error"]
    assert answer["requestID"] in server.log()
    assert server.info(vid)["size"] == 10**9
    assert not list(Path(server.directory(vid)).glob("elemento.*.ignore"))


def test_versions_slashes_and_routes(server: LiveServer) -> None:
    address = server.address.removesuffix("v1.0/")
    for version in ("v1.0", "v1"):
        assert server.http.get(f"{address}{version}/version/").status_code == 200
    for path in ("v2/version", "v1.0/nothing", "v1.0"):
        response = server.http.get(address + path)
        assert response.status_code == 404
        assert response.json()["code"] == "route-not-found"
    response = server.http.get("create")
    assert (response.status_code, response.json()["code"]) == (405, "method-not-allowed")
    assert response.headers["allow"] == "POST"
