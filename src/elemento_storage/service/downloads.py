"""Downloads: a transport of the intake that fetches from the web, as a job that can be cancelled.

The place belongs to this server and goes with it; the lock file in it tells whoever removes it which job that ends.
Should the server die after the place became the volume, the same lock file is found there, and the job was done.
"""

import os

from elemento_storage.catalog.locations import os_errors
from elemento_storage.catalog.locks import LockRecord, new_lock, write_lock
from elemento_storage.config import parse_networks
from elemento_storage.disk import Place
from elemento_storage.errors import VolumeNotFound
from elemento_storage.fetch.addresses import AddressRules
from elemento_storage.fetch.connection import parse_url
from elemento_storage.fetch.download import Download, Patience
from elemento_storage.images.incoming import Incoming
from elemento_storage.images.recognise import HEAD_BYTES
from elemento_storage.images.sparse import SparseWriter
from elemento_storage.jobs import JobState
from elemento_storage.model import Volume, volume_id_of_directory
from elemento_storage.progress import Progress
from elemento_storage.service.access import INFRASTRUCTURE
from elemento_storage.service.core import Core
from elemento_storage.service.create import Creating
from elemento_storage.service.intake import Arrival, Intake, require_allowed
from elemento_storage.service.shares import Shares

PURPOSE = "download"
_AT_ONCE = 16
_AT_ONCE_OF_ONE = 10  #: client: what one of them fetches leaves room for the others
_DOWNLOADED = 0.8  #: of the job, when all bytes are there


class Downloading:
    """Makes volumes of what is on the web."""

    def __init__(self, core: Core, intake: Intake, creating: Creating) -> None:
        self._core = core
        self._intake = intake
        self._creating = creating
        self._rules = AddressRules(
            parse_networks(core.settings.download_allow), parse_networks(core.settings.download_deny)
        )
        self._patience = Patience(stall_s=core.settings.download_stall, total_s=core.settings.job_timeout)
        self._shares = Shares(_AT_ONCE, _AT_ONCE_OF_ONE)
        core.catalog.resolvers[PURPOSE] = self._resolve_published
        core.catalog.abandoned[PURPOSE] = self._resolve_abandoned

    async def download(self, incoming: Incoming, url: str, call: str, progress: Progress) -> Volume:
        """A new volume, or content for one that waits, from a URL; ``call`` is what the job is called by.

        Raises UrlRefused, DownloadFailed, and what ``Intake.reserve`` and ``Intake.finish`` raise.
        """
        parse_url(url)
        progress.check()
        if not incoming.fills and (made := await self._creating.made_before(incoming.volume_id)) is not None:
            progress.commit()
            return made
        async with self._shares.turn(incoming.creator_id or None, progress):
            return await self._fetch(incoming, url, call, progress)

    async def _fetch(self, incoming: Incoming, url: str, call: str, progress: Progress) -> Volume:
        operations = self._core.catalog.active_operations
        receiver = _Receiver(self._core, self._intake, incoming, call, progress)
        operations.add(progress.operation_id)
        try:
            download = Download(url, self._rules, self._patience, progress, counted_only=incoming.checksum is None)
            try:
                await download.into(receiver)
            except OSError as error:
                with os_errors(receiver.place.location):
                    raise error from None
            return await self._intake.finish(receiver.place, incoming, progress, digest=receiver.digest)
        except BaseException:
            if receiver.arrival is not None:
                await receiver.arrival.release()
            raise
        finally:
            receiver.close()
            operations.discard(progress.operation_id)

    async def _resolve_published(self, place: Place, lock: LockRecord) -> None:
        """The server died when the volume was there already."""
        volume_id = volume_id_of_directory(os.path.basename(place.directory)) or ""
        self._record(lock, volume_id, JobState.DONE)

    async def _resolve_abandoned(self, place: Place, lock: LockRecord) -> None:
        """The server died before, and what had arrived is about to be removed."""
        volume_id = os.path.basename(place.directory).partition(".")[0]
        outcome = JobState.INTERRUPTED
        if lock.journal.get("fills"):
            try:
                _, volume = await self._core.catalog.find(volume_id, INFRASTRUCTURE.require_see)
                outcome = JobState.INTERRUPTED if volume.waiting else JobState.DONE
            except VolumeNotFound:
                pass
        self._record(lock, volume_id, outcome)

    def _record(self, lock: LockRecord, volume_id: str, outcome: JobState) -> None:
        self._core.jobs.record_interrupted(
            lock.operation,
            str(lock.journal.get("call", PURPOSE)),
            lock.client,
            volume_id,
            outcome,
            "the server stopped in the middle of the download; nothing was made of it, ask again",
        )


class _Receiver:
    """Gives a download a place, and looks at what comes as soon as it can be told."""

    def __init__(self, core: Core, intake: Intake, incoming: Incoming, call: str, progress: Progress) -> None:
        self.arrival: Arrival | None = None
        self._core = core
        self._intake = intake
        self._incoming = incoming
        self._call = call
        self._progress = progress
        self._descriptor: int | None = None
        self._hasher = incoming.hasher()
        self._total_bytes: int | None = None
        self._writer: SparseWriter | None = None
        self._foreseen = False

    @property
    def place(self) -> Arrival:
        """Where it is, once the first byte has come."""
        assert self.arrival is not None
        return self.arrival

    @property
    def digest(self) -> str | None:
        """Of everything that came."""
        return None if self._hasher is None else self._hasher.hexdigest()

    async def begin(self, total_bytes: int | None) -> SparseWriter:
        """See Receiver.begin."""
        self._total_bytes = total_bytes
        arrival = self.arrival = await self._intake.reserve(self._incoming, total_bytes, lasting=False)
        client = self._incoming.creator_id or None
        journal: dict[str, str | int] = {"call": self._call, "fills": int(self._incoming.fills)}
        lock = new_lock(PURPOSE, self._progress.operation_id, self._core.catalog.server_id, client, journal)
        with os_errors(arrival.location):
            await arrival.location.disk.run(write_lock, arrival.directory, lock)
            arrival.lock = lock
            self._descriptor = await arrival.location.disk.run(_create, arrival.content)
        self._writer = SparseWriter(self._descriptor, self._hasher)
        return self._writer

    async def before_more(self, size_bytes: int) -> None:
        """See Receiver.before_more."""
        position = self._writer.position if self._writer is not None else 0
        if self._total_bytes is not None:
            self._progress.advance(_DOWNLOADED * position / max(self._total_bytes, 1))
        else:
            require_allowed(size_bytes, self._core.settings.image_max_size)
            await self.place.make_room(size_bytes)
        if not self._foreseen and position:
            assert self._descriptor is not None
            head = await self.place.location.disk.run(os.pread, self._descriptor, HEAD_BYTES, 0)
            if len(head) == HEAD_BYTES:
                self._foreseen = True
                await self._intake.foresee(self.place, self._incoming, head)

    async def restart(self) -> SparseWriter:
        """See Receiver.restart."""
        assert self._descriptor is not None
        await self.place.location.disk.run(os.ftruncate, self._descriptor, 0)
        self._hasher = self._incoming.hasher()
        self._foreseen = False
        self._writer = SparseWriter(self._descriptor, self._hasher)
        return self._writer

    def close(self) -> None:
        """Let go of the file."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _create(path: str) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
