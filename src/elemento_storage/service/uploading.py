"""Uploads: bytes from clients straight into the location that will hold the volume, over as many requests as it takes.

An upload's id is the volume's. Its bytes are in a lasting reservation, what is known of it beside that
(``uploads/record.py``), so any server on the root can carry it on, and nothing is in memory but what is under way. When
the last byte is there, ``service/intake.py`` makes a volume of it, as a job.
"""

import contextlib
import hashlib
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Final

import msgspec

from elemento_storage.catalog.location import Location
from elemento_storage.catalog.locations import os_errors
from elemento_storage.catalog.room import Demand
from elemento_storage.disk import Disk
from elemento_storage.errors import (
    Conflict,
    Forbidden,
    ImageTooLarge,
    InvalidRequest,
    InvalidValue,
    JobEnded,
    LocationUnavailable,
    OffsetMismatch,
    StorageError,
    Unavailable,
    UploadBusy,
    UploadFailed,
    UploadNotFound,
)
from elemento_storage.faultpoints import reached
from elemento_storage.images.recognise import HEAD_BYTES
from elemento_storage.jobs import Job
from elemento_storage.model import MAX_VOLUME_BYTES, Volume, new_uid, utc_now
from elemento_storage.progress import Progress
from elemento_storage.service.access import Actor
from elemento_storage.service.core import Core
from elemento_storage.service.intake import Arrival, Incoming, Intake
from elemento_storage.service.receiving import Foresee, Receiving
from elemento_storage.service.upload_ends import UploadEnds
from elemento_storage.service.upload_store import Upload, UploadStore
from elemento_storage.undo import Reverter
from elemento_storage.uploads import record as records
from elemento_storage.uploads.content import Content, Hash, Hashes
from elemento_storage.uploads.place import prepare
from elemento_storage.uploads.record import Phase, Problem, UploadRecord
from elemento_storage.uploads.transfer import Checksum, Transfer
from elemento_storage.uploads.turn import Busy, Gone, Turn

log = logging.getLogger(__name__)

CHECKSUMS: Final = ("sha1", "sha256", "md5")  #: of a body, as tus names them
_THREADS: Final = 32  # each reads one client's socket; the event loop reads those of more clients than that
_PATIENCE_S: Final = 0.3  # for a turn that somebody has for a moment only
_END_PATIENCE_S: Final = 5.0  # for a transfer that was told to stop


@dataclass(frozen=True, kw_only=True)
class NewUpload:
    """An upload to be begun. ``incoming`` is None for a part that will be concatenated with others."""

    owner: str | None
    incoming: Incoming | None
    length: int | None
    metadata: str = ""
    concat: str = ""


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """How a client goes on with an upload. ``length`` is the whole upload's, if it is told now."""

    offset: int
    length: int | None = None
    sparse: bool = False
    checksum: tuple[str, bytes] | None = None  #: one of CHECKSUMS, and the digest of the body


class Uploading:
    """Begins uploads, goes on with them and ends them."""

    def __init__(self, core: Core, intake: Intake) -> None:
        self.store = UploadStore(core, intake)
        self.ends = UploadEnds(core, intake, self.store)
        self._core = core
        self._intake = intake
        self._threads = Disk("uploads", threads=_THREADS)
        self._receiving: dict[str, Receiving] = {}
        self._whole: set[Receiving] = set()
        self._stopping = False

    def start(self) -> None:
        """Finish what was left, and go on looking."""
        self.ends.start()

    def break_off(self) -> None:
        """The server is about to stop: what is arriving is kept, and nothing more is let in."""
        self._stopping = True
        for receiving in (*self._receiving.values(), *self._whole):
            receiving.end_soon()

    async def stop(self) -> None:
        """End the background work."""
        self.break_off()
        await self.ends.stop()

    @property
    def has_thread(self) -> bool:
        """Whether there is a thread left to read a client's socket."""
        return self.under_way < _THREADS

    @property
    def under_way(self) -> int:
        """How many transfers are."""
        return len(self._receiving) + len(self._whole)

    # -- resumable uploads ---------------------------------------------------------------------------------

    async def begin(self, new: NewUpload) -> Upload:
        """Room for a new upload, and its record; both are durable. Raises what ``Intake.reserve`` raises."""
        async with Reverter() as revert:
            arrival = await self._reserve(new)
            revert.add(arrival.release)
            location, upload_id = arrival.location, arrival.reservation.volume_id
            record = UploadRecord(
                upload_id=upload_id,
                owner=new.owner,
                length=new.length,
                created=utc_now(),
                metadata=new.metadata,
                concat=new.concat,
                target=new.incoming,
            )
            reached("upload.reserved")
            with os_errors(location):
                await location.disk.run(prepare, arrival.directory)
                former = await self.store.load(location, upload_id)
                if former is not None and former.is_over:
                    await self.store.forget(location, upload_id)  # of an earlier try to fill the same volume
                await location.disk.run(records.begin, location.path, record)
                upload = await self.store.load(location, upload_id)
            if upload is None:
                raise LocationUnavailable("the upload's record vanished while it was made", location=location.name)
            revert.commit()
        return upload

    async def _reserve(self, new: NewUpload) -> Arrival:
        if new.incoming is not None:
            return await self._intake.reserve(new.incoming, new.length)
        assert new.length is not None, "a part says its length"
        demand = Demand(new_uid(), new.length, lasting=True)
        return self._intake.arrival(await self._core.catalog.room.reserve_new(demand))

    @contextlib.asynccontextmanager
    async def going_on(self, actor: Actor, upload_id: str, chunk: Chunk) -> AsyncIterator["Going"]:
        """Write into an upload from where it stands.

        Leaving the block without ``Going.finish`` breaks off: what arrived is kept. Raises UploadNotFound, UploadEnded,
        UploadBusy, OffsetMismatch, Forbidden, NoRoom.
        """
        upload = await self.store.find(actor, upload_id)
        if upload.record.is_assembled:
            raise Forbidden("the upload was made of parts: nothing can be added to it")
        self._require_open(upload)
        turn = await self._turn(upload.location, upload_id, _PATIENCE_S)
        going: Going | None = None
        try:
            going = await self._go_on(upload.location, upload_id, turn, chunk)
            self._receiving[upload_id] = going.receiving
            self._require_running()
            await going.receiving.look()
            yield going
        finally:
            if going is None:
                await upload.location.disk.run(turn.give_up)
            else:
                try:
                    await going.leave()
                finally:
                    if self._receiving.get(upload_id) is going.receiving:
                        del self._receiving[upload_id]

    def _require_running(self) -> None:
        if self._stopping:
            raise Unavailable("the server stops: go on with the upload when it is back")

    def _require_open(self, upload: Upload) -> None:
        """Raises UploadEnded, UploadBusy."""
        record = upload.record
        if record.phase is Phase.FAILED:
            raise failed(record)
        if record.phase is Phase.FINISHING and self.ends.job(upload.upload_id) is not None:
            raise UploadBusy("a volume is being made of the upload: ask for it again")

    async def _turn(self, location: Location, upload_id: str, patience_s: float) -> Turn:
        with os_errors(location):
            try:
                return await location.disk.run(Turn, location.path, upload_id, patience_s)
            except Busy:
                raise UploadBusy("another request writes this upload: wait, ask for its offset, and go on") from None
            except Gone:
                raise UploadNotFound(upload_id) from None

    async def _go_on(self, location: Location, upload_id: str, turn: Turn, chunk: Chunk) -> "Going":
        with os_errors(location):
            upload = await self.store.load(location, upload_id)  # as it is now that nobody else can change it
        arrival = await self.store.arrival(location, upload_id)
        if upload is None or arrival is None:
            raise UploadNotFound(upload_id)
        self._require_open(upload)
        if chunk.offset != turn.offset:
            raise OffsetMismatch(
                f"the upload goes on at {turn.offset} and not at {chunk.offset}: HEAD tells the offset",
                offset=turn.offset,
            )
        record = upload.record
        if chunk.length is not None and chunk.length != record.length:
            record = await self._learn_length(location, record, arrival, chunk.length, turn.offset)
        if record.length is None and chunk.sparse:
            raise InvalidValue("a sparse body needs an upload whose Upload-Length is known", key="Upload-Length")
        digest = None
        if record.target is not None and turn.offset == 0 and chunk.checksum is None:
            digest = record.target.hasher()
        end = MAX_VOLUME_BYTES if record.length is None else record.length

        def open_transfer() -> Transfer:
            content = Content(arrival.content, turn.offset, digest=digest)
            checksum = None
            if chunk.checksum is not None:
                name, expected = chunk.checksum
                checksum = Checksum(hashlib.new(name, usedforsecurity=False), expected)
            return Transfer(content, end, turn=turn, sparse=chunk.sparse, checksum=checksum)

        with os_errors(location):
            transfer = await location.disk.run(open_transfer)
        # What has to be verified first is looked at when it was: at the next request's beginning, or at the end.
        from_start = turn.offset < HEAD_BYTES
        foresee = None if chunk.checksum is not None and from_start else self._foresee(location, record, arrival)
        return Going(self, record, turn, Receiving(arrival, transfer, self._threads, foresee), digest)

    def _foresee(self, location: Location, record: UploadRecord, arrival: Arrival) -> Foresee | None:
        """Ends an upload early of which no volume can be made, and reserves what its image needs in the end.

        It raises UploadFailed; NoRoom, with which the upload stays as it is.
        """
        target = record.target
        if target is None:
            return None

        async def foresee(head: bytes) -> None:
            try:
                await self._intake.foresee(arrival, target, head)
            except (InvalidRequest, Conflict, ImageTooLarge) as error:
                log.info("upload %s is refused early: %s", record.upload_id, error.message)
                raise failed(await self.ends.fail(location, record, arrival, error)) from None

        return foresee

    async def _learn_length(
        self, location: Location, record: UploadRecord, arrival: Arrival, length: int, offset: int
    ) -> UploadRecord:
        if record.length is not None:
            raise InvalidValue(
                f"the upload's length is {record.length} and stays so, {length} was given", key="Upload-Length"
            )
        if length < offset:
            raise InvalidValue(f"the upload has {offset} bytes already, {length} were given", key="Upload-Length")
        await arrival.make_room(length)
        record = msgspec.structs.replace(record, length=length)
        await self.store.write(location, record)
        return record

    async def finished(self, actor: Actor, upload_id: str) -> tuple[Upload, Job | None]:
        """The upload, and the job that makes a volume of it; begins that where a server died over it."""
        upload = await self.store.find(actor, upload_id)
        if upload.is_complete and not upload.is_over and not upload.record.is_part:
            if self.ends.job(upload_id) is None:
                with contextlib.suppress(UploadBusy, UploadNotFound):
                    location = upload.location
                    turn = await self._turn(location, upload_id, 0.0)
                    if not await self.ends.settle(location, upload_id, turn):
                        await location.disk.run(turn.give_up)
            upload = await self.store.find(actor, upload_id)
        return upload, self.ends.job(upload_id)

    async def terminate(self, actor: Actor, upload_id: str) -> None:
        """End an upload and remove what arrived; of one that has become a volume, only what is remembered of it.

        Raises UploadNotFound, UploadBusy.
        """
        upload = await self.store.find(actor, upload_id)
        job = self.ends.job(upload_id)
        if job is not None:
            with contextlib.suppress(JobEnded):
                self._core.jobs.cancel(job)
            await job.finished.wait()
        if (receiving := self._receiving.get(upload_id)) is not None:
            receiving.end_soon()
        location = upload.location
        turn = await self._turn(location, upload_id, _END_PATIENCE_S)
        try:
            settled = await self.store.load(location, upload_id)
            if settled is None:
                return
            arrival = None if settled.is_over else await self.store.arrival(location, upload_id)
            await self.ends.remove(location, upload_id, arrival)
        finally:
            await location.disk.run(turn.give_up)

    # -- parts ---------------------------------------------------------------------------------------------

    async def concatenate(self, actor: Actor, new: NewUpload, part_ids: Sequence[str]) -> tuple[Upload, Job]:
        """A new upload of parts that are complete, in this order; they are removed. The job makes a volume of it.

        Raises UploadNotFound, InvalidValue, UploadBusy, and what ``begin`` raises.
        """
        parts = [await self.store.find(actor, part_id) for part_id in part_ids]
        for part in parts:
            if part.record.owner not in (None, new.owner):
                raise UploadNotFound(part.upload_id)
            if not part.record.is_part or not part.is_complete:
                raise InvalidValue(
                    f"upload {part.upload_id} is no part, or not complete: nothing can be made of it",
                    key="Upload-Concat",
                )
        length = sum(part.offset for part in parts)
        async with contextlib.AsyncExitStack() as stack:
            for part_id in sorted(set(part_ids)):
                location = next(part.location for part in parts if part.upload_id == part_id)
                held = await self._turn(location, part_id, _PATIENCE_S)
                stack.push_async_callback(location.disk.run, held.give_up)
            upload = await self.begin(
                NewUpload(
                    owner=new.owner, incoming=new.incoming, length=length, metadata=new.metadata, concat=new.concat
                )
            )
            arrival = await self.store.arrival(upload.location, upload.upload_id)
            turn = await self._turn(upload.location, upload.upload_id, _PATIENCE_S)
            try:
                if arrival is None:
                    raise UploadNotFound(upload.upload_id)
                await self._assemble(upload, arrival, turn, parts)
            except BaseException:
                await self.ends.remove(upload.location, upload.upload_id, arrival)
                await upload.location.disk.run(turn.give_up)
                raise
            for part in {part.upload_id: part for part in parts}.values():
                place = await self.store.arrival(part.location, part.upload_id)
                await self.ends.remove(part.location, part.upload_id, place)
        job = self.ends.finish(upload.location, upload.record, arrival, turn, None)
        return upload, job

    async def _assemble(self, upload: Upload, arrival: Arrival, turn: Turn, parts: Sequence[Upload]) -> None:
        sources = []
        for part in parts:
            place = await self.store.arrival(part.location, part.upload_id)
            if place is None:
                raise UploadNotFound(part.upload_id)
            sources.append((place.content, part.offset))

        def assemble() -> None:
            content = Content(arrival.content, 0)
            try:
                for path, length in sources:
                    content.append(path, length)
                    reached("upload.appended")
                content.keep(turn)
            finally:
                content.close()

        with os_errors(upload.location):
            await self._threads.run(assemble)

    # -- the whole at once ---------------------------------------------------------------------------------

    async def whole(self, incoming: Incoming, length: int | None, hasher: Hash | None = None) -> "Whole":
        """An upload in one request, by a client that cannot go on with it: it ends with the request, or the server.

        ``hasher`` takes in every byte as well. Raises what ``Intake.reserve`` raises.
        """
        arrival = await self._intake.reserve(incoming, length, lasting=False)
        digest = incoming.hasher()
        both = digest if hasher is None else hasher if digest is None else Hashes(digest, hasher)

        def open_transfer() -> Transfer:
            content = Content(arrival.content, 0, create=True, digest=both)
            return Transfer(content, MAX_VOLUME_BYTES if length is None else length)

        async with Reverter() as revert:
            revert.add(arrival.release)
            with os_errors(arrival.location):
                transfer = await arrival.location.disk.run(open_transfer)
            revert.commit()
        receiving = Receiving(
            arrival, transfer, self._threads, lambda head: self._intake.foresee(arrival, incoming, head)
        )
        self._whole.add(receiving)
        if self._stopping:
            receiving.end_soon()
        return Whole(self._intake, incoming, receiving, digest, lambda: self._whole.discard(receiving))


def failed(record: UploadRecord) -> UploadFailed:
    """The error of an upload of which no volume could be made."""
    problem = record.problem or Problem("internal-error", "the reason was not recorded")
    return UploadFailed(
        f"no volume can be made of the upload: {problem.message}", upload_id=record.upload_id, reason=problem.code
    )


@dataclass(eq=False)
class Going:
    """A request that goes on with an upload."""

    uploading: Uploading
    record: UploadRecord
    turn: Turn
    receiving: Receiving
    digest: Hash | None
    _ended: bool = False
    _handed_over: bool = False

    async def finish(self) -> tuple[int, Job | None]:
        """After the body's last byte: where the upload stands, and the job that makes a volume of it, if that was all.

        Raises UploadChecksumMismatch, UploadStalled, LocationUnavailable, NoRoom.
        """
        self._ended = True
        offset = await self.receiving.finish()
        if offset != self.record.length or self.record.is_part:
            return offset, None
        await self.receiving.close()
        digest = None if self.digest is None else self.digest.hexdigest()
        self._handed_over = True
        arrival = self.receiving.arrival
        return offset, self.uploading.ends.finish(arrival.location, self.record, arrival, self.turn, digest)

    async def leave(self) -> None:
        """Keep what arrived, unless that is done, and let the next one write."""
        try:
            if not self._ended:
                await self.receiving.break_off()
        except StorageError as error:
            # Why the transfer ended is what the client hears; what was recorded before stands.
            log.warning("upload %s: what arrived last is not kept: %s", self.record.upload_id, error)
        finally:
            if not self._handed_over:
                await self.receiving.close()
                await self.receiving.arrival.location.disk.run(self.turn.give_up)


@dataclass(eq=False)
class Whole:
    """A request that brings a whole image. Has to be finished or dropped."""

    intake: Intake
    incoming: Incoming
    receiving: Receiving
    digest: Hash | None
    over: Callable[[], None]

    async def finish(self, progress: Progress) -> Volume:
        """After the body's last byte: the volume. Raises what ``Intake.finish`` raises; nothing is left then."""
        try:
            if await self.receiving.finish() == 0:
                raise InvalidValue("the body is empty: nothing is no image")
            await self.receiving.close()
            digest = None if self.digest is None else self.digest.hexdigest()
            volume = await self.intake.finish(self.receiving.arrival, self.incoming, progress, digest=digest)
        except BaseException:
            await self.drop()
            raise
        self.over()
        return volume

    async def drop(self) -> None:
        """Remove what arrived. Idempotent."""
        self.over()
        await self.receiving.close()
        await self.receiving.arrival.release()
