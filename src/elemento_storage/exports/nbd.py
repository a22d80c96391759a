"""NBD: over TCP (``nbd``), or over a Unix socket for guests on this host (``local``).

Each export is one of the volume's storage daemon, under the export's target name; all of them are the same block node.
QEMU's NBD server knows no addresses and no passwords: without TLS whoever reaches the port and knows the name gets in.
"""

from collections.abc import Mapping
from urllib.parse import quote

from elemento_storage.engine.volume_engine import NbdExport, Transport, VolumeEngine
from elemento_storage.errors import ExportFailed
from elemento_storage.exports.attach import GuestDisk, attribute, libvirt_disk, qemu_arguments
from elemento_storage.exports.base import Attachment, Endpoint, Presence, Probe
from elemento_storage.exports.record import ExportRecord, Protocol
from elemento_storage.model import round_up_to_sector


def nbd_export(record: ExportRecord, host: str) -> NbdExport:
    """The daemon's part of an export."""
    transport = Transport.UNIX if record.protocol is Protocol.LOCAL else Transport.TCP
    return NbdExport(
        export_id=record.export_id,
        name=record.target_name,
        writable=not record.readonly,
        transport=transport,
        host=host,
        port=record.port,
    )


class NbdExporter:
    """NBD on a TCP port of the volume's own."""

    protocol = Protocol.NBD

    transport = Transport.TCP

    def __init__(self, host: str) -> None:
        self.host = host

    @property
    def pids(self) -> tuple[int, ...]:
        """See Exporter.pids. There is nothing but the engines."""
        return ()

    async def publish(self, record: ExportRecord, attachment: Attachment) -> None:
        """See Exporter.publish. The engine serves what the attachment was made for; this makes sure of it."""
        served = await attachment.engine.nbd_exports()
        if record.export_id not in served:
            raise ExportFailed("the storage daemon does not serve the export")

    async def withdraw(self, export_id: str, engine: VolumeEngine | None) -> None:
        """See Exporter.withdraw."""
        if engine is not None:
            await engine.remove_nbd(export_id)

    async def published(self, engines: Mapping[str, VolumeEngine]) -> Mapping[str, Presence]:
        """See Exporter.published."""
        found: dict[str, Presence] = {}
        for engine in engines.values():
            served = await engine.nbd_exports()
            found |= {one: Presence() for one, transport in served.items() if transport is self.transport}
        return found

    async def probe(self, record: ExportRecord, attachment: Attachment) -> Probe:
        """See Exporter.probe."""
        answer = await attachment.engine.probe_nbd(nbd_export(record, self.host))
        size_bytes = round_up_to_sector(attachment.source.size_bytes)  # as QEMU does with a raw image
        if answer.size_bytes != size_bytes:
            raise ExportFailed(f"the export has {answer.size_bytes} bytes, the volume {size_bytes}: was it grown?")
        return Probe(answer.latency_s)

    def endpoint(self, record: ExportRecord, engine: VolumeEngine, disk: GuestDisk) -> Endpoint:
        """See Exporter.endpoint."""
        name, host = record.target_name, self.host
        shown = f"[{host}]" if ":" in host else host
        blockdev = {
            "driver": "nbd",
            "server.type": "inet",
            "server.host": host,
            "server.port": record.port,
            "export": name,
            "reconnect-delay": 30,
        }
        source = (
            f"  <source protocol='nbd' name={attribute(name)}>\n"
            f"    <host name={attribute(host)} port='{record.port}'/>\n"
            "    <reconnect delay='30'/>\n"
            "  </source>"
        )
        return Endpoint(
            address={
                "host": host,
                "port": record.port,
                "export": name,
                "uri": f"nbd://{shown}:{record.port}/{quote(name)}",
            },
            qemu=qemu_arguments(disk, blockdev),
            libvirt=libvirt_disk(disk, source),
        )


class LocalExporter(NbdExporter):
    """NBD on a Unix socket, for guests on this host."""

    protocol = Protocol.LOCAL
    transport = Transport.UNIX

    def endpoint(self, record: ExportRecord, engine: VolumeEngine, disk: GuestDisk) -> Endpoint:
        """See Exporter.endpoint."""
        name, path = record.target_name, engine.socket_path
        blockdev = {
            "driver": "nbd",
            "server.type": "unix",
            "server.path": path,
            "export": name,
            "reconnect-delay": 30,
        }
        source = (
            f"  <source protocol='nbd' name={attribute(name)}>\n"
            f"    <host transport='unix' socket={attribute(path)}/>\n"
            "    <reconnect delay='30'/>\n"
            "  </source>"
        )
        return Endpoint(
            address={"socket": path, "export": name, "uri": f"nbd+unix:///{quote(name)}?socket={quote(path)}"},
            qemu=qemu_arguments(disk, blockdev),
            libvirt=libvirt_disk(disk, source),
        )
