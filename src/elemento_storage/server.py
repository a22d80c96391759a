"""The composition root: builds the parts, starts them, serves, stops them."""

import asyncio
import contextlib
import logging
import os
import secrets
import signal
import socket
import sys
import time

import uvicorn

from elemento_storage.api.app import Api
from elemento_storage.api.auth import Authenticator
from elemento_storage.api.connection import Connection
from elemento_storage.catalog.catalog import Catalog
from elemento_storage.ceph.pool import Pools
from elemento_storage.config import Auth, Settings
from elemento_storage.disk import Disk
from elemento_storage.engine import qemu_img
from elemento_storage.errors import ConfigurationError, ToolMissing
from elemento_storage.exports.base import Exporter
from elemento_storage.exports.identity import server_identity
from elemento_storage.exports.iscsi import IscsiExporter
from elemento_storage.exports.nbd import LocalExporter, NbdExporter, NbdServerSettings
from elemento_storage.exports.publisher import Publisher
from elemento_storage.exports.reconciler import ExportStatus, Reconciler, Wanted
from elemento_storage.exports.record import ExportRecord, Protocol
from elemento_storage.exports.smb import SmbExporter
from elemento_storage.exports.smbd import Smbd
from elemento_storage.exports.tgtd import Tgtd
from elemento_storage.feed import Feed
from elemento_storage.jobs import Jobs
from elemento_storage.mdns import Announcer
from elemento_storage.model import Volume, VolumeFormat
from elemento_storage.service.backup_restore import Restoring
from elemento_storage.service.backup_schedules import BackupSchedules
from elemento_storage.service.backup_sessions import BackupSessions
from elemento_storage.service.backups import Backups
from elemento_storage.service.clone import Cloning
from elemento_storage.service.cloud_metadata import CloudMetadata
from elemento_storage.service.convert import Converting
from elemento_storage.service.core import Core, announce
from elemento_storage.service.create import Creating
from elemento_storage.service.downloads import Downloading
from elemento_storage.service.export_markers import ExportMarkers
from elemento_storage.service.exporting import Exporting, announce_export, source_of
from elemento_storage.service.history import History
from elemento_storage.service.idempotency import IdempotencyKeys
from elemento_storage.service.importing import Importing
from elemento_storage.service.intake import Intake
from elemento_storage.service.iso_library import IsoLibrary
from elemento_storage.service.live_snapshots import LiveSnapshots
from elemento_storage.service.migration import Migrating
from elemento_storage.service.moments import Moments
from elemento_storage.service.replace_image import ReplacingImages
from elemento_storage.service.resize import Resizing
from elemento_storage.service.services import Services
from elemento_storage.service.snapshots import Snapshotting
from elemento_storage.service.tokens import TokenStore
from elemento_storage.service.transient_snapshots import TransientSnapshots
from elemento_storage.service.uploading import Uploading
from elemento_storage.service.volume_data import VolumeData
from elemento_storage.service.volumes import Volumes
from elemento_storage.serving import HttpServer, address_of, listen, log_to_stderr, new_loop, notify
from elemento_storage.stores.base import Store
from elemento_storage.stores.directory import DirectoryStore
from elemento_storage.stores.rbd import RbdStore

log = logging.getLogger(__name__)

_STOP_GRACE_S = 10.0


class Server:
    """All parts of one server process."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.feed = Feed()
        self.tokens = TokenStore(settings.state_dir)
        self._state_disk = Disk("state")

        def on_change(before: Volume | None, after: Volume | None) -> None:
            announce(self.feed, before, after)

        pools = Pools(_identity(settings), settings.lease)
        self.catalog = Catalog(settings, on_change, pools)
        files = DirectoryStore(job_timeout_s=settings.job_timeout)
        stores: dict[VolumeFormat, Store] = {
            VolumeFormat.RAW: files,
            VolumeFormat.QCOW2: files,
            VolumeFormat.ISO: files,
            VolumeFormat.RBD: RbdStore(pools),
        }
        markers = ExportMarkers(_identity(settings), settings.lease)
        snapshots = dict.fromkeys(files.capabilities.snapshots, files)
        core = Core(settings, self.catalog, stores, snapshots, Jobs(self.feed), self.feed, markers)
        publisher = self._build_publisher(core)
        exporting = self._build_exports(core, publisher)
        creating, intake = Creating(core), Intake(core)
        moments = Moments(core, publisher)
        backups = Backups(core, moments)
        live = LiveSnapshots(core, publisher)
        transient = TransientSnapshots(core, live)
        snapshotting = Snapshotting(core, live, transient)
        self.services = Services(
            core=core,
            creating=creating,
            isos=IsoLibrary(creating),
            metadata=CloudMetadata(core, creating),
            volumes=Volumes(core),
            resizing=Resizing(core, exporting),
            converting=Converting(core),
            cloning=Cloning(core, creating, transient, snapshotting),
            replacing=ReplacingImages(core),
            importing=Importing(core, intake),
            intake=intake,
            downloading=Downloading(core, intake, creating),
            data=VolumeData(core),
            uploading=Uploading(core, intake),
            exporting=exporting,
            migrating=Migrating(core, exporting, settings.state_dir, self._state_disk),
            snapshotting=snapshotting,
            backups=backups,
            restoring=Restoring(core, backups),
            backup_sessions=BackupSessions(core, moments),
            backup_schedules=BackupSchedules(core, backups),
            idempotency=IdempotencyKeys(settings.state_dir, self._state_disk),
            history=History(core, lambda: self.reconciler.daemons),
        )
        self.api = Api(self.services, Authenticator(settings.auth, self.tokens))

    def _build_publisher(self, core: Core) -> Publisher:
        settings = self.settings
        host = settings.export_address
        probe_initiator = f"iqn.2004-10.cloud.elemento:probe:{secrets.token_hex(16)}"
        nbd = NbdServerSettings(host, settings.nbd_tls, settings.nbd_tls_dir)
        tgtd = Tgtd(settings.run_dir, host, settings.iscsi_port, settings.iscsi_backing)
        exporters: dict[Protocol, Exporter] = {
            Protocol.ISCSI: IscsiExporter(tgtd, host, settings.iscsi_port, probe_initiator),
            Protocol.NBD: NbdExporter(nbd),
            Protocol.LOCAL: LocalExporter(nbd),
            Protocol.SMB: SmbExporter(Smbd(settings.run_dir, host, settings.smb_port)),
        }
        return Publisher(settings.run_dir, exporters, nbd, lambda: tgtd.speaks_vhost, core.markers.server_id)

    def _build_exports(self, core: Core, publisher: Publisher) -> Exporting:
        def on_status(wanted: Wanted, record: ExportRecord, status: ExportStatus) -> None:
            announce_export(self.feed, wanted, record, status)

        self.reconciler = Reconciler(
            self.settings,
            self.catalog,
            publisher,
            lambda *one: source_of(core, *one),
            core.markers.server_id,
            on_status,
        )
        return Exporting(core, publisher, self.reconciler)

    async def start(self) -> None:
        """Read the disk and put right what is left of dead servers. Raises ConfigurationError."""
        try:
            await self.services.idempotency.start()
            await self.services.migrating.read()
        except OSError as error:
            raise ConfigurationError(
                f"the state directory {self.settings.state_dir} cannot be used: {error.strerror}; "
                "give another one with --state-dir"
            ) from error
        if self.settings.auth is Auth.TOKENS and not self.tokens.tokens():
            log.warning("there are no tokens yet, nobody can call: `elemento-storage token create` makes one")
        started = time.monotonic()
        await self.catalog.start()
        count = sum(len(location.entries) for location in self.catalog.locations.by_name.values())
        log.info(
            "%d volumes in %d locations below %s, read in %.2f s",
            count,
            len(self.catalog.locations.by_name),
            self.settings.root,
            time.monotonic() - started,
        )
        await self.services.data.sessions.start()
        self.reconciler.start()
        self.services.migrating.start()
        self.services.backup_schedules.start()
        self.services.uploading.start()
        self.services.history.start()
        try:
            log.info("qemu-img %s", await qemu_img.version())
        except ToolMissing as error:
            log.error(error.message)

    async def stop(self) -> None:
        """Roll back what runs, leave the locations."""
        self.api.stopping.set()
        await self.services.backup_schedules.stop()
        await self.services.history.stop()
        await self.services.uploading.stop()
        await self.services.core.jobs.stop(_STOP_GRACE_S)
        await self.services.backup_sessions.stop()
        await self.services.data.sessions.close()
        await self.services.migrating.stop()
        await self.reconciler.stop()
        await self.catalog.stop()
        self._state_disk.close()


def _identity(settings: Settings) -> str:
    try:
        return server_identity(settings.state_dir)
    except OSError as error:
        raise ConfigurationError(
            f"the state directory {settings.state_dir} cannot be used: {error.strerror}; "
            "give another one with --state-dir"
        ) from error


def run(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT. Raises ConfigurationError."""
    log_to_stderr(settings.log_level)
    os.umask(0o077)  # other people's disks are nobody else's business on this machine either
    # The loop is not closed and the interpreter not ended the usual way: both would wait for threads that hang in a
    # dead file system. Everything that has to be put away was put away by then.
    new_loop().run_until_complete(_serve(settings))
    logging.shutdown()
    sys.stdout.flush()
    os._exit(0)


async def _serve(settings: Settings) -> None:
    listener = listen(settings.listen_host, settings.listen_port)
    server = Server(settings)
    config = uvicorn.Config(
        server.api,
        http=Connection,
        lifespan="off",
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=75,
        ssl_certfile=settings.tls_certificate or None,
        ssl_keyfile=settings.tls_key or None,
        timeout_graceful_shutdown=int(_STOP_GRACE_S),
    )
    try:
        config.load()
    except OSError as error:
        raise ConfigurationError(f"the TLS certificate or key cannot be used: {error}") from error
    await server.start()
    http = HttpServer(config)

    def stop() -> None:
        http.should_exit = True
        server.api.stopping.set()
        server.services.uploading.break_off()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    scheme = "https" if settings.tls_certificate else "http"
    log.info("listening on %s://%s (%s)", scheme, address_of(listener), settings.auth.value)
    announcer = _announcer(settings, listener)
    notify("READY=1")
    try:
        with contextlib.suppress(asyncio.CancelledError):
            await http.serve(sockets=[listener])
    finally:
        notify("STOPPING=1")
        if announcer is not None:
            await announcer.close()
        await server.stop()
        log.info("stopped")


def _announcer(settings: Settings, listener: socket.socket) -> Announcer | None:
    if not settings.announce:
        return None
    host, port = listener.getsockname()[:2]
    announcer = Announcer(settings.announce, host, port, tls=bool(settings.tls_certificate))
    announcer.start()
    return announcer
