"""One HTTP connection: uvicorn's, with a limit on what is read, fewer writes, and bodies that bypass the parser."""

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable
from typing import Any, Final, cast

import httptools
from starlette.types import Scope
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from elemento_storage.api.wire import EXTENSION, Wire

_MOST_HEAD_BYTES: Final = 512 * 1024  # one read of the transport may hold that much of a body as well
_MOST_HELD_BYTES: Final = 64 * 1024
_TAKE_BODY: Final = "elemento.take-body"


class TakenBody:
    """A request's body that is read from the socket itself, by a thread, and not by the event loop and the parser.

    ``first`` came with the head; ``length`` bytes are there in all. It has to be given back before the answer.
    """

    def __init__(self, source: socket.socket, first: bytes, length: int, done: Callable[[int], None]) -> None:
        self.source = source
        self.first = first
        self.length = length
        self._done = done

    def abort(self) -> None:
        """Whoever waits for bytes finds the connection closed."""
        with contextlib.suppress(OSError):
            self.source.shutdown(socket.SHUT_RD)

    def give_back(self, left: int) -> None:
        """``left`` bytes of it were not read. Only in the event loop."""
        self.source.close()
        self._done(left)


def take_body(scope: Scope) -> TakenBody | None:
    """The body, of which nothing was read yet, if it can be had this way: neither with TLS nor in chunks."""
    take: Callable[[Scope], TakenBody | None] | None = scope.get("extensions", {}).get(_TAKE_BODY)
    return take(scope) if take is not None else None


class Connection(HttpToolsProtocol):
    """httptools takes headers of any length, from anybody: hang up on those that do not end."""

    _head_bytes = 0
    _in_head = True
    _body_bytes = 0
    _left_over = 0  #: bytes of a body that somebody took and did not read to its end

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        super().connection_made(cast("asyncio.Transport", _JoinedWrites(transport, self.loop)))

    def data_received(self, data: bytes) -> None:
        if self._left_over:
            passed = min(self._left_over, len(data))
            self._left_over -= passed
            data = data[passed:]
            if not data:
                return
        if self._in_head:
            self._head_bytes += len(data)
            if self._head_bytes > _MOST_HEAD_BYTES:
                self.transport.close()
                return
        super().data_received(data)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        cast("Scope", self.scope)["extensions"] = {_TAKE_BODY: self._take_body}
        self._body_bytes = 0

    def on_headers_complete(self) -> None:
        self._in_head = False
        before = self.cycle
        super().on_headers_complete()
        if self.cycle is not before:  # the application's task has not begun yet: it will find this in its scope
            extensions: dict[str, Any] = {EXTENSION: Wire(self.cycle, self.transport)}
            self.cycle.scope["extensions"] = extensions

    def on_body(self, body: bytes) -> None:
        self._body_bytes += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._in_head, self._head_bytes = True, 0
        super().on_message_complete()

    def _take_body(self, scope: Scope) -> TakenBody | None:
        cycle = self.cycle
        if cycle is None or cycle.scope is not scope or not cycle.more_body or cycle.disconnected:
            return None
        if self.scheme != "http" or self._body_bytes != len(cycle.body):
            return None
        headers = dict(self.headers)
        length = headers.get(b"content-length")
        if length is None or b"transfer-encoding" in headers:
            return None
        if cycle.waiting_for_100_continue:
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            cycle.waiting_for_100_continue = False
        self.flow.pause_reading()
        source = socket.socket(fileno=os.dup(self.transport.get_extra_info("socket").fileno()))
        first, cycle.body, cycle.more_body = bytes(cycle.body), bytearray(), False
        return TakenBody(source, first, int(length), self._body_given_back)

    def _body_given_back(self, left: int) -> None:
        # The parser still waits for the body that it never saw: a fresh one reads the next request.
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn does
        self._left_over = left
        self._in_head, self._head_bytes = True, 0


class _JoinedWrites:
    """A transport that sends in one piece what is written in one turn of the event loop.

    uvicorn writes an answer's head and its body one after the other, which would be two system calls, two packets, and
    a client that wakes up twice.
    """

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._pieces: list[bytes] = []
        self._held_bytes = 0

    def write(self, data: bytes) -> None:
        """Send this soon."""
        if not self._pieces:
            self._loop.call_soon(self._flush)
        self._pieces.append(data)
        self._held_bytes += len(data)
        if self._held_bytes > _MOST_HELD_BYTES:
            self._flush()  # or a stream would fill the memory before it is told to pause

    def _flush(self) -> None:
        if self._pieces:
            data = b"".join(self._pieces)
            self._pieces.clear()
            self._held_bytes = 0
            self._transport.write(data)

    def close(self) -> None:
        """Send what is held, then hang up."""
        self._flush()
        self._transport.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)
