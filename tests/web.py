"""A web server for downloads, with all the faults that real ones have, and some that only wicked ones have."""

import contextlib
import re
import ssl
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


@dataclass
class Page:
    """What is there under one path, and how it is served."""

    content: bytes = b""
    etag: str | None = '"one"'
    ranges: bool = True
    status: int = 200
    statuses: list[int] = field(default_factory=list)  #: of the first answers
    redirect: str | None = None
    announced: int | None = None  #: in the place of the true length
    chunked: bool = False
    unsized: bool = False  #: no length: it ends with the connection
    drops: list[int] = field(default_factory=list)  #: bytes after which each of the first connections breaks
    stalls_after: int | None = None
    piece_bytes: int = 65536
    pause_s: float = 0.0  #: after each piece
    extra: bytes = b""  #: sent after everything that was announced
    asked: list[dict[str, str]] = field(default_factory=list)  #: headers of the requests that came
    swapped: "Page | None" = None  #: takes its place after the first request


class Web:
    """The server. Paths begin with ``/``."""

    def __init__(self, address: str = "127.0.0.1", certificate: Path | None = None) -> None:
        self.pages: dict[str, Page] = {}
        self.leaving = threading.Event()
        web = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                web.answer(self)

            def log_message(self, *_: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request: Any, client_address: Any) -> None:
                pass  # a client that hangs up is no news

        self._server = Server((address, 0), Handler)
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self._scheme = "http" if certificate is None else "https"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    @property
    def address(self) -> str:
        host, port = self._server.server_address[:2]
        return f"{self._scheme}://{host!s}:{port}"

    def put(self, path: str, content: bytes | Path = b"", **how: Any) -> str:
        """Serve something; its URL."""
        self.pages[path] = Page(content.read_bytes() if isinstance(content, Path) else content, **how)
        return self.address + path

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        path = request.path.partition("?")[0]
        page = self.pages.get(path)
        request.close_connection = True
        if page is None:
            request.send_error(404)
            return
        page.asked.append(dict(request.headers))
        if page.swapped is not None:
            page.swapped.asked = page.asked
            self.pages[path] = page.swapped
        status = page.statuses.pop(0) if page.statuses else page.status
        if page.redirect is not None:
            request.send_response(302)
            request.send_header("Location", page.redirect)
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        if status != 200:
            request.send_error(status)
            return
        start = self._start(page, request)
        self._head(page, request, start)
        self._body(page, request, start)

    def _start(self, page: Page, request: BaseHTTPRequestHandler) -> int:
        match = re.fullmatch(r"bytes=(\d+)-", request.headers.get("Range", ""))
        if match is None or not page.ranges or request.headers.get("If-Range") != page.etag:
            return 0
        return int(match[1])

    def _head(self, page: Page, request: BaseHTTPRequestHandler, start: int) -> None:
        total = len(page.content)
        request.send_response(206 if start else 200)
        if page.etag is not None:
            request.send_header("ETag", page.etag)
        if start:
            request.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
        if page.chunked:
            request.send_header("Transfer-Encoding", "chunked")
        elif not page.unsized:
            request.send_header("Content-Length", str((page.announced or total) - start))
        request.send_header("Connection", "close")
        request.end_headers()

    def _body(self, page: Page, request: BaseHTTPRequestHandler, start: int) -> None:
        end = len(page.content)
        drop = page.drops.pop(0) if page.drops else None
        position = start
        while position < end:
            stop = min(end, position + page.piece_bytes)
            for limit in (drop + start if drop is not None else None, page.stalls_after):
                if limit is not None and position <= limit:
                    stop = min(stop, limit)
            piece = page.content[position:stop]
            request.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece) if page.chunked and piece else piece)
            position = stop
            if drop is not None and position >= start + drop:
                return
            if page.stalls_after is not None and position >= page.stalls_after:
                self.leaving.wait(60)
                return
            if page.pause_s and self.leaving.wait(page.pause_s):
                return
        if page.chunked:
            request.wfile.write(b"0\r\n\r\n")
        request.wfile.write(page.extra)

    def close(self) -> None:
        self.leaving.set()
        self._server.shutdown()
        self._server.server_close()


@contextlib.contextmanager
def web_server(address: str = "127.0.0.1", certificate: Path | None = None) -> Iterator[Web]:
    """A web server for the length of a test or a module."""
    web = Web(address, certificate)
    try:
        yield web
    finally:
        web.close()
