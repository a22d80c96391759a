"""What both kinds of clients tell httpx, and what its errors mean."""

import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import httpx

from elemento_storage import API_VERSION, __version__
from elemento_storage.client.errors import ClientError, ConnectionBroken, Unreachable

_CONNECT_S: Final = 10.0
#: Less than the 75 s that the server keeps a connection, so that none is used that is just being closed.
_KEPT_S: Final = 30.0
_CONNECTIONS: Final = 32


@dataclass(frozen=True)
class Options:
    """How to reach a server. ``ca``: a PEM file of the authority that its certificate is from."""

    server: str
    token: str | None
    ca: str | None
    timeout_s: float

    def for_httpx(self) -> dict[str, Any]:
        """Arguments of httpx.Client and httpx.AsyncClient. Raises ValueError for what is no address."""
        address = self.server.rstrip("/")
        if not address.startswith(("http://", "https://")):
            raise ValueError(f"{self.server!r} is no address of a server: it begins with http:// or https://")
        headers = {"User-Agent": f"elemento-storage/{__version__}", "Accept-Encoding": "identity"}
        if self.token is not None:
            if not (self.token.isascii() and self.token.isprintable()):
                raise ValueError("the token has characters that no token has")
            headers["Authorization"] = f"Bearer {self.token}"
        # Authorities are read for https only: that takes longer than many calls do.
        verify: ssl.SSLContext | bool = False
        if address.startswith("https://"):
            verify = ssl.create_default_context(cafile=self.ca)
        return {
            "base_url": f"{address}/api/{API_VERSION}/",
            "headers": headers,
            "verify": verify,
            "timeout": httpx.Timeout(self.timeout_s, connect=_CONNECT_S),
            "limits": httpx.Limits(max_connections=_CONNECTIONS, keepalive_expiry=_KEPT_S),
            # A proxy that the environment names for the web has no business with tokens and disks.
            "trust_env": False,
        }


def broken(error: httpx.HTTPError, options: Options) -> ClientError:
    """What an error of httpx means to a call."""
    told = str(error) or type(error).__name__
    if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout | httpx.PoolTimeout | httpx.ProxyError):
        return Unreachable(f"{options.server} cannot be reached: {told}")
    if isinstance(error, httpx.TimeoutException):
        return ConnectionBroken(f"{options.server} was silent for {options.timeout_s:g} s")
    return ConnectionBroken(f"the connection to {options.server} broke: {told}")


def headers_of(response: httpx.Response) -> Mapping[str, str]:
    """Headers, in any case."""
    return response.headers
