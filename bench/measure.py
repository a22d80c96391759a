"""Figures and how they are taken: many short rounds, in which the sides take turns.

Another program on the machine slows whatever runs at that moment. When each side runs once in every round, and another
one begins each time, such a moment hits all of them alike and the ratio of the medians stays.
"""

import math
import statistics
import time
from collections.abc import Callable, Sequence

import msgspec

Side = Callable[[], Sequence[float]]


class Figures(msgspec.Struct, frozen=True):
    """What was measured, one number per round or per call."""

    unit: str
    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle one: a few disturbed rounds do not move it."""
        return statistics.median(self.values)

    @property
    def spread(self) -> tuple[float, float]:
        """p10 and p90, or the extremes of fewer than ten values."""
        ordered = sorted(self.values)
        cut = len(ordered) // 10
        return ordered[cut], ordered[-1 - cut]

    def __str__(self) -> str:
        low, high = self.spread
        if len(self.values) == 1:
            return f"{shown(self.median)} {self.unit}"
        return f"{shown(self.median)} {self.unit} ({shown(low)}–{shown(high)})"


class Goal(msgspec.Struct, frozen=True):
    """What was asked for, in words, and whether it is so."""

    text: str
    met: bool


class Row(msgspec.Struct, frozen=True):
    """One line of a table. Without a peer it is a plain fact about us."""

    what: str
    ours: Figures
    peer_name: str = ""
    peer: Figures | None = None
    goal: Goal | None = None
    paired: bool = False  #: the sides' values belong together, round by round
    date: str = ""  #: of the run, if that is not the section's

    @property
    def ratio(self) -> float | None:
        """Our median over the peer's."""
        return None if self.peer is None else self.ours.median / self.peer.median

    @property
    def ratio_spread(self) -> tuple[float, float] | None:
        """Of the ratios of the single rounds: what hits a round hits both of its sides."""
        if self.peer is None or not self.paired:
            return None
        pairs = zip(self.ours.values, self.peer.values, strict=True)
        return Figures("×", tuple(ours / peer for ours, peer in pairs)).spread


class Section(msgspec.Struct, frozen=True):
    """One bench's outcome."""

    title: str
    rows: list[Row]
    remarks: list[str]


def compare(
    what: str,
    ours: Figures,
    peer_name: str,
    peer: Figures,
    *,
    at_most: float | None = None,
    at_least: float | None = None,
    paired: bool = False,
) -> Row:
    """A row with both sides; the goal is a bound on the ratio ours/peer."""
    ratio = ours.median / peer.median
    goal = None
    if at_most is not None:
        goal = Goal(f"≤ {at_most:g}×", ratio <= at_most)
    elif at_least is not None:
        goal = Goal(f"≥ {at_least:g}×", ratio >= at_least)
    return Row(what, ours, peer_name, peer, goal, paired)


def bounded(what: str, ours: Figures, *, at_most: float) -> Row:
    """A row about us alone; the goal is a bound on the median."""
    return Row(what, ours, goal=Goal(f"≤ {at_most:g} {ours.unit}", ours.median <= at_most))


def alternate(rounds: int, *sides: Side) -> list[list[float]]:
    """Let every side run once per round; each round begins with the next one. Each side's values, all rounds."""
    values: list[list[float]] = [[] for _ in sides]
    for turn in range(rounds):
        for step in range(len(sides)):
            index = (turn + step) % len(sides)
            values[index].extend(sides[index]())
    return values


def timed(work: Callable[[], object]) -> float:
    """Seconds that one call takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def figures(unit: str, values: Sequence[float], *, scale: float = 1.0) -> Figures:
    """Values times ``scale``: 1000 turns seconds into ms."""
    return Figures(unit, tuple(value * scale for value in values))


def shown(value: float) -> str:
    """Three digits that count, never in powers of ten."""
    if value == 0:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{digits}f}"
