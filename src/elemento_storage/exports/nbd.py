"""NBD: over TCP (``nbd``), or over a Unix socket for guests on this host (``local``).

Each export is one of the volume's storage daemon, under the export's target name; all of them are the same block node.
QEMU's NBD server knows no addresses and no passwords: without TLS whoever reaches the port and knows the name gets in.
"""

import asyncio
import contextlib
import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final
from urllib.parse import quote

from elemento_storage.config import NbdTls
from elemento_storage.engine.volume_engine import NbdExport, Tls, Transport, VolumeEngine
from elemento_storage.errors import ExportFailed
from elemento_storage.exports.attach import GuestDisk, attribute, libvirt_disk, qemu_arguments
from elemento_storage.exports.base import Attachment, Endpoint, Presence, Probe
from elemento_storage.exports.record import ExportRecord, Protocol
from elemento_storage.model import round_up_to_sector

_TCP_ESTABLISHED: Final = "01"
_UNIX_CONNECTED: Final = "03"
_LIBVIRT_TLS: Final = {NbdTls.OFF: "", NbdTls.PSK: "", NbdTls.X509: " tls='yes'"}


@dataclass(frozen=True)
class NbdServerSettings:
    """Where NBD over TCP is offered, and how it is protected."""

    host: str
    tls: NbdTls
    tls_directory: str

    def export(self, record: ExportRecord, engine: VolumeEngine) -> NbdExport:
        """The engine's part of an export."""
        transport = Transport.UNIX if record.protocol is Protocol.LOCAL else Transport.TCP
        return NbdExport(
            export_id=record.export_id,
            name=record.target_name,
            writable=not record.readonly,
            transport=transport,
            host=self.host,
            port=record.port,
            limits=record.limits.throttle_limits(),
            tls=self._tls(record, engine) if transport is Transport.TCP else None,
        )

    def _tls(self, record: ExportRecord, engine: VolumeEngine) -> Tls | None:
        if self.tls is NbdTls.X509:
            return Tls({"qom-type": "tls-creds-x509", "dir": self.tls_directory, "verify-peer": True})
        if self.tls is NbdTls.PSK:
            credentials = {"qom-type": "tls-creds-psk", "dir": engine.keys_directory}
            return Tls(credentials, f"{record.export_id}:{pre_shared_key(record)}")
        return None


def pre_shared_key(record: ExportRecord) -> str:
    """The key of an export, in hex as GnuTLS wants it: 256 bits made of the export's secret."""
    return hashlib.sha256(record.secret.encode()).hexdigest()


class NbdExporter:
    """NBD on a TCP port of the volume's own."""

    protocol = Protocol.NBD

    transport = Transport.TCP

    def __init__(self, settings: NbdServerSettings) -> None:
        self.settings = settings

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

    async def published(self) -> Mapping[str, Presence]:
        """See Exporter.published."""
        return {}

    async def probe(self, record: ExportRecord, attachment: Attachment) -> Probe:
        """See Exporter.probe."""
        answer = await attachment.engine.probe_nbd(self.settings.export(record, attachment.engine))
        size_bytes = round_up_to_sector(attachment.source.size_bytes)  # as QEMU does with a raw image
        if answer.size_bytes != size_bytes:
            raise ExportFailed(f"the export has {answer.size_bytes} bytes, the volume {size_bytes}: was it grown?")
        return Probe(answer.latency_s, await self._sessions(attachment.engine))

    async def _sessions(self, engine: VolumeEngine) -> int | None:
        served = [one for one, where in (await engine.nbd_exports()).items() if where is self.transport]
        address = engine.address(self.transport)
        if len(served) != 1 or address is None:
            return None  # QEMU takes the connections of all exports at one address
        return (await asyncio.to_thread(_connections))[address]

    def endpoint(self, record: ExportRecord, engine: VolumeEngine, disk: GuestDisk) -> Endpoint:
        """See Exporter.endpoint."""
        name, host = record.target_name, self.settings.host
        shown = f"[{host}]" if ":" in host else host
        blockdev: dict[str, object] = {
            "driver": "nbd",
            "server.type": "inet",
            "server.host": host,
            "server.port": record.port,
            "export": name,
            "reconnect-delay": 30,
        }
        tls = self.settings.tls
        objects: tuple[Mapping[str, object], ...] = ()
        credentials: dict[str, str] = {}
        prepare: tuple[str, ...] = ()
        if tls is not NbdTls.OFF:
            tls_id = f"tls-{record.export_id[:20]}"
            blockdev["tls-creds"] = tls_id
            options = {"qom-type": f"tls-creds-{tls.value}", "id": tls_id, "endpoint": "client"}
            if tls is NbdTls.PSK:
                directory = f"/run/elemento-psk/{record.export_id}"
                credentials = {"identity": record.export_id, "psk": pre_shared_key(record)}
                prepare = (
                    f"(umask 077 && mkdir -p {directory} && "
                    f"echo {record.export_id}:{credentials['psk']} >{directory}/keys.psk)",
                )
                objects = ({**options, "dir": directory, "username": record.export_id},)
            else:
                objects = ({**options, "dir": "/etc/pki/qemu", "verify-peer": "on"},)
        source = (
            f"  <source protocol='nbd' name={attribute(name)}{_LIBVIRT_TLS[tls]}>\n"
            f"    <host name={attribute(host)} port='{record.port}'/>\n"
            "    <reconnect delay='30'/>\n"
            "  </source>"
        )
        scheme = "nbd" if tls is NbdTls.OFF else "nbds"
        return Endpoint(
            address={
                "host": host,
                "port": record.port,
                "export": name,
                "tls": tls.value,
                "uri": f"{scheme}://{shown}:{record.port}/{quote(name)}",
            },
            credentials=credentials,
            qemu=qemu_arguments(disk, blockdev, objects),
            # libvirt knows no pre-shared keys for NBD: there, QEMU's arguments are the way.
            libvirt="" if tls is NbdTls.PSK else libvirt_disk(disk, source),
            prepare=prepare,
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


def _connections() -> Counter[str]:
    """Connections that are open, by the port or the path of the socket that took them (proc(5)). Blocks."""
    found: Counter[str] = Counter()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(FileNotFoundError), open(table, encoding="ascii") as file:
            for line in file.readlines()[1:]:
                _, local, _, state = line.split()[:4]
                found[str(int(local.rpartition(":")[2], 16))] += state == _TCP_ESTABLISHED
    with open("/proc/net/unix", encoding="utf-8", errors="surrogateescape") as file:
        lines = [line.split() for line in file.readlines()[1:]]
    found.update(words[7] for words in lines if len(words) > 7 and words[5] == _UNIX_CONNECTED)
    return found
