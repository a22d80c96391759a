"""The whole way of a cloud image: in by URL and by tus, with a seed of its own, out over exports, and booted."""

import hashlib
import subprocess
from pathlib import Path

from tusclient.client import TusClient

from tests.e2e.moving import export
from tests.e2e.test_cloud_metadata import FIRST, send
from tests.exporting import unexport_everything
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
    """The image as a raw volume, by a published client of tus."""
    metadata = {"creatorID": ALICE, "name": "web-1", "bootable": "true", "format": "raw"}
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


async def test_a_cloud_image_becomes_the_machine_that_its_seed_describes(tmp_path: Path) -> None:
    image = cloud_image()
    with live_server(tmp_path, "--download-allow", "127.0.0.0/8") as server:
        vid, seed = uploaded(server, image), seeded(server)
        from_web = fetched(server, image, "qcow2")
        facts = server.info(from_web)
        assert (facts["size"], facts["format"], facts["cloudinit"], facts["bootable"]) == (
            DISK_BYTES,
            "qcow2",
            True,
            True,
        )
        disk = server.directory(vid) / "data.img"
        for other in (image, server.directory(from_web) / "data.qcow2"):
            subprocess.run(["qemu-img", "compare", "-f", "raw", "-F", "qcow2", disk, other], check=True)
        root, cdrom = export(server, vid, protocol="iscsi"), export(server, seed, protocol="nbd")
        assert (root["readonly"], cdrom["readonly"]) == (False, True)
        disks = [*root["qemu"], *cdrom["qemu"]]
        async with Guest(tmp_path, disks, boots_itself=True, memory_mib=512, more=NETWORK_CARD) as guest:
            await guest.wait_for(r"SEEN-BY-RUNCMD web-1$", 240)
            await guest.wait_off(60)
            assert guest.complaints() == []
        unexport_everything(server)

        assert read_file(disk, "/etc/hostname") == "web-1\n"
        assert read_file(disk, "/etc/written") == "by cloud-init\n"
        assert " 192.0.2.10/24 " in read_file(disk, "/var/lib/addresses")
        assert read_file(disk, "/var/lib/cloud/data/instance-id") == f"{seed}\n"
        told = read_file(disk, "/var/lib/cloud/data/status.json")
        assert "DataSourceNoCloud [seed=/dev/vdb]" in told
        assert told.count('"errors": []') == 5
