"""Everything wrong that a caller can send: a clear 4xx, and nothing made."""

import json
from typing import Any

import pytest

from tests.live import ALICE, LiveServer

GOOD: dict[str, Any] = {"creatorID": ALICE, "name": "disk", "size": 0.001}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from tests.live import live_server  # noqa: PLC0415

    with live_server(tmp_path_factory.mktemp("bad")) as server:
        yield server


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"size": None}, "'size'"),
        ({"size": "1"}, "'size' is '1', it has to be a number"),
        ({"size": True}, "'size' is True, it has to be a number"),
        ({"size": -1}, "'size' is -1, it has to be a number greater than 0"),
        ({"size": 0}, "'size' is 0, it has to be a number greater than 0"),
        ({"size": -0.5}, "'size' is -0.5"),
        ({"size": 10**12}, "'size' is 1000000000000, it has to be a number greater than 0 and at most 9223372036"),
        ({"size": 10**40}, "'size' is"),
        ({"size": 1e300}, "'size' is 1e+300"),
        ({"size": []}, "'size' is list"),
        ({"format": "vmdk"}, "'format' is 'vmdk', it has to be one of raw, qcow2"),
        ({"format": 7}, "'format' is 7"),
        ({"format": "iso"}, "'format' is 'iso', it has to be one of raw, qcow2"),
        ({"bus": "usb"}, "'bus' is 'usb', it has to be one of virtio, scsi, sata, ide"),
        ({"alg": "dd"}, "'alg' is 'dd', it has to be one of cp, rclone, rsync, no"),
        ({"alg": "no", "clonable": True}, "'alg' is no and 'clonable' is true"),
        ({"bootable": True, "shareable": True}, "both 'bootable' and 'shareable'"),
        ({"private": "yes"}, "'private' is 'yes', it has to be true or false"),
        ({"private": 1}, "'private' is 1, it has to be true or false"),
        ({"name": 5}, "'name' is 5, it has to be a text"),
        ({"name": "x" * 10_240}, "'name' is"),
        ({"name": "é" * 4000}, "'name' has to be a text of at most 4096 bytes"),
        ({"name": "a\0b"}, "'name' contains a NUL character"),
        ({"creatorID": "alice"}, "'creatorID' is 'alice', it has to be 32 hex digits"),
        ({"creatorID": "../../etc/passwd"}, "'creatorID' is"),
        ({"creatorID": 12}, "'creatorID' is 12"),
        ({"preallocation": "metadata"}, "'preallocation' of a raw volume is one of falloc, full, off"),
        ({"preallocation": "some"}, "'preallocation' is 'some'"),
    ],
)
def test_create_refuses(shared: LiveServer, changes: dict[str, Any], told: str) -> None:
    response = shared.post("create", {**GOOD, **changes})
    assert response.status_code == 400
    answer = response.json()
    assert answer["error"].startswith("request was badly formatted. ")
    assert told in answer["error"]
    assert answer["code"] in ("missing-key", "invalid-value")
    assert shared.listed() == {}


@pytest.mark.parametrize(
    "name", ["with/slash", "../..", "emoji 💾🚀", "new\nline", " ", "", "vid.x.elimg", "-rf", "é" * 2048]
)
def test_names_are_kept(shared: LiveServer, name: str) -> None:
    vid = shared.create(name=name)
    assert shared.info(vid)["name"] == name
    assert json.loads((shared.directory(vid) / "meta.json").read_text())["name"] == name
    shared.call("destroy", {"volume_id": vid})


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"not json", 400, "not-json"),
        (b"[]", 400, "not-json"),
        (b'"text"', 400, "not-json"),
        (b"null", 400, "not-json"),
        (b"{", 400, "not-json"),
        (b'{"size": NaN}', 400, "not-json"),
        (b'{"size": Infinity}', 400, "not-json"),
        (b'{"a": "\xff\xfe"}', 400, "not-json"),
        (b'{"a": "\\ud800"}', 400, "not-json"),
        (b"[" * 100_000, 400, "not-json"),
        (b'{"a":' * 50_000 + b"1" + b"}" * 50_000, 400, "not-json"),
        (b"", 400, "missing-key"),
        (b"{}", 400, "missing-key"),
        (b" " * 2_000_000, 413, "body-too-large"),
    ],
)
def test_bodies(shared: LiveServer, body: bytes, status: int, code: str) -> None:
    response = shared.http.post("create", content=body, headers={"Content-Type": "application/json"})
    assert (response.status_code, response.json()["code"]) == (status, code)


def test_body_of_100_megabytes_is_refused_without_being_read(shared: LiveServer) -> None:
    def endless() -> Any:
        for _ in range(100):
            yield b" " * 1_000_000

    try:
        response = shared.http.post("create", content=endless(), headers={"Content-Type": "application/json"})
    except OSError:
        return  # the server closed the connection in the middle: also a refusal
    except Exception as error:
        assert "WriteError" in type(error).__name__ or "Protocol" in type(error).__name__
        return
    assert response.status_code == 413


def test_content_type(shared: LiveServer) -> None:
    response = shared.http.post("create", content=b"a=1", headers={"Content-Type": "application/x-www-form-urlencoded"})
    assert (response.status_code, response.json()["code"]) == (415, "unsupported-media-type")
    response = shared.http.post("has", content=json.dumps({"volume_id": "0" * 32}))
    assert response.status_code == 200, "no Content-Type at all is fine"


@pytest.mark.parametrize("volume_id", ["..", "../disk", "a/b", "", "g" * 32, "a" * 31, "a" * 33, "💾" * 32, "%2e%2e"])
@pytest.mark.parametrize("call", ["info", "destroy", "restore", "has"])
def test_ids_that_are_not_ids(shared: LiveServer, call: str, volume_id: str) -> None:
    response = shared.post(call, {"volume_id": volume_id})
    assert response.status_code == 400
    assert "'volume_id' is" in response.json()["error"]


def test_ids_are_normalised(shared: LiveServer) -> None:
    vid = shared.create(owner="AAAAAAAA-AAAA-AAAA-AAAA-AAAAAAAAAAAA")
    dashed = f"{vid[:8]}-{vid[8:12]}-{vid[12:16]}-{vid[16:20]}-{vid[20:]}".upper()
    assert shared.info(dashed)["creatorID"] == ALICE
    shared.call("destroy", {"vid": dashed})


def test_unknown_keys_are_named_and_ignored(shared: LiveServer) -> None:
    response = shared.post("create", {**GOOD, "servers": [], "ünï\r\nX-Evil: 1": 1})
    assert response.status_code == 200
    named = response.headers["x-ignored-keys"]
    assert named.startswith("servers, ")
    assert "\n" not in named
    assert "x-evil" not in response.headers
    shared.call("destroy", {"volume_id": response.json()["vid"]})


def test_null_is_an_absent_key(shared: LiveServer) -> None:
    response = shared.post("create", {**GOOD, "name": None})
    assert response.json()["error"] == "request was badly formatted. 'name'"
    response = shared.post("create", {**GOOD, "format": None})
    assert response.json()["img_format"] == "raw"
    shared.call("destroy", {"volume_id": response.json()["vid"]})


def test_reading_calls_answer_get(shared: LiveServer) -> None:
    vid = shared.create(name="x y", format="qcow2")
    for query in ({"client_uid": ALICE}, {"client_uid": ALICE, "name": "x y", "format": "qcow2", "limit": "5"}):
        assert [v["volumeID"] for v in shared.http.get("accessible", params=query).json()] == [vid]
    assert shared.http.get("info", params={"volume_id": vid}).json() == shared.info(vid)
    assert shared.http.get("cancreate", params={"size": "1"}).json()["cancreate"] is True
    assert shared.http.get("accessible", params={"client_uid": ALICE, "limit": "x"}).status_code == 400
    shared.call("destroy", {"volume_id": vid})


@pytest.mark.parametrize(
    ("query", "key"),
    [
        ({"limit": 0}, "limit"),
        ({"limit": 10_001}, "limit"),
        ({"sort": "price"}, "sort"),
        ({"cursor": "rubbish"}, "cursor"),
        ({"cursor": "W10"}, "cursor"),
        ({"include_locked": "yes"}, "include_locked"),
    ],
)
def test_listing_refuses(shared: LiveServer, query: dict[str, Any], key: str) -> None:
    response = shared.post("accessible", {"client_uid": ALICE, **query})
    assert response.status_code == 400
    assert response.json()["key"] == key
