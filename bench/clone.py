"""Cloning a volume, beside cp, on the file system of the source tree, on XFS and on btrfs."""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tests.live import LiveServer, make_location

from bench.connection import Connection
from bench.context import OWNER, Context, require_program, words
from bench.measure import Row, Section, alternate, bounded, compare, figures, timed
from elemento_storage.durable import fsync_directory, fsync_file
from elemento_storage.model import VolumeFormat

TITLE = "Cloning 2 GiB"
REMARKS = [
    "The image is raw, with stripes of 4 MiB of random bytes and holes. Before each run everything dirty is written "
    "back and the source is read once. The sides take turns.",
    "Ours answers when the clone is on disk and visible, *cp* alone leaves it in the page cache. *cp + fsync* is the "
    "same work without the bookkeeping.",
    "XFS and btrfs are loop mounts of sparse files; the two share blocks (`cp --reflink=always`).",
]

_SIZE = 2 * 2**30
_STRIPE = 4 * 2**20
_LOOP_BYTES = 6 * 2**30
_FULL, _SCARCE = 2, 16  #: one stripe of so many is data


class _Place:
    """A location on some file system, with volumes to clone."""

    def __init__(self, server: LiveServer, location: str) -> None:
        self._server = server
        self._location = location

    def source(self, one_of: int) -> Path:
        """A volume's image with data in one stripe of so many."""
        body = {"creatorID": OWNER, "name": f"{one_of}", "size": _SIZE / 1e9}
        vid = str(self._server.call("create", body)["vid"])
        image = next(self._server.root.glob(f"*/vid.{vid}.elimg")) / VolumeFormat.RAW.data_file
        with image.open("r+b") as file:
            for offset in range(0, _SIZE, one_of * _STRIPE):
                file.seek(offset)
                file.write(os.urandom(_STRIPE))
            os.fsync(file.fileno())
        return image

    def ours(self, image: Path) -> float:
        """Seconds until the answer."""
        _settle(image)
        body = {"volume_id": image.parent.name[4:-6], "creatorID": OWNER, "location": self._location}
        with contextlib.closing(Connection(self._server.listen_host, self._server.port)) as connection:
            seconds = timed(lambda: connection.post("clone", body))
        newest = max(self._server.listed(OWNER).values(), key=lambda one: str(one["lastUpdated"]))
        self._server.call("destroy", {"volume_id": newest["volumeID"]})
        return seconds

    def peer(self, image: Path, *flags: str) -> tuple[float, float]:
        """Seconds of cp, and of it with the fsync after it."""
        _settle(image)
        target = image.parent.parent / "copy"
        bare_s = timed(lambda: subprocess.run(words(["cp", *flags, image, target]), check=True))
        sync_s = timed(lambda: fsync_file(str(target))) + timed(lambda: fsync_directory(str(target.parent)))
        target.unlink()
        return bare_s, bare_s + sync_s


def run(context: Context) -> Section:
    """All rows."""
    rows: list[Row] = []
    root = context.directory("mnt")
    make_location(root, "disk")
    with context.server(root, "--bin-retention", "0") as server:
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
    for what, one_of in (("half of it data", _FULL), ("a sixteenth data", _SCARCE)):
        image = place.source(one_of)
        bare: list[float] = []

        def peer(image: Path = image, bare: list[float] = bare) -> list[float]:
            cp_s, durable_s = place.peer(image, "--sparse=always")
            bare.append(cp_s)
            return [durable_s]

        mine, durable = alternate(context.rounds(9), lambda image=image: [place.ours(image)], peer)  # type: ignore[misc]
        ours = figures("s", mine)
        theirs = figures("s", durable)
        rows.append(compare(what, ours, "cp --sparse=always + fsync", theirs, at_most=1.05, paired=True))
        rows.append(compare(what, ours, "cp --sparse=always, not synced", figures("s", bare)))
    return rows


def _shared(context: Context, kind: str, place: _Place) -> list[Row]:
    image = place.source(_FULL)
    mine, theirs = alternate(
        context.rounds(15), lambda: [place.ours(image)], lambda: [place.peer(image, "--reflink=always")[1]]
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


def _settle(source: Path) -> None:
    """Nothing waits to be written, and the source is in memory."""
    os.sync()
    with source.open("rb", buffering=0) as file:
        buffer = bytearray(_STRIPE)
        while file.readinto(buffer):
            pass
