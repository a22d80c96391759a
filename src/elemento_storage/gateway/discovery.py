"""Servers that announce themselves: which of them are believed, and under which name.

An announcement says where to look. A server is used only if it then proves that it is one of

- a [[server]] of the configuration that is known by its certificate's fingerprint: under that entry's name;
- those whose certificate the configured authority signed for the name they announce: under that name;
- those in the networks of ``allow-plain``: under the announced name, which proves nothing, and so without tokens.
"""

import asyncio
import ipaddress
import logging
import ssl
from collections.abc import Mapping

from elemento_storage.config import parse_networks
from elemento_storage.errors import Unavailable
from elemento_storage.gateway.configuration import Configuration, ServerEntry
from elemento_storage.gateway.storage_server import StorageServer, TrustMaker
from elemento_storage.gateway.trust import (
    by_authority,
    by_certificate,
    certificate_at,
    fingerprint_of,
    parse_fingerprint,
)
from elemento_storage.mdns import Announcement, Finder

log = logging.getLogger(__name__)


class Discovery:
    """The servers that were found and believed, as of now."""

    def __init__(self, configuration: Configuration) -> None:
        self._configuration = configuration
        self._pinned: Mapping[str, ServerEntry] = {
            fingerprint: entry
            for entry in configuration.server
            if not entry.url and (fingerprint := parse_fingerprint(entry.fingerprint)) is not None
        }
        self._listed_names = {entry.name for entry in configuration.server if entry.url}
        self._plain = parse_networks(configuration.discovery.allow_plain)
        self._found: dict[str, StorageServer] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._finder = Finder(configuration.discovery.interfaces, self._on_found, self._on_lost)

    async def start(self) -> None:
        """Begin to look. Raises ConfigurationError."""
        await self._finder.start()

    async def close(self) -> None:
        """Stop looking, close the connections."""
        await self._finder.close()
        for task in self._tasks:
            task.cancel()
        for server in self._found.values():
            await server.close()

    def servers(self) -> list[StorageServer]:
        """By name, so that their order does not depend on who was heard first."""
        return sorted(self._found.values(), key=lambda server: server.name)

    def _on_found(self, announcement: Announcement) -> None:
        task = asyncio.ensure_future(self._consider(announcement))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _on_lost(self, name: str) -> None:
        # A good-bye proves nothing either: what is gone does not answer, and says so by that. Only a server that was
        # never asked for by name and needs no proof is forgotten.
        server = self._found.get(name)
        if server is not None and not server.may_have_tokens:
            del self._found[name]

    async def _consider(self, told: Announcement) -> None:
        host = f"[{told.host}]" if ":" in told.host else told.host
        try:
            server = await (self._proven(told, host) if told.tls else self._plain_one(told, host))
        except Unavailable as error:
            log.warning(
                "%s:%d announces itself as %s and is not believed: %s", host, told.port, told.name, error.message
            )
            return
        if server is None or server.name in self._listed_names or await self._is_listed(told):
            return
        known = self._found.get(server.name)
        if known is not None and known.url == server.url:
            return
        if not told.tls and (self._is_pinned(server.name) or (known is not None and known.may_have_tokens)):
            log.warning(
                "%s:%d announces itself as %s, which has a certificate, and shows none", host, told.port, told.name
            )
            return
        log.info("found server %s at %s", server.name, server.url)
        self._found[server.name] = server
        if known is not None:
            await known.close()

    async def _proven(self, told: Announcement, host: str) -> StorageServer | None:
        patience_s = self._configuration.patience
        url = f"https://{host}:{told.port}"
        certificate = await certificate_at(told.host, told.port, patience_s)
        pinned = self._pinned.get(fingerprint_of(certificate))
        if pinned is not None:
            return StorageServer(pinned.name, url, trust=_ready(by_certificate(certificate)))
        if not self._configuration.discovery.ca:
            raise Unavailable("its certificate is none of those in the configuration")
        context = by_authority(self._configuration.discovery.ca)
        await _handshake(told, context, patience_s)
        return StorageServer(told.name, url, trust=_ready(context), proven_name=told.name)

    async def _plain_one(self, told: Announcement, host: str) -> StorageServer:
        address = ipaddress.ip_address(told.host.partition("%")[0])
        if not any(address in network for network in self._plain):
            raise Unavailable("it has no certificate, and allow-plain does not have its address")
        server = StorageServer(told.name, f"http://{host}:{told.port}")
        server.may_have_tokens = False
        return server

    def _is_pinned(self, name: str) -> bool:
        return any(entry.name == name for entry in self._pinned.values())

    async def _is_listed(self, told: Announcement) -> bool:
        """Whether it is a server of the list, which would then be there twice."""
        loop = asyncio.get_running_loop()
        for entry in self._configuration.server:
            if not entry.url:
                continue
            listed = StorageServer(entry.name, entry.url)
            if listed.port != told.port:
                continue
            try:
                addresses = await loop.getaddrinfo(listed.host, listed.port)
            except OSError:
                continue
            if told.host in {one[4][0] for one in addresses}:
                return True
        return False


def _ready(context: ssl.SSLContext) -> TrustMaker:
    async def trust() -> ssl.SSLContext:
        return context

    return trust


async def _handshake(told: Announcement, context: ssl.SSLContext, patience_s: float) -> None:
    """Raises Unavailable unless the server proves the name it announces."""
    try:
        async with asyncio.timeout(patience_s):
            _, writer = await asyncio.open_connection(told.host, told.port, ssl=context, server_hostname=told.name)
            writer.transport.abort()
    except TimeoutError:
        raise Unavailable(f"no answer within {patience_s:g} s") from None
    except (OSError, ValueError) as error:
        raise Unavailable(str(error)) from None
