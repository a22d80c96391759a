"""Undo steps of a change in memory. The journal on disk does the same for a process that dies."""

import logging
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Self

log = logging.getLogger(__name__)


class Reverter:
    """Collects undo steps; leaving the block without ``commit`` runs them, last first.

    A step that fails is logged and does not keep the others from running.
    """

    def __init__(self) -> None:
        self._steps: list[Callable[[], Awaitable[object]]] = []

    def add(self, step: Callable[[], Awaitable[object]]) -> None:
        """Register what takes back the change just made."""
        self._steps.append(step)

    def commit(self) -> None:
        """The change stands: forget the steps."""
        self._steps.clear()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._steps:
            step = self._steps.pop()
            try:
                await step()
            except Exception:
                log.exception("an undo step failed; the next start or rescan removes what it left")
