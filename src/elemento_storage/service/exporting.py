"""Putting a volume within reach of a client, and taking it away again.

The marker is the journal: it is written before anything is served and removed after nothing is served any more. What a
crash leaves in between is put right by the reconciler, by the same ``settle`` as here.
"""

import contextlib
import ipaddress
import logging
import os
import re
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import msgspec

from elemento_storage.catalog.catalog import Held
from elemento_storage.catalog.linked_clones import require_no_clones
from elemento_storage.catalog.location import Location
from elemento_storage.catalog.locations import os_errors
from elemento_storage.catalog.markers import remove_marker, write_marker
from elemento_storage.engine import qemu_img
from elemento_storage.engine.block_node import BlockNode
from elemento_storage.engine.volume_engine import Source
from elemento_storage.errors import (
    ExportDiffers,
    ExportFailed,
    ImageDamaged,
    InvalidValue,
    NotExportable,
    ProtocolsExclude,
    StorageError,
    ToolFailed,
    VolumeExported,
    VolumeNotFound,
)
from elemento_storage.exports.attach import GuestDisk
from elemento_storage.exports.base import Endpoint
from elemento_storage.exports.publisher import Publisher
from elemento_storage.exports.reconciler import ExportStatus, Orphan, Reconciler, Wanted
from elemento_storage.exports.record import (
    PATH_OF,
    ExportRecord,
    Limits,
    PathKind,
    Protocol,
    client_of,
    export_id,
    new_secret,
)
from elemento_storage.faultpoints import reached
from elemento_storage.feed import Audience, Feed
from elemento_storage.model import Volume, VolumeFormat, marker_name, utc_now
from elemento_storage.service.access import Actor
from elemento_storage.service.core import Core
from elemento_storage.service.export_markers import Marker
from elemento_storage.service.export_rules import MAY_EXPORT, Verdict
from elemento_storage.service.iso_library import require_content
from elemento_storage.undo import Reverter

log = logging.getLogger(__name__)

_INITIATOR: Final = re.compile(r"(iqn\.[0-9]{4}-[0-9]{2}\.|eui\.|naa\.)[A-Za-z0-9.:_-]{1,200}", re.ASCII)
_IS_LOCKED: Final = re.compile(r'Failed to get (shared )?"[a-z ]+" lock')
_MOST_ADDRESSES: Final = 32
# An image is checked before it is served if that takes a moment: the tables of so much data are 8 MB per 64 GB.
_CHECKED_BYTES: Final = 64 * 10**9


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """How a volume shall be exported; None is as it is already, or the default."""

    protocol: Protocol | None = None
    readonly: bool | None = None
    initiator: str | None = None
    addresses: tuple[str, ...] | None = None
    limits: Limits | None = None


@dataclass(frozen=True)
class ExportView:
    """An export as callers see it."""

    volume: Volume
    client: str
    record: ExportRecord | None  #: None: made by a server whose markers say nothing
    here: bool
    fresh: bool  #: touched within the lease
    status: ExportStatus | None
    endpoint: Endpoint | None


class Exporting:
    """The use cases export, unexport, exports, and growing what is exported."""

    def __init__(self, core: Core, publisher: Publisher, reconciler: Reconciler) -> None:
        self._core = core
        self._catalog = core.catalog
        self._markers = core.markers
        self._publisher = publisher
        self._reconciler = reconciler
        self._ports_in_hand: set[int] = set()  # of exports that are being made

    # -- export --------------------------------------------------------------------------------------------

    async def export(self, actor: Actor, volume_id: str, client: str, options: ExportOptions) -> ExportView:
        """Serve a volume to a client; the same again when it is served already.

        Raises VolumeNotFound, NotExportable, VolumeWaiting, ProtocolsExclude, ExportDiffers, ImageInUse, ImageDamaged,
        ExportFailed …
        """
        options = check_options(options)
        async with (
            self._catalog.hold(volume_id, actor.require_see, live=True) as held,
            self._publisher.changing(volume_id),
        ):
            markers = await self._markers.of(held)
            own = self._markers.own_records(markers)
            known = next((marker for marker in markers if marker.client == client), None)
            if known is not None and known.record in own:
                assert known.record is not None
                require_same(known.record, options)
                record = known.record
                if options.limits is not None and options.limits != record.limits:
                    record = await self._set_limits(held, own, record, options.limits)
                    known = replace(known, record=record)
                await self._serve(held, [record if one.client == client else one for one in own], record)
            else:
                self._require_exportable(held, client, markers, known)
                record = self.new_record(held.volume, client, options, own)
                self._ports_in_hand.add(record.port)
                try:
                    require_one_path(record, own)
                    require_shared_limits(record, own)
                    await self.check_image(held, own)
                    await self.add(await self._for(record, held), own, record)
                finally:
                    self._ports_in_hand.discard(record.port)
                known = Marker(marker_name(client, volume_id), client, record, fresh=True)
            volume = await held.reload()
            assert known.record is not None
            return self.view(volume, known)

    async def _for(self, record: ExportRecord, held: Held) -> Held:
        """The volume as it is to be served; what linked clones stand on, to nobody who could write."""
        if record.readonly:
            return held
        await require_no_clones(held)
        return replace(held, volume=await held.reload()) if held.volume.has_clones else held

    async def _set_limits(
        self, held: Held, own: Sequence[ExportRecord], record: ExportRecord, limits: Limits
    ) -> ExportRecord:
        changed: ExportRecord = msgspec.structs.replace(record, limits=limits)
        require_shared_limits(changed, [one for one in own if one != record])
        place, name = held.place, marker_name(record.client, record.volume_id)
        with os_errors(held.location):
            await place.disk.run(write_marker, place.directory, name, changed.encode())
        return changed

    def _require_exportable(self, held: Held, client: str, markers: list[Marker], known: Marker | None) -> None:
        meta = held.volume.meta
        if known is not None and known.fresh:
            raise ExportDiffers("another server exports the volume to this client: unexport it there first")
        exported = any(self._markers.counts(marker) for marker in markers)
        verdict = MAY_EXPORT[meta.private, client == meta.creator_id, meta.shareable, exported]
        if verdict is Verdict.HIDDEN:
            raise VolumeNotFound(held.volume.volume_id)
        if verdict is Verdict.NO:
            raise NotExportable(
                "the volume is exported already and is not shareable: unexport it first",
                volume_id=held.volume.volume_id,
            )
        require_content(held.volume)

    def new_record(
        self, volume: Volume, client: str, options: ExportOptions, own: Sequence[ExportRecord]
    ) -> ExportRecord:
        """The record of a new export."""
        protocol = options.protocol or Protocol.ISCSI
        with_credentials = protocol in (Protocol.ISCSI, Protocol.SMB)
        return ExportRecord(
            volume_id=volume.volume_id,
            client=client,
            protocol=protocol,
            server=self._markers.server_id,
            host=os.uname().nodename,
            created=utc_now(),
            readonly=volume.meta.readonly or volume.meta.format is VolumeFormat.ISO or bool(options.readonly),
            initiator=options.initiator,
            addresses=options.addresses or (),
            user=f"v{client_of(client, volume.volume_id)[:15]}" if with_credentials else "",
            secret=new_secret() if with_credentials or protocol is Protocol.NBD else "",
            port=self._port(own) if protocol is Protocol.NBD else 0,
            limits=options.limits or Limits(),
        )

    def _port(self, own: Sequence[ExportRecord]) -> int:
        for record in own:
            if record.port:
                return record.port
        taken = self._ports_in_hand | {
            record.port for wanted in self._reconciler.wanted.values() for record in wanted.records
        }
        host = self._core.settings.export_address
        for port in self._core.settings.nbd_port_range:
            if port not in taken and _is_free(host, port):
                return port
        raise ExportFailed("all ports of nbd-ports are taken: give the server more of them")

    async def check_image(self, held: Held, own: Sequence[ExportRecord]) -> None:
        """Refuse an image whose tables are damaged, before a guest finds out. Raises ImageDamaged."""
        volume = held.volume
        is_open = bool(own)
        if volume.meta.format is not VolumeFormat.QCOW2 or is_open or volume.allocated_bytes > _CHECKED_BYTES:
            return
        path = f"{held.place.directory}/{volume.meta.format.data_file}"
        try:
            findings = await qemu_img.check(path, volume.meta.format)
        except ToolFailed as error:
            if _IS_LOCKED.search(error.stderr):
                return  # somebody has it open: starting the engine says so
            raise ImageDamaged("the image cannot be read; look at it with qemu-img check", findings={}) from error
        if findings.corruptions:
            raise ImageDamaged(
                f"qemu-img check finds {findings.corruptions} corruptions: repair a copy of the image with "
                "qemu-img check -r all, or restore a backup",
                findings={"corruptions": findings.corruptions, "leaks": findings.leaks},
            )

    def changing(self, volume_id: str) -> contextlib.AbstractAsyncContextManager[None]:
        """Held around every change of a volume's exports."""
        return self._publisher.changing(volume_id)

    async def add(self, held: Held, own: list[ExportRecord], record: ExportRecord) -> None:
        """Record an export and serve it; nothing is left of it when that fails. Raises ExportFailed …"""
        place, name = held.place, marker_name(record.client, record.volume_id)
        async with Reverter() as revert:
            with os_errors(held.location):
                await place.disk.run(write_marker, place.directory, name, record.encode())
                revert.add(lambda: place.disk.run(remove_marker, place.directory, name))
            revert.add(lambda: self._publisher.settle(self.source(held), own))
            await self._serve(held, [*own, record], record)
            revert.commit()
        reached("export.served")

    async def _serve(self, held: Held, records: Sequence[ExportRecord], record: ExportRecord) -> None:
        """Serve, and use the one export as its client would before anybody is told that it works."""
        settled = await self._publisher.settle(self.source(held), records)
        if record.export_id in settled.failures:
            raise settled.failures[record.export_id]
        wanted = Wanted(held.location, held.volume, tuple(records))
        self._reconciler.want(held.volume.volume_id, wanted)
        assert settled.attachment is not None
        failure = await self._reconciler.probe(wanted, record, settled.attachment, {})
        if failure is not None:
            raise failure
        self._reconciler.watch()

    # -- unexport ------------------------------------------------------------------------------------------

    async def unexport(self, actor: Actor, volume_id: str, client: str) -> Volume:
        """Take the volume from a client; nothing if it has none. Raises VolumeNotFound, ExportFailed …"""

        def require_known(volume: Volume) -> None:
            # A client may give up what it has, also of a volume that has become private since.
            if actor.client != client or marker_name(client, volume_id) not in volume.markers:
                actor.require_see(volume)

        async with (
            self._catalog.hold(volume_id, require_known, live=True) as held,
            self._publisher.changing(volume_id),
        ):
            markers = await self._markers.of(held)
            known = next((marker for marker in markers if marker.client == client), None)
            own = self._markers.own_records(markers)
            if actor.client != client:
                actor.require_change(held.volume)
            if known is not None and known.fresh and known.record not in own:
                raise VolumeExported("another server exports the volume: unexport it there", volume_id=volume_id)
            await self.withdraw(held, client, [record for record in own if record.client != client])
            if known is not None:
                with os_errors(held.location):
                    await held.place.disk.run(remove_marker, held.place.directory, known.name)
            return await held.reload()

    async def withdraw(self, held: Held, client: str, remaining: Sequence[ExportRecord]) -> None:
        """Serve no more than these; the client has no way in any more when this returns.

        That what remains cannot be served now is no reason to let in who shall go: the reconciler sees to it.
        """
        source = self.source(held)
        leaving = export_id(client, source.volume_id)
        await self._publisher.withdraw_others(source.volume_id, remaining, leaving=leaving)
        try:
            settled = await self._publisher.settle(source, remaining)
        except StorageError as error:
            if not remaining:
                raise
            log.error("volume %s: its other exports are not served now: %s", source.volume_id, error)
        else:
            for failure in settled.failures.values():
                log.error("volume %s: another export of it is not served now: %s", source.volume_id, failure)
        still = Wanted(held.location, held.volume, tuple(remaining)) if remaining else None
        self._reconciler.want(held.volume.volume_id, still)
        self._reconciler.watch()

    # -- growing -------------------------------------------------------------------------------------------

    async def require_growable(self, held: Held) -> None:
        """Raises VolumeExported when the volume is open somewhere that cannot make it larger."""
        markers = await self._markers.of(held)
        own = self._markers.own_records(markers)
        if any(marker.fresh and marker.record not in own for marker in markers):
            raise VolumeExported("the volume is exported by a server that is not this one: resize it there")
        if own and held.volume.meta.readonly:
            raise VolumeExported("the volume is exported read-only: unexport it first")

    async def grow(self, held: Held, size_bytes: int) -> bool:
        """Grow a volume through the engine that has it open; False when none has. Raises ExportFailed."""
        async with self._publisher.changing(held.volume.volume_id):
            own = self._markers.own_records(await self._markers.of(held))
            if not own:
                return False
            engine = self._publisher.engine(held.volume.volume_id)
            await engine.start(self.source(held))
            await engine.grow(size_bytes)
            reached("resize.engine-grown")
            source = self.source_of(held.location, await held.reload())
            settled = await self._publisher.settle(source, own)
            for failure in settled.failures.values():
                raise failure
            return True

    # -- looking -------------------------------------------------------------------------------------------

    async def exports(self, actor: Actor) -> list[ExportView]:
        """Every export that the actor may know of: of volumes it owns, and those made for it."""
        found = []
        for location in self._catalog.locations.answering():
            for entry in list(location.entries.values()):
                volume = entry.volume
                if not volume.markers:
                    continue
                found += [
                    self.view(volume, marker)
                    for marker in await self._markers.read(location, volume)
                    if actor.client is None or actor.client in (volume.meta.creator_id, marker.client)
                ]
        return found

    @property
    def problem(self) -> str | None:
        """Why this server can serve nothing at all."""
        return self._reconciler.problem

    def watched(self) -> list[tuple[ExportRecord, ExportStatus]]:
        """What this server is to serve, and how it is."""
        return [
            (record, self._status(record)) for wanted in self._reconciler.wanted.values() for record in wanted.records
        ]

    def _status(self, record: ExportRecord) -> ExportStatus:
        status = self._reconciler.status.get(record.export_id) or ExportStatus()
        return status.as_of_now(self._core.settings.lease)

    def orphans(self) -> list[Orphan]:
        """What was served at the last look although nobody asked for it."""
        return self._reconciler.orphans

    def source(self, held: Held) -> Source:
        """A volume that is held, as its engine needs it."""
        return self.source_of(held.location, held.volume)

    def source_of(self, location: Location, volume: Volume) -> Source:
        """A volume as its engine needs it."""
        return source_of(self._core, location, volume)

    def view(self, volume: Volume, marker: Marker) -> ExportView:
        """An export as its callers see it."""
        record = marker.record
        here = record is not None and record.server == self._markers.server_id
        endpoint = None
        if record is not None and here:
            disk = GuestDisk(
                volume_id=volume.volume_id,
                bus=volume.meta.bus,
                is_cdrom=volume.meta.format is VolumeFormat.ISO,
                readonly=record.readonly,
            )
            engine = self._publisher.engine(volume.volume_id)
            endpoint = self._publisher.exporters[record.protocol].endpoint(record, engine, disk)
        return ExportView(
            volume=volume,
            client=marker.client,
            record=record,
            here=here,
            fresh=marker.fresh,
            status=self._status(record) if record is not None and here else None,
            endpoint=endpoint,
        )


def source_of(core: Core, location: Location, volume: Volume) -> Source:
    """A volume as its engine needs it."""
    place, image_format = location.place(volume.volume_id), volume.meta.format
    # What linked clones stand on is not even opened for writing.
    is_parent = volume.has_clones or volume.volume_id in location.children
    read_only = volume.meta.readonly or image_format is VolumeFormat.ISO or is_parent
    store = core.store(image_format)
    try:
        node = store.node(place, image_format, read_only=read_only, below=core.image(location, volume).below)
    except ImageDamaged as error:
        node = BlockNode((), read_only, problem=error.message)
    return Source(
        volume_id=volume.volume_id,
        directory=place.directory,
        node=node,
        plain_file=store.plain_file(place, image_format),
        size_bytes=volume.size_bytes,
        disk=place.disk,
    )


def announce_export(feed: Feed, wanted: Wanted, record: ExportRecord, status: ExportStatus) -> None:
    """Tell the volume's owner how its export is now; to whom it is made is nobody else's business."""
    feed.publish(
        "export",
        record.volume_id,
        before=None,
        after=Audience(owner=wanted.volume.meta.creator_id, private=True),
        client_uid=record.client,
        protocol=record.protocol.value,
        healthy=status.healthy,
        reason=status.reason,
    )


def require_same(record: ExportRecord, options: ExportOptions) -> None:
    """Raises ExportDiffers when something else is asked for than what there is."""
    asked: Mapping[str, tuple[object, object]] = {
        "protocol": (options.protocol, record.protocol),
        "readonly": (options.readonly or None, record.readonly or None),
        "initiator": (options.initiator, record.initiator),
        "addresses": (options.addresses, record.addresses),
    }
    for key, (wanted, present) in asked.items():
        if wanted is not None and wanted != present:
            raise ExportDiffers(
                f"the volume is exported to this client with another '{key}': unexport it first", key=key
            )


def require_one_path(record: ExportRecord, others: Sequence[ExportRecord]) -> None:
    """Raises ProtocolsExclude when the others reach the bytes on the other path."""
    for other in others:
        if PATH_OF[other.protocol] is not PATH_OF[record.protocol]:
            raise ProtocolsExclude(
                f"the volume is exported over {other.protocol}, and {record.protocol} would reach its bytes on another "
                "path: two clients would not see the same data. Use nbd and local together, or iscsi and smb",
                protocol=other.protocol.value,
            )


def require_shared_limits(record: ExportRecord, others: Sequence[ExportRecord]) -> None:
    """Raises ExportDiffers when exports that go through one file would have different limits."""
    if PATH_OF[record.protocol] is PathKind.FILE and any(other.limits != record.limits for other in others):
        raise ExportDiffers(
            "over iscsi and smb the limits are those of the volume, and its other exports have different ones: "
            "give the same 'limits', or use nbd",
            key="limits",
        )


def check_options(options: ExportOptions) -> ExportOptions:
    """The same with addresses as tgtd writes them. Raises InvalidValue for what the protocol cannot do."""
    if options.limits is not None and options.limits.problem:
        raise InvalidValue(f"'limits': {options.limits.problem}", key="limits")
    protocol = options.protocol or Protocol.ISCSI
    if options.initiator is not None:
        if protocol is not Protocol.ISCSI:
            raise InvalidValue(
                f"'initiator' has no meaning for {protocol}: only iscsi knows initiators", key="initiator"
            )
        if not _INITIATOR.fullmatch(options.initiator):
            raise InvalidValue(
                "'initiator' has to be an iSCSI name such as iqn.1993-08.org.debian:host", key="initiator"
            )
    if options.addresses:
        if protocol not in (Protocol.ISCSI, Protocol.SMB):
            raise InvalidValue(
                f"'addresses' cannot be kept out over {protocol}: QEMU's NBD server knows no addresses", key="addresses"
            )
        if options.initiator is not None:
            raise InvalidValue(
                "'initiator' and 'addresses' together: tgtd lets in who matches one of them, not both; give one. "
                "CHAP is asked for in any case",
                key="addresses",
            )
        if len(options.addresses) > _MOST_ADDRESSES:
            raise InvalidValue(f"'addresses' has more than {_MOST_ADDRESSES} entries", key="addresses")
        return replace(options, addresses=tuple(_normal_address(address) for address in options.addresses))
    return options


def _normal_address(address: str) -> str:
    # A netmask or the name of an interface would be taken and mean something else to tgtd.
    try:
        network = ipaddress.ip_network(address)
        if "%" in address:
            raise ValueError(address)
    except ValueError:
        raise InvalidValue(
            f"'addresses' holds {address[:60]!r}, it has to be an IP address or network", key="addresses"
        ) from None
    return str(network.network_address) if network.num_addresses == 1 else str(network)


def _is_free(host: str, port: int) -> bool:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True
