"""What a guest sees of an image that only QEMU can read: by a storage daemon that nothing else uses.

The daemon is a child that dies with this process. It opens the image read-only, in the format it is told, and listens
on a Unix socket in a directory of its own.
"""

import asyncio
import contextlib
import errno
import logging
import os
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from typing import Final

import msgspec

from elemento_storage import process
from elemento_storage.engine.block_node import VOLUME_NODE, BlockNode
from elemento_storage.engine.content import Extent, Part, Zeros, coarse, merged
from elemento_storage.engine.nbd_client import NbdClient
from elemento_storage.engine.storage_daemon import safe_program
from elemento_storage.errors import ImageDamaged, ImageInUse, LocationUnavailable, ToolFailed

log = logging.getLogger(__name__)

_SOCKET: Final = "nbd"
_START_S: Final = 10.0
_ADDRESS_SPACE: Final = 4 * 2**30
_READ_BYTES: Final = 2**20  #: what one stream holds in memory
_STARTING_S: Final = 60.0  #: an older directory in which nobody listens is left over
_READERS_DIRECTORY: Final = "r"


class NbdContent:
    """The content of one export. Connections are kept for the next who reads."""

    def __init__(self, socket_path: str, *, timeout_s: float) -> None:
        """Raises OSError."""
        self._path = socket_path
        self._timeout_s = timeout_s
        self._idle: list[NbdClient] = []
        self._turn = threading.Lock()
        with self._lent() as client:
            self._size_bytes = client.size_bytes

    @property
    def size_bytes(self) -> int:
        """See Content."""
        return self._size_bytes

    def extents(self, start: int, stop: int) -> Iterator[Extent]:
        """See Content."""
        with self._lent() as client:
            yield from merged(client.extents(start, stop))

    def parts(self, start: int, stop: int) -> Iterator[Part]:
        """See Content. While one piece is taken, the daemon reads the next."""
        buffer = memoryview(bytearray(min(_READ_BYTES, stop - start)))
        with self._lent() as reader:
            asked: tuple[int, int] | None = None
            for extent in coarse(self.extents(start, stop)):
                if extent.zero:
                    if asked is not None:
                        yield self._answer(reader, asked, buffer)
                        asked = None
                    yield Zeros(extent.length)
                    continue
                for offset in range(extent.start, extent.stop, _READ_BYTES):
                    following = (offset, min(_READ_BYTES, extent.stop - offset))
                    if asked is not None:
                        piece = self._answer(reader, asked, buffer)
                        reader.ask(*following)
                        asked = following
                        yield piece
                    else:
                        reader.ask(*following)
                        asked = following
            if asked is not None:
                yield self._answer(reader, asked, buffer)

    @staticmethod
    def _answer(reader: NbdClient, asked: tuple[int, int], buffer: memoryview) -> memoryview:
        offset, length = asked
        piece = buffer[:length]
        reader.read_into(offset, piece)
        return piece

    @contextlib.contextmanager
    def _lent(self) -> Iterator[NbdClient]:
        with self._turn:
            client = self._idle.pop() if self._idle else None
        if client is None:
            client = NbdClient(self._path, VOLUME_NODE, timeout_s=self._timeout_s)
        try:
            yield client
        except BaseException:
            client.close()
            raise
        if client.is_idle:
            with self._turn:
                self._idle.append(client)
        else:
            client.close()

    def close(self) -> None:
        """Hang up the connections that nobody uses."""
        with self._turn:
            idle, self._idle = self._idle, []
        for client in idle:
            client.close()


class ReadingDaemon:
    """One storage daemon that serves one image read-only to this process."""

    def __init__(self, run_directory: str, name: str) -> None:
        """``name``: of the directory it has below the run directory, at most 32 characters."""
        self._directory = f"{run_directory}/{_READERS_DIRECTORY}/{name}"
        self.socket_path = f"{self._directory}/{_SOCKET}"
        self._stop = asyncio.Event()
        self._running: asyncio.Task[process.Finished] | None = None

    async def start(self, node: BlockNode, *, lifetime_s: float) -> None:
        """Start it; it listens when this returns. Raises ImageInUse, ImageDamaged, LocationUnavailable, ToolMissing."""
        os.makedirs(self._directory, mode=0o700, exist_ok=True)
        argv = [await safe_program(), "--object", "iothread,id=io"]
        for layer in node.layers:
            argv += ["--blockdev", msgspec.json.encode(layer).decode()]
        path = self.socket_path.replace(",", ",,")
        argv += ["--nbd-server", f"addr.type=unix,addr.path={path},max-connections=0"]
        export = f"type=nbd,id=read,node-name={VOLUME_NODE},name={VOLUME_NODE},writable=off,iothread=io"
        limits = process.Limits(timeout_s=lifetime_s, address_space_bytes=_ADDRESS_SPACE)
        self._running = asyncio.create_task(
            process.run([*argv, "--export", export], limits, cancel=self._stop), name="reading-daemon"
        )
        deadline = time.monotonic() + _START_S
        try:
            while not _listens(self.socket_path):
                if self._running.done():
                    raise self._failure()
                if time.monotonic() > deadline:
                    raise LocationUnavailable("the storage daemon that reads the image does not start in time")
                await asyncio.sleep(0.002)
        except BaseException:
            await self.stop()
            raise

    def _failure(self) -> Exception:
        assert self._running is not None
        error = self._running.exception()
        if not isinstance(error, ToolFailed):
            return error if isinstance(error, Exception) else LocationUnavailable("the storage daemon ended at once")
        log.error("an image could not be opened to be read: %s", error.stderr)
        if "Failed to get" in error.stderr and "lock" in error.stderr:
            return ImageInUse("another program has the image open: end it first")
        return ImageDamaged("the image cannot be opened; look at it with qemu-img check", findings={})

    async def stop(self) -> None:
        """End it and remove its directory. Idempotent."""
        self._stop.set()
        if self._running is not None:
            await asyncio.wait({self._running})
            if not self._running.cancelled():
                self._running.exception()  # it was killed, which is no news
        shutil.rmtree(self._directory, ignore_errors=True)


def remove_left_over(run_directory: str) -> None:
    """Remove the directories of daemons that died with a server. Blocks."""
    directory = f"{run_directory}/{_READERS_DIRECTORY}"
    with contextlib.suppress(FileNotFoundError):
        for name in os.listdir(directory):
            one = f"{directory}/{name}"
            with contextlib.suppress(OSError):
                started = time.time() - os.stat(one).st_mtime > _STARTING_S or os.path.exists(f"{one}/{_SOCKET}")
                if started and not _listens(f"{one}/{_SOCKET}"):
                    shutil.rmtree(one)


def _listens(path: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(path)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ECONNREFUSED):
                raise
            return False
    return True
