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

import contextlib
import os
from typing import Final

from elemento_storage.catalog.catalog import Held
from elemento_storage.catalog.location import Location
from elemento_storage.catalog.locations import os_errors
from elemento_storage.catalog.locks import LockRecord, remove_lock
from elemento_storage.catalog.reservations import arriving
from elemento_storage.catalog.room import Demand, Reservation
from elemento_storage.catalog.volume_directory import META_FILE, Entry, image_size, rewrite_meta
from elemento_storage.disk import Place
from elemento_storage.durable import TEMPORARY_PREFIX, fsync_directory, fsync_file, keep_owner_and_mode
from elemento_storage.engine import foreign_image
from elemento_storage.errors import (
    ChecksumMismatch,
    Conflict,
    FormatUnsupported,
    ImageTooLarge,
    NoRoom,
)
from elemento_storage.faultpoints import reached
from elemento_storage.images.headers import Header, foresee_header, read_header
from elemento_storage.images.incoming import CONTENT, Compression, ImageFormat, Incoming
from elemento_storage.images.optical import require_optical, require_optical_start
from elemento_storage.images.recognise import HEAD_BYTES, compression_of, format_of
from elemento_storage.images.sparse import hash_piece
from elemento_storage.images.unpack import unpack
from elemento_storage.model import Volume, VolumeFormat, round_up_to_sector
from elemento_storage.progress import Progress
from elemento_storage.service.access import INFRASTRUCTURE, Actor
from elemento_storage.service.core import Core
from elemento_storage.service.staged import Staged

__all__ = ["CONTENT", "Arrival", "Incoming", "Intake"]

_UNPACKING: Final = f"{TEMPORARY_PREFIX}unpacking"
_UNPACKED: Final = f"{TEMPORARY_PREFIX}unpacked"
_CONVERTED: Final = f"{TEMPORARY_PREFIX}converted"
_FORMATS: Final = frozenset({VolumeFormat.RAW, VolumeFormat.QCOW2, VolumeFormat.ISO})
_DRIVERS: Final = {image_format: image_format.value for image_format in ImageFormat} | {ImageFormat.VHD: "vpc"}
_AHEAD_BYTES: Final = 4 << 30
_HASHED_AT_ONCE: Final = 64 << 20


class Arrival:
    """A place where an image arrives: a reserved directory, which gets another name whenever its size changes.

    A descriptor of a file in it stays good over that, a path does not.
    """

    def __init__(self, core: Core, reservation: Reservation) -> None:
        self.reservation = reservation
        self.lock: LockRecord | None = None  #: the transport's journal in the place; it goes when the volume is there
        self._room = core.catalog.room
        self._most_bytes = core.settings.image_max_size

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
        """Have room for at least so much; to be called before more is written than was reserved.

        Where there is room for more it takes some in advance; ``finish`` gives back what was too much. Raises NoRoom,
        ImageTooLarge.
        """
        present = self.reservation.size_bytes
        if size_bytes <= present:
            return
        ahead = max(size_bytes, present + min(present, _AHEAD_BYTES))
        if ahead > size_bytes and (not self._most_bytes or ahead <= self._most_bytes):
            with contextlib.suppress(NoRoom):
                await self.resize(ahead)
                return
        await self.resize(size_bytes)

    async def resize(self, size_bytes: int) -> None:
        """Reserve this much, not more and not less. Raises NoRoom, ImageTooLarge: nothing has changed then."""
        require_allowed(size_bytes, self._most_bytes)
        self.reservation = await self._room.resize(self.reservation, size_bytes)

    async def release(self) -> None:
        """Give the room back, and remove everything in it. Idempotent."""
        await self.reservation.release()


class Intake:
    """Makes volumes of what transports bring."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._catalog = core.catalog

    # -- places --------------------------------------------------------------------------------------------

    async def reserve(self, incoming: Incoming, content_bytes: int | None, *, lasting: bool = True) -> Arrival:
        """A place for an image of which ``content_bytes`` are to arrive (None: nobody knows).

        ``lasting``: it stays when this server dies, for whoever goes on with it; otherwise it goes with it.

        Raises NoRoom, ImageTooLarge, FormatUnsupported; with ``incoming.fills`` also VolumeNotFound, NotOwner,
        VolumeLocked, Conflict.
        """
        require_allowed(max(incoming.size_bytes or 0, content_bytes or 0), self._core.settings.image_max_size)
        self._core.store(incoming.format)
        if incoming.format not in _FORMATS:
            raise FormatUnsupported(f"an image from outside cannot become a {incoming.format} volume")
        if incoming.format is VolumeFormat.ISO and incoming.image_format not in (
            None,
            ImageFormat.ISO,
            ImageFormat.RAW,
        ):
            raise FormatUnsupported(f"a {incoming.image_format} image cannot become an ISO volume")
        if incoming.fills:
            return await self._reserve_fill(incoming, content_bytes, lasting=lasting)
        size_bytes = round_up_to_sector(max(incoming.size_bytes or 0, content_bytes or 0))
        reservation = await self._catalog.room.reserve_new(Demand(incoming.volume_id, size_bytes, lasting=lasting))
        reached("intake.reserved")
        return Arrival(self._core, reservation)

    async def _reserve_fill(self, incoming: Incoming, content_bytes: int | None, *, lasting: bool) -> Arrival:
        async with self._catalog.hold(incoming.volume_id, _owner(incoming).require_change) as held:
            await self._require_fillable(held)
            location = held.location
            if incoming.volume_id in await location.disk.run(arriving, location.path):
                raise Conflict(
                    "content for this volume is arriving already: go on with that upload or end it first",
                    volume_id=incoming.volume_id,
                )
            size_bytes = max(held.volume.size_bytes, content_bytes or 0)
            demand = Demand(incoming.volume_id, size_bytes, new_volume=False, lasting=lasting)
            reservation = await self._catalog.room.reserve_in(location, demand, directory=True)
        reached("intake.reserved")
        return Arrival(self._core, reservation)

    async def _require_fillable(self, held: Held) -> None:
        if not held.volume.waiting:
            raise Conflict(
                "the volume has its content: only an ISO volume that waits for it can be filled",
                volume_id=held.volume.volume_id,
            )
        await self._core.markers.require_unexported(held)

    def arrival(self, reservation: Reservation) -> Arrival:
        """The place of a lasting reservation that was found again (``Room.lasting``)."""
        return Arrival(self._core, reservation)

    async def foresee(self, arrival: Arrival, incoming: Incoming, head: bytes) -> None:
        """Refuse early, from the first bytes (64 KiB are enough), what ``finish`` would refuse only at the end.

        Reserves what the image's header says it needs. Worth a call, not necessary. Raises what ``finish`` raises.
        """
        if _compression(incoming, head) is not Compression.NONE:
            return
        if incoming.format is VolumeFormat.ISO:
            if len(head) >= HEAD_BYTES:
                require_optical_start(head)
            return
        header = foresee_header(head, _format(incoming, head))
        if header.virtual_bytes is not None:
            await arrival.resize(max(_final_size(incoming, header.virtual_bytes), arrival.reservation.size_bytes))

    # -- from bytes to a volume ----------------------------------------------------------------------------

    async def finish(
        self, arrival: Arrival, incoming: Incoming, progress: Progress, *, digest: str | None = None
    ) -> Volume:
        """Make what has arrived a volume; on disk and visible when this returns.

        ``digest`` is what ``incoming.hasher()`` says of the bytes; without it they are read again for the checksum.
        The fraction of ``progress`` goes on from what it is.

        Raises ChecksumMismatch, ImageRefused (it names other files, is encrypted, …), ImageDamaged, ImageTooLarge,
        NotAnIso, NoRoom, JobCancelled, VolumeExists, LocationUnavailable, ToolFailed, ToolTimeout; with
        ``incoming.fills`` what ``reserve`` raises.
        """
        progress.check()
        with os_errors(arrival.location):
            if incoming.fills and not await self._exists_any(arrival, incoming.format.data_file, _UNPACKED, CONTENT):
                return await self._filled_before(arrival, incoming)
            await self._make_image(arrival, incoming, progress, digest)
            size_bytes = await self._fit(arrival, incoming)
            progress.check()
            if incoming.fills:
                return await self._fill(arrival, incoming, size_bytes, progress)
            progress.commit()
            entry = await arrival.location.disk.run(_publish, arrival, incoming, size_bytes)
        arrival.location.record(entry)
        arrival.reservation.forget()
        return entry.volume

    async def _exists(self, arrival: Arrival, name: str) -> bool:
        return await arrival.location.disk.run(os.path.lexists, f"{arrival.directory}/{name}")

    async def _exists_any(self, arrival: Arrival, *names: str) -> bool:
        return any([await self._exists(arrival, name) for name in names])

    async def _verify(self, arrival: Arrival, incoming: Incoming, progress: Progress, digest: str | None) -> None:
        hasher = incoming.hasher()
        if incoming.checksum is None or hasher is None:
            return
        if digest is None:
            progress.advance(progress.fraction, "verifying")
            disk = arrival.location.disk
            descriptor = await disk.run(os.open, arrival.content, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                position = 0
                while count := await disk.run(hash_piece, descriptor, hasher, position, _HASHED_AT_ONCE):
                    position += count
                    progress.check()
            finally:
                os.close(descriptor)
            digest = hasher.hexdigest()
        algorithm, _, wanted = incoming.checksum.partition(":")
        if digest != wanted:
            raise ChecksumMismatch(
                f"what arrived has the {algorithm} {digest}, and {wanted} was asked for: nothing was made of it",
                expected=incoming.checksum,
                actual=f"{algorithm}:{digest}",
            )
        reached("intake.verified")

    async def _make_image(self, arrival: Arrival, incoming: Incoming, progress: Progress, digest: str | None) -> None:
        """Have the data file there by its name, whole and on disk. What is there of it already was made by this."""
        if await self._exists(arrival, incoming.format.data_file):
            return
        disk = arrival.location.disk
        name = _UNPACKED
        if not await self._exists(arrival, _UNPACKED):
            await self._verify(arrival, incoming, progress, digest)
            compression = _compression(incoming, await disk.run(_read_head, arrival.content))
            if compression is Compression.NONE:
                name = CONTENT
            else:
                await self._unpack(arrival, compression, progress)
        head = await disk.run(_read_head, f"{arrival.directory}/{name}")
        progress.advance(progress.fraction, "inspecting")
        image_format = _format(incoming, head)
        header = await self._inspect(f"{arrival.directory}/{name}", incoming, image_format, arrival)
        assert header.virtual_bytes is not None
        reached("intake.inspected")
        await arrival.resize(_final_size(incoming, header.virtual_bytes))
        reached("intake.sized")
        progress.check()
        if image_format in (ImageFormat.RAW, ImageFormat.ISO):
            as_it_is = incoming.format is not VolumeFormat.QCOW2
        else:
            as_it_is = incoming.format is VolumeFormat.QCOW2 and header.adoptable
        if not as_it_is:
            await self._convert(arrival, f"{arrival.directory}/{name}", image_format, incoming.format, progress)
            name = _CONVERTED
            reached("intake.converted")
        progress.advance(progress.fraction, "syncing")
        await disk.run(fsync_file, f"{arrival.directory}/{name}")
        progress.check()
        await disk.run(os.rename, f"{arrival.directory}/{name}", f"{arrival.directory}/{incoming.format.data_file}")
        reached("intake.adopted")
        await self._drop(arrival, CONTENT, _UNPACKED, _UNPACKING)

    async def _drop(self, arrival: Arrival, *names: str) -> None:
        """Remove what is left of an earlier stage, which may be large."""
        if arrival.reservation.lasting:
            await arrival.location.disk.run(fsync_directory, arrival.directory)  # what takes its place has its name
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                await arrival.location.disk.run(os.unlink, f"{arrival.directory}/{name}")

    async def _unpack(self, arrival: Arrival, compression: Compression, progress: Progress) -> None:
        start = progress.fraction

        async def before_more(size_bytes: int, fraction: float) -> None:
            progress.check()
            progress.advance(start + (1 - start) * fraction / 2, "unpacking")
            await arrival.make_room(size_bytes)

        disk = arrival.location.disk
        await unpack(
            arrival.content,
            f"{arrival.directory}/{_UNPACKING}",
            compression,
            disk=disk,
            timeout_s=self._core.settings.job_timeout,
            before_more=before_more,
        )
        await disk.run(fsync_file, f"{arrival.directory}/{_UNPACKING}")
        await disk.run(os.rename, f"{arrival.directory}/{_UNPACKING}", f"{arrival.directory}/{_UNPACKED}")
        reached("intake.unpacked")
        await self._drop(arrival, CONTENT)

    async def _inspect(self, path: str, incoming: Incoming, image_format: ImageFormat, arrival: Arrival) -> Header:
        disk = arrival.location.disk
        if incoming.format is VolumeFormat.ISO:
            await disk.run(require_optical, path)
        header = await disk.run(read_header, path, image_format)
        if image_format not in (ImageFormat.RAW, ImageFormat.ISO):
            driver = _DRIVERS[image_format]
            virtual_bytes = await foreign_image.virtual_size(path, driver)
            require_allowed(virtual_bytes, self._core.settings.image_max_size)
            header = Header(virtual_bytes, header.adoptable, header.outdated)
            await foreign_image.require_sound(path, driver)
        return header

    async def _convert(
        self, arrival: Arrival, source: str, image_format: ImageFormat, target: VolumeFormat, progress: Progress
    ) -> None:
        start = progress.fraction
        progress.advance(start, "converting")
        path = f"{arrival.directory}/{_CONVERTED}"
        with contextlib.suppress(FileNotFoundError):
            await arrival.location.disk.run(os.unlink, path)
        await foreign_image.convert(
            source,
            _DRIVERS[ImageFormat.RAW if image_format is ImageFormat.ISO else image_format],
            path,
            target,
            on_fraction=lambda fraction: progress.advance(start + (0.98 - start) * fraction),
            timeout_s=self._core.settings.job_timeout,
            cancel=progress.cancelled,
        )

    async def _fit(self, arrival: Arrival, incoming: Incoming) -> int:
        """Bring the image that is there to the version and size it is to have; the size. Idempotent."""
        disk, image_format = arrival.location.disk, incoming.format
        path = f"{arrival.directory}/{image_format.data_file}"
        if image_format is VolumeFormat.QCOW2 and (await disk.run(read_header, path, ImageFormat.QCOW2)).outdated:
            await foreign_image.upgrade(path)
            reached("intake.upgraded")
        present_bytes = await disk.run(image_size, arrival.directory, image_format)
        size_bytes = present_bytes if image_format is VolumeFormat.ISO else _final_size(incoming, present_bytes)
        if size_bytes != present_bytes:
            place = Place(arrival.directory, disk)
            await self._core.store(image_format).grow(place, image_format, size_bytes)
            reached("intake.grown")
        await arrival.resize(size_bytes)
        return size_bytes

    # -- content for a volume that waits -------------------------------------------------------------------

    async def _fill(self, arrival: Arrival, incoming: Incoming, size_bytes: int, progress: Progress) -> Volume:
        async with self._catalog.hold(incoming.volume_id, _owner(incoming).require_change) as held:
            await self._require_fillable(held)
            if held.location is not arrival.location:
                raise Conflict("the volume has moved to another location meanwhile: send the content again")
            progress.commit()
            content = f"{arrival.directory}/{VolumeFormat.ISO.data_file}"
            await held.place.disk.run(_put_in, held.place.directory, content, size_bytes)
            volume = await held.reload()
        await arrival.release()
        return volume

    async def _filled_before(self, arrival: Arrival, incoming: Incoming) -> Volume:
        """The server died between filling the volume and giving the place back."""
        _, volume = await self._catalog.find(incoming.volume_id, _owner(incoming).require_change)
        if volume.waiting:
            raise Conflict("nothing has arrived for the volume yet", volume_id=volume.volume_id)
        await arrival.release()
        return volume


def require_allowed(size_bytes: int, most_bytes: int) -> None:
    """Raises ImageTooLarge when a setting forbids an image of this size."""
    if most_bytes and size_bytes > most_bytes:
        raise ImageTooLarge(f"an image from outside may have {most_bytes} bytes at the most, this one has {size_bytes}")


def _owner(incoming: Incoming) -> Actor:
    return Actor(incoming.creator_id) if incoming.creator_id else INFRASTRUCTURE


def _final_size(incoming: Incoming, image_bytes: int) -> int:
    return max(round_up_to_sector(image_bytes), incoming.size_bytes or 0)


def _compression(incoming: Incoming, head: bytes) -> Compression:
    if incoming.compression is not None:
        return incoming.compression
    # What is declared raw may begin with anything: a guest writes that.
    return Compression.NONE if incoming.image_format is ImageFormat.RAW else compression_of(head)


def _format(incoming: Incoming, head: bytes) -> ImageFormat:
    if incoming.format is VolumeFormat.ISO:
        return ImageFormat.ISO
    return incoming.image_format or format_of(head)


def _read_head(path: str) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        return os.pread(descriptor, HEAD_BYTES, 0)
    finally:
        os.close(descriptor)


def _publish(arrival: Arrival, incoming: Incoming, size_bytes: int) -> Entry:
    """The place becomes the volume. Blocks."""
    staging = arrival.directory
    # Of an earlier try that ended here.
    for name in (META_FILE, *incoming.files):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"{staging}/{name}")
    temporary = [name for name in os.listdir(staging) if name.startswith(TEMPORARY_PREFIX)]
    files = {name: text.encode() for name, text in incoming.files.items()}
    entry = Staged(arrival.reservation, incoming.meta(size_bytes), files).publish()
    directory = arrival.location.volume_path(incoming.volume_id)
    for name in temporary:
        with contextlib.suppress(OSError):  # the next sweep does it
            os.unlink(f"{directory}/{name}")
    if arrival.lock is not None:
        remove_lock(directory, arrival.lock)
    reached("intake.tidied")
    return entry


def _put_in(directory: str, content: str, size_bytes: int) -> None:
    """Replace the hole by the content, in one rename. Blocks."""
    target = f"{directory}/{VolumeFormat.ISO.data_file}"
    with contextlib.suppress(PermissionError):  # a server that is not root owns what it writes
        keep_owner_and_mode(target, content)
    fsync_file(content)
    # The size first: until the rename the volume waits, and who goes on with the upload comes here again.
    rewrite_meta(directory, {"size": size_bytes})
    os.rename(content, target)
    reached("intake.filled")
    fsync_directory(directory)
