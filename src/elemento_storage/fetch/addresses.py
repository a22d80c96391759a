"""Which addresses a download may connect to.

Refused unless a setting allows them: this server's own, loopback, link-local, multicast and what is no address of a
host. The name is resolved here and the connection goes to the very address that was checked; a name that resolves
differently a moment later (DNS rebinding) changes nothing.
"""

import ipaddress
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from elemento_storage.errors import DownloadFailed, UrlRefused

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

_NAT64: Final = (ipaddress.IPv6Network("64:ff9b::/96"), ipaddress.IPv6Network("64:ff9b:1::/48"))
_CLOUD_METADATA: Final = ipaddress.IPv6Address("fd00:ec2::254")  # the one that is not link-local
_MOST_ADDRESSES: Final = 4


class TryAgain(Exception):
    """It did not work this time; another try may. The text says why."""


@dataclass(frozen=True)
class Target:
    """One address to connect to, checked."""

    family: int
    address: tuple[object, ...]  #: as socket.connect takes it


@dataclass(frozen=True)
class AddressRules:
    """The settings ``download-allow`` and ``download-deny``."""

    allowed: tuple[Network, ...] = ()
    denied: tuple[Network, ...] = ()

    def permits(self, text: str) -> bool:
        """Whether an address may be connected to."""
        address = ipaddress.ip_address(text.partition("%")[0])
        every = [address, *_inner(address)]
        if any(one in network for one in every for network in self.denied):
            return False
        return all(any(one in network for network in self.allowed) or _is_harmless(one) for one in every)


def resolve(host: str, port: int, rules: AddressRules) -> Sequence[Target]:
    """Where to connect to for a host. Blocks. Raises UrlRefused, DownloadFailed (no such host), TryAgain."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_ADDRCONFIG)
    except socket.gaierror as error:
        if error.errno == socket.EAI_NONAME:
            raise DownloadFailed(f"there is no host {host!r}") from error
        raise TryAgain(f"the host {host!r} cannot be resolved now") from error
    except (UnicodeError, ValueError) as error:
        raise UrlRefused(f"{host[:80]!r} is no name of a host", key="url") from error
    permitted = [Target(family, address) for family, _, _, _, address in found if rules.permits(str(address[0]))]
    if not permitted:
        raise UrlRefused(
            f"{host!r} is an address that this server does not fetch from: its own, a link-local or another special "
            "one, or one that the setting download-deny names; download-allow makes exceptions",
            key="url",
        )
    return permitted[:_MOST_ADDRESSES]


def _inner(address: Address) -> list[Address]:
    """IPv4 addresses that an IPv6 address leads to."""
    if isinstance(address, ipaddress.IPv4Address):
        return []
    inner: list[Address] = [one for one in (address.ipv4_mapped, address.sixtofour) if one is not None]
    if address.teredo is not None:
        inner += address.teredo
    if any(address in network for network in _NAT64) or 0xFFFF < int(address) <= 0xFFFFFFFF:  # ::a.b.c.d
        inner.append(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
    return inner


def _is_harmless(address: Address) -> bool:
    special = (
        address.is_loopback
        or address.is_link_local
        or address.is_multicast
        or address.is_unspecified
        or address.is_reserved
        or address == _CLOUD_METADATA
        or (isinstance(address, ipaddress.IPv4Address) and int(address) >> 24 == 0)
        or (isinstance(address, ipaddress.IPv6Address) and address.is_site_local)
    )
    if isinstance(address, ipaddress.IPv6Address) and (address.ipv4_mapped or any(address in one for one in _NAT64)):
        return True  # IPv6 counts these among what is reserved; what is inside decides
    return not special and not _is_our_own(address)


def _is_our_own(address: Address) -> bool:
    """Whether the kernel would reach it without leaving this machine: it then comes from the same address."""
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    with socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as probe:
        try:
            probe.connect((str(address), 9))  # of a datagram socket: asks for the route, sends nothing
        except OSError:
            return False  # there is no way there at all
        return ipaddress.ip_address(probe.getsockname()[0].partition("%")[0]) == address
