"""A writer whose traces on a disk tell a point in time: whatever is read later has to be what was there at one moment.

Record *n* goes to block ``n % blocks`` of the writer's region and names *n*; the next is begun when the one before is
acknowledged. So at every moment the region is the state after exactly *k* records, or after *k* with one more under
way, and every mixture of two moments is found out. Several writers, each with a region of its own, keep the disk busy;
``acknowledged`` and ``flushed`` say what a copy that is begun now must hold.
"""

import hashlib
import socket
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Final, Self
from urllib.parse import parse_qs, unquote, urlsplit

BLOCK: Final = 4096
_MAGIC: Final = 0x4E42444D41474943
_OPTION: Final = 0x49484156454F5054
_REQUEST: Final = struct.Struct(">IHHQQI")
_REPLY: Final = struct.Struct(">IIQ")
_FLUSH_EVERY: Final = 16


def record(number: int, seed: int) -> bytes:
    """What record ``number`` of a writer looks like: every byte depends on the number."""
    head = struct.pack(">QQ", number, seed)
    return head + hashlib.shake_128(head).digest(BLOCK - len(head))


class Nbd:
    """One connection to an NBD export, one request at a time (NBD protocol, fixed newstyle, simple replies)."""

    def __init__(self, uri: str) -> None:
        parts = urlsplit(uri)
        if path := parse_qs(parts.query).get("socket"):
            self._socket = socket.socket(socket.AF_UNIX)
            address: str | tuple[str, int] = path[0]
        else:
            self._socket = socket.socket()
            address = (parts.hostname or "", parts.port or 10809)
        self._socket.settimeout(30)
        self._socket.connect(address)
        magic, option, _ = struct.unpack(">QQH", self._take(18))
        assert (magic, option) == (_MAGIC, _OPTION)
        name = unquote(parts.path.removeprefix("/")).encode()
        # NBD_OPT_EXPORT_NAME: the shortest way in; without zeroes after it.
        self._socket.sendall(struct.pack(">I", 3) + struct.pack(">QII", _OPTION, 1, len(name)) + name)
        self.size_bytes, _ = struct.unpack(">QH", self._take(10))

    def _take(self, count: int) -> bytes:
        taken = b""
        while len(taken) < count:
            piece = self._socket.recv(count - len(taken))
            if not piece:
                raise ConnectionError("the server has closed the connection")
            taken += piece
        return taken

    def _ask(self, kind: int, offset: int, length: int, payload: bytes = b"") -> bytes:
        self._socket.sendall(_REQUEST.pack(0x25609513, 0, kind, 1, offset, length) + payload)
        magic, error, _ = _REPLY.unpack(self._take(_REPLY.size))
        assert magic == 0x67446698
        if error:
            raise OSError(error, "the NBD server refuses")
        return self._take(length) if kind == 0 else b""

    def read(self, offset: int, length: int) -> bytes:
        return self._ask(0, offset, length)

    def write(self, offset: int, content: bytes) -> None:
        self._ask(1, offset, len(content), content)

    def flush(self) -> None:
        self._ask(3, 0, 0)

    def close(self) -> None:
        self._socket.close()


class Writer:
    """Writes records until told to stop, over a connection of its own."""

    def __init__(self, uri: str, *, seed: int, base: int, blocks: int) -> None:
        self.seed, self.base, self.blocks = seed, base, blocks
        self.acknowledged = 0
        self.flushed = 0
        self.failure: BaseException | None = None
        self._nbd = Nbd(uri)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name=f"writer-{seed}", daemon=True)

    def _work(self) -> None:
        try:
            while not self._stop.is_set():
                number = self.acknowledged + 1
                self._nbd.write(self.base + number % self.blocks * BLOCK, record(number, self.seed))
                self.acknowledged = number
                if number % _FLUSH_EVERY == 0:
                    self._nbd.flush()
                    self.flushed = number
        except BaseException as error:
            self.failure = error

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join(60)
        self._nbd.close()
        if kind is None:
            assert self.failure is None, self.failure

    def records_in(self, read: Callable[[int, int], bytes]) -> int:
        """How many records a disk holds, if it is as it was at one moment. Raises AssertionError if it is not.

        ``read`` takes an offset and a length. A block that holds parts of two records can be the one under way only.
        """
        content = read(self.base, self.blocks * BLOCK)
        found: dict[int, int] = {}
        torn = []
        for slot in range(self.blocks):
            block = content[slot * BLOCK : (slot + 1) * BLOCK]
            number, seed = struct.unpack(">QQ", block[:16])
            if not any(block):
                found[slot] = 0
            elif seed == self.seed and number % self.blocks == slot and block == record(number, seed):
                found[slot] = number
            else:
                torn.append(slot)
        last = max(found.values(), default=0)
        assert len(torn) <= 1, f"blocks {torn} are parts of two records"
        assert not torn or torn == [(last + 1) % self.blocks], f"block {torn} is torn, and was not under way"
        for slot, number in found.items():
            wanted = last - (last - slot) % self.blocks
            assert number == max(wanted, 0), f"block {slot} holds record {number} and not {wanted}: no point in time"
        return last


def reader_of(path: Path) -> Callable[[int, int], bytes]:
    """Reads a raw image."""

    def read(offset: int, length: int) -> bytes:
        with path.open("rb") as file:
            file.seek(offset)
            return file.read(length)

    return read
