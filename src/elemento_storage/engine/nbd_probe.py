"""A client that looks whether an NBD export really serves: handshake, and one sector read.

NBD protocol (github.com/NetworkBlockDevice/nbd, doc/proto.md): fixed newstyle negotiation, NBD_OPT_GO, simple replies.
"""

import asyncio
import contextlib
import struct
import time
from dataclasses import dataclass
from typing import Final

from elemento_storage.errors import ExportFailed

_MAGIC: Final = b"NBDMAGICIHAVEOPT"
_OPTION: Final = struct.Struct(">8sII")
_OPTION_REPLY: Final = struct.Struct(">QIII")
_REQUEST: Final = struct.Struct(">IHHQQI")
_REPLY: Final = struct.Struct(">IIQ")
_REPLY_MAGIC: Final = 0x0003E889045565A9
_SIMPLE_REPLY_MAGIC: Final = 0x67446698
_LARGEST: Final = 65536  # of what is said about an option
_OPT_GO: Final = 7
_REP_ACK, _REP_INFO = 1, 3
_INFO_EXPORT: Final = 0
_FIXED_NEWSTYLE: Final = 1
_CMD_READ, _CMD_DISC = 0, 2
_SECTOR: Final = 512


@dataclass(frozen=True)
class NbdAnswer:
    """What an export said of itself, and how long a read took."""

    size_bytes: int
    read_only: bool
    latency_s: float


async def probe_nbd(
    name: str, *, path: str | None = None, host: str = "", port: int = 0, timeout_s: float
) -> NbdAnswer:
    """Open an export over a Unix socket or TCP and read its first sector. Raises ExportFailed."""
    try:
        async with asyncio.timeout(timeout_s):
            reader, writer = await (asyncio.open_unix_connection(path) if path else asyncio.open_connection(host, port))
            try:
                return await _probe(reader, writer, name)
            finally:
                writer.close()
    except TimeoutError as error:
        raise ExportFailed(f"the NBD export does not answer within {timeout_s:g} s") from error
    except (OSError, EOFError, struct.error) as error:
        raise ExportFailed(f"the NBD export cannot be reached: {error}") from error


async def probe_greeting(host: str, port: int, *, timeout_s: float) -> None:
    """Whether an NBD server listens there at all. Raises ExportFailed."""
    try:
        async with asyncio.timeout(timeout_s):
            reader, writer = await asyncio.open_connection(host, port)
            try:
                greeting = await reader.readexactly(len(_MAGIC))
            finally:
                writer.close()
    except TimeoutError as error:
        raise ExportFailed(f"the NBD server does not answer within {timeout_s:g} s") from error
    except (OSError, EOFError) as error:
        raise ExportFailed(f"the NBD server cannot be reached: {error}") from error
    if greeting != _MAGIC:
        raise ExportFailed("what listens there is no NBD server")


async def _probe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, name: str) -> NbdAnswer:
    greeting = await reader.readexactly(18)
    if greeting[:16] != _MAGIC:
        raise ExportFailed("what listens there is no NBD server")
    encoded = name.encode()
    payload = struct.pack(f">I{len(encoded)}sH", len(encoded), encoded, 0)
    writer.write(struct.pack(">I", _FIXED_NEWSTYLE) + _OPTION.pack(b"IHAVEOPT", _OPT_GO, len(payload)) + payload)
    size_bytes, flags = 0, 0
    while True:
        magic, _, kind, length = _OPTION_REPLY.unpack(await reader.readexactly(_OPTION_REPLY.size))
        if magic != _REPLY_MAGIC or length > _LARGEST:
            raise ExportFailed("the NBD server answers in a way that is not understood")
        content = await reader.readexactly(length)
        if kind & (1 << 31):
            raise ExportFailed(f"the NBD server refuses the export: {_printable(content)}")
        if kind == _REP_INFO and struct.unpack(">H", content[:2])[0] == _INFO_EXPORT:
            size_bytes, flags = struct.unpack(">QH", content[2:12])
        if kind == _REP_ACK:
            break
    started = time.monotonic()
    if size_bytes >= _SECTOR:
        writer.write(_REQUEST.pack(0x25609513, 0, _CMD_READ, 1, 0, _SECTOR))
        magic, problem, _ = _REPLY.unpack(await reader.readexactly(_REPLY.size))
        if magic != _SIMPLE_REPLY_MAGIC:
            raise ExportFailed("the NBD server answers in a way that is not understood")
        if problem:
            raise ExportFailed(f"the NBD export cannot be read: error {problem}")
        await reader.readexactly(_SECTOR)
    latency_s = time.monotonic() - started
    writer.write(_REQUEST.pack(0x25609513, 0, _CMD_DISC, 2, 0, 0))
    with contextlib.suppress(OSError):
        await writer.drain()
    return NbdAnswer(size_bytes, bool(flags & 2), latency_s)


def _printable(content: bytes) -> str:
    return "".join(one if one.isprintable() else "?" for one in content.decode("utf-8", "replace")[:200])
