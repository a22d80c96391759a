"""Uploads in one request: what is refused, what is left, and whose they are."""

import contextlib
import hashlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests import tus
from tests.clients import eventually
from tests.live import ALICE, LiveServer, live_server, make_location
from tests.unit.support import small_file_system

MIB = 1 << 20
DATA = os.urandom(MIB)
KEYS = {"creatorID": ALICE, "name": "disk"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """One server for all tests of this file."""
    with live_server(tmp_path_factory.mktemp("plain")) as one:
        yield one


@pytest.fixture(autouse=True)
def nothing_left(server: LiveServer) -> Iterator[None]:
    yield
    eventually(lambda: tus.places(server) == [], 5)


def put(server: LiveServer, data: bytes = DATA, path: str = "create/upload", **keys: Any) -> httpx.Response:
    return server.http.put(path, params={**KEYS, **keys}, content=data)


def test_a_volume_of_the_body(server: LiveServer) -> None:
    response = put(
        server, private="true", bus="scsi", size="0.002", checksum=f"sha256:{hashlib.sha256(DATA).hexdigest()}"
    )
    assert response.status_code == 200, response.text
    answer = response.json()
    assert set(answer) == {
        *("alg", "bootable", "bus", "clonable", "creatorID", "img_format", "name", "private", "readonly"),
        *("shareable", "size", "vid"),
    }
    assert (answer["private"], answer["bus"], answer["size"]) == (True, "scsi", 0.002000384)
    image = (server.directory(answer["vid"]) / "data.img").read_bytes()
    assert image == DATA + bytes(2_000_384 - MIB)


def test_a_form_whose_file_would_like_to_be_elsewhere(server: LiveServer) -> None:
    before = sorted(str(path) for path in server.root.parent.rglob("*") if "x.img" in path.name)
    for name in ("../../../../x.img", "/etc/x.img", "..\\x.img", "x.img\0", ""):
        response = server.http.post("create/upload", data={**KEYS, "odd": "1"}, files={"file": (name, DATA)})
        assert response.status_code == 200, response.text
        assert response.headers["X-Ignored-Keys"] == "odd"
        assert (server.directory(response.json()["vid"]) / "data.img").read_bytes() == DATA
    assert sorted(str(path) for path in server.root.parent.rglob("*") if "x.img" in path.name) == before


@pytest.mark.parametrize(
    ("keys", "key"),
    [
        ({"creatorID": "x"}, "creatorID"),
        ({"name": "x" * 5000}, "name"),
        ({"format": "vdi"}, "format"),
        ({"size": "zero"}, "size"),
        ({"checksum": "sha256:12"}, "checksum"),
    ],
)
def test_keys_that_are_wrong(server: LiveServer, keys: dict[str, Any], key: str) -> None:
    refused = put(server, **keys)
    assert (refused.status_code, refused.json()["key"]) == (400, key)
    form = server.http.post("create/upload", data={**KEYS, **keys}, files={"file": ("a", DATA)})
    assert (form.status_code, form.json()["key"]) == (400, key)


def test_keys_that_are_missing_or_forms_that_are_none(server: LiveServer) -> None:
    refused = server.http.put("create/upload", content=DATA)
    assert refused.json()["error"] == "request was badly formatted. 'creatorID'"
    for kind, body in (
        ("multipart/form-data", b"x"),
        ("multipart/form-data; boundary=x", b"y"),
        ("multipart/form-data; boundary=x", b"--x\r\n\r\n\r\n--x--\r\n"),
    ):
        refused = server.http.post("create/upload", params=KEYS, content=body, headers={"Content-Type": kind})
        assert refused.status_code == 400, refused.text
    assert server.http.get("create/upload").status_code == 405


def test_an_empty_body_is_no_image(server: LiveServer) -> None:
    assert put(server, b"").status_code == 400
    assert server.http.post("create/upload", data=KEYS, files={"file": ("a", b"")}).status_code == 400


def test_a_wrong_checksum_leaves_nothing(server: LiveServer) -> None:
    refused = put(server, checksum=f"sha512:{'0' * 128}")
    assert 400 <= refused.status_code < 500, refused.text
    before = server.listed()
    assert put(server, size="0").status_code == 400
    assert server.listed() == before


@pytest.mark.parametrize("form", [False, True])
def test_a_body_that_breaks_off_leaves_nothing(server: LiveServer, form: bool) -> None:
    before = server.listed()
    kind = "multipart/form-data; boundary=x" if form else "application/octet-stream"
    start = b'--x\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\n' if form else b""
    with socket.create_connection((server.listen_host, server.port), 10) as one:
        one.sendall(
            f"PUT /api/v1.0/create/upload?creatorID={ALICE}&name=broken HTTP/1.1\r\nHost: 127.0.0.1\r\n"
            f"Content-Type: {kind}\r\nContent-Length: {MIB}\r\n\r\n".encode()
            + start
            + DATA[:300_000]
        )
        eventually(lambda: tus.places(server) != [])
    eventually(lambda: tus.places(server) == [])
    assert server.listed() == before


def test_the_answer_need_not_wait_for_the_volume(server: LiveServer) -> None:
    begun = server.http.put("create/upload", params=KEYS, content=DATA, headers={"Prefer": "respond-async"})
    assert (begun.status_code, begun.headers["Preference-Applied"]) == (202, "respond-async")
    job = eventually(lambda: (j := server.http.get(f"jobs/{begun.json()['job']}").json())["state"] != "running" and j)
    assert job["state"] == "done"
    assert server.info(job["result"]["vid"])["size"] == MIB


def once(server: LiveServer, key: str, data: bytes, path: str = "create/upload", **more: str) -> httpx.Response:
    return server.http.put(path, params={**KEYS, **more}, content=data, headers={"Idempotency-Key": key})


def test_the_same_key_makes_one_volume(server: LiveServer) -> None:
    before = set(server.listed())
    first = once(server, "one", DATA)
    again = once(server, "one", DATA)
    assert (first.status_code, again.status_code) == (200, 200), again.text
    assert "Idempotency-Replayed" not in first.headers
    assert again.headers["Idempotency-Replayed"] == "true"
    assert again.json() == first.json()
    form = server.http.post("create/upload", data=KEYS, files={"file": ("x", DATA)}, headers={"Idempotency-Key": "one"})
    assert form.json() == first.json(), "the keys and the image count, not how they come"
    for other in (once(server, "one", DATA[:-1] + b"x"), once(server, "one", DATA, bus="scsi")):
        assert (other.status_code, other.json()["code"]) == (422, "idempotency-key-reused")
    assert set(server.listed()) == before | {first.json()["vid"]}
    assert once(server, "", DATA).status_code == 400


def test_a_key_of_what_failed_can_be_used_again(server: LiveServer) -> None:
    wrong = once(server, "later", DATA, checksum=f"sha256:{'0' * 64}")
    assert wrong.status_code == 409
    assert once(server, "later", DATA, checksum=f"sha256:{hashlib.sha256(DATA).hexdigest()}").status_code == 200


def test_a_key_with_a_job(server: LiveServer) -> None:
    headers = {"Idempotency-Key": "job", "Prefer": "respond-async"}
    begun = server.http.put("create/upload", params=KEYS, content=DATA, headers=headers)
    assert begun.status_code in (200, 202), begun.text
    if begun.status_code == 202:
        eventually(lambda: server.http.get(f"jobs/{begun.json()['job']}").json()["state"] == "done", 10)
    again = server.http.put("create/upload", params=KEYS, content=DATA, headers=headers)
    assert (again.status_code, again.headers["Idempotency-Replayed"]) == (200, "true")
    assert again.json()["vid"] in server.listed()


def test_a_key_over_a_crash(tmp_path: Path) -> None:
    with live_server(tmp_path, env={"ELEMENTO_STORAGE_FAULTPOINT": "kill:intake.tidied"}) as one:
        with pytest.raises(httpx.HTTPError):
            once(one, "crash", DATA)
        one.wait_dead()
        one.start()
        answer = once(one, "crash", DATA)
        assert answer.status_code == 200, answer.text
        assert list(one.listed()) == [answer.json()["vid"]]
        assert once(one, "crash", DATA).json() == answer.json()
        assert once(one, "crash", DATA + DATA).status_code == 422


def test_a_disk_that_fills_up(tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        stack.enter_context(small_file_system(tmp_path / "mnt" / "disk", 8))
        make_location(tmp_path / "mnt")
        server = stack.enter_context(live_server(tmp_path, "--overcommit", "0"))
        data = os.urandom(16 * MIB)
        form = server.http.post("create/upload", data=KEYS, files={"file": ("a", data)})
        for refused in (put(server, data), form):
            assert (refused.status_code, refused.json()["code"]) == (507, "no-room")
        assert tus.places(server) == []
        assert put(server, DATA).status_code == 200
