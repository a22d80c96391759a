"""Volumes that are open to be read, each once, however many read it.

A session has the reader's lock, the open image, and, for what only QEMU can read, a storage daemon. The first reader
opens it; it goes a moment after the last, so that a client that asks for a thousand stretches does not lock the volume
a thousand times; and at once when somebody wants to change the volume.

Somebody else's reader does not keep an owner waiting for as long as it likes: when the volume is wanted for a change,
those who do not own it have ``reader-grace`` to come to an end, and no others are let in.
"""

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Final, ParamSpec, TypeVar

from elemento_storage.catalog.catalog import Reading
from elemento_storage.catalog.locations import os_errors
from elemento_storage.disk import Disk
from elemento_storage.engine.content import Content, FileContent, OpenFile, Readable
from elemento_storage.engine.image_lock import lock_image
from elemento_storage.engine.nbd_content import NbdContent, ReadingDaemon, remove_left_over
from elemento_storage.engine.qcow2_content import NotPlain, Qcow2Content
from elemento_storage.errors import ImageChanged, Unavailable, VolumeLocked
from elemento_storage.faultpoints import reached
from elemento_storage.keyed_locks import KeyedLocks
from elemento_storage.model import Volume, VolumeFormat, new_uid
from elemento_storage.service.access import Actor
from elemento_storage.service.core import Core
from elemento_storage.service.reading import reading
from elemento_storage.service.shares import Shares
from elemento_storage.stores.base import Image

P = ParamSpec("P")
T = TypeVar("T")

PURPOSE: Final = "read"
_LINGER_S: Final = 1.0
_MOST_READERS: Final = 64  #: each may hold a buffer of 1 MiB
_MOST_OF_ONE: Final = 48  #: client: there is always something left for the others
_KEPT_FREE_S: Final = 3.0


@dataclass(eq=False)
class Session:
    """One volume that is being read. Its image stays as it is."""

    core: Core
    reading: Reading
    file: OpenFile
    closing: contextlib.AsyncExitStack
    images: dict[str, Readable] = field(default_factory=dict)  #: what was put together of it, by format
    readers: set["Reader"] = field(default_factory=set)
    notice: asyncio.TimerHandle | None = None  #: the volume is wanted: when those who do not own it have to go
    _opening: asyncio.Lock = field(default_factory=asyncio.Lock)
    _content: Content | None = None

    @property
    def volume(self) -> Volume:
        """The volume as it was when it was opened."""
        return self.reading.volume

    @property
    def streams(self) -> Disk:
        """The threads to read it in."""
        return self.reading.location.streams

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call a function that reads the image. Raises LocationUnavailable, and what it raises but OSError."""
        with os_errors(self.reading.location):
            return await self.streams.run(function, *args, **kwargs)

    async def content(self) -> Content:
        """What a guest sees. Starts a storage daemon where it takes one. Raises ImageInUse, ImageDamaged …"""
        async with self._opening:
            if self._content is None:
                with os_errors(self.reading.location):
                    self._content = await self._open_content()
            return self._content

    async def _open_content(self) -> Content:
        store, place, image_format = (
            self.core.store(self.volume.meta.format),
            self.reading.place,
            self.volume.meta.format,
        )
        if store.plain_file(place, image_format) is not None:
            return FileContent(self.file)
        image = self.core.image(self.reading.location, self.volume)
        if image_format is VolumeFormat.QCOW2:
            with contextlib.suppress(NotPlain):
                return await self._open_plain(image)
        settings = self.core.settings
        daemon = ReadingDaemon(settings.run_dir, new_uid())
        self.closing.push_async_callback(daemon.stop)
        node = store.node(place, image_format, read_only=True, below=image.below)
        for path in node.below_paths:
            self.closing.callback(os.close, await place.disk.run(lock_image, path, read_only=True))
        await daemon.start(node, lifetime_s=settings.job_timeout)
        reached("read.daemon-started")
        content = await self.streams.run(NbdContent, daemon.socket_path, timeout_s=settings.disk_timeout)
        self.closing.callback(content.close)
        return content

    async def _open_plain(self, image: Image) -> Content:
        """Every image of the chain, the lowest first. Raises NotPlain, ImageInUse."""
        content: Content | None = None
        for one in reversed(image.below):
            path = f"{one.place.directory}/{one.format.data_file}"
            self.closing.callback(os.close, await one.place.disk.run(lock_image, path, read_only=True))
            file = await one.place.disk.run(OpenFile, path)
            self.closing.callback(file.close)
            if one.format is VolumeFormat.QCOW2:
                content = await self.streams.run(Qcow2Content, file, content)
            else:
                content = FileContent(file)
        return await self.streams.run(Qcow2Content, self.file, content)


@dataclass(eq=False)
class Reader:
    """Somebody who reads in a session, until ``unwanted`` is set."""

    session: Session
    client: str | None
    unwanted: asyncio.Event = field(default_factory=asyncio.Event)

    def check(self) -> None:
        """Raises VolumeLocked when it is to end."""
        if self.unwanted.is_set():
            raise _wanted_error()


def is_guest(client: str | None, volume: Volume) -> bool:
    """Whether the volume is another client's."""
    return client not in (None, volume.meta.creator_id)


def _wanted_error() -> VolumeLocked:
    return VolumeLocked("somebody wants to change the volume, so it is not read by others now: ask again later")


class ReadSessions:
    """All sessions of one server."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._catalog = core.catalog
        self._sessions: dict[str, Session] = {}
        self._shares = Shares(_MOST_READERS, _MOST_OF_ONE)
        self._kept_free: dict[str, float] = {}  #: volumes that were wanted, and until when no guest is let in
        self._one_at_a_time = KeyedLocks()
        self._timers: dict[Session, asyncio.TimerHandle] = {}

    async def start(self) -> None:
        """Remove what is left of a server that was killed."""
        await asyncio.to_thread(remove_left_over, self._core.settings.run_dir)

    @contextlib.asynccontextmanager
    async def open(self, actor: Actor, volume_id: str) -> AsyncIterator[Reader]:
        """A volume to be read for as long as it takes. Raises VolumeNotFound, VolumeLocked, VolumeExported …"""
        with self._shares.taken(actor.client):
            reader = await self._join_in_time(actor, volume_id)
            try:
                yield reader
            finally:
                self._leave(reader)

    async def close(self) -> None:
        """Close everything; those who still read fail."""
        for session in [*self._sessions.values(), *self._timers]:
            await self._end(session)

    # -- joining and leaving -------------------------------------------------------------------------------

    async def _join_in_time(self, actor: Actor, volume_id: str) -> Reader:
        """Opening touches the disk, which may hang: then it goes on unwatched, and is left at once when it is done."""
        patience_s = self._core.settings.disk_timeout
        joining = asyncio.create_task(self._join(actor, volume_id), name=f"open-{volume_id}")
        try:
            done, _ = await asyncio.wait({joining}, timeout=patience_s)
        except asyncio.CancelledError:
            joining.add_done_callback(self._leave_late)
            raise
        if not done:
            joining.add_done_callback(self._leave_late)
            raise Unavailable(f"the storage did not answer within {patience_s:g} s; nothing was changed")
        return joining.result()

    def _leave_late(self, joining: "asyncio.Task[Reader]") -> None:
        if not joining.cancelled() and joining.exception() is None:
            self._leave(joining.result())

    async def _join(self, actor: Actor, volume_id: str) -> Reader:
        async with self._one_at_a_time.hold(volume_id):
            session = await self._known(actor, volume_id)
            if self._is_kept_free(volume_id) or (session is not None and session.notice is not None):
                await self._require_no_guest(actor, volume_id)
            if session is None:
                session = await self._begin(actor, volume_id)
                self._sessions[volume_id] = session
                self._catalog.readers[volume_id] = lambda: self._wanted(volume_id)
            reader = Reader(session, actor.client)
            session.readers.add(reader)
            self._stop_timer(session)
            return reader

    async def _require_no_guest(self, actor: Actor, volume_id: str) -> None:
        _, volume = await self._catalog.find(volume_id, actor.require_see)
        if is_guest(actor.client, volume):
            raise _wanted_error()

    async def _known(self, actor: Actor, volume_id: str) -> Session | None:
        session = self._sessions.get(volume_id)
        if session is None:
            return None
        _, volume = await self._catalog.find(volume_id, actor.require_see)
        lock = session.reading.lock
        if lock is None or lock.file_name in volume.locks:
            with contextlib.suppress(ImageChanged):
                await session.streams.run(session.file.require_unchanged)
                return session
        # Somebody took this server for dead, or wrote past all locks. Those who read it find out at their end.
        self._forget(session)
        if not session.readers:
            await self._end(session)
        return None

    async def _begin(self, actor: Actor, volume_id: str) -> Session:
        async with contextlib.AsyncExitStack() as closing:
            source = await closing.enter_async_context(
                reading(self._core, volume_id, actor.require_see, PURPOSE, new_uid(), client=actor.client)
            )
            path = f"{source.place.directory}/{source.volume.meta.format.data_file}"
            with os_errors(source.location):
                file = await source.place.disk.run(OpenFile, path)
            closing.callback(file.close)
            reached("read.opened")
            return Session(self._core, source, file, closing.pop_all())

    def _leave(self, reader: Reader) -> None:
        session = reader.session
        session.readers.discard(reader)
        if session.readers:
            return
        volume_id = session.volume.volume_id
        if self._sessions.get(volume_id) is not session:
            self._catalog.in_background(self._end(session))
        elif session.notice is not None:
            self._catalog.in_background(self._dismiss(volume_id))
        else:
            self._timers[session] = asyncio.get_running_loop().call_later(
                _LINGER_S, lambda: self._catalog.in_background(self._dismiss(volume_id))
            )

    async def _dismiss(self, volume_id: str) -> None:
        async with self._one_at_a_time.hold(volume_id):
            session = self._sessions.get(volume_id)
            if session is not None and not session.readers:
                await self._end(session)

    def _stop_timer(self, session: Session) -> None:
        if (timer := self._timers.pop(session, None)) is not None:
            timer.cancel()

    def _forget(self, session: Session) -> None:
        """Let nobody join it any more."""
        if self._sessions.get(session.volume.volume_id) is session:
            del self._sessions[session.volume.volume_id]

    async def _end(self, session: Session) -> None:
        volume_id = session.volume.volume_id
        self._stop_timer(session)
        if session.notice is not None:
            session.notice.cancel()
            self._kept_free[volume_id] = time.monotonic() + _KEPT_FREE_S
        self._forget(session)
        await session.closing.aclose()
        if volume_id not in self._sessions:  # until here whoever wants the volume waits for the lock file to go
            self._catalog.readers.pop(volume_id, None)

    # -- those who want to change what is read -------------------------------------------------------------

    async def _wanted(self, volume_id: str) -> None:
        """Somebody who may wants to change the volume, and is refused as long as it is read."""
        async with self._one_at_a_time.hold(volume_id):
            session = self._sessions.get(volume_id)
            if session is None:
                return
            if not session.readers:
                await self._end(session)
            elif session.notice is None:
                grace_s = self._core.settings.reader_grace
                session.notice = asyncio.get_running_loop().call_later(grace_s, self._send_guests_away, session)

    @staticmethod
    def _send_guests_away(session: Session) -> None:
        for reader in session.readers:
            if is_guest(reader.client, session.volume):
                reader.unwanted.set()

    def _is_kept_free(self, volume_id: str) -> bool:
        """Whether it is the turn of who wanted it, who asks again any moment."""
        now = time.monotonic()
        self._kept_free = {one: until for one, until in self._kept_free.items() if until > now}
        return volume_id in self._kept_free
