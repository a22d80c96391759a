"""`python -m bench`: runs the benches and writes what came out."""

import argparse
import signal
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from bench import (
    ceph,
    client,
    clone,
    convert,
    create,
    exports,
    images,
    info,
    listing,
    machine,
    recovery,
    report,
    scan,
    transfers,
)
from bench.context import BUILD, ROOT, Context, work_directory
from bench.measure import Section

_BENCHES: dict[str, Callable[[Context], Section]] = {
    "create": create.run,
    "listing": listing.run,
    "scan": scan.run,
    "info": info.run,
    "convert": convert.run,
    "images": images.run,
    "uploads": transfers.uploads,
    "downloads": transfers.downloads,
    "clone": clone.run,
    "exports": exports.run,
    "recovery": recovery.run,
    "client": client.run,
    "ceph": ceph.run,
}


def main() -> None:
    """Parse, run, write."""
    parser = argparse.ArgumentParser(prog="python -m bench", description="Compare this server with its peers.")
    parser.add_argument("--only", choices=_BENCHES, action="append", help="this one alone; the others' results stay")
    parser.add_argument("--part", choices=exports.PARTS, action="append", help="of `exports`, this one alone")
    parser.add_argument("--quick", action="store_true", help="a few rounds, to see that it works; another page")
    parser.add_argument("--output", type=Path, help="the page to write, docs/bench.md if not said")
    options = parser.parse_args()
    if options.part and options.only != ["exports"]:
        parser.error("--part goes with --only exports")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is ended

    # What was done in a hurry never takes the place of what was done thoroughly.
    raw = BUILD / ("bench-quick.json" if options.quick else "bench.json")
    output = options.output or (BUILD / "bench-quick.md" if options.quick else ROOT / "docs" / "bench.md")
    command = " ".join([".venv/bin/python -m bench", *sys.argv[1:]])
    runs = report.load(raw)
    for name in options.only or _BENCHES:
        print(f"{name} …", file=sys.stderr, flush=True)
        started = time.monotonic()
        facts = machine.facts()
        with work_directory() as work:
            section = _BENCHES[name](Context(work, options.quick, tuple(options.part or ())))
        if options.part and name in runs:
            section = report.join(section, runs[name])
        date = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
        runs[name] = report.Run(section, command, date, options.quick, facts)
        runs = {known: runs[known] for known in _BENCHES if known in runs}
        report.save(raw, runs)
        output.write_text(report.page(runs), encoding="utf-8")
        for row in section.rows:
            print(f"  {row.what}: {row.ours}  {row.peer_name} {row.peer or ''}", file=sys.stderr)
        print(f"  took {time.monotonic() - started:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
