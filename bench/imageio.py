"""ovirt-imageio: its daemon, and its own client, as published. Installed by `scripts/setup.sh bench`, beside us."""

import contextlib
import http.client
import json
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.live import free_port

from bench.context import BUILD, words

HOME = BUILD / "imageio"  #: a virtual environment of its own
_TICKET_S = 3600
_START_S = 10.0
_CONFIGURATION = """
[daemon]
drop_privileges = false
systemd_enable = false
run_dir = {run}
[tls]
enable = false
[remote]
host = 127.0.0.1
port = {port}
[local]
enable = false
[control]
transport = unix
socket = {run}/control
[logger_root]
level = ERROR
handlers = stderr
[handlers]
keys = stderr
"""
# Its own functions, timed within a process that has imported them; the answer is the last line.
_CLIENT = """
import sys, time
from ovirt_imageio import client
what, url, path = sys.argv[1:4]
work = {
    "upload": lambda: client.upload(path, url, None, secure=False, disk_is_zero=True),
    "download": lambda: client.download(url, path, None, fmt="raw", secure=False),
    "checksum": lambda: client.checksum(path, algorithm="sha256"),
}[what]
started = time.perf_counter()
found = work()
print(time.perf_counter() - started)
"""


class Imageio:
    """A daemon on loopback, without TLS, and its client."""

    def __init__(self, run: Path, port: int) -> None:
        self._run = run
        self._port = port
        self._tickets = 0

    def upload(self, image: Path, target: Path) -> float:
        """Seconds that the client takes to send an image into a new file that is as long, holes left out."""
        with target.open("wb") as file:
            file.truncate(image.stat().st_size)
        url = self._ticket(f"file://{target}", target.stat().st_size, ["write"])
        return _client("upload", url, image)

    def download_file(self, image: Path, target: Path) -> float:
        """Seconds that the client takes to fetch a raw image into a new one."""
        return _client("download", self._ticket(f"file://{image}", image.stat().st_size, ["read"]), target)

    def download_qcow2(self, image: Path, size: int, target: Path) -> float:
        """The same of the disk in a qcow2 image, which a qemu-nbd of its own serves to the daemon, as oVirt has it."""
        path = self._run / "nbd"
        argv = ["qemu-nbd", f"--socket={path}", "--format=qcow2", "--persistent", "--shared=8", "--read-only"]
        with subprocess.Popen(words([*argv, "--cache=writeback", "--aio=io_uring", image])) as qemu:
            try:
                _until_listening(path, qemu)
                return _client("download", self._ticket(f"nbd:unix:{path}", size, ["read"]), target)
            finally:
                qemu.terminate()
                qemu.wait()
                path.unlink(missing_ok=True)

    @staticmethod
    def checksum(image: Path) -> float:
        """Seconds of its client's checksum of a local image."""
        return _client("checksum", "", image)

    def _ticket(self, url: str, size: int, operations: list[str]) -> str:
        self._tickets += 1
        name = f"bench-{self._tickets}"
        ticket = {"uuid": name, "size": size, "url": url, "timeout": _TICKET_S, "sparse": True, "ops": operations}
        control = _Control(str(self._run / "control"))
        control.request("PUT", f"/tickets/{name}", json.dumps(ticket))
        answer = control.getresponse()
        if answer.status != 200:
            raise RuntimeError(f"ovirt-imageio takes no ticket: {answer.status} {answer.read()[:300]!r}")
        control.close()
        return f"http://127.0.0.1:{self._port}/images/{name}"


class _Control(http.client.HTTPConnection):
    """HTTP over the daemon's control socket."""

    def __init__(self, path: str) -> None:
        super().__init__("localhost")
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(self._path)


@contextlib.contextmanager
def running(directory: Path) -> Iterator[Imageio]:
    """The daemon, started and ended; ``directory`` is short enough for the names of sockets."""
    program = HOME / "bin" / "ovirt-imageio"
    if not program.exists():
        raise SystemExit("bench: ovirt-imageio is missing; `scripts/setup.sh bench` installs it")
    port = free_port()
    configuration = directory / "conf.d"
    configuration.mkdir()
    (configuration / "bench.conf").write_text(_CONFIGURATION.format(run=directory, port=port))
    with subprocess.Popen(words([program, "--conf-dir", directory])) as daemon:
        try:
            _until_listening(directory / "control", daemon)
            yield Imageio(directory, port)
        finally:
            daemon.terminate()


def _client(what: str, url: str, path: Path) -> float:
    argv = words([HOME / "bin" / "python", "-c", _CLIENT, what, url, path])
    done = subprocess.run(argv, check=True, capture_output=True, text=True)
    return float(done.stdout.splitlines()[-1])


def _until_listening(path: Path, process: "subprocess.Popen[Any]") -> None:
    deadline = time.monotonic() + _START_S
    while True:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as probe:
            probe.connect(str(path))
            return
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"{process.args!r} does not listen on {path}")
        time.sleep(0.01)
