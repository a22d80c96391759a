"""The whole way of a cloud image: in by URL and by tus, with a seed of its own, backed up, cloned, exported, booted."""

import hashlib
import subprocess
from pathlib import Path
from typing import Any

from tusclient.client import TusClient

from tests.e2e.moving import export
from tests.e2e.test_cloud_metadata import FIRST, send
from tests.exporting import client_of, unexport_everything
from tests.guest.cloud import DISK_BYTES, ROOT_OFFSET, cloud_image
from tests.guest.vm import Guest
from tests.live import ALICE, LiveServer, live_server
from tests.web import web_server

USER_DATA = b"""#cloud-config
hostname: web-1
write_files:
- path: /etc/written
  content: "by cloud-init\\n"
runcmd:
- "ip -4 -o address show dev lan0 > /var/lib/addresses"
- "echo SEEN-BY-RUNCMD $(hostname) > /dev/ttyS0"
power_state: {mode: poweroff, delay: now, condition: true}
"""
NETWORK_DATA = b"""version: 2
ethernets:
  lan0:
    match: {macaddress: "52:54:00:12:34:56"}
    set-name: lan0
    addresses: [192.0.2.10/24]
"""
CHANGED = "/etc/issue"
NETWORK_CARD = (
    *("-netdev", "user,id=net,restrict=on"),
    *("-device", "virtio-net-pci,netdev=net,mac=52:54:00:12:34:56"),
    *("-object", "rng-random,id=random,filename=/dev/urandom", "-device", "virtio-rng-pci,rng=random"),
)


def fetched(server: LiveServer, image: Path, image_format: str) -> str:
    """The image from the web, as a volume."""
    with web_server() as web:
        url = web.put("/cloud.qcow2", image)
        checksum = f"sha256:{hashlib.sha256(image.read_bytes()).hexdigest()}"
        body = {"creatorID": ALICE, "name": "web-1", "url": url, "format": image_format, "checksum": checksum}
        return str(server.call("cloudinit/create", body)["vid"])


def uploaded(server: LiveServer, image: Path) -> str:
    """The image as a qcow2 volume, by a published client of tus."""
    metadata = {"creatorID": ALICE, "name": "web-1", "bootable": "true", "format": "qcow2"}
    with image.open("rb") as file:
        uploader = TusClient(f"{server.address}uploads").uploader(
            file_stream=file, chunk_size=64 << 20, metadata=metadata
        )
        uploader.upload()
    return str(uploader.url).rstrip("/").rpartition("/")[2]


def seeded(server: LiveServer) -> str:
    """A seed, as published clients make it; there is no meta-data."""
    vid = send(server, {**FIRST, "name": "web-1-seed", "expectedFiles": 2}).json()["vid"]
    assert send(server, {"vid": vid}, ("user-data", USER_DATA)).status_code == 206
    done = send(server, {"vid": vid}, ("network-data", NETWORK_DATA))
    assert (done.status_code, done.json()["warnings"]) == (200, [])
    return str(vid)


def read_file(disk: Path, path: str) -> str:
    """A file in the root file system of a raw image that no guest runs on."""
    return subprocess.run(
        ["debugfs", "-R", f"cat {path}", f"{disk}?offset={ROOT_OFFSET}"], check=True, capture_output=True, text=True
    ).stdout


def place_of(disk: Path, path: str) -> tuple[int, int]:
    """Where a small file of the root file system lies in a raw image, and how long it is."""
    content = read_file(disk, path).encode()
    argv = ["debugfs", "-R", f"bmap {path} 0", f"{disk}?offset={ROOT_OFFSET}"]
    number = int(subprocess.run(argv, check=True, capture_output=True, text=True).stdout)
    with disk.open("rb") as image:
        image.seek(ROOT_OFFSET + 1024 + 24)  # s_log_block_size of the superblock
        offset = ROOT_OFFSET + (number << 10 + int.from_bytes(image.read(4), "little"))
        image.seek(offset)
        assert image.read(len(content)) == content
    return offset, len(content)


def backed_up_and_restored(server: LiveServer, vid: str, disk: Path) -> str:
    """A full backup, a change by a client, an increment: and a volume that is made of those two alone."""
    body = {"vid": vid, "creatorID": ALICE}
    with client_of(export(server, vid, protocol="local")) as client:
        assert server.call("backups/create", body)["mode"] == "full"
        offset, length = place_of(disk, CHANGED)
        client.write(offset, length, ord("B"))
        backup = server.call("backups/create", {**body, "mode": "incremental"})
    unexport_everything(server)
    assert backup["sizeOnDisk"] < 1 << 20, "no more than what was changed"
    server.call("destroy", {"volume_id": vid})
    restored = server.call("backups/restore", {"backup": backup["backup"], "creatorID": ALICE})
    assert restored["format"] == "qcow2"
    return str(restored["volumeID"])


def as_raw(server: LiveServer, vid: str, scratch: Path) -> Path:
    """A qcow2 volume's content, as a raw file."""
    raw = scratch / f"{vid}.raw"
    image = server.directory(vid) / "data.qcow2"
    subprocess.run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", image, raw], check=True)
    return raw


async def test_a_cloud_image_becomes_the_machine_that_its_seed_describes(tmp_path: Path) -> None:
    """What boots has come the longest way: uploaded, backed up, changed, backed up, restored. So does a clone of it."""
    image = cloud_image()
    with live_server(tmp_path, "--download-allow", "127.0.0.0/8", "--bin-retention", "0") as server:
        vid, seed = uploaded(server, image), seeded(server)
        from_web = fetched(server, image, "raw")
        facts = server.info(from_web)
        assert (facts["size"], facts["format"], facts["cloudinit"], facts["bootable"]) == (
            DISK_BYTES,
            "raw",
            True,
            True,
        )
        disk = server.directory(from_web) / "data.img"
        for other in (image, server.directory(vid) / "data.qcow2"):
            subprocess.run(["qemu-img", "compare", "-f", "raw", "-F", "qcow2", disk, other], check=True)
        restored = backed_up_and_restored(server, vid, disk)
        clone = server.call("clone", {"volume_id": restored, "creatorID": ALICE})["vid"]
        root, cdrom = export(server, restored, protocol="iscsi"), export(server, seed, protocol="nbd")
        copied = export(server, clone, protocol="nbd")
        assert (root["readonly"], cdrom["readonly"]) == (False, True)
        how: dict[str, Any] = {"boots_itself": True, "memory_mib": 512, "more": NETWORK_CARD}
        async with (
            Guest(tmp_path, [*root["qemu"], *cdrom["qemu"]], **how) as guest,
            Guest(tmp_path, [*copied["qemu"], *cdrom["qemu"]], name="clone", **how) as other_guest,
        ):
            for machine in (guest, other_guest):
                await machine.wait_for(r"SEEN-BY-RUNCMD web-1$", 240)
                await machine.wait_off(60)
                assert machine.complaints() == []
        unexport_everything(server)

        for booted in (restored, clone):
            disk = as_raw(server, booted, tmp_path)
            assert set(read_file(disk, CHANGED)) == {"B"}
            assert read_file(disk, "/etc/hostname") == "web-1\n"
            assert read_file(disk, "/etc/written") == "by cloud-init\n"
            assert " 192.0.2.10/24 " in read_file(disk, "/var/lib/addresses")
            assert read_file(disk, "/var/lib/cloud/data/instance-id") == f"{seed}\n"
            told = read_file(disk, "/var/lib/cloud/data/status.json")
            assert "DataSourceNoCloud [seed=/dev/vdb]" in told
            assert told.count('"errors": []') == 5
            disk.unlink()
