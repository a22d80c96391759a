"""What a long operation says about itself while it runs, and how it learns that it should stop."""

import asyncio
import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from elemento_storage.errors import JobCancelled
from elemento_storage.model import new_uid

_RATE_WINDOW_S = 3.0


@dataclass(frozen=True)
class Transfer:
    """How far bytes have got on a network, and how fast."""

    done_bytes: int | None = None  #: None: nothing is transferred
    total_bytes: int | None = None
    rate: float | None = None  #: bytes per second, of late
    _moment: float = 0.0

    @property
    def eta_s(self) -> float | None:
        """How long the rest will take at this rate."""
        if self.done_bytes is None or self.total_bytes is None or not self.rate:
            return None
        return round(max(0, self.total_bytes - self.done_bytes) / self.rate, 1)

    @property
    def whole_rate(self) -> int | None:
        """The rate without fractions."""
        return None if self.rate is None else round(self.rate)

    def at(self, moment: float, done_bytes: int, total_bytes: int | None) -> "Transfer":
        """The same a while later."""
        if self.done_bytes is None or done_bytes < self.done_bytes:
            return Transfer(done_bytes, total_bytes, None, moment)
        elapsed = moment - self._moment
        if elapsed <= 0:
            return Transfer(done_bytes, total_bytes, self.rate, self._moment)
        present = (done_bytes - self.done_bytes) / elapsed
        # What happened longer ago counts less: its weight falls to 1/e in the window.
        weight = 1 - math.exp(-elapsed / _RATE_WINDOW_S)
        rate = present if self.rate is None else self.rate + weight * (present - self.rate)
        return Transfer(done_bytes, total_bytes, rate, moment)

    def facts(self) -> dict[str, int | float | None]:
        """In the words of the API."""
        return {
            "bytes": self.done_bytes,
            "total_bytes": self.total_bytes,
            "rate": self.whole_rate,
            "eta": self.eta_s,
        }


class Progress:
    """What the work says about itself; a plain one serves a call that nobody watches."""

    def __init__(self, operation_id: str | None = None, changed: Callable[[], None] = lambda: None) -> None:
        self.operation_id = operation_id or new_uid()
        self.cancelled = asyncio.Event()
        self.fraction = 0.0
        self.phase = ""
        self.transfer = Transfer()
        self._changed = changed
        self._committed = False
        self._turn = threading.Lock()  #: the work may commit in a thread

    def advance(self, fraction: float, phase: str | None = None) -> None:
        """Report how much is done, 0 to 1, and in which phase."""
        self.fraction = min(max(fraction, 0.0), 1.0)
        if phase is not None:
            self.phase = phase
        self._changed()

    def transferred(self, done_bytes: int, total_bytes: int | None) -> None:
        """Report bytes that have come or gone over a network, of how many if that is known."""
        self.transfer = self.transfer.at(time.monotonic(), done_bytes, total_bytes)
        self._changed()

    def check(self) -> None:
        """Raise JobCancelled if somebody asked for it."""
        if self.cancelled.is_set():
            raise JobCancelled("cancelled; nothing was changed")

    def commit(self) -> None:
        """The point of no return: a last look, then a cancel comes too late."""
        with self._turn:
            self.check()
            self._committed = True

    def request_cancel(self) -> bool:
        """Ask the work to stop; False when it is past the point of no return."""
        with self._turn:
            if not self._committed:
                self.cancelled.set()
            return not self._committed


class Portion(Progress):
    """A part of some work. What is a point of no return in it is none of the whole, which can be cancelled after it."""

    def __init__(self, whole: Progress, up_to: float) -> None:
        super().__init__(whole.operation_id)
        self.cancelled = whole.cancelled
        self._whole, self._begin, self._up_to = whole, whole.fraction, up_to

    def advance(self, fraction: float, phase: str | None = None) -> None:
        """See Progress.advance: of the part."""
        super().advance(fraction, phase)
        self._whole.advance(self._begin + self.fraction * (self._up_to - self._begin), phase)

    def commit(self) -> None:
        """A last look before the part cannot be undone any more but by the whole's own rolling back."""
        self.check()
