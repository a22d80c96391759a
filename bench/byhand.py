"""The same daemons, configured by hand: one qemu-storage-daemon per image, one tgtd for all.

`.venv/bin/python -m bench.byhand` measures what may be chosen freely, against a starting point, on this machine.
"""

import argparse
import contextlib
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.live import free_port

from bench.context import require_program, words, work_directory
from bench.load import LOADS, MIB, Disk, IscsiDisk, NbdDisk
from bench.measure import alternate
from elemento_storage.model import VolumeFormat

_START_S = 10.0
TRANSPORTS = ("iscsi", "unix", "tcp")


@dataclass(frozen=True)
class Options:
    """What may be chosen without losing data; the defaults are QEMU's and tgtd's."""

    file: Mapping[str, object] = field(default_factory=dict)  #: more for the node of the file
    qcow2: Mapping[str, object] = field(default_factory=dict)
    export: Mapping[str, object] = field(default_factory=dict)
    iothread: bool = False
    io_threads: int = 16  #: tgtd's, per LUN
    bsoflags: str = ""  #: of a raw image's backing store; over FUSE anything but none loses data
    raw_over_fuse: bool = False


class ByHand:
    """Images served with some options."""

    def __init__(self, directory: Path, options: Options, *, shares_images: bool = False) -> None:
        self._directory = directory
        self._options = options
        self._shares_images = shares_images
        self._processes: list[subprocess.Popen[bytes]] = []
        self._mounts: list[Path] = []
        self._portal = ""
        self._targets = 0

    def serve(self, transport: str, image: Path, image_format: VolumeFormat, size: int) -> Disk:
        """The image as a client has it."""
        if transport == "iscsi":
            return self._iscsi(image, image_format)
        name = f"{len(self._processes)}"
        if transport == "unix":
            path = self._directory / f"{name}.nbd"
            address = f"addr.type=unix,addr.path={path}"
            uri = f"nbd+unix:///disk?socket={path}"
        else:
            port = free_port()
            address = f"addr.type=inet,addr.host=127.0.0.1,addr.port={port}"
            uri = f"nbd://127.0.0.1:{port}/disk"
        export = {"type": "nbd", "id": "x", "node-name": "volume", "name": "disk", "writable": True}
        self._daemon(name, image, image_format, export, "--nbd-server", f"{address},max-connections=0")
        return NbdDisk(uri, size)

    def _daemon(
        self, name: str, image: Path, image_format: VolumeFormat, export: Mapping[str, object], *more: str
    ) -> None:
        choice = self._options
        is_qcow2 = image_format is VolumeFormat.QCOW2
        file: dict[str, object] = {
            "driver": "file",
            "node-name": "file",
            "filename": str(image),
            "discard": "unmap",
            "locking": "off" if self._shares_images else "auto",
            **choice.file,
        }
        volume: dict[str, object] = {"driver": image_format.value, "node-name": "volume", "file": "file"}
        volume["discard"] = "unmap"
        if is_qcow2:
            volume |= choice.qcow2
        if "cache" in choice.file:
            volume["cache"] = choice.file["cache"]
        export = {**export, **choice.export}
        arguments = []
        if choice.iothread:
            arguments += ["--object", "iothread,id=t"]
            export["iothread"] = "t"
        arguments += ["--blockdev", json.dumps(file), "--blockdev", json.dumps(volume), *more]
        pid = self._directory / f"{name}.pid"
        program = require_program("qemu-storage-daemon", "qemu-utils")
        command = [program, *arguments, "--export", json.dumps(export), "--pidfile", str(pid)]
        self._start(name, command, pid)  # the pid file is written when everything else is done

    def _start(self, name: str, command: list[str], sign: Path, **environment: str) -> None:
        with (self._directory / f"{name}.log").open("wb") as log:
            # A session of their own, as every daemon has: the scheduler shares the processors among sessions.
            started = subprocess.Popen(
                command, stdout=log, stderr=log, env={**os.environ, **environment}, start_new_session=True
            )
        self._processes.append(started)
        deadline = time.monotonic() + _START_S
        while not sign.exists():
            if started.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{command[0]}: {(self._directory / f'{name}.log').read_text()}")
            time.sleep(0.01)

    def _iscsi(self, image: Path, image_format: VolumeFormat) -> Disk:
        if not self._portal:
            self._start_tgtd()
        self._targets += 1
        tid, path = self._targets, image
        is_plain = image_format is VolumeFormat.RAW and not self._options.raw_over_fuse
        if not is_plain:
            path = self._directory / f"{tid}.view"
            path.touch()
            view = {"type": "fuse", "id": "x", "node-name": "volume", "mountpoint": str(path), "writable": True}
            self._daemon(f"view-{tid}", image, image_format, {"growable": True, **view})
            self._mounts.append(path)
        target = f"iqn.2004-10.cloud.elemento:bench:{tid}"
        self._tgtadm("new", "target", "--tid", tid, "--targetname", target)
        flags = ("--bsoflags", self._options.bsoflags) if is_plain and self._options.bsoflags else ()
        backing = ("--backing-store", path, "--bstype", "rdwr", *flags)
        self._tgtadm("new", "logicalunit", "--tid", tid, "--lun", 1, *backing)
        thin = f"thin_provisioning={int(is_plain)}"
        self._tgtadm("update", "logicalunit", "--tid", tid, "--lun", 1, "--params", thin)
        self._tgtadm("bind", "target", "--tid", tid, "--initiator-address", "ALL")
        return IscsiDisk(f"iscsi://{self._portal}/{target}/1")

    def _start_tgtd(self) -> None:
        self._portal = f"127.0.0.1:{free_port()}"
        program = require_program("tgtd", "tgt")
        command = [program, "-f", "-C", "7", "-t", str(self._options.io_threads), "--iscsi", f"portal={self._portal}"]
        socket_path = self._directory / "ipc"
        self._start("tgtd", command, self._directory / "ipc.7", TGT_IPC_SOCKET=str(socket_path))
        host, _, port = self._portal.rpartition(":")
        deadline = time.monotonic() + _START_S
        while True:
            with contextlib.suppress(OSError), socket.create_connection((host, int(port)), 1):
                return
            if time.monotonic() > deadline:
                raise RuntimeError("tgtd does not listen")
            time.sleep(0.01)

    def _tgtadm(self, op: str, mode: str, *more: object) -> None:
        command = words(["tgtadm", "-C", 7, "--lld", "iscsi", "--op", op, "--mode", mode, *more])
        environment = {**os.environ, "TGT_IPC_SOCKET": str(self._directory / "ipc")}
        subprocess.run(command, check=True, env=environment)

    def stop(self) -> None:
        """End everything."""
        for process in reversed(self._processes):
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()  # tgtd does not end while it has targets
                process.wait(10)
        for mount in self._mounts:
            subprocess.run(["fusermount3", "-u", "-z", "-q", str(mount)], check=False)


@contextlib.contextmanager
def by_hand(options: Options, *, shares_images: bool = False) -> Iterator[ByHand]:
    """Daemons for as long as this lasts; sockets have short names, so they are in the system's tmp.

    ``shares_images``: somebody else has the images open too. Nothing may be allocated in them then (``write_image``).
    """
    directory = Path(tempfile.mkdtemp(prefix="bench-hand-"))
    served = ByHand(directory, options, shares_images=shares_images)
    try:
        yield served
    finally:
        served.stop()
        shutil.rmtree(directory, ignore_errors=True)


def write_image(path: Path, image_format: VolumeFormat, size: int) -> None:
    """Fill an image, made if there is none, with data: so nothing has to be allocated any more when it is measured."""
    plain = path if image_format is VolumeFormat.RAW else path.with_suffix(".source")
    with plain.open("r+b" if plain.exists() else "wb") as file:
        piece = os.urandom(MIB)
        for _ in range(size // MIB):
            file.write(piece)
    if plain != path:
        into = ("-n",) if path.exists() else ()
        command = words(["qemu-img", "convert", *into, "-f", "raw", "-O", image_format, plain, path])
        subprocess.run(command, check=True)
        plain.unlink()


_DIRECT: Mapping[str, object] = {"cache": {"direct": True}}
CHOICES: Mapping[str, Options] = {
    "default": Options(),
    "default again": Options(),
    "aio=io_uring": Options(file={"aio": "io_uring"}),
    "iothread": Options(iothread=True),
    "iothread, aio=io_uring": Options(iothread=True, file={"aio": "io_uring"}),
    "direct": Options(file=_DIRECT),
    "direct, aio=native": Options(file={**_DIRECT, "aio": "native"}),
    "direct, aio=io_uring": Options(file={**_DIRECT, "aio": "io_uring"}),
    "direct, aio=io_uring, iothread": Options(file={**_DIRECT, "aio": "io_uring"}, iothread=True),
    "l2-cache-size=16M": Options(qcow2={"l2-cache-size": 16 * MIB}),
}
#: What was found best of what is safe. Not much is left to choose over FUSE, which serves one request after the other.
BEST: Mapping[str, Options] = {
    "iscsi": CHOICES["iothread, aio=io_uring"],
    "unix": CHOICES["iothread, aio=io_uring"],
    "tcp": CHOICES["iothread, aio=io_uring"],
}
ISCSI_CHOICES: Mapping[str, Options] = {
    **CHOICES,
    "-t 1": Options(io_threads=1),
    "-t 4": Options(io_threads=4),
    "-t 32": Options(io_threads=32),
    "not growable": Options(export={"growable": False}),
    "bsoflags=direct": Options(bsoflags="direct"),
}


def main() -> None:
    """Every choice beside the default, taking turns; medians as a table."""
    parser = argparse.ArgumentParser(prog="python -m bench.byhand", description="Try the daemons' options.")
    parser.add_argument("--transport", choices=TRANSPORTS, action="append")
    parser.add_argument("--format", choices=("raw", "qcow2"), action="append")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--choice", action="append")
    parser.add_argument("--size", type=int, default=512, help="MiB")
    options = parser.parse_args()
    for transport in options.transport or TRANSPORTS:
        for image_format in [VolumeFormat(one) for one in options.format or ("raw", "qcow2")]:
            known = ISCSI_CHOICES if transport == "iscsi" else CHOICES
            chosen = {name: known[name] for name in options.choice or known if name in known}
            print(f"{transport} {image_format}", flush=True)
            _try(transport, image_format, chosen, options.rounds, options.seconds, options.size * MIB)


def _try(
    transport: str,
    image_format: VolumeFormat,
    chosen: Mapping[str, Options],
    rounds: int,
    seconds: float,
    size: int,
) -> None:
    with work_directory() as work, contextlib.ExitStack() as stack:
        disks = {}
        for number, (name, choice) in enumerate(chosen.items()):
            image = work / f"{number}.{image_format}"
            write_image(image, image_format, size)
            try:
                disks[name] = stack.enter_context(by_hand(choice)).serve(transport, image, image_format, size)
            except RuntimeError as error:
                print(f"  {name}: {error}", file=sys.stderr)
        medians: dict[str, list[float]] = {name: [] for name in disks}
        for load in LOADS:
            sides = [lambda disk=disk, load=load: [disk.rate(load, seconds)] for disk in disks.values()]
            for name, values in zip(disks, alternate(rounds, *sides), strict=True):
                medians[name].append(statistics.median(values))
        first = next(iter(medians.values()))
        for name, values in medians.items():
            shown = "  ".join(f"{value:9,.0f} {value / base:4.2f}" for value, base in zip(values, first, strict=True))
            print(f"  {name:32} {shown}", flush=True)


if __name__ == "__main__":
    main()
