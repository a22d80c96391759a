"""The password hash of NTLM: MD4 (RFC 1320) of the password in UTF-16.

OpenSSL 3 keeps MD4 in a provider that Debian does not load, so hashlib has none. SMB has no other hash; that it is a
weak one matters little for passwords of 95 random bits that are used for nothing else.
"""

import struct
from typing import Final

_MASK: Final = 0xFFFFFFFF
_START: Final = (0x67452301, 0xEFCDAB89, 0x98BADCFE, 0x10325476)
# What is added, by how much is rotated, and in which order the words are taken, in each of the three rounds.
_ROUNDS: Final = (
    (0x00000000, (3, 7, 11, 19), (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)),
    (0x5A827999, (3, 5, 9, 13), (0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15)),
    (0x6ED9EBA1, (3, 9, 11, 15), (0, 8, 4, 12, 2, 10, 6, 14, 1, 9, 5, 13, 3, 11, 7, 15)),
)


def nt_hash(password: str) -> str:
    """32 upper-case hex digits, as smbpasswd(5) writes them."""
    return md4(password.encode("utf-16-le")).hex().upper()


def md4(message: bytes) -> bytes:
    """The digest of a message."""
    padded = message + b"\x80" + b"\0" * ((55 - len(message)) % 64) + struct.pack("<Q", len(message) * 8)
    state = _START
    for offset in range(0, len(padded), 64):
        added = _compress(state, struct.unpack_from("<16I", padded, offset))
        state = tuple((one + other) & _MASK for one, other in zip(state, added, strict=True))  # type: ignore[assignment]
    return struct.pack("<4I", *state)


def _compress(state: tuple[int, int, int, int], words: tuple[int, ...]) -> tuple[int, int, int, int]:
    a, b, c, d = state
    for number, (constant, shifts, order) in enumerate(_ROUNDS):
        for step, index in enumerate(order):
            mixed = ((b & c) | (~b & d), (b & c) | (b & d) | (c & d), b ^ c ^ d)[number]
            total = (a + mixed + words[index] + constant) & _MASK
            shift = shifts[step % 4]
            a, b, c, d = d, (total << shift | total >> (32 - shift)) & _MASK, b, c
    return a, b, c, d
