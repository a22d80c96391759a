"""The gateway's two faces in front of two servers: who is served, what is merged, and what happens without answers."""

import base64
import contextlib
import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.gateway import (
    OTHER_PASSWORD,
    OTHER_USER,
    PASSWORD,
    USER,
    Gateway,
    live_gateway,
    server_tables,
    url_of,
    user_tables,
)
from tests.live import ALICE, BINARY, BOB, LiveServer, free_port, live_server
from tests.web import Page, Web

NOBODY = 65534


@dataclass
class Site:
    one: LiveServer
    two: LiveServer
    gateway: Gateway


@pytest.fixture(scope="module")
def module_site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    flags = ("--download-allow", "127.0.0.0/8")
    with (
        live_server(tmp_path_factory.mktemp("one"), *flags) as one,
        live_server(tmp_path_factory.mktemp("two"), *flags) as two,
    ):
        tables = f"{server_tables(one=url_of(one), two=url_of(two))}\n{user_tables()}"
        head = 'patience = 1.0\nwork-patience = 2.0\norigins = ["app://electros"]'
        with live_gateway(tmp_path_factory.mktemp("gateway"), tables, head=head) as gateway:
            yield Site(one, two, gateway)


@pytest.fixture
def site(module_site: Site) -> Site:
    module_site.gateway.log_in()
    return module_site


@contextlib.contextmanager
def stopped(server: LiveServer) -> Iterator[None]:
    """The server hangs: it is connected to, and answers nothing."""
    assert server.process is not None
    server.process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        server.process.send_signal(signal.SIGCONT)


# -- logging in ------------------------------------------------------------------------------------------------


def test_the_login_face(site: Site) -> None:
    login = site.gateway.login
    assert login.post("logout").json() == {"authenticated": False}
    status = login.get("status")
    assert (status.status_code, status.json()["authenticated"]) == (401, False)
    assert site.gateway.post("info", {"volume_id": "0" * 32}).json()["code"] == "unauthenticated"
    for username, password in ((USER, OTHER_PASSWORD), ("nobody@example.org", PASSWORD)):
        refused = site.gateway.log_in(username, password)
        assert (refused.status_code, refused.json()["error"]) == (401, "the name or the password is wrong")
    assert login.post("login", json={"username": USER}).json()["code"] == "missing-key"
    assert login.get("login", params={"username": USER, "password": PASSWORD}).status_code == 405
    told = site.gateway.log_in()
    assert (told.status_code, told.json()) == (200, {"authenticated": True, "username": USER})
    assert login.get("status").json() == {"authenticated": True, "username": USER}
    assert login.get("license/list").status_code == 404
    for client in (site.gateway.client, login):
        assert httpx.get(f"http://{client.base_url.netloc.decode()}/").json()["status"] in ("ok", "degraded")
    assert PASSWORD not in site.gateway.log()


def test_guessing_takes_longer_and_longer(site: Site) -> None:
    told = [site.gateway.log_in(USER, "guess") for _ in range(4)]
    assert [one.status_code for one in told] == [401, 401, 401, 429]
    assert told[-1].json()["code"] == "too-many-attempts"
    time.sleep(float(told[-1].headers["retry-after"]))
    assert site.gateway.log_in().status_code == 200


def test_a_login_outlives_the_gateway(site: Site) -> None:
    site.gateway.stop()
    site.gateway.start()
    assert site.gateway.client.get("accessible").status_code == 200


def as_nobody(code: str) -> str:
    """What the code prints, run by another account of this machine."""
    argv = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "/usr/bin/python3", "-c", code]
    return subprocess.run(argv, capture_output=True, text=True, check=True, timeout=30, cwd="/").stdout.strip()


def test_another_account_of_the_machine_is_not_who_logged_in(site: Site) -> None:
    url = str(site.gateway.client.base_url.join("accessible"))
    ask = (
        "import urllib.request, urllib.error\n"
        f"try: print(urllib.request.urlopen({url!r}).status)\n"
        "except urllib.error.HTTPError as error: print(error.code)"
    )
    assert as_nobody(ask) == "401"
    # Nor is one that hangs up at once: its socket then belongs to nobody, which the kernel writes as account 0.
    vid = site.one.create("stays")
    body = json.dumps({"volume_id": vid})
    request = (
        f"POST /api/v1.0/client/volume/destroy HTTP/1.1\\r\\nHost: 127.0.0.1\\r\\n"
        f"Content-Type: application/json\\r\\nContent-Length: {len(body)}\\r\\n\\r\\n{body}"
    )
    hang_up = (
        "import socket\n"
        "for _ in range(30):\n"
        f"    with socket.create_connection(('127.0.0.1', {site.gateway.client_port})) as one:\n"
        f"        one.sendall(b'{request}')"
    )
    as_nobody(hang_up)
    site.gateway.volumes()
    assert site.one.info(vid)["name"] == "stays"
    assert os.geteuid() == 0  # else the test would prove nothing


def test_pages_of_other_sites_are_refused(site: Site) -> None:
    foreign = site.gateway.client.get("accessible", headers={"Origin": "https://example.org"})
    assert foreign.json()["code"] == "forbidden"
    rebound = site.gateway.client.get("accessible", headers={"Host": "example.org"})
    assert rebound.json()["code"] == "forbidden"
    ours = {"Origin": "app://electros", "Sec-Fetch-Site": "cross-site"}
    allowed = site.gateway.client.get("accessible", headers=ours)
    assert (allowed.status_code, allowed.headers["access-control-allow-origin"]) == (200, "app://electros")
    before = site.gateway.client.options("create", headers=ours)
    assert (before.status_code, before.headers["access-control-allow-methods"]) == (200, "GET, POST")
    assert site.gateway.client.post("create", content=b"x", headers={"Content-Type": "text/plain"}).status_code == 415


def test_the_user_is_the_client_whatever_the_request_says(site: Site) -> None:
    for key in ("creatorID", "client_uid"):
        refused = site.gateway.post("create", {"name": "x", "size": 0.001, key: BOB})
        assert (refused.status_code, refused.json()["code"]) == (403, "forbidden")
    secret = site.two.create("secret", owner=BOB, private=True)
    assert secret not in site.gateway.volumes()
    for call in ("info", "destroy", "update", "update/resize"):
        told = site.gateway.post(call, {"vid": secret, "size": 1})
        assert (told.status_code, told.json()["code"]) == (404, "volume-not-found"), call
    assert site.gateway.call("has", {"volume_id": secret}) == {"has": False, "volume_id": secret}
    site.gateway.log_in(OTHER_USER, OTHER_PASSWORD)
    assert site.gateway.volumes()[secret]["own"] is True
    assert site.gateway.call("destroy", {"volume_id": secret})["vid"] == secret


# -- volumes ---------------------------------------------------------------------------------------------------


def test_what_the_vendors_clients_look_at(site: Site) -> None:
    made = site.gateway.call("create", {"name": "seen", "size": 0.001, "shareable": False})
    vid = made["vid"]
    assert (made["serverurl"], made["creatorID"]) == (url_of(site.one), ALICE)
    foreign = site.two.create("foreign", owner=BOB)
    seen = site.gateway.volumes()
    place = {"nservers": 1, "servers": [f"127.0.0.1:{site.one.port}"], "server": f"127.0.0.1:{site.one.port}"}
    assert seen[vid] == {**site.one.info(vid), **place, "own": True, "serverurl": url_of(site.one)}
    assert (seen[foreign]["own"], seen[foreign]["serverurl"]) == (False, url_of(site.two))
    told = site.gateway.call("info", {"volume_id": vid})
    assert told.pop("volume") == told == seen[vid]
    dashed = f"{vid[:8]}-{vid[8:12]}-{vid[12:16]}-{vid[16:20]}-{vid[20:]}"
    assert site.gateway.call("info/", {"volume_id": dashed})["volumeID"] == vid
    assert vid not in site.gateway.client.get("accessible", params={"name": "x*"}).text
    changed = site.gateway.call("update", {"vid": vid, "name": "other"})
    assert changed["name"] == site.one.info(vid)["name"] == "other"
    assert site.gateway.call("update/resize", {"vid": vid, "size": 0.002})["size"] == 0.002
    assert site.gateway.call("update/convert", {"vid": vid, "format": "qcow2"})["format"] == "qcow2"
    assert site.one.info(vid)["format"] == "qcow2"
    refused = site.gateway.post("update/resize", {"vid": vid, "size": 0.001})
    assert (refused.status_code, refused.json()["code"]) == (409, "cannot-shrink")
    assert site.gateway.call("delete", {"volume_id": vid})["vid"] == vid
    assert site.gateway.post("info", {"volume_id": vid}).status_code == 404


def test_room(site: Site) -> None:
    for size in (1, "1", 0.5):
        assert site.gateway.post("cancreate", {"size": size}).text == "2"
    assert site.gateway.client.get("cancreate", params={"size": "1000000"}).text == "0"
    assert site.gateway.post("cancreate", {"size": "much"}).json()["code"] == "invalid-value"
    assert site.gateway.post("cancreate").json()["code"] == "missing-key"
    full = site.gateway.post("create", {"name": "x", "size": 1000000})
    assert (full.status_code, full.json()["code"]) == (507, "no-room")
    on_two = site.gateway.call("create", {"name": "x", "size": 0.001, "server": "two"})
    assert on_two["serverurl"] == url_of(site.two)
    assert site.gateway.post("create", {"name": "x", "size": 1, "server": "three"}).json()["key"] == "server"


def test_one_key_makes_one_volume(site: Site) -> None:
    key = {"Idempotency-Key": "once-only"}
    made = [site.gateway.post("create", {"name": "x", "size": 0.001}, **key).json()["vid"] for _ in range(2)]
    assert made[0] == made[1]


def test_iso_and_cloud_images(site: Site) -> None:
    iso = {"name": "debian", "isotype": "os_generic", "os_family": "linux", "os_flavour": "debian"}
    made = site.gateway.call("iso/create/", {**iso, "os_version": "12.10", "size": 0.01})
    assert site.gateway.volumes()[made["vid"]]["iso_type"] == "os_generic"
    with contextlib.closing(Web()) as web:
        web.pages["/cloud.img"] = Page(bytes(1 << 20))
        url = f"{web.address}/cloud.img"
        cloud = site.gateway.call("cloudinit/create", {"name": "cloud", "url": url, "size": 0.01, "format": "qcow2"})
        assert (cloud["img_format"], site.gateway.volumes()[cloud["vid"]]["cloudinit"]) == ("qcow2", True)
        missing = site.gateway.post("cloudinit/create", {"name": "cloud", "url": f"{url}.not", "source_format": "raw"})
        assert (missing.status_code, missing.json()["code"]) == (502, "download-failed")


def test_metadata_as_the_published_clients_send_it(site: Site) -> None:
    def send(values: dict[str, Any], **files: str) -> httpx.Response:
        encoded = base64.b64encode(json.dumps(values).encode()).decode()
        parts = [("file", (name.replace("_", "-"), text.encode())) for name, text in files.items()]
        return site.gateway.client.post(f"cloudinit/metadata/{encoded}", files=parts)

    first = {"name": "web-1-cloudinit", "expectedFiles": 2, "private": False, "bootable": False}
    made = send({**first, "clonable": True, "alg": "cp"}, user_data="#cloud-config\n")
    assert made.status_code == 200, made.text
    vid = made.json()["vid"]
    assert send({"vid": vid}, meta_data="instance-id: x\n").status_code == 200
    assert site.gateway.volumes()[vid]["format"] == "iso"
    plain = site.gateway.call("cloudinit/metadata", {**first, "name": "other"})["vid"]
    assert send({"vid": plain}, meta_data="instance-id: x\n").status_code == 206
    assert send({"vid": "1" * 32}, meta_data="x").status_code == 404
    assert site.gateway.client.post("cloudinit/metadata/%%%").json()["code"] == "not-json"


def test_the_same_volume_on_two_servers(site: Site) -> None:
    vid = site.one.create("twice")
    copy = site.two.root / "disk" / f"vid.{vid}.elimg"
    subprocess.run(["cp", "-a", site.one.directory(vid), copy], check=True)
    site.two.call("rescan")
    both = site.gateway.volumes()[vid]
    assert (both["nservers"], both["serverurl"]) == (2, url_of(site.one))
    assert both["servers"] == [f"127.0.0.1:{one.port}" for one in (site.one, site.two)]
    assert site.gateway.call("info", {"volume_id": vid, "server": "two"})["nservers"] == 1
    assert site.gateway.call("destroy", {"volume_id": vid})["serverurl"] == url_of(site.one)
    assert site.gateway.volumes()[vid]["serverurl"] == url_of(site.two)
    assert site.gateway.call("destroy", {"volume_id": vid})["serverurl"] == url_of(site.two)
    assert vid not in site.gateway.volumes()


# -- servers that do not answer --------------------------------------------------------------------------------


def test_a_server_that_hangs_holds_nothing_longer_than_the_patience(site: Site) -> None:
    here, there = site.one.create("here"), site.two.create("there")
    with stopped(site.two):
        begun = time.monotonic()
        told = site.gateway.client.get("accessible")
        assert time.monotonic() - begun < 1.0 + 0.8
        assert told.headers["x-silent-servers"] == "two: no answer within 1 s"
        assert {here} == {one["volumeID"] for one in told.json()} & {here, there}
        assert site.gateway.call("info", {"volume_id": here})["silent"] == {"two": "no answer within 1 s"}
        unknown = site.gateway.post("info", {"volume_id": there})
        assert (unknown.status_code, unknown.json()["code"]) == (503, "servers-silent")
        assert unknown.json()["silent"] == {"two": "no answer within 1 s"}
        health = httpx.get(f"http://127.0.0.1:{site.gateway.client_port}/").json()
        assert health == {"status": "degraded", "servers": 2, "silent": 1}
        servers = {one["name"]: one["answers"] for one in site.gateway.client.get("servers").json()}
        assert servers == {"one": True, "two": False}
        with stopped(site.one):
            nobody = site.gateway.client.get("accessible")
            assert (nobody.status_code, set(nobody.json()["silent"])) == (503, {"one", "two"})
    assert site.gateway.client.get("accessible").headers.get("x-silent-servers") is None
    for server, vid in ((site.one, here), (site.two, there)):
        assert site.gateway.call("destroy", {"volume_id": vid})["serverurl"] == url_of(server)


class Breaking:
    """In front of a server: lets everything through, but hangs up instead of giving the answers to ``creates``."""

    def __init__(self, server: LiveServer) -> None:
        self.port = free_port()
        self.lost = 0
        self.keeps = 0
        breaking = self

        def serve() -> None:
            with socket.create_server(("127.0.0.1", breaking.port)) as listener:
                breaking.ready.set()
                while True:
                    connection, _ = listener.accept()
                    if breaking.over.is_set():
                        connection.close()
                        return
                    threading.Thread(target=pass_on, args=(connection,), daemon=True).start()

        def pass_on(connection: socket.socket) -> None:
            with connection, httpx.Client() as client:
                while request := connection.recv(1 << 16):
                    head, _, body = request.partition(b"\r\n\r\n")
                    lines = head.decode().splitlines()
                    method, path, _ = lines[0].split()
                    names = ("content-type", "idempotency-key")
                    headers = dict(one.split(": ", 1) for one in lines[1:] if one.split(":")[0].lower() in names)
                    wanted = int(next((x[16:] for x in lines if x.lower().startswith("content-length: ")), 0))
                    while len(body) < wanted:
                        body += connection.recv(1 << 16)
                    answer = client.request(method, url_of(server) + path, content=body, headers=headers)
                    if path.endswith("/create") and breaking.lost < breaking.keeps:
                        breaking.lost += 1
                        return
                    connection.sendall(
                        f"HTTP/1.1 {answer.status_code} X\r\nContent-Length: {len(answer.content)}\r\n\r\n".encode()
                        + answer.content
                    )

        self.ready, self.over = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=serve, daemon=True)
        self._thread.start()
        assert self.ready.wait(10)

    def close(self) -> None:
        self.over.set()
        socket.create_connection(("127.0.0.1", self.port)).close()
        self._thread.join(10)


def test_an_answer_that_gets_lost_makes_no_second_volume(site: Site, tmp_path: Path) -> None:
    with contextlib.closing(Breaking(site.one)) as breaking:
        tables = f"{server_tables(first=f'http://127.0.0.1:{breaking.port}', second=url_of(site.two))}\n{user_tables()}"
        with live_gateway(tmp_path, tables) as gateway:
            gateway.log_in()
            before = set(gateway.volumes())
            breaking.keeps = 1
            vid = gateway.call("create", {"name": "once", "size": 0.001})["vid"]
            assert set(gateway.volumes()) - before == {vid}
            # Twice lost: what came of it is unknown, and it is not tried elsewhere.
            breaking.keeps = 3
            lost = gateway.post("create", {"name": "perhaps", "size": 0.001})
            assert (lost.status_code, lost.json()["code"]) == (503, "unavailable")
            assert "it may still do it" in lost.json()["error"]
            [made] = [one for one in gateway.volumes().values() if one["name"] == "perhaps"]
            assert made["nservers"] == 1


def test_a_server_that_is_not_there_is_passed_over(site: Site, tmp_path: Path) -> None:
    tables = f"{server_tables(gone=f'http://127.0.0.1:{free_port()}', one=url_of(site.one))}\n{user_tables()}"
    with live_gateway(tmp_path, tables) as gateway:
        gateway.log_in()
        made = gateway.call("create", {"name": "x", "size": 0.001})
        assert (made["serverurl"], list(made["silent"])) == (url_of(site.one), ["gone"])
        assert gateway.post("cancreate", {"size": 1}).text == "1"


# -- configuration ---------------------------------------------------------------------------------------------


def test_nobody_else_may_listen_where_localhost_leads(site: Site) -> None:
    port = free_port()
    with socket.create_server(("::1", port), family=socket.AF_INET6):
        text = site.gateway.configuration.read_text()
        own = site.gateway.directory / "other.toml"
        own.write_text(text.replace(str(site.gateway.client_port), str(port)))
        own.chmod(0o600)
        told = subprocess.run(
            [BINARY, "gateway", "--config", own], capture_output=True, text=True, timeout=30, check=False
        )
        assert (told.returncode, "somebody else listens there" in told.stderr) == (3, True), told


def test_a_password_is_hashed_for_the_configuration(site: Site) -> None:
    made = subprocess.run(
        [BINARY, "gateway", "password"], input="a new secret\n", capture_output=True, text=True, timeout=30, check=True
    )
    assert made.stdout.startswith("scrypt$")
    short = subprocess.run(
        [BINARY, "gateway", "password"], input="short\n", capture_output=True, text=True, timeout=30, check=False
    )
    assert short.returncode == 2
