"""Tokens, TLS and discovery: the gateway talks to servers that prove who they are, and to no others."""

import json
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from elemento_storage.gateway.trust import parse_fingerprint
from tests.clients import eventually
from tests.gateway import Gateway, live_gateway, url_of, user_tables
from tests.live import ALICE, BINARY, LiveServer, live_server

NAME = "storage1.example.org"


@dataclass
class Secured:
    """A server that wants tokens and shows a certificate for NAME, which an authority signed."""

    server: LiveServer
    token: str
    authority: Path
    fingerprint: str

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.server.port}"


def openssl(*words: str | Path) -> None:
    subprocess.run(["openssl", *words], check=True, capture_output=True)


def make_certificate(directory: Path, name: str) -> tuple[Path, Path, Path]:
    """An authority, and a certificate and key that it signed."""
    new = ("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2")
    authority, key, certificate = (directory / f"{name}.{kind}.pem" for kind in ("ca", "key", "cert"))
    openssl(*new, "-keyout", directory / "ca.key", "-out", authority, "-subj", f"/CN=authority of {name}")
    openssl(
        *(*new, "-keyout", key, "-out", certificate, "-subj", f"/CN={name}", "-CA", authority),
        *("-CAkey", directory / "ca.key", "-addext", f"subjectAltName=DNS:{name}"),
        *("-addext", "basicConstraints=critical,CA:FALSE"),
    )
    return authority, certificate, key


def fingerprint_of(certificate: Path) -> str:
    told = subprocess.run(
        ["openssl", "x509", "-in", certificate, "-noout", "-fingerprint", "-sha256"],
        check=True,
        capture_output=True,
        text=True,
    )
    return "sha256:" + told.stdout.strip().partition("=")[2]


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    directory = tmp_path_factory.mktemp("secured")
    authority, certificate, key = make_certificate(directory, NAME)
    (directory / "mnt").mkdir()
    state = directory / "state"
    made = subprocess.run(
        [BINARY, "token", "create", ALICE, "--json", "--state-dir", state], check=True, capture_output=True, text=True
    )
    server = LiveServer(
        directory / "mnt",
        state,
        *("--auth", "tokens", "--announce", NAME),
        *("--tls-certificate", str(certificate), "--tls-key", str(key)),
    )
    (directory / "mnt" / "disk").mkdir()
    (directory / "mnt" / "disk" / "settings.json").write_text("{}")
    server.start(wait=False)
    eventually(lambda: "listening on" in server.log())
    yield Secured(server, json.loads(made.stdout)["token"], authority, fingerprint_of(certificate))
    server.stop()
    server.http.close()


def works(gateway: Gateway) -> bool:
    """Whether the user's token opens the server."""
    gateway.log_in()
    answer = gateway.post("create", {"name": "x", "size": 0.001})
    return answer.status_code == 200


def test_listed_servers_have_to_prove_who_they_are(secured: Secured, tmp_path: Path) -> None:
    strange_authority, strange, _ = make_certificate(tmp_path, "strange.example.org")
    ways = {
        "right": f'fingerprint = "{secured.fingerprint}"',
        "other-certificate": f'fingerprint = "{fingerprint_of(strange)}"',
        "other-authority": f'ca = "{strange_authority}"',
        # Signed by the right authority, but for another name than the address it is called by.
        "other-name": f'ca = "{secured.authority}"',
        "no-authority": "",
        "no-token": f'fingerprint = "{secured.fingerprint}"',
    }
    entries = "".join(f'[[server]]\nname = "{name}"\nurl = "{secured.url}"\n{how}\n' for name, how in ways.items())
    tokens = {name: secured.token for name in ways if name != "no-token"}
    with live_gateway(tmp_path, entries + user_tables(tokens)) as gateway:
        assert works(gateway)
        answer = gateway.client.get("accessible")
        assert {one["server"] for one in answer.json()} == {f"127.0.0.1:{secured.server.port}"}
        silent = {one["name"]: one["reason"] for one in gateway.client.get("servers").json() if not one["answers"]}
        assert set(silent) == set(ways) - {"right"}, silent
        assert "it answers 401" in silent["no-token"]
        assert "not the one in the configuration" in silent["other-certificate"]
        assert all(
            "CERTIFICATE_VERIFY_FAILED" in silent[one] for one in ("other-authority", "other-name", "no-authority")
        )
        assert secured.token not in gateway.log()


def test_a_token_never_travels_in_the_clear(secured: Secured, tmp_path: Path) -> None:
    entry = '[[server]]\nname = "one"\nurl = "http://192.0.2.77:7772"'
    configuration = tmp_path / "gateway.toml"
    configuration.write_text(f"{entry}\n{user_tables({'one': secured.token})}")
    configuration.chmod(0o600)
    told = subprocess.run([BINARY, "gateway", "--config", configuration], capture_output=True, text=True, check=False)
    assert (told.returncode, "would travel in the clear" in told.stderr) == (3, True), told
    configuration.chmod(0o644)
    told = subprocess.run([BINARY, "gateway", "--config", configuration], capture_output=True, text=True, check=False)
    assert (told.returncode, "chmod 600" in told.stderr) == (3, True), told


def test_discovered_servers_have_to_prove_who_they_are(secured: Secured, tmp_path: Path) -> None:
    """One gateway after the other, each with another idea of whom to believe; an impostor announces itself as well."""
    discovery = '[discovery]\nenabled = true\ninterfaces = ["127.0.0.1"]\n'
    authority = f'{discovery}ca = "{secured.authority}"\n{user_tables({NAME: secured.token})}'
    pinned = (
        f'{discovery}allow-plain = "127.0.0.0/8"\n[[server]]\nname = "pinned"\nfingerprint = "{secured.fingerprint}"\n'
        f"{user_tables({'pinned': secured.token})}"
    )
    with (
        live_server(tmp_path / "impostor", "--announce", f"{NAME}") as impostor,
        live_server(tmp_path / "open", "--announce", "open.example.org") as open_one,
    ):
        eventually(lambda: "announced as" in open_one.log() and "announced as" in impostor.log())
        with live_gateway(tmp_path / "gateway", authority) as gateway:
            gateway.log_in()
            eventually(lambda: f"found server {NAME} at {secured.url}" in gateway.log())
            eventually(lambda: gateway.log().count("and is not believed") >= 2)
            [server] = gateway.client.get("servers").json()
            assert (server["name"], server["url"], server["answers"]) == (NAME, secured.url, True)
            assert works(gateway)
            assert "allow-plain does not have its address" in gateway.log()

            gateway.stop()
            gateway.write(pinned)
            gateway.start()
            eventually(lambda: f"found server pinned at {secured.url}" in gateway.log())
            eventually(lambda: f"found server open.example.org at {url_of(open_one)}" in gateway.log())
            eventually(lambda: f"found server {NAME} at {url_of(impostor)}" in gateway.log())
            gateway.log_in()
            made = gateway.call("create", {"name": "x", "size": 0.001, "server": "pinned"})
            assert made["serverurl"] == secured.url
            open_one.stop()
            eventually(lambda: [one["name"] for one in gateway.client.get("servers").json()] == ["pinned", NAME])
        shown = subprocess.run(
            [BINARY, "gateway", "servers", "--interface", "127.0.0.1", "--seconds", "1.5", "--json"],
            check=True,
            capture_output=True,
            text=True,
            timeout=30,
        )
        rows = {one["url"]: one for one in json.loads(shown.stdout)}
        assert rows[secured.url]["fingerprint"] == parse_fingerprint(secured.fingerprint)
