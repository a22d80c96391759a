"""One HTTP connection: uvicorn's protocol with a limit on what is read and fewer writes."""

import asyncio
from typing import Any, Final, cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from elemento_storage.api.wire import EXTENSION, Wire

_MOST_HEAD_BYTES: Final = 512 * 1024  # one read of the transport may hold that much of a body as well
_MOST_HELD_BYTES: Final = 64 * 1024


class Connection(HttpToolsProtocol):
    """httptools takes headers of any length, from anybody: hang up on those that do not end."""

    _head_bytes = 0
    _in_head = True

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        super().connection_made(cast("asyncio.Transport", _JoinedWrites(transport, self.loop)))

    def data_received(self, data: bytes) -> None:
        if self._in_head:
            self._head_bytes += len(data)
            if self._head_bytes > _MOST_HEAD_BYTES:
                self.transport.close()
                return
        super().data_received(data)

    def on_headers_complete(self) -> None:
        self._in_head = False
        before = self.cycle
        super().on_headers_complete()
        if self.cycle is not before:  # the application's task has not begun yet: it will find this in its scope
            extensions: dict[str, Any] = {EXTENSION: Wire(self.cycle, self.transport)}
            self.cycle.scope["extensions"] = extensions

    def on_message_complete(self) -> None:
        self._in_head, self._head_bytes = True, 0
        super().on_message_complete()


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
