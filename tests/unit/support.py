"""What the unit and contract tests share: volumes made by hand, child processes, small file systems."""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

from elemento_storage.config import Settings
from elemento_storage.model import VolumeFormat
from elemento_storage.server import Server

ALICE = "a" * 32
BOB = "b" * 32
LONG_AGO_S = 1_000_000_000.0


def uid(number: int) -> str:
    """A uid that is easy to read in a failure."""
    return f"{number:032x}"


def make_volume(
    location: Path,
    volume_id: str,
    *,
    size: int = 512,
    image_format: VolumeFormat = VolumeFormat.RAW,
    data: bytes | None = None,
    **meta: Any,
) -> Path:
    """A volume directory as another server might have written it; keys of meta.json that are None are left out."""
    directory = location / f"vid.{volume_id}.elimg"
    directory.mkdir(parents=True)
    if data is not None:
        (directory / image_format.data_file).write_bytes(data)
    elif image_format is VolumeFormat.QCOW2:
        qemu_img("create", "-q", "-f", "qcow2", str(directory / "data.qcow2"), str(size))
    else:
        with (directory / image_format.data_file).open("wb") as file:
            file.truncate(size)
    values = {
        "volumeID": volume_id,
        "creatorID": ALICE,
        "size": size,
        "name": "disk",
        "format": image_format.value,
        **meta,
    }
    (directory / "meta.json").write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
    return directory


def age(path: Path, seconds: float = LONG_AGO_S) -> None:
    """Give a file, or a directory and all in it, an old mtime."""
    for one in [*path.iterdir(), path] if path.is_dir() else [path]:
        os.utime(one, (seconds, seconds), follow_symlinks=False)


def qemu_img(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """The real qemu-img."""
    return subprocess.run(["qemu-img", *arguments], check=check, capture_output=True, text=True)


def assert_sound(path: Path, image_format: VolumeFormat, size_bytes: int) -> None:
    """The image is whole and a guest sees this many bytes."""
    told = json.loads(qemu_img("info", "-f", image_format.value, "--output=json", str(path)).stdout)
    assert told["virtual-size"] == size_bytes
    if image_format is VolumeFormat.QCOW2:
        qemu_img("check", "-f", "qcow2", str(path))


def assert_same_content(first: Path, first_format: VolumeFormat, second: Path, second_format: VolumeFormat) -> None:
    """A guest reads the same from both; what one has more is zeros."""
    qemu_img("compare", "-f", first_format.value, "-F", second_format.value, str(first), str(second))


@contextlib.contextmanager
def python_child(code: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A process of its own that runs ``code``; it has printed its first line when the block begins."""
    child = subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        assert child.stdout.readline(), "the child died before it said anything"
        yield child
    finally:
        child.kill()
        child.wait(10)
        child.stdin.close()
        child.stdout.close()


def wait_until_gone(pid: int, timeout_s: float = 5.0) -> bool:
    """Whether a process that is not our child ends in time; a zombie that nobody reaped has ended."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.01)
    return False


@contextlib.contextmanager
def small_file_system(mount_point: Path, megabytes: int) -> Iterator[Path]:
    """A tmpfs of this size, gone at the end. Needs root."""
    mount_point.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(mount_point)], check=True)
    try:
        yield mount_point
    finally:
        subprocess.run(["umount", "-l", str(mount_point)], check=True)


@contextlib.asynccontextmanager
async def parts(root: Path, **settings: Any) -> AsyncIterator[Server]:
    """All parts of a server on ``root``, started, without its HTTP face."""
    state_dir = settings.pop("state_dir", str(root.parent / f"{root.name}-state"))
    server = Server(Settings(root=str(root), state_dir=state_dir, **settings))
    await server.start()
    try:
        yield server
    finally:
        await server.stop()
