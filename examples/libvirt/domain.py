#!/usr/bin/env python3
"""A libvirt domain on volumes of a storage server, without a storage pool: prints its XML.

    examples/libvirt/domain.py web-1 --client UID VOLUME VOLUME | virsh define /dev/stdin
    virsh start web-1

The volumes are exported to the client, which is the host that libvirt runs on; exporting again is no error, so the
same line again gives the same domain. What has to be done on the host before (libvirt's secret for iSCSI) is printed to
standard error; with --prepare it is done. The first volume is the one to boot from. When the domain is gone for
good, call `unexport` for each volume. Where the server came as a Debian package: PYTHONPATH=/usr/lib/elemento-storage.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree as ET

from elemento_storage.client import Client, ClientError

#: Names of disks by bus; the same volume gets the same name in each run.
_PREFIXES = {"virtio": "vd", "scsi": "sd", "sata": "sd", "ide": "hd"}


def domain(name: str, disks: list[str], *, kind: str, memory_mib: int, cpus: int, console: str | None) -> ET.Element:
    """A machine with these ``<disk>`` elements, as the server gave them, under names that do not clash."""
    root = ET.Element("domain", type=kind)
    ET.SubElement(root, "name").text = name
    ET.SubElement(root, "memory", unit="MiB").text = str(memory_mib)
    ET.SubElement(root, "vcpu").text = str(cpus)
    system = ET.SubElement(root, "os")
    ET.SubElement(system, "type", arch="x86_64").text = "hvm"
    features = ET.SubElement(root, "features")
    ET.SubElement(features, "acpi")
    devices = ET.SubElement(root, "devices")
    taken: dict[str, int] = {}
    for number, text in enumerate(disks):
        disk = ET.fromstring(text)  # noqa: S314  from our own server, over a connection that we trust with our disks
        target = disk.find("target")
        if target is None:
            raise SystemExit("the server gave a disk without a target")
        prefix = _PREFIXES[target.attrib["bus"]]
        target.attrib["dev"] = f"{prefix}{chr(ord('a') + taken.get(prefix, 0))}"
        taken[prefix] = taken.get(prefix, 0) + 1
        if number == 0:
            ET.SubElement(disk, "boot", order="1")
        devices.append(disk)
    if console is None:
        ET.SubElement(devices, "serial", type="pty")
    else:
        ET.SubElement(ET.SubElement(devices, "serial", type="file"), "source", path=console)
    ET.indent(root)
    return root


def prepare(commands: list[str]) -> None:
    """Run what the server said has to be done on this host, in a directory that only we can read."""
    with tempfile.TemporaryDirectory() as directory:
        for command in commands:
            subprocess.run(["sh", "-ec", command], check=True, cwd=directory, stdout=sys.stderr)


def main() -> int:
    """The command; its exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("name", help="of the domain")
    parser.add_argument("volumes", nargs="+", metavar="VOLUME", help="UID, or UID=PROTOCOL (iscsi, nbd)")
    parser.add_argument("--client", help="the uid of this host; with a token it is the token's")
    parser.add_argument("--server", default="http://127.0.0.1:7772")
    parser.add_argument("--ca", help="PEM file of the authority that signed the server's certificate")
    parser.add_argument("--token-file", type=Path)
    parser.add_argument("--type", default="kvm", choices=["kvm", "qemu"], help="qemu: emulated")
    parser.add_argument("--memory", type=int, default=1024, metavar="MIB")
    parser.add_argument("--cpus", type=int, default=1)
    parser.add_argument("--console", metavar="FILE", help="where to keep what the serial console says")
    parser.add_argument("--prepare", action="store_true", help="do what has to be done on this host")
    arguments = parser.parse_args()
    token = arguments.token_file.read_text().strip() if arguments.token_file else None
    disks, commands = [], []
    try:
        with Client(arguments.server, client=arguments.client, token=token, ca=arguments.ca) as storage:
            for one in arguments.volumes:
                volume_id, _, protocol = one.partition("=")
                export = storage.exports.create(volume_id, protocol=protocol or "nbd")
                disks.append(export.libvirt)
                commands += export.prepare
    except ClientError as error:
        print(f"domain.py: {error}", file=sys.stderr)
        return 1
    if arguments.prepare:
        prepare(commands)
    elif commands:
        print("# first, on the host that libvirt runs on:", *commands, sep=os.linesep, file=sys.stderr)
    xml = domain(
        arguments.name,
        disks,
        kind=arguments.type,
        memory_mib=arguments.memory,
        cpus=arguments.cpus,
        console=arguments.console,
    )
    print(ET.tostring(xml, encoding="unicode"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
