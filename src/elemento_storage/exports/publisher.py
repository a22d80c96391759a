"""Makes what is served of one volume what its records say: the same steps for an export, an unexport and a repair."""

import contextlib
import logging
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import msgspec

from elemento_storage.engine.volume_engine import Source, VolumeEngine
from elemento_storage.errors import ExportFailed, StorageError
from elemento_storage.exports.base import Attachment, Exporter
from elemento_storage.exports.nbd import nbd_export
from elemento_storage.exports.record import PATH_OF, ExportRecord, PathKind, Protocol
from elemento_storage.faultpoints import reached
from elemento_storage.keyed_locks import KeyedLocks
from elemento_storage.model import normalise_uid

log = logging.getLogger(__name__)

_STATE_FILE: Final = "engine.json"


class ServedVolume(msgspec.Struct, frozen=True, kw_only=True):
    """What a volume's run directory says is, or may be, served of it. Written before anything is published."""

    volume_id: str
    directory: str
    exports: dict[str, Protocol]


@dataclass
class Settled:
    """What came of it: the way to the bytes, and why some exports are not served."""

    attachment: Attachment | None
    failures: dict[str, StorageError] = field(default_factory=dict)


class Publisher:
    """All engines of this server, below one run directory, and the exporters in front of them."""

    def __init__(self, run_directory: str, exporters: Mapping[Protocol, Exporter], host: str) -> None:
        self.exporters = exporters
        self._volumes = f"{run_directory}/v"
        self._host = host
        self._engines: dict[str, VolumeEngine] = {}
        self._one_at_a_time = KeyedLocks()

    def engine(self, volume_id: str) -> VolumeEngine:
        """The engine of a volume, running or not."""
        if volume_id not in self._engines:
            self._engines[volume_id] = VolumeEngine(f"{self._volumes}/{volume_id}", volume_id)
        return self._engines[volume_id]

    @contextlib.asynccontextmanager
    async def changing(self, volume_id: str) -> AsyncIterator[None]:
        """Held around every look at a volume's records that ends in ``settle``."""
        async with self._one_at_a_time.hold(volume_id), self.engine(volume_id).conversation():
            yield

    def served(self) -> dict[str, ServedVolume | None]:
        """Every volume that has a run directory; None for one that cannot be understood. Blocks."""
        found: dict[str, ServedVolume | None] = {}
        with contextlib.suppress(FileNotFoundError):
            for name in os.listdir(self._volumes):
                if normalise_uid(name) == name:
                    found[name] = self._read_state(name)
        return found

    async def settle(self, source: Source, records: Sequence[ExportRecord]) -> Settled:
        """Serve exactly these records. What cannot be served is in ``failures``; the others are.

        Raises ExportFailed when something that shall go does not, ImageInUse, ImageDamaged.
        """
        engine = self.engine(source.volume_id)
        wanted = {record.export_id: record for record in records}
        await self._withdraw_others(engine, wanted)
        if not wanted:
            await engine.stop()
            return Settled(None)
        state = {export_id: record.protocol for export_id, record in wanted.items()}
        self._write_state(engine, ServedVolume(volume_id=source.volume_id, directory=source.directory, exports=state))
        attachment = await self._attach(engine, source, records)
        reached("export.attached")
        settled = Settled(attachment)
        for record in records:
            try:
                await self.exporters[record.protocol].publish(record, attachment)
            except StorageError as error:
                settled.failures[record.export_id] = error
        return settled

    async def withdraw_all(self, volume_id: str) -> None:
        """Serve nothing of a volume any more. Raises ExportFailed."""
        engine = self.engine(volume_id)
        await self._withdraw_others(engine, {})
        await engine.stop()
        self._engines.pop(volume_id, None)

    async def _withdraw_others(self, engine: VolumeEngine, wanted: Mapping[str, ExportRecord]) -> None:
        state = self._read_state(engine.volume_id)
        for export_id, protocol in (state.exports if state else {}).items():
            if export_id not in wanted or wanted[export_id].protocol is not protocol:
                await self.exporters[protocol].withdraw(export_id, engine)
                reached("export.withdrawn")

    async def _attach(self, engine: VolumeEngine, source: Source, records: Sequence[ExportRecord]) -> Attachment:
        kinds = {PATH_OF[record.protocol] for record in records}
        if len(kinds) > 1:
            raise ExportFailed("the records of this volume want two paths to its bytes at once: unexport one of them")
        if kinds == {PathKind.SOCKET}:
            await engine.serve_nbd(source, [nbd_export(record, self._host) for record in records])
            return Attachment(engine, source)
        # smbd serves as the user who logged in, and its writers and tgtd's have to go through one and the same file.
        with_smb = any(record.protocol is Protocol.SMB for record in records)
        limits = records[0].limits.throttle_limits()
        path = await engine.show_file(source, plain=not with_smb and not limits, everybody=with_smb, limits=limits)
        return Attachment(engine, source, path)

    def _read_state(self, volume_id: str) -> ServedVolume | None:
        try:
            with open(f"{self._volumes}/{volume_id}/{_STATE_FILE}", "rb") as file:
                return msgspec.json.decode(file.read(), type=ServedVolume)
        except (FileNotFoundError, msgspec.DecodeError):
            return None

    def _write_state(self, engine: VolumeEngine, state: ServedVolume) -> None:
        if self._read_state(engine.volume_id) == state:
            return
        os.makedirs(f"{engine.directory}/bridge", mode=0o700, exist_ok=True)
        path = f"{engine.directory}/{_STATE_FILE}"
        with open(f"{path}.new", "wb") as file:
            file.write(msgspec.json.encode(state))
        os.rename(f"{path}.new", path)
