"""A way to the server that counts what passes, and breaks or holds it where a test says so."""

import contextlib
import socket
import threading
from collections.abc import Iterator

from tests.live import LiveServer


class Way:
    """Forwards connections. ``up`` and ``down`` count bytes.

    ``cut_up``, ``cut_down``: the connection on which so many more bytes have passed is cut, once. ``hold_up``: after so
    many bytes nothing passes any more, and ``held`` is set.
    """

    def __init__(self, server: LiveServer) -> None:
        self._server = server
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self._listening.getsockname()[1]}"
        self.up = self.down = self.cuts = 0
        self.cut_up: int | None = None
        self.cut_down: int | None = None
        self.hold_up: int | None = None
        self.held = threading.Event()
        self.released = threading.Event()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listening.accept()
                far = socket.create_connection((self._server.listen_host, self._server.port))
            except OSError:
                return
            for source, target, is_up in ((near, far, True), (far, near, False)):
                threading.Thread(target=self._pump, args=(source, target, is_up), daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket, is_up: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if is_up:
                    self.up += len(data)
                    if self.hold_up is not None and self.up > self.hold_up:
                        self.held.set()
                        self.released.wait(60)
                        break
                else:
                    self.down += len(data)
                if self._cuts(is_up):
                    break
                target.sendall(data)
        for one in (source, target):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()

    def _cuts(self, is_up: bool) -> bool:
        if is_up and self.cut_up is not None and self.up > self.cut_up:
            self.cut_up = None
        elif not is_up and self.cut_down is not None and self.down > self.cut_down:
            self.cut_down = None
        else:
            return False
        self.cuts += 1
        return True

    def close(self) -> None:
        """No more connections."""
        self.released.set()
        self._listening.close()


@contextlib.contextmanager
def way_to(server: LiveServer) -> Iterator[Way]:
    """A way to a server."""
    way = Way(server)
    try:
        yield way
    finally:
        way.close()
