"""A pump between a file and a socket."""

import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from elemento_storage.api.wire import ClientGone, Pump, Turn
from elemento_storage.engine.content import FileContent, FileRange, OpenFile, Part, Zeros
from tests.unit.engine.test_content import MIB, sparse


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    with ours, theirs:
        yield ours, theirs


def run(pump: Pump) -> None:
    while pump.turn() is not Turn.DONE:
        pass


def received(theirs: socket.socket, pump: Pump, length: int) -> bytes:
    """What arrives while the pump runs to its end."""
    pumping = threading.Thread(target=run, args=(pump,))
    pumping.start()
    found = bytearray()
    while len(found) < length:
        piece = theirs.recv(MIB)
        assert piece
        found += piece
    pumping.join(10)
    assert not pumping.is_alive()
    return bytes(found)


def test_every_kind_of_part_arrives(tmp_path: Path, pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    path = sparse(tmp_path / "a", 20 * MIB, (0, os.urandom(3 * MIB)), (19 * MIB, b"z" * 1000))
    file = OpenFile(str(path))
    content = FileContent(file)

    def parts() -> Iterator[Part]:
        yield b"head"
        yield b""
        yield from content.parts(5, content.size_bytes)
        yield memoryview(bytearray(b"tail"))
        yield Zeros(0)

    expected = b"head" + path.read_bytes()[5:] + b"tail"
    pump = Pump(ours, parts())
    assert received(theirs, pump, len(expected)) == expected
    assert pump.sent_bytes == len(expected)


def test_a_client_that_takes_nothing_gives_the_thread_back(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    pump = Pump(ours, iter([Zeros(100 * MIB)]))
    assert pump.turn() is Turn.FULL
    before = pump.sent_bytes
    assert pump.turn() is Turn.FULL
    assert pump.sent_bytes == before < 100 * MIB
    theirs.close()
    with pytest.raises(ClientGone):
        pump.turn()


def test_a_file_that_ends_too_early_is_an_error(tmp_path: Path, pair: tuple[socket.socket, socket.socket]) -> None:
    file = OpenFile(str(sparse(tmp_path / "a", 4096, (0, b"x" * 4096))))
    pump = Pump(pair[0], iter([FileRange(file.descriptor, 0, 8192)]))
    with pytest.raises(OSError, match="shorter"):
        run(pump)
