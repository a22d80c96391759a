"""Makes what is served of one volume what its records say: the same steps for an export, an unexport and a repair."""

import contextlib
import fcntl
import logging
import os
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import msgspec

from elemento_storage.engine.volume_engine import Lun, Source, VolumeEngine
from elemento_storage.errors import ExportFailed, StorageError
from elemento_storage.exports.base import Attachment, Exporter
from elemento_storage.exports.nbd import NbdServerSettings
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
    through_daemon: bool = False  #: no export may have the image itself, as long as there are any


@dataclass
class Settled:
    """What came of it: the way to the bytes, and why some exports are not served."""

    attachment: Attachment | None
    failures: dict[str, StorageError] = field(default_factory=dict)


class Publisher:
    """All engines of this server, below one run directory, and the exporters in front of them."""

    def __init__(
        self,
        run_directory: str,
        exporters: Mapping[Protocol, Exporter],
        nbd: NbdServerSettings,
        luns_are_shared: Callable[[], bool],
        server_id: str,
    ) -> None:
        self.exporters = exporters
        self._run_directory = run_directory
        self._server_id = server_id
        self._claim: int | None = None
        self._volumes = f"{run_directory}/v"
        self._nbd = nbd
        self._luns_are_shared = luns_are_shared
        self._engines: dict[str, VolumeEngine] = {}
        self._one_at_a_time = KeyedLocks()
        self._kept: set[str] = set()  # volumes that stay open, exported or not

    def claim(self) -> None:
        """Make the run directory ours for as long as this process lives. Raises ExportFailed when it is another's.

        Two servers in one directory would each withdraw what the other serves.
        """
        if self._claim is not None:
            return
        try:
            os.makedirs(self._volumes, mode=0o700, exist_ok=True)
            descriptor = os.open(f"{self._run_directory}/lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ExportFailed(f"the run-dir {self._run_directory} cannot be used: {error.strerror}") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            owner = os.read(descriptor, 64).decode("ascii", "replace").strip()
            if owner not in ("", self._server_id) and os.listdir(self._volumes):
                raise ExportFailed(
                    f"the run-dir {self._run_directory} belongs to another server ({owner}), whose exports may still "
                    "run: give this one a run-dir of its own, or the state-dir it had"
                )
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, self._server_id.encode(), 0)
        except BlockingIOError:
            os.close(descriptor)
            raise ExportFailed(
                f"another server works with the run-dir {self._run_directory}: give this one its own"
            ) from None
        except BaseException:
            os.close(descriptor)
            raise
        self._claim = descriptor

    def release(self) -> None:
        """Let the next process have the run directory; what is served stays."""
        if self._claim is not None:
            os.close(self._claim)
            self._claim = None

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

    # -- volumes that are open for another reason than exports -----------------------------------------------

    async def keep(self, source: Source, records: Sequence[ExportRecord]) -> VolumeEngine:
        """Open the volume in its engine, and keep it open until ``let_go``; all its exports go through the engine.

        Under ``changing``. Raises ImageInUse, ImageDamaged, ExportFailed.
        """
        self.claim()
        self._kept.add(source.volume_id)
        engine = self.engine(source.volume_id)
        if records:
            await self.move_to_daemon(source, records)
        else:
            self._write_state(engine, _state(source, (), through_daemon=True))
            await engine.start(source)
        return engine

    async def let_go(self, source: Source, records: Sequence[ExportRecord]) -> None:
        """The end of ``keep``, which may have been another process's. Without exports the engine ends.

        Exports go on, those that can have the image itself without the engine. Under ``changing``. Idempotent. Raises
        ExportFailed.
        """
        self._kept.discard(source.volume_id)
        state = self._read_state(source.volume_id)
        moved = state is not None and state.through_daemon
        if state is not None and moved:
            self._write_state(self.engine(source.volume_id), msgspec.structs.replace(state, through_daemon=False))
        await self.settle(source, records, moving_back=moved)

    def is_kept(self, volume_id: str) -> bool:
        """Whether a volume stays open without exports."""
        return volume_id in self._kept

    def served(self) -> dict[str, ServedVolume | None]:
        """Every volume that has a run directory; None for one that cannot be understood. Blocks."""
        found: dict[str, ServedVolume | None] = {}
        with contextlib.suppress(FileNotFoundError):
            for name in os.listdir(self._volumes):
                if normalise_uid(name) == name:
                    found[name] = self._read_state(name)
        return found

    async def settle(self, source: Source, records: Sequence[ExportRecord], *, moving_back: bool = False) -> Settled:
        """Serve exactly these records. What cannot be served is in ``failures``; the others are.

        ``moving_back``: from the daemon to the image itself, where that can be. Raises ExportFailed when something that
        shall go does not.
        """
        self.claim()
        engine = self.engine(source.volume_id)
        wanted = {record.export_id: record for record in records}
        await self.withdraw_others(source.volume_id, records)
        if not wanted:
            if source.volume_id in self._kept:
                await engine.serve_nothing()
                self._write_state(engine, _state(source, (), through_daemon=True))
            else:
                await engine.stop()
            return Settled(None)
        try:
            source.directory.encode()
        except UnicodeEncodeError:
            why = ExportFailed("the location's name is not UTF-8, and QEMU opens no such path: rename it")
            return Settled(None, dict.fromkeys(wanted, why))
        known = self._read_state(source.volume_id)
        through_daemon = source.volume_id in self._kept or (known is not None and known.through_daemon)
        self._write_state(engine, _state(source, records, through_daemon=through_daemon))
        try:
            may_be_plain = not through_daemon and (moving_back or not await engine.is_serving())
            attachment = await self._attach(engine, source, records, may_be_plain=may_be_plain)
        except StorageError as error:
            return Settled(None, dict.fromkeys(wanted, error))
        except OSError as error:
            why = ExportFailed(f"the image cannot be reached: {error.strerror or error}")
            return Settled(None, dict.fromkeys(wanted, why))
        reached("export.attached")
        settled = Settled(attachment)
        for record in records:
            try:
                await self.exporters[record.protocol].publish(record, attachment)
            except StorageError as error:
                settled.failures[record.export_id] = error
        if moving_back and attachment.is_plain and not settled.failures:
            await engine.serve_nothing()  # tgtd has let go of it
        return settled

    async def move_to_daemon(self, source: Source, records: Sequence[ExportRecord]) -> None:
        """Have every byte of these exports go through the storage daemon, until all are gone; sessions go on.

        Raises ExportFailed.
        """
        state = self._read_state(source.volume_id)
        if state is not None and not state.through_daemon:
            # Written down: a daemon that dies comes back the same way, or requests that wait for it would fail.
            self._write_state(self.engine(source.volume_id), msgspec.structs.replace(state, through_daemon=True))
        settled = await self.settle(source, records)
        for failure in settled.failures.values():
            raise failure

    async def withdraw_all(self, volume_id: str) -> None:
        """Serve nothing of a volume any more. Raises ExportFailed."""
        engine = self.engine(volume_id)
        await self.withdraw_others(volume_id, ())
        await engine.stop()
        self._engines.pop(volume_id, None)

    async def sweep(self, volume_id: str) -> None:
        """Remove a run directory that cannot be understood, unless something lives in it. Raises ExportFailed."""
        engine = self.engine(volume_id)
        if engine.pids:
            raise ExportFailed(
                f"volume {volume_id} is served by pids {engine.pids}, and what its run directory says of it is not "
                "understood: was it made by a newer version?"
            )
        await self.withdraw_all(volume_id)

    async def withdraw_others(
        self, volume_id: str, records: Sequence[ExportRecord], *, leaving: str | None = None
    ) -> None:
        """Serve nothing but these of a volume. Raises ExportFailed.

        ``leaving`` is an export that has to be gone whatever the run directory says: where that knows nothing of it,
        every daemon is asked.
        """
        engine, wanted = self.engine(volume_id), {record.export_id: record for record in records}
        state = self._read_state(volume_id)
        served = dict(state.exports) if state else {}
        for export_id, protocol in served.items():
            if export_id not in wanted or wanted[export_id].protocol is not protocol:
                await self.exporters[protocol].withdraw(export_id, engine)
                reached("export.withdrawn")
        if leaving is not None and leaving not in served and leaving not in wanted:
            for exporter in self.exporters.values():
                await exporter.withdraw(leaving, engine)

    async def _attach(
        self, engine: VolumeEngine, source: Source, records: Sequence[ExportRecord], *, may_be_plain: bool
    ) -> Attachment:
        kinds = {PATH_OF[record.protocol] for record in records}
        if len(kinds) > 1:
            raise ExportFailed("the records of this volume want two paths to its bytes at once: unexport one of them")
        if kinds == {PathKind.SOCKET}:
            await engine.serve_nbd(source, [self._nbd.export(record, engine) for record in records])
            return Attachment(engine, source)
        # smbd serves as the user who logged in, and its writers and tgtd's have to go through one and the same file.
        with_smb = any(record.protocol is Protocol.SMB for record in records)
        is_limited = any(record.limits.throttle_limits() for record in records)
        is_viewed = await engine.is_viewed()
        # A path that is in use stays: to change it would hold up whoever uses it, for nothing.
        if source.plain_file is not None and may_be_plain and not (with_smb or is_limited):
            path = await engine.show_plain(source)
            return Attachment(engine, source, {record.export_id: path for record in records}, is_plain=True)
        if self._luns_are_shared() and not (with_smb or is_viewed):
            return Attachment(engine, source, await engine.serve_luns(source, [_lun(record) for record in records]))
        limits = records[0].limits.throttle_limits()
        path = await engine.show_view(source, everybody=with_smb, limits=limits)
        return Attachment(engine, source, {record.export_id: path for record in records}, is_viewed=True)

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


def _state(source: Source, records: Sequence[ExportRecord], *, through_daemon: bool) -> ServedVolume:
    return ServedVolume(
        volume_id=source.volume_id,
        directory=source.directory,
        exports={record.export_id: record.protocol for record in records},
        through_daemon=through_daemon,
    )


def _lun(record: ExportRecord) -> Lun:
    return Lun(record.export_id, not record.readonly, record.limits.throttle_limits())
