"""Our lock and QEMU's, each of them first."""

import os
import subprocess
from pathlib import Path

import pytest

from elemento_storage.engine.image_lock import lock_image
from elemento_storage.errors import ImageInUse
from tests.clients import QemuIo


@pytest.fixture
def image(tmp_path: Path) -> str:
    path = tmp_path / "data.img"
    path.write_bytes(bytes(1 << 20))
    return str(path)


def qemu_io(image: str, *flags: str, command: str = "read 0 512") -> subprocess.CompletedProcess[str]:
    argv = ["qemu-io", "-f", "raw", *flags, "-c", command, image]
    return subprocess.run(argv, capture_output=True, text=True, check=False)


def test_one_writer_at_a_time(image: str) -> None:
    first = lock_image(image, read_only=False)
    for read_only in (False, True):
        with pytest.raises(ImageInUse, match="another program"):
            lock_image(image, read_only=read_only)
    os.close(first)
    os.close(lock_image(image, read_only=False))


def test_readers_go_together(image: str) -> None:
    readers = [lock_image(image, read_only=True) for _ in range(3)]
    with pytest.raises(ImageInUse):
        lock_image(image, read_only=False)
    for one in readers:
        os.close(one)
    os.close(lock_image(image, read_only=False))


def test_a_refused_lock_leaves_nothing(image: str) -> None:
    first = lock_image(image, read_only=True)
    before = os.listdir("/proc/self/fd")
    with pytest.raises(ImageInUse):
        lock_image(image, read_only=False)
    assert os.listdir("/proc/self/fd") == before
    os.close(lock_image(image, read_only=True))
    os.close(first)


def test_qemu_respects_ours(image: str) -> None:
    lock = lock_image(image, read_only=False)
    refused = qemu_io(image, command="write 0 512")
    assert refused.returncode == 1
    assert "lock" in refused.stderr
    assert qemu_io(image, "-r", "-U").returncode == 0
    os.close(lock)
    assert qemu_io(image, command="write 0 512").returncode == 0


def test_qemu_reads_with_our_reader(image: str) -> None:
    lock = lock_image(image, read_only=True)
    assert qemu_io(image, "-r").returncode == 0
    assert qemu_io(image, command="write 0 512").returncode == 1
    os.close(lock)


def test_we_respect_qemus(image: str) -> None:
    with QemuIo.on_file(Path(image), "raw"):
        for read_only in (False, True):
            with pytest.raises(ImageInUse):
                lock_image(image, read_only=read_only)
    os.close(lock_image(image, read_only=False))


def test_the_lock_goes_with_the_last_descriptor(image: str) -> None:
    lock = lock_image(image, read_only=False)
    child = subprocess.Popen(["sleep", "60"], pass_fds=(lock,))
    os.close(lock)
    with pytest.raises(ImageInUse):
        lock_image(image, read_only=False)
    child.kill()
    child.wait(10)
    os.close(lock_image(image, read_only=False))


def test_a_link_is_not_followed(image: str, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(image)
    with pytest.raises(OSError, match="symbolic links"):
        lock_image(str(tmp_path / "link"), read_only=False)
