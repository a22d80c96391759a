"""How fast a transfer is, and how long it will take."""

import time
from typing import Final

from elemento_storage.client.types import OnProgress, Progress

_OFTEN_S: Final = 0.1
_WINDOW_S: Final = 5.0  #: the rate is that of the last seconds


class Pace:
    """Tells a callback, ten times a second at the most, how far a transfer of ``total`` bytes is."""

    def __init__(self, phase: str, total: int, on_progress: OnProgress | None) -> None:
        self.phase = phase
        self.total = total
        self._on_progress = on_progress
        self._told = 0.0
        self._seen: list[tuple[float, int]] = []

    def starts_at(self, done: int) -> None:
        """Begin, or go on elsewhere: what is behind ``done`` says nothing of the rate."""
        self._seen = []
        self._told = 0.0
        self.is_at(done)

    def is_at(self, done: int) -> None:
        """So far it has come."""
        now = time.monotonic()
        if self._on_progress is None or (now - self._told < _OFTEN_S and done < self.total):
            return
        self._told = now
        self._seen = [one for one in self._seen if now - one[0] <= _WINDOW_S]
        self._seen.append((now, done))
        since, before = self._seen[0]
        rate = (done - before) / (now - since) if now > since else None
        eta = (self.total - done) / rate if rate else None
        self._on_progress(Progress(self.phase, done / self.total if self.total else 1.0, done, self.total, rate, eta))
