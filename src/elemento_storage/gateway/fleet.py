"""All storage servers that are known now: the listed ones first, in their order, then those that were found."""

import asyncio
import logging
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from elemento_storage.errors import ConfigurationError, InvalidValue
from elemento_storage.gateway.configuration import Configuration, ServerEntry, UserEntry
from elemento_storage.gateway.discovery import Discovery
from elemento_storage.gateway.storage_server import Answer, Silent, StorageServer
from elemento_storage.gateway.trust import by_authority, by_fingerprint, parse_fingerprint

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Silence:
    """A server that gave no answer that could be used."""

    server: StorageServer
    reason: str


@dataclass(frozen=True)
class Said:
    """What all servers said to one call: those that answered, in the servers' order, and those that did not."""

    answers: list[Answer]
    silences: list[Silence]


class Fleet:
    """The servers, and how to ask all of them at once."""

    def __init__(self, configuration: Configuration) -> None:
        self._patience_s = configuration.patience
        self._listed = [_listed(entry, configuration.patience) for entry in configuration.server if entry.url]
        self._discovery = Discovery(configuration) if configuration.discovery.enabled else None

    async def start(self) -> None:
        """Raises ConfigurationError."""
        if self._discovery is not None:
            await self._discovery.start()

    async def close(self) -> None:
        """Close all connections."""
        if self._discovery is not None:
            await self._discovery.close()
        for server in self._listed:
            await server.close()

    def servers(self) -> list[StorageServer]:
        """Those that are known now."""
        return [*self._listed, *(self._discovery.servers() if self._discovery is not None else [])]

    def named(self, name: str) -> StorageServer:
        """The server of this name. Raises InvalidValue."""
        for server in self.servers():
            if server.name == name:
                return server
        raise InvalidValue(f"'server' is {name[:80]!r}, and no server of that name is known", key="server")

    async def ask_all(
        self,
        path: str,
        values: Mapping[str, Any],
        user: UserEntry,
        *,
        usable: Callable[[Answer], bool],
        only: StorageServer | None = None,
    ) -> Said:
        """Ask every server, or ``only`` one, at the same time; it takes no longer than the patience."""
        asked = [only] if only is not None else self.servers()
        told = await asyncio.gather(*(self._ask(server, path, values, user) for server in asked))
        answers, silences = [], []
        for server, one in zip(asked, told, strict=True):
            if isinstance(one, Silent):
                silences.append(Silence(server, one.reason))
            elif usable(one):
                answers.append(one)
            else:
                silences.append(Silence(server, one.complaint))
        return Said(answers, silences)

    async def _ask(
        self, server: StorageServer, path: str, values: Mapping[str, Any], user: UserEntry
    ) -> Answer | Silent:
        try:
            return await server.ask(path, values, token=user.tokens.get(server.name), patience_s=self._patience_s)
        except Silent as silent:
            return silent


def _listed(entry: ServerEntry, patience_s: float) -> StorageServer:
    if not entry.url.startswith("https:"):
        return StorageServer(entry.name, entry.url)
    wanted = parse_fingerprint(entry.fingerprint)
    if wanted is None:
        try:
            context = by_authority(entry.ca)
        except (OSError, ssl.SSLError) as error:
            raise ConfigurationError(f"server {entry.name!r}: the ca {entry.ca} cannot be used: {error}") from None

        async def authority() -> ssl.SSLContext:
            return context

        return StorageServer(entry.name, entry.url, trust=authority)
    server: StorageServer

    async def pinned() -> ssl.SSLContext:
        return await by_fingerprint(server.host, server.port, wanted, patience_s)

    server = StorageServer(entry.name, entry.url, trust=pinned)
    return server
