"""Reading and writing through exports, beside the same daemons configured by hand."""

import contextlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
    "Images of the same size, full of data. What both sides write goes to the page cache, as nothing asks for a flush "
    "but a guest; before each run what waits to be written is written. The same client for both: fio over NBD, "
    "`qemu-img bench` over iSCSI (with a long stride in place of random offsets), on the same cores as the daemons.",
    "NBD over a Unix socket is our protocol `local`. iSCSI of ours asks for CHAP, that by hand for nothing: it is part "
    "of the login, not of requests.",
    "Memory: what the storage daemon of a volume holds (PSS) when all loads have been through it.",
]

_SIZE = 512 * MIB
_FORMATS = (VolumeFormat.RAW, VolumeFormat.QCOW2)
_PROTOCOLS = {"iscsi": "iscsi", "unix": "local", "tcp": "nbd"}
_SHOWN = {"iscsi": "iSCSI", "unix": "NBD, Unix socket", "tcp": "NBD, TCP"}


@dataclass(frozen=True)
class _Pair:
    """The same disk twice."""

    name: str
    ours: Disk
    by_hand: Disk
    images: tuple[Path, Path]
    volume_id: str


def run(context: Context) -> Section:
    """All rows."""
    size = _SIZE // 4 if context.quick else _SIZE
    seconds = 0.5 if context.quick else 2.0
    root = context.directory("mnt")
    make_location(root)
    images = context.directory("images")
    rows: list[Row] = []
    memory: list[float] = []
    with context.server(root) as server, contextlib.ExitStack() as stack:
        for transport in TRANSPORTS:
            peer = stack.enter_context(by_hand(BEST[transport]))
            for image_format in _FORMATS:
                image = images / f"{transport}.{image_format}"
                write_image(image, image_format, size)
                theirs = peer.serve(transport, image, image_format, size)
                volume_id = server.create("disk", size / 1e9, OWNER, format=image_format.value)
                own = server.directory(volume_id) / image_format.data_file
                write_image(own, image_format, size)
                ours = our_disk(server, volume_id, transport, size)
                name = f"{_SHOWN[transport]}, {image_format}"
                pair = _Pair(name, ours, theirs, (own, image), volume_id)
                rows += [_row(context, pair, load, seconds) for load in LOADS]
                memory += [memory_mb(pid) for pid in server.daemons(volume_id)]
                server.call("unexport", {"volume_id": volume_id, "client_uid": OWNER})
    return Section(TITLE, [*rows, bounded("memory of a storage daemon", figures("MB", memory), at_most=25)], REMARKS)


def our_disk(server: LiveServer, volume_id: str, transport: str, size: int) -> Disk:
    """Export a volume and take it as a client would."""
    body = {"volume_id": volume_id, "client_uid": OWNER, "protocol": _PROTOCOLS[transport]}
    answer: dict[str, Any] = server.call("export", body)
    where = answer["endpoint"]
    if transport != "iscsi":
        return NbdDisk(where["uri"], size)
    user, password = answer["credentials"]["user"], answer["credentials"]["password"]
    return IscsiDisk(f"iscsi://{user}%{password}@{where['portal']}/{where['target']}/{where['lun']}")


def _row(context: Context, pair: _Pair, load: Load, seconds: float) -> Row:
    def side(disk: Disk) -> Callable[[], Sequence[float]]:
        def measure() -> Sequence[float]:
            for image in pair.images:
                _write_back(image)
            return [disk.rate(load, seconds)]

        return measure

    # One run of each that does not count: caches fill, and qemu-img's side learns how much is a run.
    pair.ours.rate(load, seconds / 4)
    pair.by_hand.rate(load, seconds / 4)
    ours, theirs = alternate(context.rounds(11), side(pair.ours), side(pair.by_hand))
    return compare(
        f"{pair.name}: {load.name}",
        figures(load.unit, ours),
        "by hand",
        figures(load.unit, theirs),
        at_least=0.95,
        paired=True,
    )


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
