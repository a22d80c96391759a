"""A tree made by hand with real images in it, a file system with files inside, through everything the server does."""

import json
import subprocess
from pathlib import Path

import pytest

from tests.e2e.invariants import assert_clean
from tests.live import ALICE, BOB, LiveServer

VOLUMES = {"1" * 32: "raw", "2" * 32: "qcow2"}


def qemu_img(*words: str | Path) -> str:
    return subprocess.check_output(["qemu-img", *words], text=True)


@pytest.fixture
def original(tmp_path: Path) -> Path:
    """64 MiB of ext4 with some files, as raw bytes."""
    content = tmp_path / "content"
    (content / "etc").mkdir(parents=True)
    (content / "etc" / "hostname").write_text("guest\n")
    for number in range(20):
        (content / f"file-{number}").write_bytes(bytes([number]) * (number * 10_000))
    image = tmp_path / "original.img"
    with image.open("wb") as file:
        file.truncate(64 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-F", "-d", content, image], check=True)
    return image


@pytest.fixture
def tree(server: LiveServer, original: Path) -> LiveServer:
    """The document's layout, written with a text editor and qemu-img, while the server runs."""
    for vid, image_format in VOLUMES.items():
        directory = server.directory(vid)
        directory.mkdir()
        target = directory / ("data.img" if image_format == "raw" else "data.qcow2")
        qemu_img("convert", "-f", "raw", "-O", image_format, original, target)
        meta = {
            "creatorID": ALICE,
            "name": f"by hand {image_format}",
            "private": False,
            "bootable": True,
            "readonly": False,
            "shareable": False,
            "clonable": True,
            "alg": "cp",
            "format": image_format,
            "bus": "virtio",
            "cloudinit": False,
            "ceph": False,
        }
        (directory / "meta.json").write_text(json.dumps(meta))
    return server


def data_of(server: LiveServer, vid: str) -> tuple[str, Path]:
    (path,) = server.directory(vid).glob("data.*")
    return ("raw" if path.suffix == ".img" else "qcow2"), path


def assert_same_content(server: LiveServer, vid: str, original: Path) -> None:
    image_format, path = data_of(server, vid)
    told = qemu_img("compare", "-f", "raw", "-F", image_format, original, path)
    assert "identical" in told
    if image_format == "qcow2":
        qemu_img("check", "-q", path)


def test_the_whole_way(tree: LiveServer, original: Path, tmp_path: Path) -> None:
    assert sorted(tree.call("rescan")["added"]) == sorted(VOLUMES)
    listed = tree.listed()
    assert {vid: volume["format"] for vid, volume in listed.items()} == VOLUMES
    assert {volume["size"] for volume in listed.values()} == {64 << 20}
    for vid, first_format in VOLUMES.items():
        second_format = "qcow2" if first_format == "raw" else "raw"
        for target in (second_format, first_format, second_format):
            tree.call("update/convert", {"vid": vid, "creatorID": ALICE, "format": target})
            assert data_of(tree, vid)[0] == target
            assert_same_content(tree, vid, original)
        tree.call("update/resize", {"vid": vid, "creatorID": ALICE, "size": 0.1})
        image_format, path = data_of(tree, vid)
        assert json.loads(qemu_img("info", "--output=json", "-f", image_format, path))["virtual-size"] == 100_000_256
        tree.call("transfer", {"vid": vid, "creatorID": ALICE, "newCreatorID": BOB})
        tree.call("destroy", {"volume_id": vid, "creatorID": BOB})
        assert vid not in tree.listed(BOB)
        assert tree.call("restore", {"volume_id": vid, "client_uid": BOB})["creatorID"] == BOB
        # What a guest would find: the file system, whole, with its files.
        image_format, path = data_of(tree, vid)
        raw = tmp_path / f"{vid}.raw"
        qemu_img("convert", "-f", image_format, "-O", "raw", path, raw)
        subprocess.run(["e2fsck", "-fn", raw], check=True, capture_output=True)
        hostname = subprocess.check_output(["debugfs", "-R", "cat /etc/hostname", raw], stderr=subprocess.DEVNULL)
        assert hostname == b"guest\n"
    assert_clean(tree)
