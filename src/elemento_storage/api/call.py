"""What a call is: a path, a request type, an answer type and a function. Routes and OpenAPI are made from these."""

from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any, Final, Generic, TypeVar

import msgspec

from elemento_storage.api.auth import Caller
from elemento_storage.api.listed import ListedVolumes
from elemento_storage.errors import InvalidValue, StorageError
from elemento_storage.progress import Progress
from elemento_storage.service.access import Actor
from elemento_storage.service.services import Services

R = TypeVar("R", bound=msgspec.Struct)

_KEY_LONGEST: Final = 255


class Kind(Enum):
    """How a call is carried out."""

    READ = auto()  #: given up after the disk time-out
    CHANGE = auto()  #: goes on when the caller has gone, or has waited for the disk time-out
    LONG = auto()  #: a job; the caller waits for its end or asks for 202


@dataclass
class Context:
    """What a handler has besides the request."""

    services: Services
    caller: Caller
    headers: Mapping[str, str]
    progress: Progress
    listed: ListedVolumes
    ignored: list[str] = field(default_factory=list)  #: keys that mean nothing here
    fill: Mapping[str, str] = field(default_factory=dict)  #: values of absent keys that name the client
    seed: str | None = None  #: of the Idempotency-Key, if one was sent

    def actor(self, named: str | None) -> Actor:
        """On whose behalf the call runs."""
        return self.caller.actor(named)


@dataclass(frozen=True)
class Reply:
    """An answer with headers of its own."""

    answer: object
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Call(Generic[R]):
    """One call of the API."""

    path: str
    request: type[R]
    answer: Any
    handle: Callable[[Context, R], Coroutine[Any, Any, object]]
    kind: Kind
    errors: tuple[type[StorageError], ...] = ()
    aliases: tuple[str, ...] = ()
    creates: bool = False  #: takes an Idempotency-Key; an admin's own client is filled in as the creator
    admin_only: bool = False
    is_slow: Callable[[R], bool] = lambda _: True  #: of LONG calls: whether this one is worth a job
    needs_body: bool = False  #: a list of values does not fit into a query

    @property
    def answers_get(self) -> bool:
        """Calls that only read answer GET with query parameters too (contract, section 5)."""
        return self.kind is Kind.READ and not self.needs_body

    @property
    def doc(self) -> str:
        """The handler's docstring documents the call."""
        return self.handle.__doc__ or ""


def idempotency_key(headers: Mapping[str, str]) -> str | None:
    """The Idempotency-Key of a request, if it has one. Raises InvalidValue."""
    key = headers.get("idempotency-key")
    if key is not None and not 0 < len(key) <= _KEY_LONGEST:
        raise InvalidValue(f"the header Idempotency-Key has to have 1 to {_KEY_LONGEST} characters")
    return key


def idempotency_scope(caller: Caller, creator_id: str, path: str) -> str:
    """Whose key it is, and for which call."""
    return f"{caller.client or creator_id}:{path}"
