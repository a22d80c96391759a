"""Which account of this machine is at the other end of a loopback connection.

The vendor's clients send no credentials after the login, so the gateway has to know by other means that a request is
from who logged in, and not from somebody else on the same machine. The kernel tells: each row of /proc/net/tcp has the
account that owns the socket. Rows of sockets that no process has open any more (the client hung up) say 0 there, which
would be root; their inode is 0 too, and such a row is no answer.
"""

import ipaddress
import sys
from collections.abc import Sequence
from typing import Final

from elemento_storage.errors import Forbidden

_TABLES: Final = ("/proc/net/tcp", "/proc/net/tcp6")

Address = tuple[str, int]


def account_of(client: Address, server: Address, tables: Sequence[str] = _TABLES) -> int:
    """The numeric id of the account that has the client's end open. Blocks for a read of /proc. Raises Forbidden."""
    wanted = {f"{mine} {other}" for mine, other in zip(_forms(client), _forms(server), strict=True)}
    for table in tables:
        try:
            with open(table, encoding="ascii") as rows:
                next(rows, None)
                for row in rows:
                    fields = row.split()
                    if f"{fields[1]} {fields[2]}" in wanted and fields[9] != "0":
                        return int(fields[7])
        except OSError as error:
            raise Forbidden(f"this system does not tell who is calling: {table}: {error.strerror}") from None
    raise Forbidden("the connection is not of a process on this machine that has it open still")


def account_name(account: int) -> str:
    """The account's name, or its number where it has none."""
    import pwd  # noqa: PLC0415  not there on every system that can import this module

    try:
        return pwd.getpwuid(account).pw_name
    except KeyError:
        return str(account)


def _forms(address: Address) -> tuple[str, ...]:
    """How the tables write it: as it is, and for IPv4 also as a socket of IPv6 has it."""
    host, port = ipaddress.ip_address(address[0]), address[1]
    if host.version == 6:
        return (f"{_words(host.packed)}:{port:04X}",) * 2
    mapped = ipaddress.IPv6Address(f"::ffff:{host}")
    return f"{_words(host.packed)}:{port:04X}", f"{_words(mapped.packed)}:{port:04X}"


def _words(packed: bytes) -> str:
    """Hex of the 32-bit words as this machine reads them."""
    words = (packed[at : at + 4] for at in range(0, len(packed), 4))
    return "".join(f"{int.from_bytes(word, sys.byteorder):08X}" for word in words)
