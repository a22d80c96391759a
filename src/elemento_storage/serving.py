"""What every daemon of ours does as a process: listen, serve HTTP until a signal, tell systemd, log."""

import asyncio
import contextlib
import logging
import os
import socket
import time
from collections.abc import Iterator

import uvicorn

from elemento_storage.errors import ConfigurationError


class HttpServer(uvicorn.Server):
    """Leaves the signals to us: uvicorn raises them again when it is done, before we have stopped."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def listen(host: str, port: int) -> socket.socket:
    """A listening TCP socket. Raises ConfigurationError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        shown = f"[{host}]" if ":" in host else host
        raise ConfigurationError(f"cannot listen on {shown}:{port}: {error.strerror or error}") from error
    listener.listen(1024)
    return listener


def address_of(listener: socket.socket) -> str:
    """HOST:PORT as it stands in a URL."""
    host, port = listener.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def new_loop() -> asyncio.AbstractEventLoop:
    """The event loop of a daemon."""
    import uvloop  # noqa: PLC0415  loading it costs the other commands 20 ms

    return uvloop.new_event_loop()


def notify(state: str) -> None:
    """Tell systemd (sd_notify(3)); nothing when it did not ask."""
    address = os.environ.get("NOTIFY_SOCKET")
    if address:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as notifier:
            notifier.connect(f"\0{address[1:]}" if address.startswith("@") else address)
            notifier.sendall(state.encode())


def log_to_stderr(level: str) -> None:
    """One line for each message, in UTC."""
    formatter = logging.Formatter("%(asctime)s.%(msecs)03dZ %(levelname)s %(name)s: %(message)s", "%Y-%m-%dT%H:%M:%S")
    formatter.converter = time.gmtime
    handler = logging.StreamHandler()
    handler.setFormatter(formatter)
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL)  # what goes wrong there is raised, and told by who asked
