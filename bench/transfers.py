"""Images over loopback, to the server and from it, beside ovirt-imageio with its own client; and checksums."""

import contextlib
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from tests.live import LiveServer, make_location

from bench.context import OWNER, Context, words
from bench.image_client import ImageClient
from bench.imageio import Imageio, running
from bench.measure import Figures, Row, Section, alternate, bounded, compare, figures, timed
from bench.settle import settle, write_striped
from elemento_storage.durable import fsync_file
from elemento_storage.model import VolumeFormat

UPLOADS = "Images to the server over loopback, 2 GiB, half of it data"
DOWNLOADS = "Images from the server over loopback, 2 GiB, half of it data; checksums"
_BOTH = [
    "4 MiB of random bytes, a 4 MiB hole, and so on. Before each run everything dirty is written back, 3 GiB of memory "
    "are touched and freed, and the source is read once, so that it is in the page cache. The sides take turns, on the "
    "same two cores and one file system. A side's time ends when the last byte is on disk.",
    "ovirt-imageio 2.5.1: its daemon and its client from PyPI, HTTP without TLS, `max_workers` and `buffer_size` as "
    "they are by default. Its client reads images past the page cache, and so does the daemon with raw ones; neither "
    "can be told otherwise. That the client starts, and imports Python's modules, is not counted.",
    "Memory: by how much the server's resident memory at its highest (VmHWM) was above what it had before.",
]
_UPLOADING = [
    "Ours ends with a volume that is visible, theirs (`disk_is_zero`, so that holes are not sent) when the client's "
    "flush is answered.",
    "Ours, *with holes*: a client in Python that sends what lies between the holes by our extension of tus, in one "
    "PATCH. *Every byte*: a plain PATCH, holes as zeros, as published clients of tus do it.",
]
_DOWNLOADING = [
    "qcow2 is served to the daemon by a qemu-nbd, as oVirt does it, with `--cache=writeback --aio=io_uring`.",
    "Ours, *with holes*: a client in Python that asks for `extents` and fetches what is data, over two connections. "
    "*Every byte*: one GET. *Linked*: a linked clone of the qcow2 volume that has nothing of its own. *Compressed* "
    "(zstd): of these the only one that is read through a storage daemon, as only QEMU knows what is in it.",
    "Checksums: sha256 of blocks of 4 MiB, the same for both. Theirs is the client's own of a local file.",
]

_SIZE = 2 * 2**30
_EMPTY = 100 * 2**30
_RAW, _QCOW2 = VolumeFormat.RAW, VolumeFormat.QCOW2


def uploads(context: Context) -> Section:
    """All rows about images that come."""
    with _both_sides(context) as both:
        return Section(UPLOADS, both.uploads(), [*_BOTH, *_UPLOADING])


def downloads(context: Context) -> Section:
    """All rows about images that go, and about checksums."""
    with _both_sides(context) as both:
        return Section(DOWNLOADS, [*both.downloads(), *both.checksums()], [*_BOTH, *_DOWNLOADING])


@contextlib.contextmanager
def _both_sides(context: Context) -> Iterator["_Transfers"]:
    root = context.directory("mnt")
    make_location(root)
    image = context.directory("images") / "source.img"
    write_striped(image, _SIZE, 2)
    sockets = Path(tempfile.mkdtemp(prefix="imageio-"))
    try:
        with context.server(root, "--bin-retention", "0", "--overcommit", "0") as server, running(sockets) as imageio:
            yield _Transfers(context, server, imageio, image)
    finally:
        shutil.rmtree(sockets, ignore_errors=True)


class _Transfers:
    """Both sides, on one file system."""

    def __init__(self, context: Context, server: LiveServer, imageio: Imageio, image: Path) -> None:
        self._context = context
        self._server = server
        self._imageio = imageio
        self._image = image
        self._target = image.with_name("target")
        self._client = ImageClient(server.listen_host, server.port)

    def uploads(self) -> list[Row]:
        """Three sides, and memory."""
        grown: list[float] = []

        def ours(*, sparse: bool) -> float:
            settle(self._image)
            with _Memory(self._server) as memory:
                vids: list[str] = []
                seconds = timed(lambda: vids.append(self._client.upload(self._image, sparse=sparse)))
            grown.append(memory.grown_mb)
            self._server.call("destroy", {"volume_id": vids[0]})
            return seconds

        def theirs() -> float:
            settle(self._image)
            try:
                return self._imageio.upload(self._image, self._target)
            finally:
                self._target.unlink()

        self._same_bytes(self._client.upload(self._image, sparse=True))
        holes, plain, peer = self._turns(5, lambda: ours(sparse=True), lambda: ours(sparse=False), theirs)
        name = "ovirt-imageio, client.upload"
        return [
            compare("upload, with holes", holes, name, peer, at_most=1.0, paired=True),
            compare("upload, every byte", plain, name, peer, at_most=1.0, paired=True),
            bounded("upload: the server's memory grows by", figures("MB", grown), at_most=16),
        ]

    def _same_bytes(self, vid: str) -> None:
        subprocess.run(words(["cmp", self._image, self._server.directory(vid) / _RAW.data_file]), check=True)
        self._server.call("destroy", {"volume_id": vid})

    def downloads(self) -> list[Row]:
        """raw as raw, qcow2 as raw, and of an image that only QEMU can read."""
        grown: list[float] = []
        rows: list[Row] = []
        for what, make, rounds in (
            ("raw", self._raw, 3),
            ("qcow2", self._qcow2, 3),
            ("linked qcow2", self._linked, 2),
            ("compressed qcow2", self._compressed, 2),
        ):
            vid, below = make()
            (data,) = self._server.directory(vid).glob("data.*")
            settled = below or data

            def ours(*, sparse: bool, vid: str = vid, settled: Path = settled) -> float:
                settle(settled)
                with _Memory(self._server) as memory:
                    seconds = timed(lambda: self._client.download(vid, self._target, sparse=sparse))
                grown.append(memory.grown_mb)
                self._target.unlink()
                return seconds

            def theirs(data: Path = data, settled: Path = settled) -> float:
                settle(settled)
                try:
                    if data.suffix == ".img":
                        return self._imageio.download_file(data, self._target)
                    return self._imageio.download_qcow2(data, _SIZE, self._target)
                finally:
                    self._target.unlink()

            self._client.download(vid, self._target)
            subprocess.run(words(["cmp", self._image, self._target]), check=True)
            self._target.unlink()
            holes, plain, peer = self._turns(rounds, partial(ours, sparse=True), partial(ours, sparse=False), theirs)
            name = "ovirt-imageio, client.download"
            rows.append(compare(f"download of {what} as raw, with holes", holes, name, peer, at_most=1.0, paired=True))
            rows.append(compare(f"download of {what} as raw, every byte", plain, name, peer, at_most=1.0, paired=True))
        rows.append(bounded("download: the server's memory grows by", figures("MB", grown), at_most=16))
        return rows

    def _raw(self) -> tuple[str, Path | None]:
        return self._volume(_RAW), None

    def _qcow2(self) -> tuple[str, Path | None]:
        return self._volume(_QCOW2), None

    def _compressed(self) -> tuple[str, Path | None]:
        return self._volume(_QCOW2, "-c", "-o", "compression_type=zstd"), None

    def _linked(self) -> tuple[str, Path | None]:
        below = self._volume(_QCOW2)
        answer = self._server.call("clone", {"volume_id": below, "creatorID": OWNER, "linked": True})
        return str(answer["vid"]), self._server.directory(below) / _QCOW2.data_file

    def _volume(self, image_format: VolumeFormat, *options: str) -> str:
        vid = self._server.create("source", _SIZE / 1e9, OWNER, format=image_format.value)
        data = self._server.directory(vid) / image_format.data_file
        convert = ["qemu-img", "convert", *options, "-f", "raw", "-O", image_format.value, self._image, data]
        subprocess.run(words(convert), check=True)
        fsync_file(str(data))
        return vid

    def checksums(self) -> list[Row]:
        """Of nothing, and of data."""
        rows = []
        for image_format in (_RAW, _QCOW2):
            vid = self._server.create("empty", _EMPTY / 1e9, OWNER, format=image_format.value)
            path = self._server.directory(vid) / image_format.data_file
            mine, peer = self._turns(
                3,
                lambda vid=vid: timed(lambda: self._client.checksum(vid)),  # type: ignore[misc]
                lambda path=path: self._imageio.checksum(path),  # type: ignore[misc]
            )
            what = f"checksum of an empty {image_format} volume of 100 GiB"
            rows.append(bounded(what, mine, at_most=1.0))
            rows.append(compare(what, mine, "ovirt-imageio, client.checksum", peer))
            self._server.call("destroy", {"volume_id": vid})
        vid = self._volume(_RAW)
        path = self._server.directory(vid) / _RAW.data_file

        def ours() -> float:
            settle(path)
            return timed(lambda: self._client.checksum(vid))

        def theirs() -> float:
            settle(path)
            return self._imageio.checksum(path)

        mine, peer = self._turns(3, ours, theirs)
        rows.append(compare("checksum of 2 GiB, half of it data", mine, "ovirt-imageio, client.checksum", peer))
        return rows

    def _turns(self, rounds: int, *sides: Callable[[], float]) -> list[Figures]:
        taken = alternate(self._context.rounds(rounds), *(lambda side=side: [side()] for side in sides))
        return [figures("s", seconds) for seconds in taken]


class _Memory:
    """How far above its beginning the server's resident memory was at its highest."""

    def __init__(self, server: LiveServer) -> None:
        assert server.process is not None
        self._proc = Path(f"/proc/{server.process.pid}")
        self.grown_mb = 0.0

    def __enter__(self) -> "_Memory":
        (self._proc / "clear_refs").write_text("5")  # the highest is what it is now
        self._before = self._kilobytes("VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        self.grown_mb = max(0, self._kilobytes("VmHWM") - self._before) * 1024 / 1e6

    def _kilobytes(self, name: str) -> int:
        line = next(line for line in (self._proc / "status").read_text().splitlines() if line.startswith(name))
        return int(line.split()[1])
