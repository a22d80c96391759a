"""Finding uploads on disk, in whichever location they are."""

import logging
import time
from dataclasses import dataclass

from elemento_storage.catalog import reservations
from elemento_storage.catalog.location import Location
from elemento_storage.catalog.locations import os_errors
from elemento_storage.catalog.room import Reservation
from elemento_storage.disk import within
from elemento_storage.errors import UploadEnded, UploadNotFound
from elemento_storage.service.access import Actor
from elemento_storage.service.core import Core
from elemento_storage.service.intake import Arrival, Intake
from elemento_storage.uploads import record as records
from elemento_storage.uploads.record import Phase, UploadRecord
from elemento_storage.uploads.turn import Gone, read_offset

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Upload:
    """An upload as it is on disk. ``offset``: so many bytes are safe. ``expires_s``: since the epoch.

    ``has_place``: the bytes are there; without them it was ended by somebody who died over it, or is a volume.
    """

    location: Location
    record: UploadRecord
    offset: int
    expires_s: float
    has_place: bool

    @property
    def upload_id(self) -> str:
        """Its id, which is the volume's."""
        return self.record.upload_id

    @property
    def is_complete(self) -> bool:
        """Whether its last byte is there."""
        return self.record.length is not None and self.offset >= self.record.length

    @property
    def is_over(self) -> bool:
        """Whether nothing of it is left but what became of it."""
        return self.record.phase in {Phase.DONE, Phase.FAILED}


class UploadStore:
    """The uploads of all locations that answer."""

    def __init__(self, core: Core, intake: Intake) -> None:
        self._locations = core.catalog.locations
        self._intake = intake
        self._expiry_s = core.settings.upload_expiry

    async def find(self, actor: Actor, upload_id: str) -> Upload:
        """An upload of the caller's. Raises UploadNotFound (for somebody else's too), UploadEnded when it expired."""
        for location in self._locations.answering():
            try:
                upload = await within(self._locations.patience_s, self.load(location, upload_id))
            except OSError as error:
                log.warning("location %s was not asked for upload %s: %s", location.name, upload_id, error)
                continue
            if upload is not None:
                ended = upload.record.phase is Phase.RECEIVING and not upload.has_place
                if ended or not may_see(actor, upload.record):
                    break
                if upload.expires_s < time.time() and not upload.is_over and not upload.is_complete:
                    raise UploadEnded("the upload has expired: begin a new one", upload_id=upload_id, state="expired")
                return upload
        raise UploadNotFound(upload_id)

    async def load(self, location: Location, upload_id: str) -> Upload | None:
        """From one location. Raises OSError."""

        def load() -> Upload | None:
            record = records.read(location.path, upload_id)
            if record is None:
                return None
            try:
                offset, touched_s = read_offset(location.path, upload_id)
            except Gone:
                return None
            has_place = any(upload_id == one for one, _, _ in reservations.lasting(location.path))
            return Upload(location, record, offset, touched_s + self._expiry_s, has_place)

        return await location.disk.run(load)

    async def all(self, actor: Actor) -> list[Upload]:
        """The caller's uploads, oldest first, in the locations that answer."""
        found: list[Upload] = []
        for location in self._locations.answering():
            try:
                ids = await within(self._locations.patience_s, location.disk.run(records.ids, location.path))
                for upload_id in ids:
                    upload = await within(self._locations.patience_s, self.load(location, upload_id))
                    if upload is not None and may_see(actor, upload.record):
                        found.append(upload)
            except OSError as error:
                log.warning("location %s was not asked for uploads: %s", location.name, error)
        return sorted(found, key=lambda upload: upload.record.created)

    async def arrival(self, location: Location, upload_id: str) -> Arrival | None:
        """Where the upload's bytes are; None when there is no such place any more."""
        with os_errors(location):
            for volume_id, size_bytes, path in await location.disk.run(reservations.lasting, location.path):
                if volume_id == upload_id:
                    reservation = Reservation(location, volume_id, size_bytes, path, lasting=True)
                    reservation.enter()
                    return self._intake.arrival(reservation)
        return None

    async def write(self, location: Location, record: UploadRecord) -> None:
        """Replace a record; durable. Only by whose turn it is."""
        with os_errors(location):
            await location.disk.run(records.write, location.path, record)

    async def forget(self, location: Location, upload_id: str) -> None:
        """Remove a record. Idempotent."""
        with os_errors(location):
            await location.disk.run(records.remove, location.path, upload_id)


def may_see(actor: Actor, record: UploadRecord) -> bool:
    """Whether it is the caller's own; the infrastructure sees all."""
    return actor.client is None or actor.client == record.owner
