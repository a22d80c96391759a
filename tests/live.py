"""Launches the real server as its own process, for end-to-end tests and the bench."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx

ALICE = "a" * 32
BOB = "b" * 32
CAROL = "c" * 32

_NBD_PORTS = 100

BINARY = Path(sys.executable).parent / "elemento-storage"


class LiveServer:
    """One server process. ``call`` posts JSON; ``kill`` is SIGKILL; ``start`` may be called again after either."""

    def __init__(self, root: Path, state_dir: Path, *flags: str, listen_host: str = "127.0.0.1") -> None:
        self.root = root
        self.state_dir = state_dir
        self.flags = flags
        self.port = free_port()
        self.listen_host = listen_host
        # Short, because the names of Unix sockets are; made by the server when something is exported.
        self.run_dir = Path(tempfile.gettempdir()) / f"es-{os.getpid()}-{self.port}"
        self.iscsi_port = free_port()
        self.smb_port = free_port()
        self.nbd_port = free_port(_NBD_PORTS)
        self.process: subprocess.Popen[bytes] | None = None
        self.log_path = state_dir.parent / f"{state_dir.name}-{self.port}.log"
        self.http = httpx.Client(base_url=self.address, timeout=60)

    @property
    def address(self) -> str:
        return f"http://{self.listen_host}:{self.port}/api/v1.0/"

    def start(self, env: Mapping[str, str] | None = None, *, wait: bool = True) -> "LiveServer":
        assert self.process is None
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                [
                    str(BINARY),
                    "serve",
                    "--root",
                    str(self.root),
                    "--state-dir",
                    str(self.state_dir),
                    "--listen",
                    f"{self.listen_host}:{self.port}",
                    "--run-dir",
                    str(self.run_dir),
                    "--iscsi-port",
                    str(self.iscsi_port),
                    "--smb-port",
                    str(self.smb_port),
                    "--nbd-ports",
                    f"{self.nbd_port}-{self.nbd_port + _NBD_PORTS - 1}",
                    *self.flags,
                ],
                stdout=log,
                stderr=log,
                env={**os.environ, **(env or {})},
            )
        if wait:
            self.wait_ready()
        return self

    def wait_ready(self, timeout_s: float = 30) -> None:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError), socket.create_connection((self.listen_host, self.port), 1):
                if self._answers():
                    return
            assert self.process is not None
            if self.process.poll() is not None:
                raise AssertionError(f"the server ended with {self.process.returncode}:\n{self.log()}")
            time.sleep(0.02)
        raise AssertionError(f"the server is not ready after {timeout_s} s:\n{self.log()}")

    def _answers(self) -> bool:
        # The socket is bound before the disk is read, so a connection alone does not mean ready.
        with contextlib.suppress(httpx.HTTPError):
            self.http.get("version", timeout=10)
            return True
        return False

    def kill(self) -> None:
        """SIGKILL, as a power failure of the process."""
        self._end(signal.SIGKILL)

    def stop(self) -> int:
        """SIGTERM and wait; the exit status."""
        return self._end(signal.SIGTERM)

    def _end(self, number: signal.Signals) -> int:
        assert self.process is not None
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(number)
        status = self.process.wait(30)
        self.process = None
        self.http.close()
        self.http = httpx.Client(base_url=self.address, timeout=60)
        return status

    def daemons(self, name: str = "") -> dict[int, str]:
        """The processes that serve exports: pid and pid file, of those whose pid file has ``name`` in its path."""
        found = {}
        directories = (directory for directory, _, names in os.walk(self.run_dir) if "pid" in names)
        for pid_file in sorted(Path(directory) / "pid" for directory in directories):
            with contextlib.suppress(OSError, ValueError):
                pid = int(pid_file.read_text())
                command_line = Path(f"/proc/{pid}/cmdline").read_bytes()
                if os.fsencode(self.run_dir) in command_line and name in str(pid_file):
                    found[pid] = str(pid_file)
        return found

    def kill_daemons(self, name: str = "") -> list[int]:
        """SIGKILL to what serves exports; when this returns they are gone."""
        pids = list(self.daemons(name))
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        deadline = time.monotonic() + 10
        while any(_lives(pid) for pid in pids):
            assert time.monotonic() < deadline
            time.sleep(0.005)
        return pids

    def clean_exports(self) -> None:
        """End every daemon and mount that is left, as a reboot would."""
        self.kill_daemons()
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            if (point := line.split(" ")[4]).startswith(f"{self.run_dir}/"):
                subprocess.run(["fusermount3", "-u", "-z", point], check=True)
        shutil.rmtree(self.run_dir, ignore_errors=True)

    def wait_dead(self, timeout_s: float = 60) -> None:
        """Until a fault point has ended the process."""
        assert self.process is not None
        self.process.wait(timeout_s)
        self.process = None
        self.http.close()
        self.http = httpx.Client(base_url=self.address, timeout=60)

    def post(self, path: str, body: Any = None, **headers: str) -> httpx.Response:
        """POST JSON; header names with underscores for dashes."""
        return self.http.post(
            path,
            content=json.dumps({} if body is None else body).encode(),
            headers={"Content-Type": "application/json", **{k.replace("_", "-"): v for k, v in headers.items()}},
        )

    def call(self, path: str, body: Any = None, **headers: str) -> Any:
        """POST JSON and insist on success."""
        response = self.post(path, body, **headers)
        assert response.status_code in (200, 202), (
            f"{path}: {response.status_code} {response.text}\n{self.log()[-3000:]}"
        )
        return response.json()

    def create(self, name: str = "disk", size: float = 0.001, owner: str = ALICE, **more: Any) -> str:
        """A small volume; its id."""
        return str(self.call("create", {"creatorID": owner, "name": name, "size": size, **more})["vid"])

    def info(self, vid: str, **more: Any) -> dict[str, Any]:
        """The volume's JSON."""
        answer: dict[str, Any] = self.call("info", {"volume_id": vid, **more})
        return answer

    def listed(self, client: str = ALICE, **more: Any) -> dict[str, dict[str, Any]]:
        """What a client sees, by id."""
        return {v["volumeID"]: v for v in self.call("accessible", {"client_uid": client, **more})}

    def directory(self, vid: str, location: str = "disk") -> Path:
        """A volume's directory."""
        return self.root / location / f"vid.{vid}.elimg"

    def log(self) -> str:
        """What the server has said so far."""
        return self.log_path.read_text(errors="replace")


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] not in "ZX"
    except OSError:
        return False


# Below those that the kernel gives to connections, and a part of its own for each process that tests at the same time.
_PORTS_BEGIN, _PORTS_PER_PROCESS, _PORT_PROCESSES = 10_000, 2_200, 10
_taken_ports = 0


def free_port(count: int = 1) -> int:
    """A port nobody listens on now; the first of ``count`` in a row. No two calls of one process give the same."""
    global _taken_ports  # noqa: PLW0603  one per process is what it is for
    worker = os.environ.get("PYTEST_XDIST_WORKER", "").removeprefix("gw")
    part = int(worker) if worker else 5 + os.getpid() % 5
    begin = _PORTS_BEGIN + part % _PORT_PROCESSES * _PORTS_PER_PROCESS
    while True:
        if _taken_ports + count > _PORTS_PER_PROCESS:
            _taken_ports = 0
        first = begin + _taken_ports
        _taken_ports += count
        if all(_is_free(port) for port in range(first, first + count)):
            return first


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def make_location(root: Path, name: str = "disk", **settings: Any) -> Path:
    """A directory with a settings.json; underscores in keys become dashes."""
    path = root / name
    path.mkdir(parents=True, exist_ok=True)
    (path / "settings.json").write_text(json.dumps({k.replace("_", "-"): v for k, v in settings.items()}))
    return path


@contextlib.contextmanager
def live_server(tmp_path: Path, *flags: str, env: Mapping[str, str] | None = None) -> Iterator[LiveServer]:
    """A running server on a root with one location, ``disk``."""
    root = tmp_path / "mnt"
    if not root.exists():
        make_location(root)
    server = LiveServer(root, tmp_path / "state", *flags)
    server.start(env)
    try:
        yield server
    finally:
        if server.process is not None:
            server.stop()
        server.clean_exports()
        server.http.close()
