"""Volumes that are open to be read, each once, however many read it.

A session has the reader's lock, the open image, and, for what only QEMU can read, a storage daemon. The first reader
opens it; it goes a moment after the last, so that a client that asks for a thousand stretches does not lock the volume
a thousand times; and at once when somebody wants to change the volume.
"""

import asyncio
import contextlib
import os
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
from elemento_storage.errors import ImageChanged, Unavailable
from elemento_storage.faultpoints import reached
from elemento_storage.keyed_locks import KeyedLocks
from elemento_storage.model import Volume, VolumeFormat, new_uid
from elemento_storage.service.access import Actor
from elemento_storage.service.core import Core
from elemento_storage.service.reading import reading

P = ParamSpec("P")
T = TypeVar("T")

PURPOSE: Final = "read"
_LINGER_S: Final = 1.0
_MOST_READERS: Final = 64  #: each may hold a buffer of 1 MiB


@dataclass(eq=False)
class Session:
    """One volume that is being read. Its image stays as it is."""

    core: Core
    reading: Reading
    file: OpenFile
    closing: contextlib.AsyncExitStack
    images: dict[str, Readable] = field(default_factory=dict)  #: what was put together of it, by format
    users: int = 0
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
        if image_format is VolumeFormat.QCOW2 and not image.below:
            with contextlib.suppress(NotPlain):
                return await self.streams.run(Qcow2Content, self.file)
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


class ReadSessions:
    """All sessions of one server."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._catalog = core.catalog
        self._sessions: dict[str, Session] = {}
        self._readers = 0
        self._one_at_a_time = KeyedLocks()
        self._timers: dict[Session, asyncio.TimerHandle] = {}

    async def start(self) -> None:
        """Remove what is left of a server that was killed."""
        await asyncio.to_thread(remove_left_over, self._core.settings.run_dir)

    @contextlib.asynccontextmanager
    async def open(self, actor: Actor, volume_id: str) -> AsyncIterator[Session]:
        """A volume to be read for as long as it takes. Raises VolumeNotFound, VolumeLocked, VolumeExported …"""
        if self._readers >= _MOST_READERS:
            raise Unavailable(f"{self._readers} are being read, which is as many as this server does: try again later")
        self._readers += 1
        try:
            session = await self._join_in_time(actor, volume_id)
            try:
                yield session
            finally:
                self._leave(session)
        finally:
            self._readers -= 1

    async def close(self) -> None:
        """Close everything; those who still read fail."""
        for session in [*self._sessions.values(), *self._timers]:
            await self._end(session)

    # -- joining and leaving -------------------------------------------------------------------------------

    async def _join_in_time(self, actor: Actor, volume_id: str) -> Session:
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

    def _leave_late(self, joining: "asyncio.Task[Session]") -> None:
        if not joining.cancelled() and joining.exception() is None:
            self._leave(joining.result())

    async def _join(self, actor: Actor, volume_id: str) -> Session:
        async with self._one_at_a_time.hold(volume_id):
            session = await self._known(actor, volume_id)
            if session is None:
                session = await self._begin(actor, volume_id)
                self._sessions[volume_id] = session
            session.users += 1
            self._stop_timer(session)
            return session

    async def _known(self, actor: Actor, volume_id: str) -> Session | None:
        session = self._sessions.get(volume_id)
        if session is None:
            return None
        _, volume = await self._catalog.find(volume_id, actor.require_see)
        if session.reading.lock.file_name in volume.locks:
            with contextlib.suppress(ImageChanged):
                await session.streams.run(session.file.require_unchanged)
                return session
        # Somebody took this server for dead, or wrote past all locks. Those who read it find out at their end.
        del self._sessions[volume_id]
        if not session.users:
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

    def _leave(self, session: Session) -> None:
        session.users -= 1
        if session.users:
            return
        volume_id = session.volume.volume_id
        if self._sessions.get(volume_id) is not session:
            self._catalog.in_background(self._end(session))
            return
        self._catalog.idle_readers[volume_id] = lambda: self._dismiss(volume_id)
        self._timers[session] = asyncio.get_running_loop().call_later(
            _LINGER_S, lambda: self._catalog.in_background(self._dismiss(volume_id))
        )

    async def _dismiss(self, volume_id: str) -> None:
        async with self._one_at_a_time.hold(volume_id):
            session = self._sessions.get(volume_id)
            if session is not None and not session.users:
                await self._end(session)

    def _stop_timer(self, session: Session) -> None:
        self._catalog.idle_readers.pop(session.volume.volume_id, None)
        if (timer := self._timers.pop(session, None)) is not None:
            timer.cancel()

    async def _end(self, session: Session) -> None:
        volume_id = session.volume.volume_id
        self._stop_timer(session)
        if self._sessions.get(volume_id) is session:
            del self._sessions[volume_id]
        await session.closing.aclose()
