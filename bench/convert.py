"""Converting between raw and qcow2, beside qemu-img with several sets of flags."""

import contextlib
import subprocess
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from tests.live import LiveServer, make_location

from bench.connection import Connection
from bench.context import OWNER, Context, require_program, words
from bench.measure import Row, Section, compare, figures, timed
from bench.settle import settle, write_striped
from elemento_storage.durable import fsync_file
from elemento_storage.model import VolumeFormat

TITLE = "Converting 2 GiB, half of it data"
REMARKS = [
    "The image: 4 MiB of random bytes, a 4 MiB hole, and so on. Before each run everything dirty is written back, "
    "3 GiB of memory are touched and freed, and the source is read once, so that it is in the page cache. The same for "
    "both sides. Touching memory is there because memory that had lain free was seen to cost seconds at its next use, "
    "probably as the host of a virtual machine takes it back; it does not help fully, and what goes through the page "
    "cache (all but `-t none`) stays noisy.",
    "Ours answers when the new image is synced, renamed, recorded in `meta.json` (synced) and the old image is gone. "
    "*qemu-img + fsync* is the same work without the bookkeeping; *qemu-img* alone leaves the image in the page cache "
    "(`-t none` writes past it). The goal is about the best set of flags with fsync; the other row is there to show "
    "what durability costs.",
]

_SIZE = 2 * 2**30
_FLAGS = {
    "": (),
    "-W -m 8": ("-W", "-m", "8"),
    "-t none": ("-t", "none"),
    "-t none -T none": ("-t", "none", "-T", "none"),
}
_DIRECTIONS = ((VolumeFormat.RAW, VolumeFormat.QCOW2), (VolumeFormat.QCOW2, VolumeFormat.RAW))


class _Peer:
    """qemu-img on its own copies of the image."""

    def __init__(self, directory: Path, source: Path) -> None:
        self._program = require_program("qemu-img", "qemu-utils")
        self._target = directory / "target"
        self.sources = {VolumeFormat.RAW: source, VolumeFormat.QCOW2: directory / "source.qcow2"}
        self._convert(VolumeFormat.RAW, VolumeFormat.QCOW2, (), self.sources[VolumeFormat.QCOW2])

    def run(self, source: VolumeFormat, target: VolumeFormat, flags: tuple[str, ...]) -> tuple[float, float]:
        """Seconds of the conversion, and of it with the fsync after it."""
        settle(self.sources[source])
        bare_s = timed(lambda: self._convert(source, target, flags, self._target))
        fsync_s = timed(lambda: fsync_file(str(self._target)))
        self._target.unlink()
        return bare_s, bare_s + fsync_s

    def _convert(self, source: VolumeFormat, target: VolumeFormat, flags: tuple[str, ...], path: Path) -> None:
        formats = ("-f", source.value, "-O", target.value)
        subprocess.run(words([self._program, "convert", *flags, *formats, self.sources[source], path]), check=True)


class _Ours:
    """One volume that goes to and fro."""

    def __init__(self, server: LiveServer, source: Path) -> None:
        self._server = server
        self._vid = server.create("disk", _SIZE / 1e9, OWNER)
        self._directory = server.directory(self._vid)
        image = self._directory / VolumeFormat.RAW.data_file
        assert image.stat().st_size == _SIZE
        subprocess.run(words(["cp", "--sparse=always", source, image]), check=True)

    def run(self, source: VolumeFormat, target: VolumeFormat) -> float:
        """Seconds until the answer."""
        settle(self._directory / source.data_file)
        body = {"vid": self._vid, "creatorID": OWNER, "format": target.value}
        with contextlib.closing(Connection(self._server.listen_host, self._server.port)) as connection:
            return timed(lambda: connection.post("update/convert", body))


def run(context: Context) -> Section:
    """All rows."""
    root = context.directory("mnt")
    make_location(root)
    source = context.directory("images") / "source.img"
    write_striped(source, _SIZE, 2)
    peer = _Peer(source.parent, source)
    ours_s: dict[VolumeFormat, list[float]] = defaultdict(list)
    bare_s: dict[tuple[VolumeFormat, str], list[float]] = defaultdict(list)
    durable_s: dict[tuple[VolumeFormat, str], list[float]] = defaultdict(list)
    with context.server(root) as server:
        ours = _Ours(server, source)

        def convert_ours(before: VolumeFormat, after: VolumeFormat) -> None:
            ours_s[after].append(ours.run(before, after))

        def convert_peer(before: VolumeFormat, after: VolumeFormat, name: str) -> None:
            bare, durable = peer.run(before, after, _FLAGS[name])
            bare_s[after, name].append(bare)
            durable_s[after, name].append(durable)

        for turn in range(context.rounds(5)):
            for before, after in _DIRECTIONS:
                sides: list[Callable[[], None]] = [lambda b=before, a=after: convert_ours(b, a)]  # type: ignore[misc]
                sides += [lambda b=before, a=after, n=name: convert_peer(b, a, n) for name in _FLAGS]  # type: ignore[misc]
                for step in range(len(sides)):
                    sides[(turn + step) % len(sides)]()
    rows: list[Row] = []
    for before, after in _DIRECTIONS:
        what = f"{before} → {after}"
        mine = figures("s", ours_s[after])
        durable = {name: figures("s", durable_s[after, name]) for name in _FLAGS}
        best = min(_FLAGS, key=lambda name: durable[name].median)
        for name in _FLAGS:
            at_most = 1.1 if name == best else None
            rows.append(compare(what, mine, f"{_command(name)} + fsync", durable[name], at_most=at_most))
        for name in _FLAGS:
            bare = figures("s", bare_s[after, name])
            rows.append(compare(what, mine, f"{_command(name)}, not synced", bare))
    return Section(TITLE, rows, REMARKS)


def _command(flags: str) -> str:
    return f"qemu-img convert {flags}".strip()
