"""Images in and out. Each part is a function that gives rows; ``run`` puts them together."""

import asyncio
import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.live import LiveServer, free_port, make_location

from bench.connection import Connection
from bench.context import OWNER, Context, require_program, words
from bench.measure import Row, Section, compare, figures, timed
from bench.settle import STRIPE, settle
from elemento_storage.config import Settings
from elemento_storage.durable import fsync_file
from elemento_storage.images.incoming import Incoming
from elemento_storage.model import VolumeFormat, new_uid
from elemento_storage.progress import Progress
from elemento_storage.server import Server
from elemento_storage.service.access import INFRASTRUCTURE

TITLE = "Images in and out"
REMARKS = [
    "*From the last byte to the volume*: the same image lies in its place already, as an upload leaves it; timed is "
    "what makes a volume of it (`Intake.finish`: header, `qemu-img check`, conversion, sync, publication). The peer is "
    "one qemu-img convert of the file, and fsync.",
    "*Import*: a compressed qcow2 image of a 2 GiB disk, half of it data that halves when it is compressed, from a web "
    "server on loopback (Python's, the same for both sides). Ours is `create/url`, until the volume is verified by its "
    "sha256, converted, synced and there. The peer fetches with curl, compares with sha256sum, converts with qemu-img "
    "and calls fsync. Before each run everything dirty is written back.",
]

_SIZE = 2 * 2**30
_FLAGS = {
    "-W -m 16": ("-W", "-m", "16"),
    "-t none -W -m 16": ("-t", "none", "-W", "-m", "16"),
    "-t none -T none -W -m 16": ("-t", "none", "-T", "none", "-W", "-m", "16"),
}


def run(context: Context) -> Section:
    """All rows."""
    image = _compressed_image(context.directory("web"))
    return Section(TITLE, [*_finish(context, image), *_import(context, image)], REMARKS)


def _finish(context: Context, image: Path) -> list[Row]:
    """What makes a volume of bytes that have arrived, beside qemu-img."""
    root = context.directory("mnt-finish")
    make_location(root)
    peer = _Peer(context.directory("peer-finish"))
    ours_s: list[float] = []
    peer_s: dict[str, list[float]] = defaultdict(list)

    def theirs(name: str) -> None:
        settle(image)
        peer_s[name].append(timed(lambda: peer.convert(image, "raw", _FLAGS[name])))
        peer.clean()

    async def ours() -> None:
        incoming = Incoming(volume_id=new_uid(), creator_id=OWNER, name="import", format=VolumeFormat.RAW)
        settings = Settings(root=str(root), state_dir=str(root.parent / "state-finish"), bin_retention=0.0)
        server = Server(settings)
        await server.start()
        try:
            arrival = await server.services.intake.reserve(incoming, image.stat().st_size)
            shutil.copyfile(image, arrival.content)
            settle(Path(arrival.content))
            started = time.perf_counter()
            await server.services.intake.finish(arrival, incoming, Progress())
            ours_s.append(time.perf_counter() - started)
            await server.services.volumes.destroy(INFRASTRUCTURE, incoming.volume_id)
        finally:
            await server.stop()

    sides: list[Callable[[], None]] = [lambda: asyncio.run(ours())]
    sides += [lambda n=name: theirs(n) for name in _FLAGS]  # type: ignore[misc]
    for turn in range(context.rounds(7)):
        for step in range(len(sides)):
            sides[(turn + step) % len(sides)]()
    best = min(_FLAGS, key=lambda name: figures("s", peer_s[name]).median)
    return [
        compare(
            "from the last byte to the volume, compressed qcow2 as raw",
            figures("s", ours_s),
            f"qemu-img convert {name}, fsync",
            figures("s", peer_s[name]),
            at_most=1.1 if name == best else None,
            paired=True,
        )
        for name in _FLAGS
    ]


def _import(context: Context, image: Path) -> list[Row]:
    checksum = subprocess.run(words(["sha256sum", image]), check=True, capture_output=True, text=True).stdout[:64]
    root = context.directory("mnt-import")
    make_location(root)
    ours_s: dict[str, list[float]] = defaultdict(list)
    peer_s: dict[str, list[float]] = defaultdict(list)
    peer = _Peer(context.directory("peer"))
    flags = ("--download-allow", "127.0.0.1", "--bin-retention", "0")
    with _web(image.parent) as address, context.server(root, *flags) as server:
        url = f"{address}/{image.name}"

        def ours(target: str) -> None:
            settle(image)
            seconds, vid = _create(server, url, target, f"sha256:{checksum}")
            ours_s[target].append(seconds)
            server.call("destroy", {"volume_id": vid})

        def theirs(target: str, name: str) -> None:
            settle(image)
            peer_s[f"{target} {name}"].append(timed(lambda: peer.run(url, target, _FLAGS[name], checksum)))

        sides: list[Callable[[], None]] = [lambda: ours("raw"), lambda: ours("qcow2")]
        sides += [lambda n=name: theirs("raw", n) for name in _FLAGS]  # type: ignore[misc]
        sides += [lambda: theirs("qcow2", "-t none -T none -W -m 16")]
        for turn in range(context.rounds(5)):
            for step in range(len(sides)):
                sides[(turn + step) % len(sides)]()
    rows: list[Row] = []
    best = min(_FLAGS, key=lambda name: figures("s", peer_s[f"raw {name}"]).median)
    for target in ("raw", "qcow2"):
        for name in _FLAGS:
            if values := peer_s.get(f"{target} {name}"):
                at_most = 1.1 if name == best or target == "qcow2" else None
                what = f"import of a compressed qcow2 as {target}"
                peer_name = f"curl, sha256sum, qemu-img convert {name}, fsync"
                rows.append(
                    compare(what, figures("s", ours_s[target]), peer_name, figures("s", values), at_most=at_most)
                )
    return rows


class _Peer:
    """What people do by hand."""

    def __init__(self, directory: Path) -> None:
        self._curl = require_program("curl", "curl")
        self._qemu_img = require_program("qemu-img", "qemu-utils")
        self._fetched = directory / "fetched"
        self._target = directory / "target"

    def run(self, url: str, target: str, flags: tuple[str, ...], checksum: str) -> None:
        subprocess.run(words([self._curl, "-sS", "-o", self._fetched, url]), check=True)
        said = subprocess.run(words(["sha256sum", self._fetched]), check=True, capture_output=True, text=True).stdout
        assert said.startswith(checksum)
        self.convert(self._fetched, target, flags)
        self.clean()

    def convert(self, image: Path, target: str, flags: tuple[str, ...]) -> None:
        convert = [self._qemu_img, "convert", *flags, "-f", "qcow2", "-O", target, image, self._target]
        subprocess.run(words(convert), check=True)
        fsync_file(str(self._target))

    def clean(self) -> None:
        self._fetched.unlink(missing_ok=True)
        self._target.unlink()


def _create(server: LiveServer, url: str, target: str, checksum: str) -> tuple[float, str]:
    body = {"creatorID": OWNER, "name": "import", "url": url, "format": target, "checksum": checksum}
    answers: list[str] = []
    with contextlib.closing(Connection(server.listen_host, server.port)) as connection:
        seconds = timed(lambda: answers.append(json.loads(connection.post("create/url", body))["vid"]))
    return seconds, answers[0]


def _compressed_image(directory: Path) -> Path:
    """Random bytes and zeros in turn within each sector: zlib makes half of it."""
    raw, image = directory / "raw", directory / "disk.qcow2"
    with raw.open("wb") as file:
        for offset in range(0, _SIZE, 2 * STRIPE):
            file.seek(offset)
            noise = os.urandom(STRIPE // 2)
            piece = bytearray(STRIPE)
            for position in range(0, STRIPE, 512):
                piece[position : position + 256] = noise[position // 2 : position // 2 + 256]
            file.write(piece)
        file.truncate(_SIZE)
    subprocess.run(words(["qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", raw, image]), check=True)
    raw.unlink()
    return image


@contextlib.contextmanager
def _web(directory: Path) -> Iterator[str]:
    port = free_port()
    argv = words([sys.executable, "-m", "http.server", port, "--bind", "127.0.0.1", "--directory", directory])
    with subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            ready = [
                "curl",
                "-sf",
                "--retry",
                "20",
                "--retry-connrefused",
                "-o",
                "/dev/null",
                f"http://127.0.0.1:{port}/",
            ]
            subprocess.run(ready, check=True)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
