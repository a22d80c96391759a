import pytest

from elemento_storage.exports.attach import GuestDisk, libvirt_disk, qemu_arguments
from elemento_storage.model import Bus
from tests.unit.support import uid


def disk(bus: Bus, *, readonly: bool = False, is_cdrom: bool = False) -> GuestDisk:
    return GuestDisk(volume_id=uid(7), bus=bus, is_cdrom=is_cdrom, readonly=readonly)


def drivers(one: GuestDisk) -> list[str]:
    """What is put into the machine, controllers first."""
    arguments = qemu_arguments(one, {"driver": "null-co"})
    devices = [value for name, value in zip(arguments[::2], arguments[1::2], strict=True) if name == "-device"]
    return [device.partition(",")[0].removeprefix("driver=") for device in devices]


@pytest.mark.parametrize(
    ("bus", "writable", "readonly", "cdrom"),
    [
        (Bus.VIRTIO, ["virtio-blk-pci"], ["virtio-blk-pci"], ["virtio-blk-pci"]),
        (Bus.SCSI, ["virtio-scsi-pci", "scsi-hd"], ["virtio-scsi-pci", "scsi-hd"], ["virtio-scsi-pci", "scsi-cd"]),
        (Bus.SATA, ["ich9-ahci", "ide-hd"], ["virtio-scsi-pci", "scsi-hd"], ["ich9-ahci", "ide-cd"]),
        (Bus.IDE, ["ide-hd"], ["virtio-scsi-pci", "scsi-hd"], ["ide-cd"]),
    ],
)
def test_every_bus_has_a_device_that_works(
    bus: Bus, writable: list[str], readonly: list[str], cdrom: list[str]
) -> None:
    assert drivers(disk(bus)) == writable
    assert drivers(disk(bus, readonly=True)) == readonly
    assert drivers(disk(bus, readonly=True, is_cdrom=True)) == cdrom


@pytest.mark.parametrize("bus", Bus)
def test_libvirt_and_qemu_agree_on_the_bus(bus: Bus) -> None:
    for readonly, is_cdrom in ((False, False), (True, False), (True, True)):
        one = disk(bus, readonly=readonly, is_cdrom=is_cdrom)
        xml, devices = libvirt_disk(one, "  <source/>"), drivers(one)
        assert f"bus='{one.attached_as.value}'" in xml
        assert ("device='cdrom'" in xml) == devices[-1].endswith("-cd")
        assert (one.attached_as is Bus.SCSI) == (devices[0] == "virtio-scsi-pci")


def test_commas_do_not_end_a_value() -> None:
    arguments = qemu_arguments(disk(Bus.VIRTIO), {"driver": "nbd", "server.path": "/run/a,b"})
    assert "server.path=/run/a,,b," in arguments[1]


def test_names_fit_into_what_qemu_allows() -> None:
    assert len(disk(Bus.VIRTIO).node_name) <= 31
    assert len(disk(Bus.VIRTIO).serial) == 20
