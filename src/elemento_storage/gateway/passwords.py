"""Passwords of the gateway's users: only scrypt hashes are kept (RFC 7914).

Unlike a token a password may be guessed, so a guess has to cost: 16 MiB and some 50 ms each.
"""

import base64
import binascii
import hashlib
import hmac
import secrets
from typing import Final

_COST, _BLOCK, _LANES = 2**14, 8, 1
_MOST_COST: Final = 2**17
_SALT_BYTES, _HASH_BYTES = 16, 32
_MEMORY_BYTES: Final = 256 * 1024 * 1024  #: a hash from a file cannot make us take more
_SCHEME: Final = "scrypt"


def hash_password(password: str) -> str:
    """What the configuration keeps: ``scrypt$cost$block$lanes$salt$hash``."""
    salt = secrets.token_bytes(_SALT_BYTES)
    made = _scrypt(password, salt, _COST, _BLOCK, _LANES)
    return "$".join([_SCHEME, str(_COST), str(_BLOCK), str(_LANES), _text(salt), _text(made)])


def is_hash(text: str) -> bool:
    """Whether it is of the form that ``hash_password`` gives, with costs that can be paid."""
    return _parse(text) is not None


def verify(password: str, kept: str | None) -> bool:
    """Whether it is this password. Takes as long where there is none, so that nobody learns which users there are."""
    parsed = _parse(kept) if kept is not None else None
    if parsed is None:
        _scrypt(password, b"0" * _SALT_BYTES, _COST, _BLOCK, _LANES)
        return False
    cost, block, lanes, salt, wanted = parsed
    return hmac.compare_digest(_scrypt(password, salt, cost, block, lanes), wanted)


def _scrypt(password: str, salt: bytes, cost: int, block: int, lanes: int) -> bytes:
    return hashlib.scrypt(
        password.encode("utf-8", "surrogatepass"),
        salt=salt,
        n=cost,
        r=block,
        p=lanes,
        maxmem=_MEMORY_BYTES,
        dklen=_HASH_BYTES,
    )


def _parse(text: str) -> tuple[int, int, int, bytes, bytes] | None:
    parts = text.split("$")
    if len(parts) != 6 or parts[0] != _SCHEME:
        return None
    try:
        cost, block, lanes = (int(part) for part in parts[1:4])
        salt, made = (base64.b64decode(part, validate=True) for part in parts[4:])
    except (ValueError, binascii.Error):
        return None
    payable = 2 <= cost <= _MOST_COST and cost & (cost - 1) == 0 and 1 <= block <= 8 and 1 <= lanes <= 4
    return (cost, block, lanes, salt, made) if payable and salt and len(made) == _HASH_BYTES else None


def _text(value: bytes) -> str:
    return base64.b64encode(value).decode()
