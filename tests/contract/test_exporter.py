"""What every exporter has to do, over every format. A new one joins by a line in ``KINDS``."""

import asyncio
import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from elemento_storage.config import IscsiBacking, NbdTls
from elemento_storage.disk import Disk, Place
from elemento_storage.engine.block_node import VOLUME_NODE
from elemento_storage.engine.image_lock import lock_image
from elemento_storage.engine.volume_engine import Source, VolumeEngine, mounts_below
from elemento_storage.errors import ExportFailed, ImageInUse
from elemento_storage.exports.attach import GuestDisk
from elemento_storage.exports.base import Attachment, Endpoint, Exporter, Presence
from elemento_storage.exports.iscsi import IscsiExporter
from elemento_storage.exports.nbd import LocalExporter, NbdExporter, NbdServerSettings
from elemento_storage.exports.publisher import Publisher, Settled
from elemento_storage.exports.record import ExportRecord, Protocol, new_secret
from elemento_storage.exports.tgtd import Mode, Op, Tgtd
from elemento_storage.model import Bus, VolumeFormat
from elemento_storage.stores.directory import DirectoryStore
from tests.clients import Attach, ClientFailed, NoAnswer, QemuIo, cannot_write
from tests.live import free_port
from tests.unit.support import ALICE, BOB, assert_sound, make_volume, uid

HOST = "127.0.0.1"
MB = 1 << 20
SIZE = 8 * MB
NBD = NbdServerSettings(HOST, NbdTls.OFF, "")
PROBE_INITIATOR = "iqn.2004-10.cloud.elemento:probe:test"


@dataclass(frozen=True)
class ExporterKind:
    """An exporter to test: how it is made in a run directory with a port, and how a client uses what it offers."""

    protocol: Protocol
    make: Callable[[str, int], Exporter]
    client: Callable[[Endpoint], QemuIo] = lambda endpoint: QemuIo(endpoint.qemu)
    name: str = ""


KINDS = [
    ExporterKind(Protocol.ISCSI, lambda run, port: IscsiExporter(Tgtd(run, HOST, port), HOST, port, PROBE_INITIATOR)),
    ExporterKind(
        Protocol.ISCSI,
        lambda run, port: IscsiExporter(Tgtd(run, HOST, port, IscsiBacking.FUSE), HOST, port, PROBE_INITIATOR),
        name="iscsi-fuse",
    ),
    ExporterKind(Protocol.NBD, lambda _run, _port: NbdExporter(NBD)),
    ExporterKind(Protocol.LOCAL, lambda _run, _port: LocalExporter(NBD)),
]
FORMATS = [VolumeFormat.RAW, VolumeFormat.QCOW2]


class Rig:
    """One volume, and one exporter in front of its engine. ``restarted`` is another process on the same machine."""

    def __init__(self, kind: ExporterKind, image_format: VolumeFormat, location: Path, run_dir: str, port: int) -> None:
        self.kind, self.image_format, self.location, self.run_dir, self.port = (
            kind,
            image_format,
            location,
            run_dir,
            port,
        )
        self.volume_id = uid(0x1234)
        self.size = SIZE
        self.readonly_volume = False
        self._nbd_port = free_port()
        self._records: dict[str, ExportRecord] = {}
        self.exporter = kind.make(run_dir, port)
        exporter = self.exporter
        self.publisher = Publisher(
            run_dir,
            {kind.protocol: exporter},
            NBD,
            lambda: isinstance(exporter, IscsiExporter) and exporter.tgtd.speaks_vhost,
            uid(1),
        )

    def restarted(self) -> "Rig":
        self.publisher.release()
        other = Rig(self.kind, self.image_format, self.location, self.run_dir, self.port)
        other.size, other._records, other._nbd_port = self.size, self._records, self._nbd_port
        return other

    @property
    def engine(self) -> VolumeEngine:
        return self.publisher.engine(self.volume_id)

    @property
    def directory(self) -> Path:
        return self.location / f"vid.{self.volume_id}.elimg"

    @property
    def image(self) -> Path:
        return self.directory / self.image_format.data_file

    def source(self) -> Source:
        store, place = DirectoryStore(job_timeout_s=60), Place(str(self.directory), Disk("unused"))
        return Source(
            volume_id=self.volume_id,
            directory=str(self.directory),
            node=store.node(place, self.image_format, read_only=self.readonly_volume),
            plain_file=store.plain_file(place, self.image_format),
            size_bytes=self.size,
            disk=place.disk,
        )

    def record(self, client: str = ALICE, *, readonly: bool = False) -> ExportRecord:
        """The same one for the same client."""
        return self._records.setdefault(
            client,
            ExportRecord(
                volume_id=self.volume_id,
                client=client,
                protocol=self.kind.protocol,
                server=uid(1),
                readonly=readonly or self.readonly_volume,
                user=f"user{client[:4]}",
                secret=new_secret(),
                port=self._nbd_port if self.kind.protocol is Protocol.NBD else 0,
            ),
        )

    async def serve(self, *records: ExportRecord) -> Attachment:
        settled: Settled = await self.publisher.settle(self.source(), records)
        for failure in settled.failures.values():
            raise failure
        assert settled.attachment is not None
        return settled.attachment

    async def serve_nothing(self) -> None:
        await self.publisher.settle(self.source(), [])

    async def published(self) -> dict[str, Presence]:
        if isinstance(self.exporter, NbdExporter):
            served = await self.engine.nbd_exports()
            return {one: Presence() for one, where in served.items() if where is self.exporter.transport}
        return dict(await self.exporter.published())

    def endpoint(self, record: ExportRecord, bus: Bus = Bus.VIRTIO, *, is_cdrom: bool = False) -> Endpoint:
        disk = GuestDisk(volume_id=self.volume_id, bus=bus, is_cdrom=is_cdrom, readonly=record.readonly)
        return self.exporter.endpoint(record, self.engine, disk)

    def client(self, record: ExportRecord) -> QemuIo:
        return self.kind.client(self.endpoint(record))

    def pids(self) -> set[int]:
        return {*self.engine.pids, *self.exporter.pids}

    async def kill(self) -> None:
        """End all that serves, without a word."""
        pids = self.pids()
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        while self.pids() & pids:
            await asyncio.sleep(0.005)


def over(*chosen: VolumeFormat) -> pytest.MarkDecorator:
    """The test for every exporter, and each of these formats."""
    cases = [(kind, image_format) for kind, image_format in itertools.product(KINDS, chosen)]
    return pytest.mark.parametrize(
        "rig", [pytest.param(case, id=f"{case[0].name or case[0].protocol}-{case[1]}") for case in cases], indirect=True
    )


every_exporter = over(*FORMATS)
each_protocol = over(VolumeFormat.RAW)


@pytest.fixture
def rig(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Rig]:
    kind, image_format = request.param
    run_dir = tempfile.mkdtemp(prefix="es-contract-")
    one = Rig(kind, image_format, tmp_path, run_dir, free_port())
    make_volume(tmp_path, one.volume_id, size=SIZE, image_format=image_format)
    yield one
    for pid in one.pids():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    for mount_point in mounts_below(run_dir):
        subprocess.run(["fusermount3", "-u", "-z", mount_point], check=True)
    shutil.rmtree(run_dir)


# -- publishing ------------------------------------------------------------------------------------------------


@every_exporter
async def test_what_is_published_is_shown_and_probed(rig: Rig) -> None:
    record = rig.record()
    assert await rig.published() == {}
    attachment = await rig.serve(record)
    assert set(await rig.published()) == {record.export_id}
    assert 0 < (await rig.exporter.probe(record, attachment)).latency_s < 5


@every_exporter
async def test_publishing_again_changes_nothing_for_a_client(rig: Rig) -> None:
    record = rig.record()
    await rig.serve(record)
    pids = rig.pids()
    with rig.client(record) as client:
        client.write(0, 65536, 1)
        for _ in range(3):
            await rig.serve(record)
        assert set(await rig.published()) == {record.export_id}
        assert rig.pids() == pids
        client.write(65536, 65536, 2)
        assert client.reads(0, 65536, 1)


@every_exporter
async def test_another_instance_finds_everything(rig: Rig) -> None:
    """The server may end and start again: what it serves goes on, and the next one knows of it."""
    record = rig.record()
    await rig.serve(record)
    pids = rig.pids()
    with rig.client(record) as client:
        client.write(0, 65536, 1)
        second = rig.restarted()
        assert set(await second.published()) == {record.export_id}
        attachment = await second.serve(record)
        await second.exporter.probe(record, attachment)
        assert second.pids() == pids
        client.write(65536, 65536, 2)
        with second.client(record) as other:
            assert other.reads(0, 65536, 1)
            assert other.reads(65536, 65536, 2)
    await second.serve_nothing()
    assert await rig.published() == {}


@every_exporter
async def test_what_is_written_is_in_the_image(rig: Rig) -> None:
    record = rig.record()
    await rig.serve(record)
    with rig.client(record) as client:
        client.write(MB - 512, 4096, 7)
        client.write(SIZE - 512, 512, 8)
    await rig.serve_nothing()
    with QemuIo.on_file(rig.image, rig.image_format) as past:
        assert past.reads(MB - 512, 4096, 7)
        assert past.reads(SIZE - 512, 512, 8)
        assert past.reads(0, MB - 512, 0)
    assert_sound(rig.image, rig.image_format, SIZE)


@every_exporter
async def test_two_exports_always_see_the_same(rig: Rig) -> None:
    first, second = rig.record(ALICE), rig.record(BOB)
    await rig.serve(first, second)
    with rig.client(first) as one, rig.client(second) as two:
        for round_number in range(1, 6):
            one.write(0, 65536, round_number)
            assert two.reads(0, 65536, round_number)
            two.write(0, 65536, 100 + round_number)
            assert one.reads(0, 65536, 100 + round_number)
        await rig.exporter.withdraw(first.export_id, rig.engine)
        assert cannot_write(one, 0, 65536, 50, timeout_s=1)
        assert two.reads(0, 65536, 105)
        two.write(0, 65536, 51)


@pytest.mark.parametrize("rig", [(KINDS[0], VolumeFormat.QCOW2)], ids=["iscsi-qcow2"], indirect=True)
async def test_nodes_and_exports_come_and_go_beside_a_lun(rig: Rig) -> None:
    """What copies of a moment are made with. QEMU 10.0.2 hangs or dies of it where a LUN has the wrong thread."""
    record = rig.record()
    await rig.serve(record)
    daemon, pids = rig.engine.daemon, rig.pids()
    address = {"type": "unix", "data": {"path": rig.engine.socket_path}}
    await daemon.execute("nbd-server-start", {"addr": address, "max-connections": 0})
    with rig.client(record) as client:
        for number in range(1, 6):
            client.write(0, 65536, number)
            node = {"driver": "copy-on-read", "node-name": "above", "file": VOLUME_NODE}
            await daemon.execute("blockdev-add", node)
            export = {"type": "nbd", "id": "beside", "node-name": "above", "name": "beside", "writable": False}
            await daemon.execute("block-export-add", export)
            where = f"driver=nbd,server.type=unix,server.path={rig.engine.socket_path},export=beside,read-only=on"
            with QemuIo(Attach((), where, ())) as beside:
                assert beside.reads(0, 65536, number)
            await daemon.remove_export("beside")
            await daemon.remove_node("above")
        assert client.reads(0, 65536, 5)
    assert rig.pids() == pids


# -- withdrawing -----------------------------------------------------------------------------------------------


@every_exporter
async def test_withdrawing_shuts_a_client_out_and_leaves_nothing(rig: Rig) -> None:
    record = rig.record()
    await rig.serve(record)
    with rig.client(record) as client:
        client.write(0, 65536, 1)
        await rig.exporter.withdraw(record.export_id, rig.engine)
        assert await rig.published() == {}
        assert cannot_write(client, 0, 65536, 2, timeout_s=1)
        with pytest.raises((ClientFailed, NoAnswer)):
            rig.client(record)
    await rig.exporter.withdraw(record.export_id, rig.engine)
    await rig.exporter.withdraw(record.export_id, None)
    await rig.exporter.withdraw(uid(99), rig.engine)
    await rig.serve_nothing()
    await rig.serve_nothing()
    assert rig.engine.pids == []
    assert not os.path.exists(rig.engine.directory)
    assert mounts_below(rig.run_dir) == []
    with QemuIo.on_file(rig.image, rig.image_format) as past:
        assert past.reads(0, 65536, 1)


@every_exporter
async def test_no_account_is_kept_of_what_is_gone(rig: Rig) -> None:
    if not isinstance(rig.exporter, IscsiExporter):
        return
    record, tgtd = rig.record(), rig.exporter.tgtd
    await rig.serve(record)
    assert record.user in await tgtd.execute(Mode.ACCOUNT, Op.SHOW)
    await rig.exporter.withdraw(record.export_id, rig.engine)
    assert record.user not in await tgtd.execute(Mode.ACCOUNT, Op.SHOW)
    assert await tgtd.targets() == {}


@every_exporter
async def test_when_everything_is_gone_there_is_nothing_to_say(rig: Rig) -> None:
    """Neither looking nor withdrawing needs a daemon, and neither starts one."""
    assert await rig.published() == {}
    await rig.exporter.withdraw(rig.record().export_id, rig.engine)
    await rig.publisher.withdraw_all(rig.volume_id)
    assert rig.pids() == set()


# -- daemons that die ------------------------------------------------------------------------------------------


@every_exporter
async def test_a_client_goes_on_after_everything_was_killed(rig: Rig) -> None:
    record = rig.record()
    await rig.serve(record)
    with rig.client(record) as client:
        client.write(0, 65536, 1)
        await rig.kill()
        assert await rig.published() == {}
        attachment = await rig.serve(record)
        await rig.exporter.probe(record, attachment)
        assert set(await rig.published()) == {record.export_id}
        assert client.reads(0, 65536, 1)
        client.write(65536, 65536, 2)
        with rig.client(record) as other:
            assert other.reads(65536, 65536, 2)


@every_exporter
async def test_a_probe_tells_what_is_wrong(rig: Rig) -> None:
    record = rig.record()
    attachment = await rig.serve(record)
    await rig.kill()
    with pytest.raises(ExportFailed, match=r"cannot be reached|does not answer"):
        await rig.exporter.probe(record, attachment)
    await rig.serve(record)
    await rig.exporter.withdraw(record.export_id, rig.engine)
    with pytest.raises(ExportFailed, match=r"refuses|cannot be reached"):
        await rig.exporter.probe(record, attachment)


# -- reading only ----------------------------------------------------------------------------------------------


@every_exporter
@pytest.mark.parametrize("of_the_volume", [False, True], ids=["export", "volume"])
async def test_read_only_refuses_writes(rig: Rig, of_the_volume: bool) -> None:
    rig.readonly_volume = of_the_volume
    record = rig.record(readonly=True)
    attachment = await rig.serve(record)
    await rig.exporter.probe(record, attachment)
    before = rig.image.read_bytes()
    with rig.client(record) as client:
        assert client.reads(0, 65536, 0)
        assert cannot_write(client, 0, 65536, 1)
    # A client that ignores what it was told.
    attach = Attach.of(rig.endpoint(replace(record, readonly=False)).qemu)
    with contextlib.suppress(Exception), QemuIo(attach) as client:
        assert cannot_write(client, 0, 65536, 1)
    await rig.serve_nothing()
    assert rig.image.read_bytes() == before


# -- growing ---------------------------------------------------------------------------------------------------


@every_exporter
async def test_growth_reaches_clients(rig: Rig) -> None:
    record = rig.record()
    await rig.serve(record)
    with rig.client(record) as connected:
        connected.write(0, 65536, 1)
        for larger in (12 * MB, 24 * MB):
            await rig.engine.grow(larger)
            rig.size = larger
            attachment = await rig.serve(record)
            await rig.exporter.probe(record, attachment)
            assert connected.reads(0, 65536, 1)
            connected.succeed(f"truncate {larger}")  # QEMU looks at the disk's size again when it is told to
            assert connected.length() == larger
            connected.write(larger - 65536, 65536, 2)
            with rig.client(record) as new:
                assert new.length() == larger
                assert new.reads(larger - 65536, 65536, 2)
    await rig.serve_nothing()
    assert_sound(rig.image, rig.image_format, 24 * MB)


# -- nobody else -----------------------------------------------------------------------------------------------


@every_exporter
async def test_nobody_else_writes_to_the_image(rig: Rig) -> None:
    await rig.serve(rig.record())
    refused = subprocess.run(
        ["qemu-io", "-f", rig.image_format, "-c", "write 0 512", str(rig.image)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert refused.returncode != 0
    assert "lock" in refused.stderr
    if rig.image_format is VolumeFormat.RAW:
        with pytest.raises(ImageInUse):
            os.close(lock_image(str(rig.image), read_only=False))


@every_exporter
async def test_an_image_that_somebody_writes_to_is_not_served(rig: Rig) -> None:
    with QemuIo.on_file(rig.image, rig.image_format), pytest.raises(ImageInUse):
        await rig.serve(rig.record())
    await rig.serve(rig.record())


# -- what the client is told -----------------------------------------------------------------------------------


def start_qemu(arguments: tuple[str, ...], machine: str) -> list[dict[str, Any]]:
    """What a paused machine says of its disks when it is started with exactly these arguments."""
    argv = [
        "qemu-system-x86_64",
        "-S",
        "-nodefaults",
        "-display",
        "none",
        "-machine",
        f"{machine},accel=tcg",
        "-m",
        "64",
    ]
    commands = '{"execute":"qmp_capabilities"}\n{"execute":"query-block"}\n{"execute":"quit"}\n'
    done = subprocess.run(
        [*argv, "-qmp", "stdio", *arguments], input=commands, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    [disks] = [
        answer["return"]
        for line in done.stdout.splitlines()
        if isinstance((answer := json.loads(line)).get("return"), list)
    ]
    return list(disks)


@each_protocol
@pytest.mark.parametrize("bus", Bus)
async def test_qemu_takes_the_arguments_as_they_are(rig: Rig, bus: Bus) -> None:
    record = rig.record()
    await rig.serve(record)
    arguments = rig.endpoint(record, bus).qemu
    for machine in ("pc", "q35"):
        [disk] = start_qemu(arguments, machine)
        assert disk["inserted"]["image"]["virtual-size"] == SIZE
        assert disk["inserted"]["ro"] is False
        assert disk["inserted"]["cache"] == {"writeback": True, "direct": True, "no-flush": False}


@each_protocol
@pytest.mark.parametrize("bus", Bus)
@pytest.mark.parametrize("is_cdrom", [False, True], ids=["disk", "cdrom"])
async def test_qemu_takes_what_is_read_only(rig: Rig, bus: Bus, is_cdrom: bool) -> None:
    rig.readonly_volume = True
    record = rig.record(readonly=True)
    await rig.serve(record)
    [disk] = start_qemu(rig.endpoint(record, bus, is_cdrom=is_cdrom).qemu, "pc")
    assert disk["inserted"]["ro"] is True
    assert disk["removable"] is (is_cdrom and bus is not Bus.VIRTIO)  # virtio has no CD-ROM drives


def validate(disk: str, tmp_path: Path) -> None:
    """libvirt's own schema has nothing to say against it."""
    domain = (
        "<domain type='qemu'><name>guest</name><memory>65536</memory><os><type arch='x86_64'>hvm</type></os>"
        f"<devices>{disk}</devices></domain>"
    )
    path = tmp_path / "domain.xml"
    # Which Debian 12's libvirt does not know yet, and ignores.
    path.write_text(domain.replace("<reconnect delay='30'/>", ""))
    done = subprocess.run(["virt-xml-validate", str(path), "domain"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr + disk


@each_protocol
async def test_libvirt_takes_the_disk(rig: Rig, tmp_path: Path) -> None:
    for bus, readonly, is_cdrom in itertools.product(Bus, (False, True), (False, True)):
        record = replace(rig.record(), readonly=readonly or is_cdrom)
        disk = rig.endpoint(record, bus, is_cdrom=is_cdrom).libvirt
        validate(disk, tmp_path)
        root = ET.fromstring(disk)
        assert (root.find("readonly") is not None) == record.readonly
        target = root.find("target")
        assert target is not None
        assert target.get("bus") == (bus.value if not record.readonly or is_cdrom else readable_bus(bus))
        assert root.get("device") == ("cdrom" if is_cdrom and bus is not Bus.VIRTIO else "disk")


def readable_bus(bus: Bus) -> str:
    """Neither QEMU nor libvirt has hard disks on SATA and IDE that can only be read."""
    return "scsi" if bus in (Bus.SATA, Bus.IDE) else bus.value


@each_protocol
async def test_ipv6_addresses_are_written_as_such(rig: Rig, tmp_path: Path) -> None:
    exporter: Exporter
    match rig.kind.protocol:
        case Protocol.ISCSI:
            exporter = IscsiExporter(Tgtd(rig.run_dir, "::1", 3260), "::1", 3260, PROBE_INITIATOR)
        case Protocol.NBD:
            exporter = NbdExporter(NbdServerSettings("::1", NbdTls.OFF, ""))
        case _:
            return
    disk = GuestDisk(volume_id=rig.volume_id, bus=Bus.VIRTIO, is_cdrom=False, readonly=False)
    endpoint = exporter.endpoint(rig.record(), rig.engine, disk)
    assert "[::1]:" in str(endpoint.address["uri"])
    validate(endpoint.libvirt, tmp_path)
