"""Who is calling, and on whose behalf (contract, section 4)."""

import ipaddress
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from starlette.datastructures import Headers

from elemento_storage.config import Auth
from elemento_storage.errors import Forbidden, Unauthenticated
from elemento_storage.service.access import Actor
from elemento_storage.service.tokens import Role, TokenStore

INFRASTRUCTURE_UID = "0" * 32  #: stands for "nobody named" where a key that names the client must be given


@dataclass(frozen=True)
class Caller:
    """``client`` is the token's; None on a trusted network, where the payload says who it is."""

    client: str | None
    admin: bool

    @property
    def is_user(self) -> bool:
        """Bound to one client by its token."""
        return self.client is not None and not self.admin

    def actor(self, named: str | None) -> Actor:
        """The actor of a call that names a client, or none. Raises Forbidden."""
        if named == INFRASTRUCTURE_UID and self.admin:
            named = None
        if self.is_user:
            if named is not None and named != self.client:
                raise Forbidden("the token belongs to another client than the one named in the request")
            return Actor(self.client)
        return Actor(named)

    def stands_for(self, *, creates: bool) -> Mapping[str, str]:
        """What stands in for absent keys that name the client, when a token says who it is."""
        if self.client is None:
            return {}
        named = self.client if self.is_user or creates else INFRASTRUCTURE_UID
        return {"creatorID": named, "client_uid": named}

    def require_admin(self) -> None:
        """Raises Forbidden for a user's token."""
        if not self.admin:
            raise Forbidden("this call needs an admin's token")


TRUSTED = Caller(client=None, admin=True)


class Authenticator:
    """Finds the caller of a request."""

    def __init__(self, auth: Auth, tokens: TokenStore) -> None:
        self._auth = auth
        self._tokens = tokens

    def caller(self, headers: Headers) -> Caller:
        """Raises Unauthenticated, Forbidden."""
        if self._auth is Auth.TOKENS:
            scheme, _, text = headers.get("authorization", "").partition(" ")
            token = self._tokens.verify(text.strip()) if scheme.lower() == "bearer" else None
            if token is None:
                raise Unauthenticated(
                    "this server wants a token: send 'Authorization: Bearer …' "
                    "(`elemento-storage token create` makes one)"
                )
            return Caller(client=token.client, admin=token.role is Role.ADMIN)
        refuse_foreign_page(headers, loopback_only=self._auth is Auth.LOOPBACK)
        return TRUSTED


def refuse_foreign_page(headers: Headers, *, loopback_only: bool, origins: Collection[str] = ()) -> None:
    """A web page from elsewhere, open in a browser on a trusted machine, is not the user. Raises Forbidden.

    ``origins`` are pages that the operator lets in. Browsers say where a request comes from (Fetch Metadata, Origin),
    but neither for a plain GET to a name that was rebound to 127.0.0.1, which is same-origin to them. So on loopback
    the Host has to be a loopback one, always.
    """
    host = headers.get("host")
    if loopback_only and host is not None and not _is_loopback_host(host):
        raise Forbidden(
            f"this server trusts its own machine only and was addressed as {host[:200]!r}: use 127.0.0.1 or localhost, "
            "or run it with --auth tokens"
        )
    origin = headers.get("origin")
    if origin is not None and origin in origins:
        return
    foreign_origin = origin is not None and origin.partition("://")[2] != host
    if foreign_origin or headers.get("sec-fetch-site") in {"cross-site", "same-site"}:
        raise Forbidden("a page of another site may not use this server")


def _is_loopback_host(host: str) -> bool:
    name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
    name = name.strip("[]")
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
