"""Servers that announce themselves on the local network (multicast DNS, RFC 6762 and 6763), and who looks for them.

What is announced is where to look, never a reason to believe: anybody on the network may announce anything.
"""

import asyncio
import ipaddress
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from elemento_storage.errors import ConfigurationError

log = logging.getLogger(__name__)

SERVICE: Final = "_elemento-store._tcp.local."
_LOOK_UP_MS: Final = 3000
_LONGEST_NAME: Final = 255


@dataclass(frozen=True)
class Announcement:
    """``name`` is the one that a certificate would have to prove; ``tls``: it speaks https."""

    name: str
    host: str
    port: int
    tls: bool


class Announcer:
    """Tells the network that a server is here, until it is closed."""

    def __init__(self, name: str, host: str, port: int, *, tls: bool) -> None:
        self._name, self._host, self._port, self._tls = name, host, port, tls
        self._zeroconf: Any = None
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to announce; it takes 2 s to be heard, and nobody has to wait for that."""
        self._task = asyncio.create_task(self._announce())

    async def close(self) -> None:
        """Say good-bye."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        if self._zeroconf is not None:
            await self._zeroconf.async_close()

    async def _announce(self) -> None:
        from zeroconf.asyncio import AsyncServiceInfo  # noqa: PLC0415  80 ms, for who announces only

        address = ipaddress.ip_address(self._host)
        try:
            self._zeroconf = _open([] if address.is_unspecified else [self._host])
            addresses = _own_addresses(address.version) if address.is_unspecified else [self._host]
            info = AsyncServiceInfo(
                SERVICE,
                f"{self._name.replace('.', '-')}.{SERVICE}",
                port=self._port,
                parsed_addresses=addresses,
                properties={"name": self._name, "tls": "1" if self._tls else "0", "api": "v1.0"},
                server=f"{self._name.rstrip('.')}.",
            )
            await (await self._zeroconf.async_register_service(info, allow_name_change=True))
        except Exception as error:  # noqa: BLE001  whatever the network does, the server serves
            log.error("the server cannot announce itself: %s", error)
            return
        log.info("announced as %s at %s", self._name, ", ".join(addresses))


class Finder:
    """Tells of every server that announces itself, and of every one that leaves."""

    def __init__(
        self, interfaces: list[str], on_found: Callable[[Announcement], None], on_lost: Callable[[str], None]
    ) -> None:
        self._interfaces = interfaces
        self._on_found = on_found
        self._on_lost = on_lost
        self._names: dict[str, str] = {}
        self._zeroconf: Any = None
        self._browser: Any = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Begin to look. Raises ConfigurationError when the network cannot be used."""
        from zeroconf.asyncio import AsyncServiceBrowser  # noqa: PLC0415

        try:
            self._zeroconf = _open(self._interfaces)
            self._browser = AsyncServiceBrowser(self._zeroconf.zeroconf, [SERVICE], handlers=[self._changed])
        except OSError as error:
            raise ConfigurationError(f"servers cannot be looked for: {error.strerror or error}") from error

    async def close(self) -> None:
        """Stop looking."""
        for task in self._tasks:
            task.cancel()
        if self._browser is not None:
            await self._browser.async_cancel()
        if self._zeroconf is not None:
            await self._zeroconf.async_close()

    def _changed(self, zeroconf: Any, service_type: str, name: str, state_change: Any) -> None:
        from zeroconf import ServiceStateChange  # noqa: PLC0415

        if state_change is ServiceStateChange.Removed:
            known = self._names.pop(name, None)
            if known is not None:
                self._on_lost(known)
            return
        task = asyncio.ensure_future(self._look_up(zeroconf, service_type, name))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _look_up(self, zeroconf: Any, service_type: str, name: str) -> None:
        from zeroconf.asyncio import AsyncServiceInfo  # noqa: PLC0415

        info = AsyncServiceInfo(service_type, name)
        if not await info.async_request(zeroconf, _LOOK_UP_MS):
            return
        addresses = info.parsed_scoped_addresses()
        told = (info.properties.get(b"name") or b"").decode("utf-8", "replace")
        if not addresses or not info.port or not told.isprintable() or not 0 < len(told) <= _LONGEST_NAME:
            log.debug("%s announces nothing that could be used", name)
            return
        self._names[name] = told
        self._on_found(Announcement(told, addresses[0], info.port, info.properties.get(b"tls") == b"1"))


def _open(interfaces: list[str]) -> Any:
    from zeroconf import InterfaceChoice, IPVersion  # noqa: PLC0415
    from zeroconf.asyncio import AsyncZeroconf  # noqa: PLC0415

    if not interfaces:
        return AsyncZeroconf(interfaces=InterfaceChoice.All, ip_version=IPVersion.V4Only)
    versions = {ipaddress.ip_address(one).version for one in interfaces}
    kinds = {frozenset({4}): IPVersion.V4Only, frozenset({6}): IPVersion.V6Only}
    return AsyncZeroconf(interfaces=interfaces, ip_version=kinds.get(frozenset(versions), IPVersion.All))


def _own_addresses(version: int) -> list[str]:
    import ifaddr  # noqa: PLC0415  comes with zeroconf

    found = []
    for adapter in ifaddr.get_adapters():
        for one in adapter.ips:
            text = one.ip if isinstance(one.ip, str) else one.ip[0]
            address = ipaddress.ip_address(text)
            if address.version == version and not address.is_loopback and not address.is_link_local:
                found.append(text)
    return found
