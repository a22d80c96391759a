"""Probes of what is not what it should be: whatever answers, or does not, ends in a sentence and in time."""

import asyncio
import contextlib
import os
import struct
import time
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from elemento_storage.engine.nbd_probe import probe_nbd
from elemento_storage.errors import ExportFailed
from elemento_storage.exports.iscsi_probe import probe_iscsi

TIMEOUT_S = 0.5
Answer = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
NBD_HELLO = b"NBDMAGICIHAVEOPT" + struct.pack(">H", 1)


@contextlib.asynccontextmanager
async def listening(answer: Answer) -> AsyncIterator[int]:
    """A server that does this with every connection; its port."""

    connections: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await answer(reader, writer)
        except (OSError, EOFError, asyncio.CancelledError):
            writer.transport.abort()
        finally:
            writer.close()

    def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.add(asyncio.create_task(serve(reader, writer)))

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for one in connections:
            one.cancel()
        await asyncio.gather(*connections, return_exceptions=True)
        await asyncio.sleep(0)  # the loop closes what is to be closed


async def nbd(port: int) -> None:
    await probe_nbd("name", host="127.0.0.1", port=port, timeout_s=TIMEOUT_S)


async def iscsi(port: int) -> None:
    await probe_iscsi(
        "127.0.0.1", port, target="iqn.x:y", lun=1, initiator="iqn.x:z", user="u", secret="s", timeout_s=TIMEOUT_S
    )


def says(*pieces: bytes, then_hang: bool = False) -> Answer:
    """Says this, a piece for each thing it hears; then closes, or says no more."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for number, piece in enumerate(pieces):
            if number:
                await reader.read(65536)
            writer.write(piece)
            await writer.drain()
        if then_hang:
            await asyncio.sleep(60)

    return answer


async def floods(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while True:
        writer.write(b"\0" * 65536)
        await writer.drain()


def pdu(opcode: int, data: bytes = b"", *, byte_1: int = 0, status: int = 0, claims: int | None = None) -> bytes:
    """An iSCSI PDU that a target might send."""
    header = bytearray(48)
    header[0], header[1], header[36] = opcode, byte_1, status
    header[5:8] = (len(data) if claims is None else claims).to_bytes(3, "big")
    return bytes(header) + data + b"\0" * (-len(data) % 4)


def option(kind: int, content: bytes = b"", *, magic: int = 0x0003E889045565A9, claims: int | None = None) -> bytes:
    """A reply to an option that an NBD server might send."""
    return struct.pack(">QIII", magic, 7, kind, len(content) if claims is None else claims) + content


CHAP = pdu(0x23, b"AuthMethod=CHAP\0")
INFO = option(3, struct.pack(">HQH", 0, 1 << 20, 1)) + option(1)
ANYTHING = {
    "closes": says(),
    "hangs": says(then_hang=True),
    "says half": says(b"NBDM", then_hang=True),
    "rubbish": says(os.urandom(4096)),
    "zeros": says(bytes(4096)),
    "ones": says(b"\xff" * 4096),
    "is a web server": says(b"HTTP/1.1 400 Bad Request\r\n\r\n" * 10),
    "floods": floods,
}
NBD = {
    "closes after the greeting": says(NBD_HELLO),
    "hangs after the greeting": says(NBD_HELLO, then_hang=True),
    "refuses": says(NBD_HELLO, option(1 << 31 | 6, b"no such export \xff")),
    "another magic": says(NBD_HELLO, option(1, magic=7)),
    "claims 4 GiB": says(NBD_HELLO, option(3, claims=2**32 - 1) + b"x" * 100_000, then_hang=True),
    "refuses with 4 GiB of reasons": says(NBD_HELLO, option(1 << 31, claims=2**32 - 1), then_hang=True),
    "info without content": says(NBD_HELLO, option(3) + option(1)),
    "info cut short": says(NBD_HELLO, option(3, b"\0\0\0") + option(1)),
    "error on reading": says(NBD_HELLO, INFO, struct.pack(">IIQ", 0x67446698, 5, 0)),
    "another answer than to reading": says(NBD_HELLO, INFO, struct.pack(">IIQ", 1, 0, 9) + bytes(512), then_hang=True),
    "half a sector": says(NBD_HELLO, INFO, struct.pack(">IIQ", 0x67446698, 0, 0) + bytes(256)),
}
ISCSI = {
    "refuses the login": says(pdu(0x23, status=2)),
    "wants no CHAP": says(pdu(0x23, b"AuthMethod=None\0")),
    "no challenge": says(CHAP, pdu(0x23)),
    "a challenge that is no number": says(CHAP, pdu(0x23, b"CHAP_I=x\0CHAP_C=0x00\0")),
    "a challenge of 300": says(CHAP, pdu(0x23, b"CHAP_I=300\0CHAP_C=0x00\0")),
    "a challenge below zero": says(CHAP, pdu(0x23, b"CHAP_I=-1\0CHAP_C=0x00\0")),
    "a challenge of no digits": says(CHAP, pdu(0x23, b"CHAP_I=1\0CHAP_C=0xzz\0")),
    "a challenge of odd length": says(CHAP, pdu(0x23, b"CHAP_I=1\0CHAP_C=0x123\0")),
    "text that is no text": says(pdu(0x23, b"\xff=\xfe\0=\0==\0")),
    "claims 16 MiB": says(pdu(0x23, claims=0xFFFFFF), then_hang=True),
    "another PDU": says(pdu(0x3F)),
    "a long additional header": says(bytes([0x23, 0, 0, 0, 255]) + bytes(43), then_hang=True),
    "refuses the secret": says(CHAP, pdu(0x23, b"CHAP_I=1\0CHAP_C=0x12\0"), pdu(0x23, status=2), then_hang=True),
    "another PDU after login": says(
        CHAP, pdu(0x23, b"CHAP_I=1\0CHAP_C=0x12\0"), pdu(0x23), pdu(0x23), pdu(0x3F), then_hang=True
    ),
    "says that reading went well, without data": says(
        CHAP, pdu(0x23, b"CHAP_I=1\0CHAP_C=0x12\0"), pdu(0x23), pdu(0x23), pdu(0x21), then_hang=True
    ),
}
CASES = [
    *((nbd, name, answer) for name, answer in (ANYTHING | NBD).items()),
    *((iscsi, name, answer) for name, answer in (ANYTHING | ISCSI).items()),
]


@pytest.mark.parametrize(("probe", "answer"), [pytest.param(p, a, id=f"{p.__name__}: {n}") for p, n, a in CASES])
async def test_whatever_answers(probe: Callable[[int], Awaitable[None]], answer: Answer) -> None:
    started = time.monotonic()
    async with listening(answer) as port:
        with pytest.raises(ExportFailed) as failure:
            await probe(port)
    assert time.monotonic() - started < TIMEOUT_S * 6
    assert failure.value.message.isprintable()
    assert len(failure.value.message) < 300


@pytest.mark.parametrize("probe", [nbd, iscsi])
async def test_nobody_answers(probe: Callable[[int], Awaitable[None]]) -> None:
    async with listening(says()) as port:
        pass
    with pytest.raises(ExportFailed, match="cannot be reached"):
        await probe(port)


async def test_the_reason_of_a_refusal_is_told() -> None:
    """And not that the logout was not answered."""
    async with listening(says(pdu(0x23, status=2), then_hang=True)) as port:
        with pytest.raises(ExportFailed, match="refuses the login: status 0200"):
            await iscsi(port)


async def test_a_flood_does_not_fill_the_memory() -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(NBD_HELLO + option(3, claims=2**32 - 1))
        await floods(reader, writer)

    async with listening(answer) as port:
        with pytest.raises(ExportFailed, match="not understood"):
            await nbd(port)
