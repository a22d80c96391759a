"""How a hypervisor attaches what was exported: arguments of QEMU and XML of libvirt, ready to be pasted."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final
from xml.sax.saxutils import quoteattr

from elemento_storage.model import Bus

_TARGET_DEVICE: Final = {Bus.VIRTIO: "vda", Bus.SCSI: "sda", Bus.SATA: "sda", Bus.IDE: "hda"}


@dataclass(frozen=True)
class GuestDisk:
    """How a guest shall see the volume."""

    volume_id: str
    bus: Bus
    is_cdrom: bool
    readonly: bool

    @property
    def node_name(self) -> str:
        """A name for QEMU's block node (31 characters at most)."""
        return f"volume-{self.volume_id[:24]}"

    @property
    def serial(self) -> str:
        """The serial number the guest sees: the same over every protocol, so that a moved disk is the same disk."""
        return self.volume_id[:20]

    @property
    def attached_as(self) -> Bus:
        """The bus it is attached to: QEMU has no hard disk for SATA and IDE that can only be read."""
        only_hard_disks = self.bus in (Bus.SATA, Bus.IDE) and not self.is_cdrom
        return Bus.SCSI if only_hard_disks and self.readonly else self.bus

    @property
    def in_a_drive(self) -> bool:
        """Whether the guest sees a CD-ROM drive; virtio has none, an ISO there is a disk that can only be read."""
        return self.is_cdrom and self.bus is not Bus.VIRTIO


def qemu_arguments(
    disk: GuestDisk, blockdev: Mapping[str, object], objects: tuple[Mapping[str, object], ...] = ()
) -> tuple[str, ...]:
    """``-object``, ``-blockdev`` and ``-device`` for one disk.

    ``cache.direct``: the host that runs the guest keeps no copy of its own, which live migration needs; the device
    still tells the guest of a volatile write cache, so that it flushes.
    """
    arguments: list[str] = []
    for one in objects:
        arguments += ["-object", _joined(one)]
    node = {"node-name": disk.node_name, **blockdev, "cache.direct": "on", "discard": "unmap"}
    if disk.readonly:
        node["read-only"] = "on"
    arguments += ["-blockdev", _joined(node)]
    controller = f"bus-{disk.volume_id[:20]}"
    drive = {"drive": disk.node_name, "serial": disk.serial}
    bus = disk.attached_as
    kind = "cd" if disk.in_a_drive else "hd"
    if bus is Bus.VIRTIO:
        device: dict[str, object] = {"driver": "virtio-blk-pci", **drive}
    elif bus is Bus.SCSI:
        arguments += ["-device", _joined({"driver": "virtio-scsi-pci", "id": controller})]
        device = {"driver": f"scsi-{kind}", "bus": f"{controller}.0", **drive}
    elif bus is Bus.SATA:
        arguments += ["-device", _joined({"driver": "ich9-ahci", "id": controller})]
        device = {"driver": f"ide-{kind}", "bus": f"{controller}.0", **drive}
    else:
        device = {"driver": f"ide-{kind}", **drive}
    if not disk.in_a_drive:
        device["write-cache"] = "on"
    return (*arguments, "-device", _joined(device))


def _joined(options: Mapping[str, object]) -> str:
    """QEMU's own syntax: commas in values are doubled."""
    return ",".join(f"{key}={value}".replace(",", ",,") for key, value in options.items())


def libvirt_disk(disk: GuestDisk, source: str, *, network: bool = True, cache: str = "none") -> str:
    """A ``<disk>`` element (libvirt.org/formatdomain.html) around a ``<source>``."""
    lines = [
        f"<disk type='{'network' if network else 'file'}' device='{'cdrom' if disk.in_a_drive else 'disk'}'>",
        f"  <driver name='qemu' type='raw' cache='{cache}' discard='unmap'/>",
        source,
        f"  <target dev='{_TARGET_DEVICE[disk.attached_as]}' bus='{disk.attached_as.value}'/>",
        f"  <serial>{disk.serial}</serial>",
    ]
    if disk.readonly or disk.is_cdrom:
        lines.append("  <readonly/>")
    return "\n".join([*lines, "</disk>"])


def attribute(value: object) -> str:
    """A quoted XML attribute."""
    return quoteattr(str(value))
