"""The libvirt example, run as a user would: a domain is defined from what exports answer, boots, and writes."""

import subprocess
import sys
from pathlib import Path

from tests.clients import eventually
from tests.guest.build import BOOT_DISK_BYTES, images
from tests.libvirtd import private_libvirtd
from tests.live import ALICE, LiveServer

EXAMPLE = Path(__file__).parents[2] / "examples" / "libvirt" / "domain.py"


def test_a_domain_boots_from_volumes_without_a_pool(server: LiveServer) -> None:
    boots = server.create("boots", size=BOOT_DISK_BYTES / 10**9, format="qcow2", bootable=True)
    data = server.create("data", size=0.01)
    with private_libvirtd() as libvirt:
        disk = images().new_boot_disk(libvirt.directory / "boot.raw", "BOOTED FROM AN EXPORT")
        image = server.directory(boots) / "data.qcow2"
        subprocess.run(["qemu-img", "convert", "-n", "-f", "raw", "-O", "qcow2", disk, image], check=True)
        console = libvirt.directory / "console"
        argv: list[str | Path] = [
            *(sys.executable, EXAMPLE, "web-1", boots, f"{data}=iscsi", "--client", ALICE, "--prepare"),
            *("--server", f"http://127.0.0.1:{server.port}", "--type", "qemu", "--memory", "96", "--console", console),
        ]
        made = [
            subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60, env=libvirt.environment)
            for _ in range(2)
        ]
        assert made[0].returncode == 0, made[0].stderr
        assert made[0].stdout == made[1].stdout  # the second time changes nothing
        libvirt.virsh("define", "/dev/stdin", given=made[0].stdout)
        libvirt.virsh("start", "web-1")
        assert [line.split() for line in libvirt.virsh("domblklist", "web-1").splitlines()] == [
            ["vda", next(one for one in made[0].stdout.split('"') if one.startswith("iqn."))],
            ["vdb", server.call("exports", {"volume_id": data})["exports"][0]["iqn"] + "/1"],
        ]
        eventually(lambda: console.exists() and "BOOTED FROM AN EXPORT" in console.read_text(errors="replace"), 120)
        exports = server.call("exports")["exports"]
        assert {one["protocol"]: one["state"] for one in exports} == {"nbd": "healthy", "iscsi": "healthy"}
        eventually(lambda: libvirt.virsh("domstate", "web-1").strip() == "shut off", 60)
        libvirt.virsh("undefine", "web-1")
        for vid in (boots, data):
            server.call("unexport", {"volume_id": vid, "client_uid": ALICE})


def test_what_cannot_be_exported_is_said(server: LiveServer) -> None:
    told = subprocess.run(
        [sys.executable, EXAMPLE, "x", "0" * 32, "--client", ALICE, "--server", f"http://127.0.0.1:{server.port}"],
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    assert (told.returncode, told.stdout) == (1, "")
    assert "no volume" in told.stderr
