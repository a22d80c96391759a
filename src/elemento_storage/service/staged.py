"""A volume in the making: an image in a reserved directory, and the steps that make it a volume."""

import contextlib
import errno
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import msgspec

from elemento_storage.catalog.room import Reservation
from elemento_storage.catalog.volume_directory import Entry, finish_staging, publish, take_back
from elemento_storage.errors import VolumeExists
from elemento_storage.model import VolumeMeta


@dataclass
class Staged:
    """A volume in the making, in its staging directory. The methods block."""

    reservation: Reservation
    meta: VolumeMeta
    files: Mapping[str, bytes] = field(default_factory=dict)  #: small ones beside meta.json, such as isoinfo.json
    _entry: Entry | None = field(default=None, init=False)

    def finish(self) -> None:
        """Make it whole and durable but for its name. The image has to be there, and nothing that is not the volume's.

        Raises OSError, BadHeader.
        """
        location = self.reservation.location
        self._entry = finish_staging(
            self.reservation.path, location.name, self.meta, self.files, is_copy=location.pool is not None
        )

    def publish(self) -> Entry:
        """Give it its name. Raises VolumeExists, OSError, BadHeader."""
        if self._entry is None:
            self.finish()
        assert self._entry is not None
        if (pool := self.reservation.location.pool) is not None:
            assert isinstance(self.meta.size, int)
            pool.publish(self.meta.volume_id, msgspec.json.encode(self.meta), self.meta.size)
        with _existing_refused(self.meta.volume_id):
            publish(self.reservation.path, self.reservation.location.path, self.meta.volume_id)
        return self._entry

    def take_back(self) -> None:
        """Take its name away again."""
        if (pool := self.reservation.location.pool) is not None:
            pool.take_back(self.meta.volume_id)
        take_back(self.reservation.path, self.reservation.location.path, self.meta.volume_id)


@contextlib.contextmanager
def _existing_refused(volume_id: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise VolumeExists(f"volume {volume_id} exists already", volume_id=volume_id) from error
        raise
