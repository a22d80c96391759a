"""A libvirtd of our own, and long sessions with it.

The daemon sees private directories in place of ``/run``, ``/etc/libvirt``, ``/var/lib`` and ``/var/cache`` (a mount
namespace; without root inside a user namespace), loads the storage driver alone and listens on a UNIX socket in a
temporary directory. The host's libvirt, if there is one, neither sees it nor is seen by it.
"""

import contextlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from bench.context import require_program
from bench.measure import timed

_PROMPT = b"virsh # "
_START_S = 20.0
_LISTENS = 'unix_sock_dir = "{directory}"\nauth_unix_rw = "none"\nauth_unix_ro = "none"\nmax_clients = 100\n'
_PRIVATE = {"run": "/run", "etc": "/etc/libvirt", "lib": "/var/lib", "cache": "/var/cache"}
_DRIVER = "libvirt_driver_storage.so"


class Virsh:
    """One ``virsh`` process that is given command after command."""

    def __init__(self, uri: str) -> None:
        self._process = subprocess.Popen(
            [require_program("virsh", "libvirt-clients"), "-q", "-c", uri],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, "LC_ALL": "C.UTF-8"},
        )
        self._read_answer()

    def run(self, command: str) -> str:
        """What the command prints, once it has ended. Raises RuntimeError when it failed."""
        assert self._process.stdin is not None
        self._process.stdin.write(command.encode() + b"\n")
        self._process.stdin.flush()
        answer = self._read_answer()
        text = answer.decode().partition("\n")[2]  # it repeats the command first
        if text.startswith("error:"):
            raise RuntimeError(f"virsh {command}: {text.strip()}")
        return text

    def timed(self, command: str) -> float:
        """Seconds from the command's being sent until all it printed is here."""
        return timed(lambda: self.run(command))

    def close(self) -> None:
        """End the session."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait(10)

    def _read_answer(self) -> bytes:
        assert self._process.stdout is not None
        answer = bytearray()
        while not answer.endswith(_PROMPT):
            piece = os.read(self._process.stdout.fileno(), 1 << 20)
            if not piece:
                raise RuntimeError(f"virsh ended: {answer.decode(errors='replace')}")
            answer += piece
        return bytes(answer[: -len(_PROMPT)])


class Libvirt:
    """A running private libvirtd."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._socket = directory / "sock" / "libvirt-sock"
        self.uri = f"storage:///system?socket={self._socket}"
        for name in ("sock", "drivers", *_PRIVATE):
            (directory / name).mkdir()
        (directory / "drivers" / _DRIVER).symlink_to(_driver())
        config = directory / "libvirtd.conf"
        config.write_text(_LISTENS.format(directory=directory / "sock"))
        mounts = "".join(f"mount --bind {directory / name} {path} && " for name, path in _PRIVATE.items())
        daemon = require_program("libvirtd", "libvirt-daemon")
        with (directory / "log").open("wb") as log:
            self._process = subprocess.Popen(
                [
                    require_program("unshare", "util-linux"),
                    *([] if os.geteuid() == 0 else ["--user", "--map-root-user"]),
                    *("--mount", "--propagation", "private"),
                    *("sh", "-c", f'{mounts}exec "$@"', "sh"),
                    *(daemon, "--config", str(config), "--pid-file", str(directory / "pid")),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "LIBVIRT_DRIVER_DIR": str(directory / "drivers"), "LC_ALL": "C.UTF-8"},
            )
        try:
            self._wait()
        except BaseException:
            self.stop()
            raise

    def _wait(self) -> None:
        deadline = time.monotonic() + _START_S
        while not self._socket.exists():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"bench: libvirtd does not start:\n{(self._directory / 'log').read_text()}")
            time.sleep(0.05)

    @contextlib.contextmanager
    def session(self) -> Iterator[Virsh]:
        """A long virsh session."""
        virsh = Virsh(self.uri)
        try:
            yield virsh
        finally:
            virsh.close()

    def stop(self) -> None:
        """End the daemon."""
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(10)


@contextlib.contextmanager
def private_libvirt() -> Iterator[Libvirt]:
    """A libvirtd for the length of a bench. Its socket's path has to be short, so it lives in the system's tmp."""
    directory = Path(tempfile.mkdtemp(prefix="bench-libvirt-"))
    try:
        daemon = Libvirt(directory)
        try:
            yield daemon
        finally:
            daemon.stop()
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _driver() -> Path:
    places = [*Path("/usr/lib").glob(f"*/libvirt/connection-driver/{_DRIVER}")]
    places += Path("/usr").glob(f"lib*/libvirt/connection-driver/{_DRIVER}")
    if not places:
        raise SystemExit(f"bench: {_DRIVER} is missing; install the package libvirt-daemon (`make bench` does)")
    return places[0]
