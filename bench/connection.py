"""One keep-alive connection, as thin as a client in Python can be.

virsh is a C program. A comfortable HTTP library would spend more time on a call than the server does, and the figure
would be the library's.
"""

import socket

import httptools
import msgspec


class Connection:
    """Posts JSON and waits for the answer."""

    def __init__(self, host: str, port: int) -> None:
        self._socket = socket.create_connection((host, port))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._head = f" HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\nContent-Length: "

    def post(self, call: str, body: object) -> bytes:
        """The bytes of a 200 answer, all of them read."""
        content = msgspec.json.encode(body)
        self._socket.sendall(f"POST /api/v1.0/{call}{self._head}{len(content)}\r\n\r\n".encode() + content)
        answer = _Answer()
        parser = httptools.HttpResponseParser(answer)
        while not answer.complete:
            piece = self._socket.recv(1 << 20)
            if not piece:
                raise ConnectionError(f"{call}: the server closed the connection")
            parser.feed_data(piece)
        received = b"".join(answer.pieces)
        if parser.get_status_code() != 200:
            raise RuntimeError(f"{call}: {parser.get_status_code()} {received[:500]!r}")
        return received

    def close(self) -> None:
        """Hang up."""
        self._socket.close()


class _Answer:
    def __init__(self) -> None:
        self.pieces: list[bytes] = []
        self.complete = False

    def on_body(self, piece: bytes) -> None:
        self.pieces.append(piece)

    def on_message_complete(self) -> None:
        self.complete = True
