"""The outcome as a file of raw figures and a page to read."""

from collections.abc import Mapping
from pathlib import Path

import msgspec
from msgspec import structs

from bench.measure import Row, Section, shown


class Run(msgspec.Struct, frozen=True):
    """A section and how it came about."""

    section: Section
    command: str
    date: str
    quick: bool
    machine: dict[str, str]


def load(path: Path) -> dict[str, Run]:
    """The raw figures of earlier runs, by bench; none when there is no such file or it is of an older form."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Run])
    except (OSError, msgspec.DecodeError):
        return {}


def join(new: Section, old: Run) -> Section:
    """A section of some parts, and of an earlier run's the others, in the earlier order."""
    parts: dict[str, list[Row]] = {}
    for row in old.section.rows:
        parts.setdefault(part_of(row), []).append(structs.replace(row, date=row.date or old.date))
    for name in {part_of(row): None for row in new.rows}:
        parts[name] = [row for row in new.rows if part_of(row) == name]
    return Section(new.title, [row for rows in parts.values() for row in rows], new.remarks)


def part_of(row: Row) -> str:
    """What its name begins with: of a bench that can be run in parts, which of them it is from."""
    return row.what.partition(": ")[0]


def save(path: Path, runs: Mapping[str, Run]) -> None:
    """Every single figure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(msgspec.json.format(msgspec.json.encode(runs), indent=1))


def page(runs: Mapping[str, Run]) -> str:
    """Markdown."""
    newest = max(runs.values(), key=lambda run: run.date)
    lines = [
        "# Side by side",
        "",
        "Made by `make bench`, which installs the tools and runs `.venv/bin/python -m bench`. Both sides of a line",
        "ran on the same machine and file system in the same run, taking turns. Shown are the median and, in brackets,",
        "p10–p90 (the extremes of fewer than ten values). The ratio is our median over the peer's: for times less is",
        "better, for rates (*per s*, *MB/s*, *IOPS*) more; the bracket behind it is that of the single rounds. Figures",
        "of another machine are made there, by the same command.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in newest.machine.items()),
    ]
    for run in runs.values():
        lines += ["", f"## {run.section.title}", "", *_table(run.section.rows), ""]
        lines += [f"- {remark}" for remark in run.section.remarks]
        for date in sorted({row.date for row in run.section.rows if row.date}):
            names = dict.fromkeys(part_of(row) for row in run.section.rows if row.date == date)
            lines.append(f"- Of {date}: {'; '.join(names)}.")
        hurry = " In a hurry: few rounds, fewer volumes." if run.quick else ""
        lines.append(f"- `{run.command}`, {run.date}, load {run.machine['Load when it began']}.{hurry}")
    return "\n".join(lines) + "\n"


def _table(rows: list[Row]) -> list[str]:
    lines = ["| | ours | peer | peer's | ratio | goal | met |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        ratio = "" if row.ratio is None else f"{shown(row.ratio)}×"
        if row.ratio_spread is not None:
            ratio += f" ({shown(row.ratio_spread[0])}–{shown(row.ratio_spread[1])})"
        goal, met = ("", "") if row.goal is None else (row.goal.text, "yes" if row.goal.met else "**no**")
        lines.append(f"| {row.what} | {row.ours} | {row.peer_name} | {row.peer or ''} | {ratio} | {goal} | {met} |")
    return lines
