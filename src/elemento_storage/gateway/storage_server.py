"""One storage server as the gateway sees it: a call, an answer, and never a wait without end."""

import asyncio
import logging
import ssl
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import urlsplit

import httpx
import msgspec

from elemento_storage import API_VERSION
from elemento_storage.config import is_loopback
from elemento_storage.errors import Unavailable

log = logging.getLogger(__name__)

_MOST_ANSWER_BYTES: Final = 256 * 1024 * 1024
_USUAL_PORT: Final = 7772

TrustMaker = Callable[[], Awaitable[ssl.SSLContext]]
Files = list[tuple[str, bytes]]


class Silent(Exception):
    """The server gave no answer. ``sent``: the request may have reached it, so what it asks for may be done."""

    def __init__(self, reason: str, *, sent: bool) -> None:
        super().__init__(reason)
        self.reason = reason
        self.sent = sent


@dataclass(frozen=True)
class Answer:
    """What a server said."""

    server: "StorageServer"
    status: int
    content: bytes
    headers: Mapping[str, str] = field(default_factory=dict)

    def json(self) -> Any:
        """The decoded content; None where it is no JSON."""
        try:
            return msgspec.json.decode(self.content)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return None

    @property
    def complaint(self) -> str:
        """What an error says, in one line."""
        told = self.json()
        sentence = told.get("error") if isinstance(told, dict) else None
        return f"it answers {self.status}: {str(sentence or 'no reason given')[:300]}"


class StorageServer:
    """A server under the name that tokens are kept by.

    ``proven_name`` is the name that its certificate has to be of, where that is not the host in ``url``; ``trust``
    makes the TLS context of an https server, when it is first needed.
    """

    def __init__(self, name: str, url: str, *, trust: TrustMaker | None = None, proven_name: str | None = None) -> None:
        self.name = name
        self.url = url.rstrip("/")
        parts = urlsplit(url)
        self.host = parts.hostname or ""
        self.port = parts.port or (443 if parts.scheme == "https" else 80)
        # Over http anybody on the way reads a token; on loopback there is no way.
        self.may_have_tokens = parts.scheme == "https" or is_loopback(self.host)
        self._trust = trust
        self._proven_name = proven_name
        self._client: httpx.AsyncClient | None = None
        self._connecting = asyncio.Lock()
        self.answers: bool | None = None

    @property
    def address(self) -> str:
        """For people: the host, and the port if it is not the usual one."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _USUAL_PORT else f"{host}:{self.port}"

    async def ask(
        self,
        path: str,
        values: Mapping[str, Any] | None,
        *,
        token: str | None,
        patience_s: float,
        headers: Mapping[str, str] | None = None,
        files: Files | None = None,
    ) -> Answer:
        """POST ``values`` as JSON, or ``files`` as a form, or GET if there is neither. Raises Silent."""
        try:
            answer = await self._ask(path, values, token, patience_s, dict(headers or {}), files)
        except Silent as silent:
            if self.answers is not False:
                log.warning("server %s does not answer: %s", self.name, silent.reason)
            self.answers = False
            raise
        if self.answers is False:
            log.info("server %s answers again", self.name)
        self.answers = True
        return answer

    async def _ask(
        self,
        path: str,
        values: Mapping[str, Any] | None,
        token: str | None,
        patience_s: float,
        headers: dict[str, str],
        files: Files | None,
    ) -> Answer:
        if token is not None and self.may_have_tokens:
            headers["Authorization"] = f"Bearer {token}"
        extensions = {"sni_hostname": self._proven_name} if self._proven_name else {}
        content: dict[str, Any] = {}
        if files:
            content["files"] = [("file", (name, data, "application/octet-stream")) for name, data in files]
        elif values is not None:
            headers["Content-Type"] = "application/json"
            content["content"] = msgspec.json.encode(values)
        method = "POST" if content else "GET"
        sent = False
        try:
            async with asyncio.timeout(patience_s):
                client = await self._connected(patience_s)
                request = client.build_request(
                    method, f"{self.url}/api/{API_VERSION}/{path}", headers=headers, extensions=extensions, **content
                )
                sent = True
                response = await client.send(request, stream=True)
                try:
                    return Answer(self, response.status_code, await _limited(response), dict(response.headers))
                finally:
                    await response.aclose()
        except TimeoutError:
            raise Silent(f"no answer within {patience_s:g} s", sent=sent) from None
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise Silent(str(error) or "no connection", sent=False) from None
        except Unavailable as error:
            raise Silent(error.message, sent=False) from None
        except (httpx.HTTPError, httpx.InvalidURL, OSError, ssl.SSLError) as error:
            raise Silent(
                f"the connection broke: {error}" if str(error) else "the connection broke", sent=sent
            ) from None

    async def _connected(self, patience_s: float) -> httpx.AsyncClient:
        async with self._connecting:
            if self._client is None:
                verify: ssl.SSLContext | bool = False if self._trust is None else await self._trust()
                self._client = httpx.AsyncClient(
                    verify=verify,
                    trust_env=False,
                    follow_redirects=False,
                    timeout=httpx.Timeout(None, connect=patience_s),
                    headers={"Accept-Encoding": "identity", "User-Agent": "elemento-storage-gateway"},
                )
            return self._client

    async def close(self) -> None:
        """Close its connections."""
        if self._client is not None:
            await self._client.aclose()
            self._client = None


async def _limited(response: httpx.Response) -> bytes:
    pieces, size = [], 0
    async for piece in response.aiter_raw():
        size += len(piece)
        if size > _MOST_ANSWER_BYTES:
            raise httpx.DecodingError("it answers more than anybody could want")
        pieces.append(piece)
    return b"".join(pieces)
