"""What a long operation says about itself while it runs, and how it learns that it should stop."""

import asyncio
import threading
from collections.abc import Callable

from elemento_storage.errors import JobCancelled
from elemento_storage.model import new_uid


class Progress:
    """What the work says about itself; a plain one serves a call that nobody watches."""

    def __init__(self, operation_id: str | None = None, changed: Callable[[], None] = lambda: None) -> None:
        self.operation_id = operation_id or new_uid()
        self.cancelled = asyncio.Event()
        self.fraction = 0.0
        self.phase = ""
        self._changed = changed
        self._committed = False
        self._turn = threading.Lock()  #: the work may commit in a thread

    def advance(self, fraction: float, phase: str | None = None) -> None:
        """Report how much is done, 0 to 1, and in which phase."""
        self.fraction = min(max(fraction, 0.0), 1.0)
        if phase is not None:
            self.phase = phase
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
