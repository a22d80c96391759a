"""Reading and writing through exports, beside the same daemons configured by hand."""

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.live import LiveServer, make_location

from bench.byhand import BEST, TRANSPORTS, by_hand, write_image
from bench.context import OWNER, Context
from bench.load import LOADS, MIB, Disk, IscsiDisk, Load, NbdDisk
from bench.measure import Row, Section, alternate, bounded, compare, figures
from elemento_storage.model import VolumeFormat

TITLE = "Reading and writing through an export"
REMARKS = [
    "Ours is what `export` made. By hand: one qemu-storage-daemon per image and one tgtd for all, with the best "
    "options that lose no data (`python -m bench.byhand` compares them): page cache, `aio=io_uring`, an iothread, "
    "tgtd's `rdwr` store without flags and its 16 threads, FUSE for qcow2 over iSCSI.",
    "Both sides serve one and the same image at the same time (before 2026-11-25 16:00 UTC: one each), full of "
    "data, so that nothing is allocated in it. With an image for each, two sides that were set up by hand in the same "
    "way differed by up to 15 % in writes, always to the same side: how it lies in the page cache differs from file to "
    "file. What both sides write goes to the page cache, as nothing asks for a flush but a guest; before each run what "
    "waits to be written is written. The same client for both: fio over NBD, `qemu-img bench` over iSCSI (with a long "
    "stride in place of random offsets), on the same cores as the daemons.",
    "NBD over a Unix socket is our protocol `local`. iSCSI of ours asks for CHAP, that by hand for nothing: it is part "
    "of the login, not of requests.",
    "*By hand again* is a second set of daemons by hand: what their ratio to the first is apart from 1 is chance.",
    "Memory: what the storage daemon of a volume holds (PSS) when all loads have been through it.",
    "`--part` runs the rows of one protocol and format alone; the others stay.",
]

_SIZE = 512 * MIB
_FORMATS = (VolumeFormat.RAW, VolumeFormat.QCOW2)
_PROTOCOLS = {"iscsi": "iscsi", "unix": "local", "tcp": "nbd"}
_SHOWN = {"iscsi": "iSCSI", "unix": "NBD, Unix socket", "tcp": "NBD, TCP"}


PARTS = tuple(f"{transport}-{image_format}" for transport in TRANSPORTS for image_format in _FORMATS)


def run(context: Context) -> Section:
    """All rows, or those of some parts."""
    size = _SIZE // 4 if context.quick else _SIZE
    root = context.directory("mnt")
    make_location(root)
    rows: list[Row] = []
    with context.server(root) as server:
        for transport in TRANSPORTS:
            for image_format in _FORMATS:
                if context.wants(f"{transport}-{image_format}"):
                    rows += _part(context, server, transport, image_format, size)
    return Section(TITLE, rows, REMARKS)


def _part(context: Context, server: LiveServer, transport: str, image_format: VolumeFormat, size: int) -> Iterator[Row]:
    """Every load, for one protocol and format."""
    name = f"{_SHOWN[transport]}, {image_format}"
    volume_id = server.create("disk", size / 1e9, OWNER, format=image_format.value)
    image = server.directory(volume_id) / image_format.data_file
    write_image(image, image_format, size)
    ours = our_disk(server, volume_id, transport, size)
    with (
        by_hand(BEST[transport], shares_images=True) as first,
        by_hand(BEST[transport], shares_images=True) as second,
    ):
        theirs = [one.serve(transport, image, image_format, size) for one in (first, second)]
        for load in LOADS:
            yield from _rows(context, f"{name}: {load.name}", [ours, *theirs], image, load)
        memory = [memory_mb(pid) for pid in server.daemons(volume_id)]
        yield bounded(f"{name}: memory of the storage daemon", figures("MB", memory), at_most=25)
    server.call("unexport", {"volume_id": volume_id, "client_uid": OWNER})


def our_disk(server: LiveServer, volume_id: str, transport: str, size: int) -> Disk:
    """Export a volume and take it as a client would."""
    body = {"volume_id": volume_id, "client_uid": OWNER, "protocol": _PROTOCOLS[transport]}
    answer: dict[str, Any] = server.call("export", body)
    where = answer["endpoint"]
    if transport != "iscsi":
        return NbdDisk(where["uri"], size)
    user, password = answer["credentials"]["user"], answer["credentials"]["password"]
    return IscsiDisk(f"iscsi://{user}%{password}@{where['portal']}/{where['target']}/{where['lun']}")


def _rows(context: Context, name: str, disks: Sequence[Disk], image: Path, load: Load) -> Iterator[Row]:
    seconds = 0.3 if context.quick else 0.45

    def side(disk: Disk) -> Callable[[], Sequence[float]]:
        def measure() -> Sequence[float]:
            _write_back(image)
            return [disk.rate(load, seconds)]

        return measure

    # One run of each that does not count: caches fill, and qemu-img's side learns how much is a run.
    for disk in disks:
        disk.rate(load, seconds / 4)
    ours, theirs, again = (figures(load.unit, one) for one in alternate(context.rounds(7), *map(side, disks)))
    yield compare(name, ours, "by hand", theirs, at_least=0.95, paired=True)
    yield compare(f"{name}, *by hand again*", again, "by hand", theirs, paired=True)


def _write_back(image: Path) -> None:
    descriptor = os.open(image, os.O_RDONLY)
    try:
        os.fdatasync(descriptor)
    finally:
        os.close(descriptor)


def memory_mb(pid: int) -> float:
    """What a process holds: its own pages, and its share of those it shares (proc(5), smaps_rollup, Pss)."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise RuntimeError(f"process {pid} has no memory")
