"""Taking in images from outside: from the first byte to a volume. Uploads and downloads are its transports.

A transport asks for a place (``reserve``), writes what arrives into the file ``CONTENT`` there, and hands over
(``finish``). Everything that tells what arrived, and whether it is let in, is in here and ``images/``.

Rules for transports:

* Every file of theirs in the place has a name that begins with ``TEMPORARY_PREFIX``. Those that are still there when
  the place becomes the volume are removed then, and by the next sweep if the server dies first.
* One finisher at a time: whoever may go on with an upload on another server holds a lock of its own over ``finish``.
* When ``finish`` fails, the place is as it was or further: it may be called again, also after a crash. When the error
  says that what arrived can never be a volume (every InvalidRequest and Conflict but JobCancelled), the transport
  releases the place. ``Arrival.release`` is safe to call at any time but after success.
"""

from elemento_storage.catalog.location import Location
from elemento_storage.catalog.reservations import lasting
from elemento_storage.catalog.room import Demand, Reservation
from elemento_storage.errors import Conflict, FormatUnsupported
from elemento_storage.images.incoming import CONTENT, Incoming
from elemento_storage.model import Volume, VolumeFormat, round_up_to_sector
from elemento_storage.progress import Progress
from elemento_storage.service.access import Actor
from elemento_storage.service.core import Core

__all__ = ["CONTENT", "Arrival", "Incoming", "Intake"]

_FORMATS = frozenset({VolumeFormat.RAW, VolumeFormat.QCOW2, VolumeFormat.ISO})


class Arrival:
    """A place where an image arrives: a reserved directory, which gets another name whenever its size changes.

    A descriptor of a file in it stays good over that, a path does not.
    """

    def __init__(self, core: Core, reservation: Reservation) -> None:
        self.reservation = reservation
        self._room = core.catalog.room

    @property
    def location(self) -> Location:
        """Where it is; ``location.disk`` are the threads that may touch it."""
        return self.reservation.location

    @property
    def directory(self) -> str:
        """The path of the place as of now."""
        return self.reservation.path

    @property
    def content(self) -> str:
        """The path, as of now, of the file for the bytes that arrive."""
        return f"{self.directory}/{CONTENT}"

    async def make_room(self, size_bytes: int) -> None:
        """Have room for at least so much; call it before more is written than was reserved. Raises NoRoom."""
        if size_bytes > self.reservation.size_bytes:
            await self.resize(size_bytes)

    async def resize(self, size_bytes: int) -> None:
        """Reserve this much, not more and not less. Raises NoRoom: nothing has changed then."""
        self.reservation = await self._room.resize(self.reservation, size_bytes)

    async def release(self) -> None:
        """Give the room back, and remove everything in it. Idempotent."""
        await self.reservation.release()


class Intake:
    """Makes volumes of what transports bring."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._catalog = core.catalog

    async def reserve(self, incoming: Incoming, content_bytes: int | None, *, lasting: bool = True) -> Arrival:
        """A place for an image of which ``content_bytes`` are to arrive (None: nobody knows).

        ``lasting``: it stays when this server dies, for whoever goes on with it; otherwise it goes with it.

        Raises NoRoom, FormatUnsupported; with ``incoming.fills`` also VolumeNotFound, NotOwner, VolumeLocked, Conflict.
        """
        if incoming.fills:
            return await self._reserve_fill(incoming, content_bytes, lasting=lasting)
        self._core.store(incoming.format)
        if incoming.format not in _FORMATS:
            raise FormatUnsupported(f"an image from outside cannot become a {incoming.format} volume")
        size_bytes = round_up_to_sector(max(incoming.size_bytes or 0, content_bytes or 0))
        demand = Demand(incoming.volume_id, size_bytes, lasting=lasting)
        return Arrival(self._core, await self._catalog.room.reserve_new(demand))

    async def _reserve_fill(self, incoming: Incoming, content_bytes: int | None, *, lasting: bool) -> Arrival:
        check = Actor(incoming.creator_id or None).require_change
        async with self._catalog.hold(incoming.volume_id, check) as held:
            require_waiting(held.volume)
            location = held.location
            if incoming.volume_id in await location.disk.run(_arriving, location.path):
                raise Conflict(
                    "content for this volume is arriving already: go on with that upload or end it first",
                    volume_id=incoming.volume_id,
                )
            size_bytes = max(held.volume.size_bytes, content_bytes or 0)
            demand = Demand(incoming.volume_id, size_bytes, new_volume=False, lasting=lasting)
            return Arrival(self._core, await self._catalog.room.reserve_in(location, demand, directory=True))

    def arrival(self, reservation: Reservation) -> Arrival:
        """The place of a lasting reservation that was found again (``Room.lasting``)."""
        return Arrival(self._core, reservation)

    async def foresee(self, arrival: Arrival, incoming: Incoming, head: bytes) -> None:
        """Refuse early, from the first bytes (64 KiB are enough), what ``finish`` would refuse only at the end.

        Reserves what the image's header says it needs. Worth a call, not necessary. Raises what ``finish`` raises.
        """

    async def finish(
        self, arrival: Arrival, incoming: Incoming, progress: Progress, *, digest: str | None = None
    ) -> Volume:
        """Make what has arrived a volume; on disk and visible when this returns.

        The phases of ``progress`` go on from the fraction it has.

        ``digest`` is what ``incoming.hasher()`` says of the bytes; without it they are read again for the checksum.

        Raises ChecksumMismatch, ImageRefused (it names other files, is encrypted, …), ImageDamaged, NotAnIso, NoRoom,
        JobCancelled, VolumeExists, ToolFailed, ToolTimeout; with ``incoming.fills`` what ``reserve`` raises.
        """
        raise NotImplementedError


def require_waiting(volume: Volume) -> None:
    """Raises Conflict when the volume has its content."""
    if not volume.waiting:
        raise Conflict(
            "the volume has its content: only an ISO volume without any can be filled", volume_id=volume.volume_id
        )


def _arriving(location_path: str) -> set[str]:
    """Uids of volumes that something is arriving for. Blocks."""
    return {volume_id for volume_id, _, _ in lasting(location_path)}
