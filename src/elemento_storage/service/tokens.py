"""Tokens: who may call when the network is not trusted. Only salted hashes are kept.

A token is ``est_<id>_<secret>`` with 256 random bits of secret, so a fast hash is enough: there is nothing to guess.
"""

import base64
import contextlib
import fcntl
import hashlib
import hmac
import os
import secrets
from collections.abc import Iterator
from enum import StrEnum

import msgspec

from elemento_storage.durable import replace
from elemento_storage.errors import ConfigurationError, NotFound
from elemento_storage.model import utc_now

_PREFIX = "est"


class Role(StrEnum):
    """``user``: one client's volumes. ``admin``: everything."""

    USER = "user"
    ADMIN = "admin"


class Token(msgspec.Struct, frozen=True, kw_only=True):
    """What is kept of a token."""

    token_id: str = msgspec.field(name="id")
    client: str
    role: Role
    note: str = ""
    created: str
    salt: str
    hash: str


class TokenStore:
    """``tokens.json`` in the state directory; read again whenever it changed, so that a revocation counts at once."""

    def __init__(self, state_dir: str) -> None:
        self._path = f"{state_dir}/tokens.json"
        self._identity: tuple[int, int, int] | None = None
        self._tokens: dict[str, Token] = {}

    def tokens(self) -> list[Token]:
        """All tokens, oldest first. Raises ConfigurationError when the file is damaged."""
        self._load()
        return list(self._tokens.values())

    def verify(self, text: str) -> Token | None:
        """The token if it is one of ours."""
        prefix, _, rest = text.partition("_")
        token_id, _, secret = rest.partition("_")
        if prefix != _PREFIX:
            return None
        self._load()
        token = self._tokens.get(token_id)
        if token is None or not hmac.compare_digest(token.hash, _hash(token.salt, secret)):
            return None
        return token

    def create(self, client: str, role: Role, note: str) -> tuple[Token, str]:
        """A new token and its text, which is shown this once only."""
        secret = base64.urlsafe_b64encode(secrets.token_bytes(32)).decode().rstrip("=")
        salt = secrets.token_hex(16)
        token = Token(
            token_id=secrets.token_hex(6),
            client=client,
            role=role,
            note=note,
            created=utc_now(),
            salt=salt,
            hash=_hash(salt, secret),
        )
        with self._changing():
            self._tokens[token.token_id] = token
        return token, f"{_PREFIX}_{token.token_id}_{secret}"

    def revoke(self, token_id: str) -> Token:
        """Forget a token. Raises NotFound."""
        with self._changing():
            token = self._tokens.pop(token_id, None)
            if token is None:
                raise NotFound(f"no token {token_id}; `elemento-storage token list` shows them")
        return token

    @contextlib.contextmanager
    def _changing(self) -> Iterator[None]:
        """Read, change and write with nobody else in between: a lost revocation would be a way in."""
        directory = os.path.dirname(self._path)
        os.makedirs(directory, mode=0o700, exist_ok=True)
        with open(f"{self._path}.lock", "w", encoding="ascii") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self._load()
            yield
            replace(self._path, msgspec.json.encode(list(self._tokens.values())), mode=0o600)

    def _load(self) -> None:
        try:
            status = os.stat(self._path)
            identity = (status.st_ino, status.st_mtime_ns, status.st_size)
            if identity == self._identity:
                return
            with open(self._path, "rb") as file:
                tokens = msgspec.json.decode(file.read(), type=list[Token])
        except FileNotFoundError:
            self._identity, self._tokens = None, {}
            return
        except (msgspec.DecodeError, OSError) as error:
            raise ConfigurationError(f"{self._path} cannot be read: {error}") from error
        self._identity = identity
        self._tokens = {token.token_id: token for token in tokens}


def _hash(salt: str, secret: str) -> str:
    return hashlib.blake2b(secret.encode(), key=bytes.fromhex(salt), digest_size=32).hexdigest()
