"""The Debian package: built, installed, run, removed and purged, on a copy of this machine that is thrown away.

The copy is an overlay of the root directory: what dpkg does happens in it, and shows as the overlay's own files.
"""

import contextlib
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.live import free_port

ROOT = Path(__file__).parents[2]
UNITS = ("elemento-storage.service", "elemento-storage-gateway.service")


@pytest.fixture(scope="module")
def package() -> Path:
    built = subprocess.run(
        [ROOT / "scripts" / "build-deb.sh"], capture_output=True, text=True, check=False, timeout=240
    )
    assert built.returncode == 0, built.stderr
    return ROOT / built.stdout.strip().splitlines()[-1]


class Machine:
    """The copy; ``upper`` is what differs from this machine."""

    def __init__(self, directory: Path) -> None:
        self.root = directory / "root"
        self.upper = directory / "upper"
        for path in (self.root, self.upper, directory / "work"):
            path.mkdir()
        layers = f"lowerdir=/,upperdir={self.upper},workdir={directory / 'work'}"
        subprocess.run(["mount", "-t", "overlay", "overlay", "-o", layers, self.root], check=True)
        for name in ("proc", "sys", "dev"):
            subprocess.run(["mount", "--rbind", f"/{name}", self.root / name], check=True)
            subprocess.run(["mount", "--make-rslave", self.root / name], check=True)
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", self.root / "run"], check=True)
        # No service is started by who installs something here.
        policy = self.root / "usr" / "sbin" / "policy-rc.d"
        policy.write_text("#!/bin/sh\nexit 101\n")
        policy.chmod(0o755)

    def run(self, *words: str | Path, check: bool = True) -> str:
        told = subprocess.run(
            ["chroot", self.root, *words],
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8", "DEBIAN_FRONTEND": "noninteractive"},
        )
        assert not check or told.returncode == 0, (words, told.stdout, told.stderr)
        return told.stdout + told.stderr

    def files(self) -> set[str]:
        """What was made, changed or removed, without what dpkg and Python keep for themselves."""
        own = ("var/lib/dpkg/", "var/log/", "var/cache/", "run/", "tmp/", "usr/sbin/policy-rc.d")
        names = (path.relative_to(self.upper).as_posix() for path in self.upper.rglob("*") if not path.is_dir())
        return {name for name in names if not name.startswith(own)}

    def close(self) -> None:
        subprocess.run(["umount", "-R", "-l", self.root], check=True)


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    directory = Path(tempfile.mkdtemp(prefix="es-deb-"))
    try:
        with contextlib.closing(Machine(directory)) as one:
            yield one
    finally:
        shutil.rmtree(directory)


def test_a_package_that_installs_runs_and_leaves(package: Path, machine: Machine, tmp_path: Path) -> None:
    assert "elemento-storage" in subprocess.run(
        ["dpkg-deb", "--field", package], capture_output=True, text=True, check=True
    ).stdout  # fmt: skip
    shutil.copyfile(package, machine.root / "tmp" / "package.deb")
    before = machine.files()

    machine.run("dpkg", "--install", "/tmp/package.deb")
    installed = machine.files()
    assert {"usr/bin/elemento-storage", "etc/elemento-storage.toml"} <= installed
    assert "etc/systemd/system/multi-user.target.wants/elemento-storage.service" in installed
    assert machine.run("elemento-storage", "--version").strip().endswith(", version 0.1.0")
    machine.run("systemd-analyze", "verify", *(f"/lib/systemd/system/{unit}" for unit in UNITS))
    # Nothing of the environment of whoever calls it, nor of the directory, gets into the program.
    assert "/usr/lib/elemento-storage" in machine.run(
        *("/usr/bin/python3", "-I", "-c"),
        "import sys; sys.path.insert(0, '/usr/lib/elemento-storage'); import msgspec; print(msgspec.__file__)",
    )

    serves(machine)

    # Again is an upgrade; a changed setting survives it.
    settings = machine.root / "etc" / "elemento-storage.toml"
    settings.write_text(settings.read_text() + '\nlog-level = "debug"\n')
    machine.run("dpkg", "--install", "/tmp/package.deb")
    assert settings.read_text().endswith('log-level = "debug"\n')

    machine.run("dpkg", "--remove", "elemento-storage")
    assert not (machine.root / "usr" / "lib" / "elemento-storage").exists()
    assert settings.exists()
    volume = machine.root / "mnt" / "disk"
    assert list(volume.glob("vid.*.elimg"))
    told = machine.run("dpkg", "--purge", "elemento-storage")
    assert "left where they are" in told
    assert list(volume.glob("vid.*.elimg"))
    assert not settings.exists()
    left = {name for name in machine.files() - before if not name.startswith(("mnt/", "var/lib/elemento-storage/"))}
    assert left == set()
    assert machine.run("dpkg-query", "--show", "elemento-storage", check=False).startswith("dpkg-query: no packages")


def serves(machine: Machine) -> None:
    """The installed program as the unit starts it, on another port: it makes a volume in /mnt."""
    (machine.root / "mnt" / "disk").mkdir(parents=True)
    (machine.root / "mnt" / "disk" / "settings.json").write_text("{}")
    port = free_port()
    process = subprocess.Popen(
        [
            *("chroot", machine.root, "elemento-storage", "serve", "--config", "/etc/elemento-storage.toml"),
            *("--listen", f"127.0.0.1:{port}"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
    )
    try:
        deadline = time.monotonic() + 30
        while True:
            with contextlib.suppress(httpx.HTTPError):
                body = {"creatorID": "f" * 32, "name": "x", "size": 0.001, "format": "qcow2"}
                made = httpx.post(f"http://127.0.0.1:{port}/api/v1.0/create", json=body, timeout=30)
                assert made.status_code == 200, made.text
                break
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert httpx.get(f"http://127.0.0.1:{port}/api/v1.0/version").json()["qemu-img"] != "missing"
    finally:
        process.terminate()
        process.communicate(timeout=30)
    assert process.returncode == 0
