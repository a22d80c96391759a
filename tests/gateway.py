"""Launches the gateway as its own process, in front of launched servers."""

import contextlib
import fcntl
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx

from elemento_storage.gateway.passwords import hash_password
from tests.live import ALICE, BINARY, BOB, LiveServer, free_port

USER, PASSWORD = "alice@example.org", "correct horse"
OTHER_USER, OTHER_PASSWORD = "bob@example.org", "battery staple"
_HASHES = {one: hash_password(one) for one in (PASSWORD, OTHER_PASSWORD)}


def user_tables(tokens: Mapping[str, str] | None = None) -> str:
    """Two users; ``tokens`` are the first one's, by server."""
    lines = [f'[user."{USER}"]', f'client = "{ALICE}"', f'password = "{_HASHES[PASSWORD]}"']
    if tokens:
        lines += [f'[user."{USER}".tokens]', *(f'"{name}" = "{token}"' for name, token in tokens.items())]
    lines += [f'[user."{OTHER_USER}"]', f'client = "{BOB}"', f'password = "{_HASHES[OTHER_PASSWORD]}"']
    return "\n".join(lines)


def server_tables(**urls: str) -> str:
    """Servers by name, in this order."""
    return "\n".join(f'[[server]]\nname = "{name}"\nurl = "{url}"' for name, url in urls.items())


def url_of(server: LiveServer) -> str:
    return f"http://127.0.0.1:{server.port}"


class Gateway:
    """One gateway process. ``log_in`` first, then ``call``."""

    def __init__(
        self, directory: Path, tables: str, *, client_port: int, login_port: int, head: str = "patience = 2.0"
    ) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self.client_port, self.login_port = client_port, login_port
        self.configuration = directory / "gateway.toml"
        self.log_path = directory / "gateway.log"
        self.process: subprocess.Popen[bytes] | None = None
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{client_port}/api/v1.0/client/volume/", timeout=60)
        self.login = httpx.Client(base_url=f"http://127.0.0.1:{login_port}/api/v1/authenticate/", timeout=60)
        self.write(tables, head)

    def write(self, tables: str, head: str = "patience = 2.0") -> None:
        """The configuration that the next start reads."""
        self.configuration.write_text(
            f'listen-client = "127.0.0.1:{self.client_port}"\nlisten-login = "127.0.0.1:{self.login_port}"\n'
            f'state-dir = "{self.directory}/state"\n{head}\n{tables}\n'
        )
        self.configuration.chmod(0o600)

    def start(self) -> "Gateway":
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                [BINARY, "gateway", "--config", self.configuration], stdout=log, stderr=log, env=os.environ
            )
        deadline = time.monotonic() + 20
        while True:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"http://127.0.0.1:{self.login_port}/", timeout=5).status_code == 200:
                    return self
            assert self.process.poll() is None, self.log()
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.02)

    def stop(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(20) == 0
        self.process = None

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def log_in(self, username: str = USER, password: str = PASSWORD) -> httpx.Response:
        return self.login.post("login", json={"username": username, "password": password})

    def post(self, path: str, body: Any = None, **headers: str) -> httpx.Response:
        return self.client.post(path, json=body or {}, headers=headers)

    def call(self, path: str, body: Any = None) -> Any:
        """POST JSON and insist on success."""
        response = self.post(path, body)
        assert response.status_code == 200, (path, response.status_code, response.text, self.log()[-2000:])
        return response.json()

    def volumes(self) -> dict[str, dict[str, Any]]:
        return {one["volumeID"]: one for one in self.client.get("accessible").raise_for_status().json()}


@contextlib.contextmanager
def live_gateway(
    directory: Path,
    tables: str,
    *,
    client_port: int | None = None,
    login_port: int | None = None,
    head: str = "patience = 2.0",
) -> Iterator[Gateway]:
    """A running gateway; on free ports if none are given."""
    gateway = Gateway(
        directory, tables, client_port=client_port or free_port(), login_port=login_port or free_port(), head=head
    )
    gateway.start()
    try:
        yield gateway
    finally:
        if gateway.process is not None:
            gateway.stop()
        gateway.client.close()
        gateway.login.close()


@contextlib.contextmanager
def published_ports() -> Iterator[tuple[int, int]]:
    """The two ports that the vendor's clients know, for one test process of the machine at a time."""
    with Path("/tmp/elemento-gateway-ports.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield 27777, 47777
