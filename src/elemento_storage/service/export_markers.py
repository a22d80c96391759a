"""Who serves a volume, as the markers in its directory say."""

import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass

from elemento_storage.catalog.catalog import Held
from elemento_storage.catalog.location import Location
from elemento_storage.catalog.locations import os_errors
from elemento_storage.catalog.markers import marker_names, read_marker
from elemento_storage.engine.image_lock import lock_image
from elemento_storage.errors import VolumeExported
from elemento_storage.exports.record import ExportRecord, client_of, decode_record
from elemento_storage.model import MARKER_SUFFIX, TARGET_PREFIX, Volume, VolumeFormat


@dataclass(frozen=True)
class Marker:
    """A marker as found on disk. ``record`` is None when it says nothing (the vendor's server leaves them empty)."""

    name: str
    client: str
    record: ExportRecord | None
    fresh: bool  #: touched within the lease


class ExportMarkers:
    """Reads markers, and knows which are this server's own."""

    def __init__(self, server_id: str, lease_s: float) -> None:
        self.server_id = server_id
        self._lease_s = lease_s

    async def of(self, held: Held) -> list[Marker]:
        """The markers of a volume that is held. Raises LocationUnavailable."""
        with os_errors(held.location):
            return await self.read(held.location, held.volume)

    async def read(self, location: Location, volume: Volume) -> list[Marker]:
        """The markers of a volume. Raises OSError."""
        if not volume.markers:
            return []
        return await location.disk.run(self._read, location.volume_path(volume.volume_id), volume.volume_id)

    def _read(self, directory: str, volume_id: str) -> list[Marker]:
        horizon = time.time() - self._lease_s
        found = []
        for name in marker_names(directory):
            digits = name[len(TARGET_PREFIX) : -len(MARKER_SUFFIX)]
            content = read_marker(directory, name)
            if content is not None and re.fullmatch("[0-9a-f]{32}", digits):
                record = decode_record(content[0], volume_id)
                found.append(Marker(name, client_of(digits, volume_id), record, content[1] >= horizon))
        return found

    def own_records(self, markers: Sequence[Marker]) -> list[ExportRecord]:
        """What this server is to serve."""
        return [one.record for one in markers if one.record is not None and one.record.server == self.server_id]

    def counts(self, marker: Marker) -> bool:
        """Whether it is an export: what we are to serve is one even while it ails, others' while they say so."""
        return marker.fresh or (marker.record is not None and marker.record.server == self.server_id)

    async def require_unexported_to_others(self, held: Held) -> None:
        """Raises VolumeExported when somebody but the owner has the volume: it cannot be private then."""
        owner = held.volume.meta.creator_id
        if any(self.counts(marker) and marker.client != owner for marker in await self.of(held)):
            raise VolumeExported(
                "the volume is exported to another client, who would go on to see it: unexport it there first",
                volume_id=held.volume.volume_id,
            )

    async def require_unexported(self, held: Held) -> None:
        """Raises VolumeExported when anybody serves the volume, or is to; ImageInUse when it is open nevertheless."""
        markers = await self.of(held)
        if any(self.counts(marker) for marker in markers):
            raise VolumeExported("the volume is exported: unexport it first", volume_id=held.volume.volume_id)
        if markers and held.volume.meta.format is not VolumeFormat.RBD:
            # Stale, and yet the daemons of a server that is down may serve on: they hold the image's lock.
            path = f"{held.place.directory}/{held.volume.meta.format.data_file}"
            with os_errors(held.location):
                os.close(await held.place.disk.run(lock_image, path, read_only=False))
