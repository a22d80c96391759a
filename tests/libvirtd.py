"""A libvirtd of the test's own, with its QEMU driver, that the host's libvirt neither sees nor is seen by."""

import contextlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

_PRIVATE = {"run": "/run/libvirt", "etc": "/etc/libvirt", "lib": "/var/lib/libvirt", "cache": "/var/cache/libvirt"}
_DRIVERS = ("qemu", "secret", "network", "storage")
_QEMU = (
    'user = "root"\ngroup = "root"\nsecurity_driver = "none"\ncgroup_controllers = []\nnamespaces = []\n'
    'remember_owner = 0\ndynamic_ownership = 0\nstdio_handler = "file"\n'
)


class Libvirtd:
    """A running daemon; ``virsh`` talks to it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        socket = directory / "sock" / "libvirt-sock"
        self.environment = {**os.environ, "LC_ALL": "C.UTF-8", "LIBVIRT_DEFAULT_URI": f"qemu:///system?socket={socket}"}
        for name in ("sock", "drivers", "log", *_PRIVATE):
            (directory / name).mkdir()
        for driver in _DRIVERS:
            [there] = Path("/usr/lib").glob(f"*/libvirt/connection-driver/libvirt_driver_{driver}.so")
            (directory / "drivers" / there.name).symlink_to(there)
        (directory / "etc" / "qemu.conf").write_text(_QEMU)
        config = directory / "libvirtd.conf"
        config.write_text(f'unix_sock_dir = "{directory}/sock"\nauth_unix_rw = "none"\nauth_unix_ro = "none"\n')
        # Debian's build wants its user before it reads that it is to be another.
        for name, line in (
            ("passwd", "libvirt-qemu:x:64055:64055::/:/usr/sbin/nologin"),
            ("group", "libvirt-qemu:x:64055:"),
        ):
            known = Path("/etc", name).read_text()
            (directory / name).write_text(known if "libvirt-qemu:" in known else f"{known}{line}\n")
        accounts = "".join(f"mount --bind {directory / name} /etc/{name} && " for name in ("passwd", "group"))
        mounts = accounts + "".join(
            f"mkdir -p {there} && mount --bind {directory / own} {there} && " for own, there in _PRIVATE.items()
        )
        self._log = directory / "libvirtd.log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [
                    *("unshare", "--mount", "--propagation", "private", "sh", "-c", f'{mounts}exec "$@"', "sh"),
                    *("libvirtd", "--config", str(config), "--pid-file", str(directory / "pid")),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**self.environment, "LIBVIRT_DRIVER_DIR": str(directory / "drivers")},
            )
        deadline = time.monotonic() + 30
        while not socket.exists():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise AssertionError(f"libvirtd does not start:\n{self.log()}")
            time.sleep(0.05)

    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def virsh(self, *words: str | Path, given: str | None = None) -> str:
        told = subprocess.run(
            ["virsh", "-q", *words],
            input=given,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
            env=self.environment,
        )
        assert told.returncode == 0, (words, told.stdout, told.stderr, self.log()[-3000:])
        return told.stdout

    def stop(self) -> None:
        """End the guests, then the daemon."""
        with contextlib.suppress(AssertionError, subprocess.TimeoutExpired):
            for name in self.virsh("list", "--name").split():
                self.virsh("destroy", name)
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(10)


@contextlib.contextmanager
def private_libvirtd() -> Iterator[Libvirtd]:
    """Its socket's path has to be short, so it lives in the system's directory for temporary files."""
    directory = Path(tempfile.mkdtemp(prefix="es-libvirt-"))
    try:
        daemon = Libvirtd(directory)
        try:
            yield daemon
        finally:
            daemon.stop()
    finally:
        shutil.rmtree(directory, ignore_errors=True)
