"""A download from its first request to its last byte, over as many connections as it takes, but not more than that.

A connection that breaks is followed by another that asks for the rest, with If-Range: the rest of the same file, or all
of another one. Where the server cannot do that, the download begins again at 0. Tries are counted, those that brought
nothing and all of them; a server that stops sending, or sends a trickle, is as good as broken.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from elemento_storage.disk import Disk
from elemento_storage.errors import DownloadFailed
from elemento_storage.faultpoints import reached
from elemento_storage.fetch.addresses import AddressRules, TryAgain
from elemento_storage.fetch.connection import Exchange, ServerBusy
from elemento_storage.images.sparse import SparseWriter
from elemento_storage.progress import Progress

T = TypeVar("T")

log = logging.getLogger(__name__)

_PIECE_BYTES = 16 << 20  #: between two looks at progress, room and whether it is cancelled
_PIECE_S = 0.25
_REPORT_S = 0.5
_LAST_PATIENCE_S = 30.0


@dataclass(frozen=True)
class Patience:
    """What a download puts up with."""

    stall_s: float  #: nothing for so long, or next to nothing, and the connection is given up
    total_s: float  #: all of it
    idle_tries: int = 6  #: connections one after the other that bring nothing
    tries: int = 40  #: connections in all
    restarts: int = 3  #: from the first byte
    trickle_bytes_s: int = 1024  #: slower than this is a stall

    def pause_s(self, idle: int) -> float:
        """Before another try, after so many that brought nothing."""
        return min(self.stall_s / 150 * float(2**idle), self.stall_s / 3)


class Receiver(Protocol):
    """Who a download is for."""

    async def begin(self, total_bytes: int | None) -> SparseWriter:
        """The first byte is about to come: where it goes. Raises what ends the download."""

    async def before_more(self, size_bytes: int) -> None:
        """The file may grow to so much. Raises what ends the download."""

    async def restart(self) -> SparseWriter:
        """The download begins again: an empty file."""


class Download:
    """One file from the web."""

    def __init__(
        self, url: str, rules: AddressRules, patience: Patience, progress: Progress, *, counted_only: bool
    ) -> None:
        self._url = url
        self._rules = rules
        self._patience = patience
        self._progress = progress
        self._counted_only = counted_only  #: no checksum tells whether all has come, so the server has to
        self._thread = Disk("download", threads=1)
        self._exchange: Exchange | None = None
        self._writer: SparseWriter | None = None
        self._total_bytes: int | None = None
        self._validator: str | None = None
        self._restarts = 0
        self._deadline = time.monotonic() + patience.total_s

    @property
    def _position(self) -> int:
        return self._writer.position if self._writer is not None else 0

    async def into(self, receiver: Receiver) -> SparseWriter:
        """Bring the whole file; the writer that has it. Its bytes are not yet synced.

        Raises UrlRefused, DownloadFailed, JobCancelled, OSError of the file, and what ``receiver`` raises.
        """
        patience = self._patience
        idle = tries = 0
        try:
            while True:
                before, pause_s = self._position, 0.0
                try:
                    await self._connection_after(receiver)
                    await self._unless_unwanted(self._writer_of_all().finish)
                    reached("download.received")
                    return self._writer_of_all()
                except TryAgain as error:
                    tries += 1
                    idle = 0 if self._position > before else idle + 1
                    if idle >= patience.idle_tries or tries >= patience.tries:
                        raise DownloadFailed(f"{error}; given up after {tries} tries") from error
                    log.info("a download goes on after a pause: %s", error)
                    if isinstance(error, ServerBusy):
                        pause_s = error.pause_s
                self._progress.advance(self._progress.fraction, "waiting to try again")
                pause_s = max(pause_s, patience.pause_s(idle))
                await self._pause(pause_s)
        finally:
            self._thread.close()

    def _writer_of_all(self) -> SparseWriter:
        assert self._writer is not None
        return self._writer

    async def _connection_after(self, receiver: Receiver) -> None:
        """One connection: from where the last one broke off to the end, or until it breaks. Raises TryAgain …"""
        exchange = Exchange(self._rules, stall_s=self._patience.stall_s, downgrade=not self._counted_only)
        self._exchange = exchange
        try:
            self._progress.advance(self._progress.fraction, "connecting")
            asked = (self._url, self._position, self._validator)
            await self._unless_unwanted(exchange.open, *asked, patience_s=3 * self._patience.stall_s)
            if self._counted_only and not exchange.counted:
                raise DownloadFailed(f"{exchange.site} does not say how long the file is: give a checksum")
            await self._begin(exchange, receiver)
            await self._receive(exchange, receiver)
        finally:
            exchange.break_off()
            exchange.close()

    async def _begin(self, exchange: Exchange, receiver: Receiver) -> None:
        if self._writer is None:
            self._writer = await receiver.begin(exchange.total_bytes)
        elif exchange.start == 0 and self._position:
            self._restarts += 1
            if self._restarts > self._patience.restarts:
                raise DownloadFailed(f"{exchange.site} cannot go on where a connection broke, and they break")
            self._writer = await receiver.restart()
        elif exchange.start and exchange.total_bytes != self._total_bytes:
            self._validator = None
            raise TryAgain(f"{exchange.site} has another file there by now")
        self._total_bytes, self._validator = exchange.total_bytes, exchange.validator
        self._progress.advance(self._progress.fraction, "downloading")

    async def _receive(self, exchange: Exchange, receiver: Receiver) -> None:
        writer = self._writer_of_all()
        window_began, window_position = time.monotonic(), writer.position
        more = True
        while more:
            await receiver.before_more(writer.position + _PIECE_BYTES)
            more = await self._unless_unwanted(exchange.pour, writer, _PIECE_BYTES, _PIECE_S)
            self._report()
            reached("download.piece")
            now = time.monotonic()
            if now - window_began > self._patience.stall_s:
                if writer.position - window_position < self._patience.trickle_bytes_s * self._patience.stall_s:
                    raise TryAgain(f"{exchange.site} sends next to nothing")
                window_began, window_position = now, writer.position

    def _report(self) -> None:
        if self._writer is not None and self._exchange is not None and self._exchange.site:
            self._progress.transferred(self._writer.position, self._total_bytes)

    async def _unless_unwanted(
        self,
        function: Callable[..., T],
        *args: Any,
        patience_s: float | None = None,
    ) -> T:
        """Do something that blocks in the download's thread, and break the connection off when it is cancelled."""
        self._progress.check()
        left_s = self._deadline - time.monotonic()
        if left_s <= 0:
            raise DownloadFailed(f"the download is not over after {self._patience.total_s:g} s")
        work = asyncio.ensure_future(self._thread.run(function, *args))
        cancelled = asyncio.ensure_future(self._progress.cancelled.wait())
        try:
            until = time.monotonic() + (left_s if patience_s is None else min(left_s, patience_s))
            while not work.done() and not cancelled.done() and (wait_s := until - time.monotonic()) > 0:
                wait_s = min(wait_s, _REPORT_S)
                await asyncio.wait({work, cancelled}, timeout=wait_s, return_when=asyncio.FIRST_COMPLETED)
                if not work.done():
                    self._report()  # a connection that stands still shows in the rate
            if not work.done() and self._exchange is not None:
                self._exchange.break_off()
                await asyncio.wait({work}, timeout=_LAST_PATIENCE_S)
            if not work.done():
                work.add_done_callback(lambda task: task.cancelled() or task.exception())
                self._progress.check()
                raise DownloadFailed("the download hangs in the system: its name server or file system does not answer")
            self._progress.check()
            return work.result()
        finally:
            cancelled.cancel()

    async def _pause(self, seconds: float) -> None:
        try:
            await asyncio.wait_for(self._progress.cancelled.wait(), seconds)
        except TimeoutError:
            return
        finally:
            self._progress.check()
