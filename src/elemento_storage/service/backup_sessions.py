"""A moment of a volume for another backup program: read over NBD, with what changed since the program's last one.

What is served is read-only: the content as an export, and a dirty bitmap as a metadata context of it, as the backup
programs for oVirt and libvirt read them. The program says at the end whether it has everything; if so, its next session
may ask for what changed since this one. Otherwise nothing is lost: what was recorded goes on from the one before.

A session that nobody ends is ended when its lease is over, and when the server ends.
"""

import asyncio
import contextlib
import logging
import time
from dataclasses import dataclass, replace
from typing import Final

import msgspec

from elemento_storage.catalog.catalog import Operation
from elemento_storage.catalog.locations import os_errors
from elemento_storage.catalog.locks import LockRecord, remove_lock, rewrite_lock
from elemento_storage.disk import Place
from elemento_storage.errors import BackupNotFound, BackupSessionLost, NoIncrement, StorageError
from elemento_storage.faultpoints import reached
from elemento_storage.model import new_uid
from elemento_storage.service.access import Actor
from elemento_storage.service.core import Core
from elemento_storage.service.moments import Moment, Moments

log = logging.getLogger(__name__)

PURPOSE: Final = "backup-session"
_BITMAPS: Final = "pull-"
_SAVED: Final = "saved"


@dataclass(frozen=True)
class Session:
    """A moment that another program reads."""

    session_id: str
    volume_id: str
    creator_id: str
    uri: str
    size_bytes: int
    since: str | None  #: the session whose changes it asked for
    context: str | None  #: the NBD metadata context that says what changed since
    tracked: bool  #: the next session may ask for what changed since this one
    reason: str  #: why not
    ends: float  #: seconds since the epoch
    lock: LockRecord
    moment: Moment


class BackupSessions:
    """Opens and ends sessions of other backup programs."""

    def __init__(self, core: Core, moments: Moments) -> None:
        self._core = core
        self._catalog = core.catalog
        self._moments = moments
        self._sessions: dict[str, Session] = {}
        self._timers: dict[str, asyncio.Task[None]] = {}
        core.catalog.resolvers[PURPOSE] = self.resolve

    async def open(self, actor: Actor, volume_id: str, *, since: str | None, lease_s: float) -> Session:
        """Keep this moment and serve it. Raises NoIncrement when nothing says what changed since, VolumeLocked …"""
        session_id = new_uid()
        operation = Operation(session_id, self._catalog.server_id)
        self._catalog.active_operations.add(session_id)
        try:
            async with self._catalog.hold(volume_id, actor.require_change) as held:
                await self._moments.require_possible(held)
                lock = await operation.lock_volume(held, PURPOSE, actor.client, {"since": since or ""})
                moment = await self._moments.take(held, session_id, _BITMAPS, since, only_changes=since is not None)
                if since is not None and moment.changed is None:
                    raise NoIncrement(f"what changed since is not known: {moment.reason}", reason=moment.reason)
                uri = await self._moments.publish(volume_id, moment, session_id)
                reached("backup-session.served")
                session = Session(
                    session_id=session_id,
                    volume_id=volume_id,
                    creator_id=held.volume.meta.creator_id,
                    uri=uri,
                    size_bytes=held.volume.size_bytes,
                    since=since,
                    context=f"qemu:dirty-bitmap:{moment.changed}" if moment.changed else None,
                    tracked=moment.tracked,
                    reason="" if moment.tracked else moment.reason,
                    ends=time.time() + lease_s,
                    lock=lock,
                    moment=moment,
                )
        except BaseException:
            self._catalog.active_operations.discard(session_id)
            if operation.lock is not None:
                await self._catalog.settle(volume_id)
            raise
        self._sessions[session_id] = session
        self._set_timer(session)
        return session

    def renew(self, actor: Actor, session_id: str, lease_s: float) -> Session:
        """Let it last longer. Raises BackupNotFound."""
        session = replace(self._find(actor, session_id), ends=time.time() + lease_s)
        self._sessions[session_id] = session
        self._set_timer(session)
        return session

    def visible(self, actor: Actor) -> list[Session]:
        """The actor's own."""
        return [one for one in self._sessions.values() if actor.client in (None, one.creator_id)]

    async def close(self, actor: Actor, session_id: str, *, saved: bool) -> Session:
        """End it. ``saved``: the program has everything, and its next session may ask for what changed since.

        Raises BackupNotFound; BackupSessionLost when what was to be saved was cut off: it is ended all the same.
        """
        session = self._find(actor, session_id)
        is_whole = not saved or await session.moment.frozen.is_published(session_id)
        await self._end(session, saved=saved and is_whole)
        if not is_whole:
            raise BackupSessionLost(
                "the session was cut off, because the volume's daemon ended or its NBD server was moved: what was read "
                "is no backup, open another session",
                session=session_id,
            )
        return session

    async def _end(self, session: Session, *, saved: bool) -> None:
        async with self._catalog.hold(session.volume_id, lambda _: None, own_lock=session.lock) as held:
            lock = session.lock
            if saved and session.tracked:
                # The decision: a crash from here on ends the session as a saved one.
                lock = _with_phase(lock, _SAVED)
                with os_errors(held.location):
                    await held.place.disk.run(rewrite_lock, held.place.directory, lock)
                reached("backup-session.said-saved")
            current = session.session_id if saved and session.tracked else session.since
            await self._moments.end(held.location, held.volume, session.session_id, _BITMAPS, current)
            with os_errors(held.location):
                await held.place.disk.run(remove_lock, held.place.directory, lock)
            await held.reload()
        self._forget(session.session_id)

    def _find(self, actor: Actor, session_id: str) -> Session:
        session = self._sessions.get(session_id)
        if session is None or actor.client not in (None, session.creator_id):
            raise BackupNotFound(f"no backup session {session_id}: was its lease over?", session=session_id)
        return session

    def _forget(self, session_id: str) -> None:
        self._sessions.pop(session_id, None)
        self._catalog.active_operations.discard(session_id)
        timer = self._timers.pop(session_id, None)
        if timer is not None and timer is not asyncio.current_task():
            timer.cancel()

    def _set_timer(self, session: Session) -> None:
        before = self._timers.pop(session.session_id, None)
        if before is not None:
            before.cancel()
        work = self._end_in_time(session.session_id)
        self._timers[session.session_id] = asyncio.create_task(work, name=f"lease-{session.session_id}")

    async def _end_in_time(self, session_id: str) -> None:
        while (session := self._sessions.get(session_id)) is not None:
            await asyncio.sleep(max(0.0, session.ends - time.time()))
            log.warning("backup session %s of volume %s: its lease is over", session_id, session.volume_id)
            try:
                await self._end(session, saved=False)
            except StorageError as error:
                # Left over from now on: the next sweep resolves it.
                log.error("backup session %s does not end: %s", session_id, error.message)
                self._forget(session_id)

    async def stop(self) -> None:
        """End all: nobody would look after them."""
        for session in list(self._sessions.values()):
            with contextlib.suppress(StorageError):
                await self._end(session, saved=False)

    async def resolve(self, place: Place, lock: LockRecord) -> None:
        """After a crash: a session that was not said to be saved was none."""
        location, volume = self._moments.volume_of(place)
        is_saved = lock.journal.get("phase") == _SAVED
        current = lock.operation if is_saved else str(lock.journal.get("since", "")) or None
        await self._moments.end(location, volume, lock.operation, _BITMAPS, current)
        reached("backup-session.resolved")
        log.warning("backup session %s of volume %s was ended: its server died", lock.operation, volume.volume_id)


def _with_phase(lock: LockRecord, phase: str) -> LockRecord:
    changed: LockRecord = msgspec.structs.replace(lock, journal={**lock.journal, "phase": phase})
    return changed
