"""What commands print: tables for people, JSON for programs, a bar while something takes long."""

import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import click

if TYPE_CHECKING:
    from elemento_storage.client.types import Progress

_UNITS: Final = ("B", "K", "M", "G", "T", "P", "E")


def size(size_bytes: int | float | None) -> str:
    """Bytes in powers of 1000, as sizes are given: ``20G``, ``1.5T``."""
    if size_bytes is None:
        return "-"
    value, unit = float(size_bytes), 0
    while value >= 999.95 and unit < len(_UNITS) - 1:
        value, unit = value / 1000, unit + 1
    text = f"{value:.0f}" if unit == 0 else f"{value:.1f}".removesuffix(".0")
    return text + (_UNITS[unit] if unit else "")


def clean(value: object) -> str:
    """Text that does nothing to a terminal: names of volumes are other people's words."""
    if value is None or value == "":
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "".join(one if one.isprintable() else "\N{REPLACEMENT CHARACTER}" for one in str(value))


def table(headings: Sequence[str], rows: Sequence[Sequence[object]], right: frozenset[int] = frozenset()) -> None:
    """Columns as wide as they have to be; those in ``right`` are numbers."""
    cells = [[*headings], *([clean(value) for value in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(headings))]
    for row in cells:
        padded = [text.rjust(width) if column in right else text.ljust(width)
                  for column, (text, width) in enumerate(zip(row, widths, strict=True))]  # fmt: skip
        click.echo("  ".join(padded).rstrip())


def facts(said: Mapping[str, object]) -> None:
    """Names and values below each other."""
    width = max(map(len, said))
    for name, value in said.items():
        click.echo(f"{name:<{width}}  {clean(value)}")


def as_json(answer: Any) -> None:
    """What the API answers, one value, indented."""
    import msgspec  # noqa: PLC0415  --help need not wait

    click.echo(msgspec.json.format(msgspec.json.encode(answer), indent=2).decode())


def as_json_line(answer: Any) -> None:
    """The same on one line, for what goes on for ever."""
    import msgspec  # noqa: PLC0415

    click.echo(msgspec.json.encode(answer).decode())


class Bar:
    """How far something is, on one line of a terminal; nothing where stderr is none."""

    def __init__(self, *, quiet: bool) -> None:
        self._shows = not quiet and sys.stderr.isatty()
        self._began = time.monotonic()
        self._drawn = False

    def __call__(self, progress: "Progress") -> None:
        """The bar is a callback of the client library."""
        # What is over in a blink needs no bar.
        if not self._shows or (not self._drawn and time.monotonic() - self._began < 0.3):
            return
        columns = shutil.get_terminal_size().columns
        sys.stderr.write("\r\x1b[K" + line(progress, columns - 1))
        sys.stderr.flush()
        self._drawn = True

    def end(self) -> None:
        """Wipe it."""
        if self._drawn:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()


def line(progress: "Progress", columns: int) -> str:
    """One line: phase, bar, bytes, rate, time that is left."""
    parts = [clean(progress.phase)[:24]]
    tail = []
    if progress.fraction is not None:
        parts.append(f"{progress.fraction:4.0%}")
    if progress.done is not None:
        tail.append(size(progress.done) + (f" of {size(progress.total)}" if progress.total else ""))
    if progress.rate:
        tail.append(f"{size(progress.rate)}B/s")
    if progress.eta is not None:
        left = max(0, round(progress.eta))
        tail.append(f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02} left")
    text = "  ".join([*parts, *tail])
    room = columns - len(text) - 4
    if progress.fraction is not None and room >= 10:
        width = min(room, 30)
        filled = round(min(max(progress.fraction, 0), 1) * width)
        text = "  ".join([*parts, f"[{'#' * filled}{'.' * (width - filled)}]", *tail])
    return text[:columns]
