"""Tokens, roles, TLS, and what the server refuses to do without them."""

import json
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.live import ALICE, BINARY, BOB, CAROL, LiveServer, free_port, live_server, make_location


def cli(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([BINARY, *words], capture_output=True, text=True, check=False, timeout=30)


def make_token(state_dir: Path, client: str, *flags: str) -> dict[str, str]:
    made = cli("token", "create", client, "--json", "--state-dir", state_dir, *flags)
    assert made.returncode == 0, made.stderr
    token: dict[str, str] = json.loads(made.stdout)
    return token


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[LiveServer]:
    with live_server(tmp_path, "--auth", "tokens") as server:
        yield server


def bearer(token: dict[str, str]) -> dict[str, str]:
    return {"Authorization": f"Bearer {token['token']}"}


def test_every_call_wants_a_token(guarded: LiveServer) -> None:
    for headers in (
        {},
        {"Authorization": "Bearer nonsense"},
        {"Authorization": "Basic eDp5"},
        {"Authorization": "Bearer est_1_2"},
    ):
        for path in ("info", "accessible", "create", "health", "version", "jobs/x", "events", "metrics", "rescan"):
            method = "GET" if path in ("events", "metrics", "jobs/x") else "POST"
            response = guarded.http.request(method, path, headers=headers)
            assert (response.status_code, response.json()["code"]) == (401, "unauthenticated"), path
            assert response.headers["www-authenticate"] == "Bearer"


def test_a_user_is_the_client_of_the_token(guarded: LiveServer) -> None:
    alice = bearer(make_token(guarded.state_dir, ALICE))
    bob = bearer(make_token(guarded.state_dir, BOB))
    vid = guarded.call("create", {"name": "mine", "size": 0.001, "private": True}, **alice)["vid"]
    assert guarded.call("info", {"volume_id": vid}, **alice)["creatorID"] == ALICE
    other = {"creatorID": CAROL, "client_uid": CAROL, "volume_id": vid, "vid": vid, "name": "x", "size": 1}
    for call in ("create", "accessible", "info", "destroy", "update", "update/resize", "bin", "jobs", "revisions"):
        response = guarded.post(call, other, **alice)
        assert (response.status_code, response.json()["code"]) == (403, "forbidden"), call
    calls: dict[str, dict[str, Any]] = {
        "info": {},
        "destroy": {},
        "update": {"name": "x"},
        "update/resize": {"size": 1},
        "update/convert": {"format": "qcow2"},
        "transfer": {"newCreatorID": BOB},
        "restore": {},
    }
    for call, keys in calls.items():
        assert guarded.post(call, {"volume_id": vid, **keys}, **bob).status_code == 404, call
    assert guarded.call("accessible", {}, **bob) == []
    guarded.call("destroy", {"volume_id": vid}, **alice)
    assert guarded.call("bin", {}, **bob) == []
    assert len(guarded.call("bin", {}, **alice)) == 1


def test_only_admins_see_the_inside(guarded: LiveServer) -> None:
    user = bearer(make_token(guarded.state_dir, ALICE))
    admin = bearer(make_token(guarded.state_dir, CAROL, "--admin"))
    for path, method in (("locations", "POST"), ("rescan", "POST"), ("metrics", "GET")):
        assert guarded.http.request(method, path, headers=user).status_code == 403
        assert guarded.http.request(method, path, headers=admin).status_code == 200
    vid = guarded.call("create", {"name": "a", "size": 0.001, "private": True}, **user)["vid"]
    assert vid in [v["volumeID"] for v in guarded.call("accessible", {}, **admin)]
    assert guarded.call("accessible", {"client_uid": BOB}, **admin) == [], "an admin who names a client is that client"
    assert guarded.post("update", {"vid": vid, "creatorID": BOB, "name": "x"}, **admin).status_code == 404
    assert guarded.call("update", {"vid": vid, "name": "x"}, **admin)["name"] == "x"
    made = guarded.call("create", {"name": "b", "size": 0.001}, **admin)
    assert made["creatorID"] == CAROL
    assert guarded.call("create", {"name": "b", "size": 0.001, "creatorID": BOB}, **admin)["creatorID"] == BOB


def test_tokens_are_listed_without_secrets_and_revoked_at_once(guarded: LiveServer) -> None:
    token = make_token(guarded.state_dir, ALICE, "--note", "laptop")
    headers = bearer(token)
    assert guarded.post("health", **headers).status_code == 200
    listed = cli("token", "list", "--json", "--state-dir", guarded.state_dir)
    (row,) = json.loads(listed.stdout)
    assert (row["id"], row["client"], row["role"], row["note"]) == (token["id"], ALICE, "user", "laptop")
    secret = token["token"].split("_", 2)[2]
    kept = (guarded.state_dir / "tokens.json").read_text()
    assert secret not in listed.stdout + kept + guarded.log()
    assert (guarded.state_dir / "tokens.json").stat().st_mode & 0o077 == 0
    assert cli("token", "revoke", token["id"], "--state-dir", guarded.state_dir).returncode == 0
    assert guarded.post("health", **headers).status_code == 401
    again = cli("token", "revoke", token["id"], "--state-dir", guarded.state_dir)
    assert (again.returncode, "token list" in again.stderr) == (4, True)
    assert cli("token", "create", "alice", "--state-dir", guarded.state_dir).returncode == 2


@pytest.mark.parametrize("address", ["0.0.0.0", "::", "192.0.2.1", "storage.example"])
def test_refuses_other_addresses_without_tokens(tmp_path: Path, address: str) -> None:
    shown = f"[{address}]" if ":" in address else address
    refused = cli("serve", "--root", tmp_path, "--state-dir", tmp_path / "s", "--listen", f"{shown}:{free_port()}")
    assert refused.returncode == 3
    assert "trusted-network" in refused.stderr
    assert "--auth tokens" in refused.stderr


def test_trusted_network_in_so_many_words(tmp_path: Path) -> None:
    make_location(tmp_path / "mnt")
    server = LiveServer(tmp_path / "mnt", tmp_path / "state", "--auth", "trusted-network")
    server.start()
    assert server.create()
    server.stop()
    server.http.close()


def test_pages_of_other_sites_are_refused(server: LiveServer) -> None:
    def post(**headers: str) -> int:
        return server.post("health", **headers).status_code

    own = f"http://127.0.0.1:{server.port}"
    assert post() == 200
    assert post(Origin=own, Sec_Fetch_Site="same-origin") == 200
    assert post(Origin="https://evil.example", Sec_Fetch_Site="cross-site") == 403
    assert post(Origin="https://evil.example") == 403
    assert post(Origin="null") == 403
    assert post(Sec_Fetch_Site="same-site") == 403
    rebound = {"Host": f"evil.example:{server.port}"}
    assert post(Sec_Fetch_Site="same-origin", **rebound) == 403
    assert post(Origin=f"http://evil.example:{server.port}", **rebound) == 403
    assert server.http.get("version", headers=rebound).status_code == 403, "a browser's plain GET says nothing else"
    assert post(Host=f"localhost:{server.port}") == 200
    assert post(Host="[::1]:7772") == 200


def test_tls(tmp_path: Path) -> None:
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
         "-keyout", key, "-out", certificate, "-days", "2", "-subj", "/CN=localhost",
         "-addext", "subjectAltName=IP:127.0.0.1"],
        check=True, capture_output=True,
    )  # fmt: skip
    make_location(tmp_path / "mnt")
    flags = ("--tls-certificate", str(certificate), "--tls-key", str(key))
    server = LiveServer(tmp_path / "mnt", tmp_path / "state", *flags)
    server.http.close()
    server.start(wait=False)
    context = ssl.create_default_context(cafile=str(certificate))
    transport = httpx.HTTPTransport(verify=context, retries=10)
    with httpx.Client(transport=transport, base_url=f"https://127.0.0.1:{server.port}/api/v1.0/") as http:
        assert http.post("create", json={"creatorID": ALICE, "name": "x", "size": 1}).status_code == 200
    server.stop()
    server.http.close()
    refused = cli("serve", "--state-dir", tmp_path / "s", "--root", tmp_path, "--tls-certificate", certificate)
    assert refused.returncode == 3
    assert "tls-key" in refused.stderr
    refused = cli("serve", "--state-dir", tmp_path / "s", "--root", tmp_path, "--listen", f"127.0.0.1:{free_port()}",
                  "--tls-certificate", certificate, "--tls-key", tmp_path / "nothing")  # fmt: skip
    assert refused.returncode == 3


def test_events_of_a_user_token(guarded: LiveServer) -> None:
    alice = bearer(make_token(guarded.state_dir, ALICE))
    bob = bearer(make_token(guarded.state_dir, BOB))
    start = guarded.call("revisions", {}, **alice)["revision"]
    vid = guarded.call("create", {"name": "x", "size": 0.001, "private": True}, **alice)["vid"]
    changes: dict[str, Any] = guarded.call("revisions", {"since": start}, **bob)
    assert changes["changed"] == []
    assert guarded.call("revisions", {"since": start}, **alice)["changed"] == [vid]
    refused = guarded.http.get("events", params={"client_uid": ALICE}, headers=bob)
    assert refused.status_code == 403
