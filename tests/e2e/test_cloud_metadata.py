"""cloudinit/metadata as published clients speak it, with curl and with httpx, and everything wrong with it."""

import base64
import json
import os
import shutil
import subprocess
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.clients import eventually
from tests.e2e.invariants import assert_clean
from tests.exporting import unexport_everything
from tests.live import ALICE, BOB, LiveServer, live_server, make_location
from tests.unit.support import small_file_system

USER = b"#cloud-config\nhostname: one\n"
META = b"instance-id: i-1\n"
NETWORK = b"version: 2\n"
FIRST: dict[str, Any] = {
    "creatorID": ALICE,
    "name": "seed",
    "expectedFiles": 3,
    "private": False,
    "bootable": False,
    "clonable": True,
    "alg": "cp",
}


def encoded(values: dict[str, Any], *, url_safe: bool = False, padded: bool = True) -> str:
    text = json.dumps(values).encode()
    result = (base64.urlsafe_b64encode if url_safe else base64.b64encode)(text).decode()
    return result if padded else result.rstrip("=")


def first(server: LiveServer, **changes: Any) -> str:
    return str(server.call("cloudinit/metadata", {**FIRST, **changes})["vid"])


def send(server: LiveServer, values: dict[str, Any], *files: tuple[str, bytes], **more: Any) -> httpx.Response:
    forms = [("file", (name, content)) for name, content in files]
    return server.http.post(f"cloudinit/metadata/{encoded(values)}", files=forms, **more)


def extracted(server: LiveServer, vid: str, into: Path) -> dict[str, bytes]:
    shutil.rmtree(into, ignore_errors=True)
    image = server.directory(vid) / "data.iso"
    subprocess.run(
        ["xorriso", "-osirrox", "on", "-indev", image, "-extract", "/", into], check=True, capture_output=True
    )
    return {path.name: path.read_bytes() for path in into.iterdir()}


def test_the_whole_protocol(running: LiveServer, tmp_path: Path) -> None:
    begun = running.post("cloudinit/metadata", FIRST)
    assert begun.status_code == 200
    vid = begun.json()["vid"]
    volume = running.info(vid)
    assert (volume["format"], volume["cloudinit"], volume["readonly"], volume["bus"]) == ("iso", True, True, "virtio")
    assert (volume["waiting"], volume["sizeOnDisk"], volume["bootable"]) == (True, 0, False)
    refused = running.post("export", {"volume_id": vid, "client_uid": ALICE})
    assert (refused.status_code, refused.json()["code"]) == (409, "volume-waiting")
    assert "cloudinit/metadata" in refused.json()["error"]

    for number, (name, content) in enumerate((("user-data", USER), ("network-data", NETWORK)), start=1):
        answer = send(running, {"vid": vid}, (name, content))
        assert answer.status_code == 206
        told = answer.json()
        assert (told["vid"], told["received"], told["expected"], told["warnings"]) == (vid, number, 3, [])
        assert (running.directory(vid) / "cloud-init-metadata" / name).read_bytes() == content
    answer = send(running, {"vid": vid}, ("setup.sh", b"#!/bin/sh\n"))
    assert answer.status_code == 200
    assert answer.json()["files"] == ["network-data", "setup.sh", "user-data"]

    volume = running.info(vid)
    assert volume["waiting"] is False
    assert volume["size"] == (running.directory(vid) / "data.iso").stat().st_size < 10**6
    assert extracted(running, vid, tmp_path / "out") == {
        "user-data": USER,
        "network-config": NETWORK,
        "setup.sh": b"#!/bin/sh\n",
        "meta-data": f"instance-id: {vid}\n".encode(),
    }
    assert [one.name for one in (running.directory(vid) / "cloud-init-metadata").glob("elemento.*")] == [
        "elemento.3.expected"
    ]


def curl(server: LiveServer, path: str, *words: str) -> tuple[int, Any]:
    done = subprocess.run(
        ["curl", "-sS", "-w", "\n%{http_code}", "-X", "POST", f"{server.address}{path}", *words],
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    )
    body, _, status = done.stdout.rpartition("\n")
    return int(status), json.loads(body)


def test_with_curl(running: LiveServer, tmp_path: Path) -> None:
    files = {"user-data": USER, "meta-data": META, "network-data": NETWORK}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    status, answer = curl(running, f"cloudinit/metadata/{encoded(FIRST)}", "-F", f"file=@{tmp_path / 'user-data'}")
    assert (status, answer["received"], answer["expected"]) == (200, 1, 3)
    vid = answer["vid"]
    status, answer = curl(
        running,
        f"cloudinit/metadata/{encoded({'vid': vid}, url_safe=True, padded=False)}/",
        "-F",
        f"file=@{tmp_path / 'meta-data'}",
    )
    assert (status, answer["received"]) == (206, 2)
    status, answer = curl(
        running, "cloudinit/metadata", "-F", f'data={{"vid": "{vid}"}}', "-F", f"file=@{tmp_path / 'network-data'}"
    )
    assert (status, answer["received"]) == (200, 3)
    assert extracted(running, vid, tmp_path / "out")["meta-data"] == META


# 'ÿ>?~' in base64 has every character in which the alphabets differ.
@pytest.mark.parametrize("url_safe", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("quoted", [False, True])
def test_spellings_of_the_path(running: LiveServer, url_safe: bool, padded: bool, quoted: bool) -> None:
    values = {**FIRST, "name": "?>~ÿ>?~ ????>>>>"}
    text = base64.b64encode(json.dumps(values, ensure_ascii=False).encode()).decode()
    assert "/" in text
    assert "+" in text
    if url_safe:
        text = text.replace("+", "-").replace("/", "_")
    if not padded:
        text = text.rstrip("=")
    if quoted:
        text = text.replace("/", "%2F").replace("+", "%2B").replace("=", "%3D")
    answer = running.http.post(f"cloudinit/metadata/{text}")
    assert answer.status_code == 200, answer.text
    assert running.info(answer.json()["vid"])["name"] == values["name"]


def test_spellings_of_the_form(running: LiveServer) -> None:
    for data in (json.dumps({**FIRST, "expectedFiles": 1}), encoded({**FIRST, "expectedFiles": 1})):
        answer = running.http.post(
            "cloudinit/metadata", data={"data": data, "more": "x"}, files={"file": ("user-data", USER)}
        )
        assert answer.status_code == 200
        assert answer.headers["x-ignored-keys"] == "more"
        assert running.info(answer.json()["vid"])["waiting"] is False


def test_several_files_at_once(running: LiveServer) -> None:
    answer = send(running, FIRST, ("user-data", USER), ("meta-data", META))
    assert answer.json()["received"] == 2
    answer = send(running, {"vid": answer.json()["vid"]}, ("meta-data", META), ("network-data", NETWORK))
    assert (answer.status_code, answer.json()["received"]) == (200, 3)


def test_a_file_sent_again_replaces_it_but_not_while_exported(running: LiveServer, tmp_path: Path) -> None:
    vid = send(running, {**FIRST, "expectedFiles": 1}, ("user-data", USER)).json()["vid"]
    exported = running.call("export", {"volume_id": vid, "client_uid": BOB, "protocol": "nbd"})
    assert exported["readonly"] is True
    assert exported["size"] == running.info(vid)["size"]
    refused = send(running, {"vid": vid}, ("user-data", b"#cloud-config\nhostname: two\n"))
    assert (refused.status_code, refused.json()["code"]) == (409, "volume-exported")
    unexport_everything(running)
    answer = send(running, {"vid": vid}, ("user-data", b"#cloud-config\nhostname: two\n"))
    assert answer.status_code == 200
    assert extracted(running, vid, tmp_path / "out")["user-data"] == b"#cloud-config\nhostname: two\n"
    # Changed by hand on the host, it goes in with whatever is sent next.
    (running.directory(vid) / "cloud-init-metadata" / "script_a.sh").write_text("#!/bin/sh\n")
    assert send(running, {"vid": vid}, ("user-data", USER)).status_code == 200
    assert extracted(running, vid, tmp_path / "out")["script_a.sh"] == b"#!/bin/sh\n"


def test_what_cloud_init_would_not_take_is_a_warning(running: LiveServer) -> None:
    answer = send(running, {**FIRST, "expectedFiles": 2}, ("user-data", b"hostname: [\n"))
    assert answer.status_code == 200
    assert [warning.partition(" ")[0] for warning in answer.json()["warnings"]] == ["user-data", "user-data"]
    answer = send(running, {"vid": answer.json()["vid"]}, ("meta-data", b"x: 1\n"))
    assert "no instance-id" in answer.json()["warnings"][0]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"creatorID": None}, "'creatorID'"),
        ({"name": None}, "'name'"),
        ({"expectedFiles": None}, "'expectedFiles'"),
        ({"expectedFiles": 0}, "'expectedFiles' is 0, it has to be a whole number from 1 to 64"),
        ({"expectedFiles": 65}, "'expectedFiles' is 65"),
        ({"expectedFiles": "3"}, "'expectedFiles' is '3'"),
        ({"private": "yes"}, "'private' is 'yes'"),
        ({"alg": "no"}, "'alg' is no and 'clonable' is true"),
        ({"name": "a\0b"}, "'name' contains a NUL character"),
    ],
)
def test_a_first_call_that_is_wrong(running: LiveServer, changes: dict[str, Any], told: str) -> None:
    before = running.listed()
    response = running.post("cloudinit/metadata", {**FIRST, **changes})
    assert response.status_code == 400
    assert response.json()["error"].startswith(f"request was badly formatted. {told}")
    assert running.listed() == before


def test_files_that_are_wrong(running: LiveServer) -> None:
    vid = first(running, expectedFiles=2)
    for name in ("../user-data", "/etc/shadow", ".bashrc", "a" * 65, "a b", "elemento.1.expected", "é", "a\\b"):
        answer = send(running, {"vid": vid}, (name, USER))
        assert (answer.status_code, answer.json()["code"]) == (400, "invalid-value"), name
        assert "'file' has the name" in answer.json()["error"]
    answer = send(running, {"vid": vid}, ("user-data", b"x" * (4 * 2**20 + 1)))
    assert (answer.status_code, answer.json()["code"]) == (413, "body-too-large")
    answer = send(running, {"vid": vid}, ("user-data", b"x" * (5 * 2**20)))
    assert (answer.status_code, answer.json()["code"]) == (413, "body-too-large")
    answer = send(running, {"vid": vid}, ("user-data", USER), ("user-data", META))
    assert "is there twice" in answer.json()["error"]
    assert len(list((running.directory(vid) / "cloud-init-metadata").iterdir())) == 1
    for name in ("user-data", "meta-data"):
        send(running, {"vid": vid}, (name, META))
    answer = send(running, {"vid": vid}, ("one-more", USER))
    assert (answer.status_code, answer.json()["code"], answer.json()["expected"]) == (409, "too-many-files", 2)


def test_calls_that_are_wrong(running: LiveServer) -> None:
    vid = first(running)
    path = f"cloudinit/metadata/{encoded({'vid': vid})}"
    post = running.http.post
    form = {"file": ("user-data", USER)}
    for response, status, told in (
        (post(path), 400, "'file'"),
        (post("cloudinit/metadata", json={"vid": vid}), 400, "'file'"),
        (post(path, files={"other": ("user-data", USER)}), 400, "'file'"),
        (post(path, data={"file": "text"}, files={"x": ("a", b"")}), 400, "'file' has to be a file with a name"),
        (post("cloudinit/metadata", files=form), 400, "'creatorID'"),
        (post("cloudinit/metadata/%%%", files=form), 400, "what stands for the call's JSON is not base64"),
        (post("cloudinit/metadata/é", files=form), 400, "what stands for the call's JSON is not base64"),
        (post(f"cloudinit/metadata/{encoded({'vid': vid})[:-8]}", files=form), 400, "the body is not JSON"),
        (post("cloudinit/metadata/WzFd", files=form), 400, "the body is not a JSON object"),
        (post(path, content=b"x", headers={"Content-Type": "multipart/form-data"}), 400, "the form in the body"),
        (
            post(path, content=b"--x\r\nnonsense", headers={"Content-Type": "multipart/form-data; boundary=x"}),
            400,
            "the form in the body",
        ),
        (post("cloudinit/metadata", content=b"[]"), 400, "the body is not a JSON object"),
        (post(f"cloudinit/metadata/{encoded({'vid': 'nobody'})}", files=form), 400, "'vid' is 'nobody'"),
    ):
        assert response.status_code == status, response.text
        assert response.json()["error"].startswith(f"request was badly formatted. {told}"), response.text
    answer = post(path, content=b"x", headers={"Content-Type": "text/plain"})
    assert (answer.status_code, answer.json()["code"]) == (415, "unsupported-media-type")
    assert running.http.get(path).status_code == 405
    answer = send(running, {"vid": "9" * 32}, ("user-data", USER))
    assert (answer.status_code, answer.json()["code"]) == (404, "volume-not-found")
    answer = send(running, {"vid": running.create()}, ("user-data", USER))
    assert (answer.status_code, answer.json()["code"]) == (409, "conflict")
    assert not list((running.directory(vid) / "cloud-init-metadata").glob("[!e]*"))


def test_a_disk_that_is_full(tmp_path: Path) -> None:
    with small_file_system(tmp_path / "mnt" / "disk", 30) as disk:
        make_location(tmp_path / "mnt")
        with live_server(tmp_path) as server:
            vid = first(server, expectedFiles=2)
            assert send(server, {"vid": vid}, ("meta-data", META)).status_code == 206
            script = b"#!/bin/sh\n" + os.urandom(3 << 20)
            (disk / "filler").write_bytes(bytes(28 << 20))
            refused = send(server, {"vid": vid}, ("script.sh", script))
            assert (refused.status_code, refused.json()["code"]) == (507, "no-room")
            assert_clean(server)
            (disk / "filler").unlink()
            assert send(server, {"vid": vid}, ("script.sh", script)).status_code == 200
            assert extracted(server, vid, tmp_path / "seed")["script.sh"] == script
            assert_clean(server)


def test_only_the_owner(running: LiveServer) -> None:
    private = first(running, private=True)
    answer = send(running, {"vid": private, "creatorID": BOB}, ("user-data", USER))
    missing = send(running, {"vid": "9" * 32, "creatorID": BOB}, ("user-data", USER))
    assert answer.status_code == missing.status_code == 404
    assert answer.json()["error"].replace(private, "9" * 32) == missing.json()["error"]
    assert private not in running.listed(BOB)
    public = first(running)
    answer = send(running, {"vid": public, "creatorID": BOB}, ("user-data", USER))
    assert (answer.status_code, answer.json()["code"]) == (403, "not-owner")
    assert send(running, {"vid": private, "creatorID": ALICE}, ("user-data", USER)).status_code == 206


def test_the_same_key_makes_one_volume(running: LiveServer) -> None:
    headers = {"Idempotency-Key": "the-seed"}
    answers = [send(running, FIRST, ("user-data", USER), headers=headers) for _ in range(2)]
    assert answers[0].json() == answers[1].json()
    assert answers[1].headers["idempotency-replayed"] == "true"
    assert send(running, FIRST, ("user-data", META), headers=headers).status_code == 422


def test_two_servers_take_the_files_of_one_volume(running: LiveServer, tmp_path: Path) -> None:
    other = LiveServer(running.root, tmp_path / "other").start()
    try:
        vid = first(running, expectedFiles=8)
        statuses: list[int] = []

        def send_half(server: LiveServer, numbers: range) -> None:
            address = f"{server.address}cloudinit/metadata/{encoded({'vid': vid})}"
            for number in numbers:
                statuses.append(httpx.post(address, files={"file": (f"f{number}", b"x")}, timeout=60).status_code)

        halves = [
            threading.Thread(target=send_half, args=(server, range(start, 8, 2)))
            for start, server in enumerate((running, other))
        ]
        for half in halves:
            half.start()
        for half in halves:
            half.join()
        assert sorted(statuses) == [200] + [206] * 7
        assert set(extracted(running, vid, tmp_path / "out")) == {f"f{number}" for number in range(8)} | {
            "user-data",
            "meta-data",
        }
        size = (running.directory(vid) / "data.iso").stat().st_size
        eventually(lambda: running.info(vid)["size"] == other.info(vid)["size"] == size)
    finally:
        other.stop()
        other.http.close()


def test_files_of_the_vendors_server(tmp_path: Path) -> None:
    vid = "5" * 32
    with live_server(tmp_path) as server:
        directory = server.directory(vid)
        inside = directory / "cloud-init-metadata"
        inside.mkdir(parents=True)
        (directory / "meta.json").write_text(
            json.dumps({"creatorID": ALICE, "name": "seed", "format": "iso", "cloudinit": True})
        )
        (directory / "data.iso").write_bytes(b"x" * 40_960)
        (inside / "elemento.2.expected").touch()
        (inside / "user-data").write_bytes(USER)
        (inside / "meta-data").write_bytes(META)
        assert server.call("rescan")["odd"] == []
        assert server.info(vid)["waiting"] is False
        answer = send(server, {"vid": vid}, ("meta-data", META))
        assert (answer.status_code, answer.json()["received"]) == (200, 2)
        assert extracted(server, vid, tmp_path / "out") == {"user-data": USER, "meta-data": META}
        assert server.call("rescan")["differences"] == []
