"""The socket below an answer, for bodies that the kernel sends from a file (sendfile(2)) and no Python touches.

uvicorn knows no such thing. An exchange finds its ``Wire`` among the extensions of its ASGI scope; over TLS, where the
bytes have to be encrypted here, and below other servers there is none that is plain, and the body goes the usual way.
"""

import asyncio
import contextlib
import os
import select
import socket
import time
from collections.abc import Iterator
from enum import Enum, auto
from functools import cache
from typing import Final

from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from elemento_storage.engine.content import FileRange, Part, Zeros

EXTENSION: Final = "elemento_storage.wire"
_TURN_S: Final = 0.25  #: how long one body keeps a thread before another has it
_GLANCE_MS: Final = 20  #: how long a thread waits for the client; longer is for the event loop
_SLICE_BYTES: Final = 16 * 2**20
_ZEROS_BYTES: Final = 4 * 2**20


class ClientGone(Exception):
    """The client hung up, or takes too long to take what it asked for."""


class Wire:
    """The connection of one exchange."""

    def __init__(self, cycle: RequestResponseCycle, transport: asyncio.Transport) -> None:
        self._cycle = cycle
        self._transport = transport

    @property
    def is_plain(self) -> bool:
        """Whether what is written to the socket is what the client reads."""
        return self._transport.get_extra_info("sslcontext") is None

    async def take(self, patience_s: float) -> socket.socket:
        """The socket, when all that was written before is sent. The caller closes it. Raises ClientGone."""
        deadline = time.monotonic() + patience_s
        turns = 0
        await asyncio.sleep(0)  # what was written is sent at the end of this turn of the event loop
        while self._transport.get_write_buffer_size():
            if time.monotonic() > deadline:
                raise ClientGone("the client does not take what it asked for before")
            turns += 1
            await asyncio.sleep(0 if turns < 10 else 0.005)
        if self._cycle.disconnected or self._transport.is_closing():
            raise ClientGone("the client hung up")
        return socket.socket(fileno=os.dup(self._transport.get_extra_info("socket").fileno()))

    def account(self, sent_bytes: int) -> None:
        """Let uvicorn know how much of the body went past it."""
        self._cycle.expected_content_length -= sent_bytes

    def hang_up(self) -> None:
        """End the connection, so that the client knows that something is missing."""
        self._cycle.disconnected = True
        self._transport.abort()


class Turn(Enum):
    """Why a pump stopped."""

    DONE = auto()
    MORE = auto()  #: it is another one's turn
    FULL = auto()  #: the client has to take something first


class Pump:
    """Sends the parts of a body to a socket that does not block, some in every turn. Turns block: for threads."""

    def __init__(self, connection: socket.socket, parts: Iterator[Part]) -> None:
        self.sent_bytes = 0
        self._connection = connection
        self._parts = parts
        self._part: Part = b""
        self._poll = select.poll()
        self._poll.register(connection, select.POLLOUT)

    def turn(self) -> Turn:
        """Raises ClientGone, and what reading the parts raises."""
        end = time.monotonic() + _TURN_S
        while True:
            while not _length(self._part):
                part = next(self._parts, None)
                if part is None:
                    return Turn.DONE
                self._part = part
            try:
                sent_bytes = self._send()
            except BlockingIOError:
                if not self._poll.poll(_GLANCE_MS):
                    return Turn.FULL
                continue
            self.sent_bytes += sent_bytes
            if time.monotonic() > end:
                return Turn.MORE

    def _send(self) -> int:
        part = self._part
        with _client_gone():
            if isinstance(part, Zeros):
                count = os.sendfile(self._connection.fileno(), _zeros(), 0, min(part.length, _ZEROS_BYTES))
                self._part = Zeros(part.length - count)
                return count
            if not isinstance(part, FileRange):
                view = memoryview(part)
                count = self._connection.send(view)
                self._part = view[count:]
                return count
            length = min(part.length, _SLICE_BYTES)
            count = os.sendfile(self._connection.fileno(), part.descriptor, part.offset, length)
        if not count:
            raise OSError("the image is shorter than it was")
        self._part = FileRange(part.descriptor, part.offset + count, part.length - count)
        return count


@contextlib.contextmanager
def _client_gone() -> Iterator[None]:
    try:
        yield
    except (BrokenPipeError, ConnectionError, TimeoutError) as error:
        raise ClientGone("the client hung up") from error


def _length(part: Part) -> int:
    return part.length if isinstance(part, FileRange | Zeros) else len(part)


@cache
def _zeros() -> int:
    """A file of zeros: holes of an image are sent from here, and not through the page cache."""
    descriptor = os.memfd_create("zeros")
    os.ftruncate(descriptor, _ZEROS_BYTES)
    return descriptor
