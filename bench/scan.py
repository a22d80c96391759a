"""Start-up: reading every volume's directory, and the memory that the index takes."""

import os
import re
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path

from tests.live import make_location

from bench.context import Context
from bench.libvirt import private_libvirt
from bench.measure import Goal, Row, Section, bounded, compare, figures
from bench.volumes import make_pool_files, make_volumes

TITLE = "Start-up"
REMARKS = [
    "*Reading* is what the log says (`N volumes in …, read in X s`); *until it answers* is from the start of the "
    "process, so it holds the interpreter's start and the first call too. Memory is VmRSS after the first answer.",
    "The kernel had the directories in its cache, except where it says *cold* (dentries, inodes and pages dropped "
    "just before; only with root).",
    "`pool-refresh` reads 10,000 plain files of one directory; ours reads 10,000 directories with two files each.",
]

_READ = re.compile(r" (\d+) volumes in \d+ locations? .*read in ([\d.]+) s")
_RSS = re.compile(r"^VmRSS:\s+(\d+) kB", re.MULTILINE)
_LARGEST = 100_000


@dataclass
class _Starts:
    read_s: list[float] = field(default_factory=list)
    ready_s: list[float] = field(default_factory=list)
    rss_mb: list[float] = field(default_factory=list)


def run(context: Context) -> Section:
    """All rows."""
    sizes = (1_000, 10_000) if context.quick else (1_000, 10_000, _LARGEST)
    starts: dict[int, _Starts] = {}
    rows: list[Row] = []
    cold_rows: list[Row] = []
    for count in sizes:
        root = context.directory(f"mnt-{count}")
        make_volumes(make_location(root), count)
        time.sleep(2.5)  # what is younger is read again, see volume_directory.RACY_NS
        starts[count] = _Starts()
        if count == 10_000:
            rows.append(_beside_libvirt(context, root, starts[count]))
        else:
            for _ in range(context.rounds(5 if count == _LARGEST else 11)):
                _start(context, root, count, starts[count])
        if count == max(sizes) and os.geteuid() == 0 and not context.quick:
            cold = _Starts()
            for _ in range(2):
                _drop_caches()
                _start(context, root, count, cold)
            cold_rows.append(Row(f"{count:,} volumes, cold: reading", figures("s", cold.read_s)))
        shutil.rmtree(root)
    own = [row for count in sizes for row in _own_rows(count, starts[count])]
    return Section(TITLE, [*own, *cold_rows, *_growth(starts), *rows], REMARKS)


def _own_rows(count: int, starts: _Starts) -> list[Row]:
    read, ready = figures("s", starts.read_s), figures("s", starts.ready_s)
    memory = figures("MB", starts.rss_mb)
    if count == _LARGEST:
        return [
            bounded(f"{count:,} volumes: reading", read, at_most=6),
            bounded(f"{count:,} volumes: until it answers", ready, at_most=6),
            bounded(f"{count:,} volumes: memory", memory, at_most=400),
        ]
    return [
        Row(f"{count:,} volumes: reading", read),
        Row(f"{count:,} volumes: until it answers", ready),
        Row(f"{count:,} volumes: memory", memory),
    ]


def _growth(starts: dict[int, _Starts]) -> list[Row]:
    """Ten times as many volumes take ten times as long, give or take noise, if growth is linear."""
    if _LARGEST not in starts:
        return []
    small, large = figures("s", starts[10_000].read_s), figures("s", starts[_LARGEST].read_s)
    factor = large.median / small.median
    row = Row("reading 100,000 / reading 10,000", figures("×", [factor]), goal=Goal("linear: ≤ 12×", factor <= 12))
    return [row]


def _start(context: Context, root: Path, count: int, starts: _Starts) -> float:
    began = time.perf_counter()
    with context.server(root) as server:
        starts.ready_s.append(time.perf_counter() - began)
        assert server.process is not None
        status = Path(f"/proc/{server.process.pid}/status").read_text()
        memory, read = _RSS.search(status), _READ.search(server.log())
        assert memory, status
        assert read, server.log()
        assert int(read[1]) == count, server.log()
    starts.read_s.append(float(read[2]))
    starts.rss_mb.append(int(memory[1]) * 1024 / 1e6)
    return float(read[2])


def _beside_libvirt(context: Context, root: Path, starts: _Starts) -> Row:
    pool = context.directory("pool")
    make_pool_files(pool, 10_000)
    refresh_s: list[float] = []
    with private_libvirt() as libvirt, libvirt.session() as virsh:
        virsh.run(f"pool-create-as bench dir --target {pool}")
        for _ in range(context.rounds(11)):
            _start(context, root, 10_000, starts)
            refresh_s.append(virsh.timed("pool-refresh bench"))
    shutil.rmtree(pool)
    return compare(
        "10,000 volumes: reading", figures("s", starts.read_s), "virsh pool-refresh", figures("s", refresh_s)
    )


def _drop_caches() -> None:
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3\n")
