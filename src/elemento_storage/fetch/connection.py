"""One HTTP exchange: to an address that was checked, with limits, that another thread can break off."""

import contextlib
import email.utils
import http.client
import re
import socket
import ssl
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from email.message import Message
from typing import Final
from urllib.parse import quote, urljoin, urlsplit

from elemento_storage import __version__
from elemento_storage.errors import DownloadFailed, UrlRefused
from elemento_storage.fetch.addresses import AddressRules, Target, TryAgain, resolve
from elemento_storage.images.sparse import SparseWriter

_CONNECT_S: Final = 10.0
_LONGEST_URL: Final = 8192
_MOST_REDIRECTS: Final = 10
_REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})
_TRY_AGAIN: Final = frozenset({408, 425, 429, 500, 502, 503, 504})
_LONGEST_PAUSE_S: Final = 60.0
_READ_BYTES: Final = 256 << 10
_EXTRA_WAIT_S: Final = 0.05
_CONTENT_RANGE: Final = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19}|\*)", re.ASCII)
_SAFE: Final = "%/:=&?~#+!$,;'@()*[]"


class ServerBusy(TryAgain):
    """The server asks to be left alone for a while."""

    def __init__(self, reason: str, pause_s: float) -> None:
        super().__init__(reason)
        self.pause_s = pause_s


@dataclass(frozen=True)
class Url:
    """An address on the web that passed a first look."""

    text: str
    is_tls: bool
    host: str
    port: int
    target: str  #: path and query, as the request has it

    @property
    def site(self) -> str:
        """What messages say of it: queries may hold secrets."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.is_tls else 'http'}://{host}"


def parse_url(text: str) -> Url:
    """Take a URL apart. Raises UrlRefused."""
    try:
        parts = urlsplit(text)
        port = parts.port
        host = (parts.hostname or "").encode("idna" if not (parts.hostname or "").isascii() else "ascii").decode()
    except ValueError as error:
        raise UrlRefused("'url' is not a URL", key="url") from error
    if parts.scheme not in ("http", "https"):
        raise UrlRefused(f"a URL has to begin with http:// or https://, not {parts.scheme[:20]!r}", key="url")
    if not host or len(text) > _LONGEST_URL or any(character <= " " or character == "\x7f" for character in text):
        raise UrlRefused("the URL has no host, a blank in it, or no end", key="url")
    if parts.username is not None or parts.password is not None:
        raise UrlRefused("a URL with a user name in it is not taken: everybody would read the password", key="url")
    target = quote(parts.path or "/", safe=_SAFE) + (f"?{quote(parts.query, safe=_SAFE)}" if parts.query else "")
    is_tls = parts.scheme == "https"
    return Url(text, is_tls, host, port or (443 if is_tls else 80), target)


class _Connection(http.client.HTTPConnection):
    """A connection to one of the addresses that were checked, whatever the name resolves to by now."""

    def __init__(self, url: Url, targets: list[Target], timeout_s: float, tls: ssl.SSLContext | None) -> None:
        super().__init__(url.host, url.port, timeout=timeout_s)
        self.default_port = 443 if url.is_tls else 80
        self._url = url
        self._targets = targets
        self._timeout_s = timeout_s
        self._tls = tls
        self.raw: socket.socket | None = None  #: a second handle, by which another thread breaks the connection off
        self.kept: socket.socket | None = None  #: the library forgets its own as soon as the answer has begun

    def connect(self) -> None:
        sock = self._first_that_answers()
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.raw = sock.dup()
            sock.settimeout(self._timeout_s)
            self.sock = sock if self._tls is None else self._tls.wrap_socket(sock, server_hostname=self._url.host)
            self.kept = self.sock
        except BaseException:
            sock.close()
            raise

    def _first_that_answers(self) -> socket.socket:
        problem: OSError | None = None
        for target in self._targets:
            sock = socket.socket(target.family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
            try:
                sock.settimeout(min(_CONNECT_S, self._timeout_s))
                sock.connect(target.address)
            except OSError as error:
                sock.close()
                problem = error
            else:
                return sock
        raise problem or OSError("there is no address to connect to")


class Exchange:
    """One request and its answer, after redirects. All methods but ``break_off`` block, and are for one thread."""

    def __init__(self, rules: AddressRules, *, stall_s: float, downgrade: bool) -> None:
        self._rules = rules
        self._stall_s = stall_s
        self._downgrade = downgrade  #: from https to http: only what is checked by a checksum may take that way
        self._tls: ssl.SSLContext | None = None
        self._connection: _Connection | None = None
        self._response: http.client.HTTPResponse | None = None
        self._broken_off = False
        self.start = 0  #: the position of the first byte that comes
        self.total_bytes: int | None = None  #: of the whole file, if the server says
        self.counted = False  #: whether the end can be told from a broken connection
        self.validator: str | None = None  #: for If-Range
        self.site = ""  #: who answered, for messages

    def open(self, text: str, position: int, validator: str | None) -> None:
        """Ask for the file, from ``position`` on if it still is the one of ``validator``.

        Raises UrlRefused, DownloadFailed, TryAgain.
        """
        headers = {"User-Agent": f"elemento-storage/{__version__}", "Accept": "*/*", "Accept-Encoding": "identity"}
        headers["Connection"] = "close"
        if position and validator is not None:
            headers |= {"Range": f"bytes={position}-", "If-Range": validator}
        url = parse_url(text)
        for _ in range(_MOST_REDIRECTS + 1):
            response = self._ask(url, headers)
            if response.status not in _REDIRECTS:
                self._read_answer(url, response, position if "Range" in headers else 0, validator)
                return
            location = response.headers.get("location")
            if location is None:
                raise DownloadFailed(f"{url.site} redirects to nowhere")
            following = parse_url(urljoin(url.text, location))
            if url.is_tls and not following.is_tls and not self._downgrade:
                raise UrlRefused(
                    f"{url.site} redirects from https to http, where anybody could change the image: give a checksum",
                    key="url",
                )
            self.close()
            url = following
        raise DownloadFailed(f"more than {_MOST_REDIRECTS} redirects, the last from {url.site}")

    def _ask(self, url: Url, headers: Mapping[str, str]) -> http.client.HTTPResponse:
        targets = list(resolve(url.host, url.port, self._rules))
        if url.is_tls and self._tls is None:
            self._tls = ssl.create_default_context()
        self._connection = _Connection(url, targets, self._stall_s, self._tls if url.is_tls else None)
        with _broken_is_try_again(url.site):
            if self._broken_off:
                raise TryAgain("broken off")
            self._connection.request("GET", url.target, headers=headers)
            self._response = self._connection.getresponse()
            return self._response

    def _read_answer(self, url: Url, response: http.client.HTTPResponse, position: int, validator: str | None) -> None:
        headers = response.headers
        if response.status == 206 and position:
            match = _CONTENT_RANGE.fullmatch(headers.get("content-range", "").strip())
            found = _validator(headers)
            if match is None or int(match[1]) != position or match[3] == "*" or found not in (validator, None):
                raise TryAgain(f"{url.site} answers with another part than the one asked for")
            self.start, self.total_bytes, self.validator = position, int(match[3]), validator
            if int(match[2]) + 1 != self.total_bytes:
                raise TryAgain(f"{url.site} answers with less than was asked for")
        elif response.status == 200:
            self.start, self.total_bytes, self.validator = 0, response.length, _validator(headers)
        elif response.status == 416 and position:
            raise TryAgain(f"{url.site} has less than it had")
        elif response.status in _TRY_AGAIN:
            raise ServerBusy(f"{url.site} answers {response.status}", _pause(headers))
        else:
            raise DownloadFailed(f"{url.site} answers {response.status}")
        self.counted = self.total_bytes is not None or bool(response.chunked)
        self.site = url.site

    def pour(self, writer: SparseWriter, most_bytes: int, most_s: float) -> bool:
        """Write what comes, for at most so many bytes or so long; False at the end.

        Raises TryAgain (also at an end that came too early), DownloadFailed, OSError of the file.
        """
        assert self._response is not None
        deadline = time.monotonic() + most_s
        received = 0
        while received < most_bytes and time.monotonic() < deadline:
            with _broken_is_try_again(self.site):
                piece = self._response.read1(_READ_BYTES)
            if not piece:
                self._require_end(writer.position)
                return False
            writer.write(piece)
            received += len(piece)
        return True

    def _require_end(self, position: int) -> None:
        if self.total_bytes is None:
            return
        if position < self.total_bytes:
            raise TryAgain(f"{self.site} ended after {position} of {self.total_bytes} bytes")
        assert self._response is not None
        kept = self._connection.kept if self._connection is not None else None
        if self._response.fp is not None and kept is not None:
            with contextlib.suppress(OSError, ValueError):
                kept.settimeout(_EXTRA_WAIT_S)
                if self._response.fp.read(1):
                    raise DownloadFailed(f"{self.site} sends more than the {self.total_bytes} bytes that it announced")

    def close(self) -> None:
        """End the exchange."""
        if self._response is not None:
            self._response.close()
        if self._connection is not None:
            if self._connection.raw is not None:
                self._connection.raw.close()
            self._connection.close()
        self._connection = self._response = None

    def break_off(self) -> None:
        """From another thread: let whatever blocks on the network fail at once."""
        self._broken_off = True
        connection = self._connection
        if connection is not None and connection.raw is not None:
            with contextlib.suppress(OSError):
                connection.raw.shutdown(socket.SHUT_RDWR)


def _validator(headers: Message) -> str | None:
    """What If-Range can name this state of the file by (RFC 9110, 13.1.5)."""
    tag = headers.get("etag", "")
    if tag.startswith('"'):
        return tag
    modified = headers.get("last-modified")
    return modified if modified and modified != headers.get("date") else None


def _pause(headers: Message) -> float:
    text = headers.get("retry-after", "")
    if text.isascii() and text.isdigit():
        return min(float(text), _LONGEST_PAUSE_S)
    with contextlib.suppress(TypeError, ValueError):
        moment = email.utils.parsedate_to_datetime(text).timestamp()
        return min(max(moment - time.time(), 0.0), _LONGEST_PAUSE_S)
    return 0.0


@contextlib.contextmanager
def _broken_is_try_again(site: str) -> Iterator[None]:
    try:
        yield
    except ssl.SSLCertVerificationError as error:
        raise DownloadFailed(f"{site} shows a certificate that is not trusted: {error.verify_message}") from error
    except TimeoutError as error:
        raise TryAgain(f"{site} stopped sending") from error
    except (OSError, http.client.HTTPException, ValueError, AttributeError) as error:
        raise TryAgain(f"the connection to {site} broke ({type(error).__name__})") from error
