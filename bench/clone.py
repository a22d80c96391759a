"""Cloning a volume, beside cp, on the file system of the source tree, on XFS and on btrfs."""

import contextlib
import mmap
import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

from tests.live import LiveServer, make_location

from bench.connection import Connection
from bench.context import OWNER, Context, require_program, words
from bench.measure import Row, Section, alternate, bounded, compare, figures, timed
from bench.settle import STRIPE, settle, write_striped
from elemento_storage.durable import fsync_directory, fsync_file
from elemento_storage.model import VolumeFormat

TITLE = "Cloning 2 GiB"
REMARKS = [
    "The image is raw, with stripes of 4 MiB of random bytes and holes. Before each run everything dirty is written "
    "back, 3 GiB of memory are touched and freed, and the source is read once. The sides take turns.",
    "Ours answers when the clone is on disk and visible, *cp* alone leaves it in the page cache. *cp + fsync* is the "
    "same work without the bookkeeping. *The disk alone* is as many random bytes from memory to a new file, past the "
    "page cache and synced, by two threads: no copy that is on disk at its end can be expected to take much less.",
    "*The same data in a 2 TB volume*: the peer is our own clone of the 2 GiB volume with as much data.",
    "XFS and btrfs are loop mounts of sparse files; the two share blocks (`cp --reflink=always`).",
]

_SIZE = 2 * 2**30
_HUGE = 2 * 10**12
_LOOP_BYTES = 6 * 2**30
_FULL, _SCARCE = 2, 16  #: one stripe of so many is data
_THREADS = 2


class _Place:
    """A location on some file system, with volumes to clone."""

    def __init__(self, server: LiveServer, location: str) -> None:
        self._server = server
        self._location = location

    def source(self, one_of: int, size: int = _SIZE) -> Path:
        """A volume's image with data in one stripe of so many of its first 2 GiB."""
        body = {"creatorID": OWNER, "name": f"{one_of}", "size": size / 1e9}
        vid = str(self._server.call("create", body)["vid"])
        image = next(self._server.root.glob(f"*/vid.{vid}.elimg")) / VolumeFormat.RAW.data_file
        write_striped(image, _SIZE, one_of)
        os.truncate(image, size)
        return image

    def ours(self, image: Path) -> float:
        """Seconds until the answer."""
        settle(image)
        body = {"volume_id": image.parent.name[4:-6], "creatorID": OWNER, "location": self._location}
        with contextlib.closing(Connection(self._server.listen_host, self._server.port)) as connection:
            seconds = timed(lambda: connection.post("clone", body))
        newest = max(self._server.listed(OWNER).values(), key=lambda one: str(one["lastUpdated"]))
        self._server.call("destroy", {"volume_id": newest["volumeID"]})
        return seconds

    def peer(self, image: Path, *flags: str) -> tuple[float, float]:
        """Seconds of cp, and of it with the fsync after it."""
        settle(image)
        target = image.parent.parent / "copy"
        bare_s = timed(lambda: subprocess.run(words(["cp", *flags, image, target]), check=True))
        sync_s = timed(lambda: fsync_file(str(target))) + timed(lambda: fsync_directory(str(target.parent)))
        target.unlink()
        return bare_s, bare_s + sync_s

    def disk_alone(self, image: Path) -> float:
        """Seconds to write as much data as the image has."""
        settle(image)
        target = image.parent.parent / "bytes"
        seconds = timed(lambda: _write_directly(target, image.stat().st_blocks * 512))
        target.unlink()
        return seconds


def run(context: Context) -> Section:
    """All rows."""
    rows: list[Row] = []
    root = context.directory("mnt")
    make_location(root, "disk")
    with context.server(root, "--bin-retention", "0", "--overcommit", "0") as server:
        rows += _plain(context, _Place(server, "disk"))
    for kind, package in (("xfs", "xfsprogs"), ("btrfs", "btrfs-progs")):
        require_program(f"mkfs.{kind}", package)
        root = context.directory(f"mnt-{kind}")
        with _mounted(context.work / f"{kind}.img", kind, root / kind):
            make_location(root, kind)
            with context.server(root, "--bin-retention", "0") as server:
                rows += _shared(context, kind, _Place(server, kind))
    return Section(TITLE, rows, REMARKS)


def _plain(context: Context, place: _Place) -> list[Row]:
    rows = []
    last: list[float] = []
    for what, one_of, rounds in (("half of it data", _FULL, 5), ("a sixteenth data", _SCARCE, 3)):
        image = place.source(one_of)
        bare: list[float] = []

        def peer(image: Path = image, bare: list[float] = bare) -> list[float]:
            cp_s, durable_s = place.peer(image, "--sparse=always")
            bare.append(cp_s)
            return [durable_s]

        last, durable, disk = alternate(
            context.rounds(rounds),
            lambda image=image: [place.ours(image)],  # type: ignore[misc]
            peer,
            lambda image=image: [place.disk_alone(image)],  # type: ignore[misc]
        )
        ours = figures("s", last)
        theirs = figures("s", durable)
        rows.append(compare(what, ours, "cp --sparse=always + fsync", theirs, at_most=1.05, paired=True))
        rows.append(compare(what, ours, "cp --sparse=always, not synced", figures("s", bare), at_most=1.05))
        rows.append(compare(what, ours, "the disk alone", figures("s", disk)))
    scarce, huge = place.source(_SCARCE), place.source(_SCARCE, _HUGE)
    mine, same = alternate(context.rounds(3), lambda: [place.ours(huge)], lambda: [place.ours(scarce)])
    rows.append(
        compare("the same data in a 2 TB volume", figures("s", mine), "in 2 GiB", figures("s", same), at_most=1.1)
    )
    return rows


def _write_directly(target: Path, size: int) -> None:
    descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_DIRECT, 0o644)
    noise = os.urandom(STRIPE)

    def write(first: int) -> None:
        with mmap.mmap(-1, STRIPE) as buffer:
            buffer[:] = noise
            for offset in range(first * STRIPE, size, _THREADS * STRIPE):
                os.pwrite(descriptor, buffer, offset)

    threads = [threading.Thread(target=write, args=(first,)) for first in range(_THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    os.fsync(descriptor)
    os.close(descriptor)


def _shared(context: Context, kind: str, place: _Place) -> list[Row]:
    image = place.source(_FULL)
    mine, theirs = alternate(
        context.rounds(4), lambda: [place.ours(image)], lambda: [place.peer(image, "--reflink=always")[1]]
    )
    ours = figures("ms", mine, scale=1000)
    return [
        bounded(f"{kind}, half of it data", ours, at_most=100),
        compare(f"{kind}, half of it data", ours, "cp --reflink=always + fsync", figures("ms", theirs, scale=1000)),
    ]


@contextlib.contextmanager
def _mounted(image: Path, kind: str, mount_point: Path) -> Iterator[None]:
    with image.open("wb") as file:
        file.truncate(_LOOP_BYTES)
    mount_point.mkdir()
    subprocess.run(words([f"mkfs.{kind}", "-q", image]), check=True)
    subprocess.run(words(["mount", "-o", "loop", image, mount_point]), check=True)
    try:
        yield
    finally:
        subprocess.run(words(["umount", "-l", mount_point]), check=True)
        image.unlink()
