"""What the library does, as data: steps that a transport carries out, plans that are made of them.

A *plan* is a generator that yields steps and is sent what came of each; errors of a step are thrown into it. It knows
nothing of sockets, threads or event loops, so one plan serves both clients: ``blocking.py`` drives it with a loop,
``awaiting.py`` with the same loop and ``await``. Methods of the groups (``volumes``, ``jobs`` …) return plans; the
descriptors ``operation``, ``long_operation`` and ``iteration`` turn each into a method of its client's kind, typed:

    client.volumes.get(vid)          -> Volume
    await client.volumes.get(vid)    -> Volume, of an AsyncClient
"""

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Coroutine, Generator, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TYPE_CHECKING, Any, Concatenate, Generic, ParamSpec, Protocol, TypeVar, overload

if TYPE_CHECKING:
    from typing import Self

    from elemento_storage.client.types import Job, OnProgress

P = ParamSpec("P")
T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
J_co = TypeVar("J_co", covariant=True)


class Repeat(Enum):
    """What may be done when nobody knows whether a request arrived."""

    SAFE = auto()  #: repeat it: it changes nothing, or changes the same once only
    NEVER = auto()  #: say so


Parts = Callable[[], Iterator[bytes]]  #: a body in parts, from its beginning whenever it is called


@dataclass(frozen=True, slots=True)
class Request:
    """One HTTP request. ``path`` is below ``/api/v1.0/``."""

    method: str
    path: str
    body: bytes | Parts = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    query: Mapping[str, str] | None = None
    repeat: Repeat = Repeat.NEVER


@dataclass(frozen=True, slots=True)
class Response:
    """One answer, whole."""

    status: int
    headers: Mapping[str, str]  #: in any case
    body: bytes


class Stream(Protocol):
    """An answer that is still coming."""

    @property
    def status(self) -> int:
        """The HTTP status."""

    @property
    def headers(self) -> Mapping[str, str]:
        """In any case."""


@dataclass(frozen=True, slots=True)
class Send:
    """Step: send a request; the Response. Raises Unreachable, ConnectionBroken."""

    request: Request


@dataclass(frozen=True, slots=True)
class Open:
    """Step: send a request; a Stream. Whatever is left open when the plan ends is closed. Raises as Send.

    ``chunk``: how many bytes Read gives at a time; None: whatever has come.
    """

    request: Request
    chunk: int | None = None


@dataclass(frozen=True, slots=True)
class Read:
    """Step: the next bytes of a stream, none at its end. Raises ConnectionBroken."""

    stream: Any


@dataclass(frozen=True, slots=True)
class Close:
    """Step: end a stream."""

    stream: Any


@dataclass(frozen=True, slots=True)
class Sleep:
    """Step: let time pass."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Work:
    """Step: call a function that may wait for a disk; what it returns. Not on an event loop's own thread."""

    function: Callable[[], Any]


@dataclass(frozen=True, slots=True)
class Emit:
    """Step of an iteration: one more item."""

    item: Any


Step = Send | Open | Read | Close | Sleep | Work | Emit
Plan = Generator[Step, Any, T]


@dataclass(frozen=True, slots=True)
class Items(Generic[T_co]):
    """A plan that emits items of one type."""

    plan: Plan[None]


@dataclass(frozen=True, slots=True)
class Long(Generic[T_co]):
    """A call that can become a job. ``keyed``: its Idempotency-Key, "" for a new one; None: it takes none.

    ``is_short``: it is over in a moment, so its answer is waited for and not its job's.
    """

    path: str
    body: Mapping[str, Any]
    answer: Any
    keyed: str | None = None
    on_progress: "OnProgress | None" = None
    method: str = "POST"
    is_short: bool = False


class Blocking(Protocol):
    """The kind of client whose methods return when they are done."""

    def run(self, plan: Plan[T]) -> T:
        """Carry a plan out."""

    def items(self, plan: Plan[None]) -> Iterator[Any]:
        """Carry a plan out that emits items."""


class Awaiting(Protocol):
    """The kind of client whose methods are awaited."""

    def run(self, plan: Plan[T]) -> Coroutine[Any, Any, T]:
        """Carry a plan out."""

    def items(self, plan: Plan[None]) -> AsyncIterator[Any]:
        """Carry a plan out that emits items."""


M = TypeVar("M", bound=Blocking | Awaiting)


class Bound(ABC, Generic[M]):
    """What methods are on: a client, and how it sends long calls."""

    runner: Any  #: M; which it is shows in the types of the methods

    @abstractmethod
    def carry_out(self, call: Long[T]) -> Plan[T]:
        """Send a long call and wait for its end."""

    @abstractmethod
    def begin(self, call: Long[Any]) -> "Plan[Job]":
        """Send a long call and leave it at that."""


class operation(Generic[P, T]):  # noqa: N801  a decorator
    """A method that returns a plan becomes one that carries it out."""

    def __init__(self, plan: Callable[Concatenate[Any, P], Plan[T]]) -> None:
        self.plan = plan
        self.__doc__ = plan.__doc__
        self.__wrapped__ = plan

    @overload
    def __get__(self, instance: None, owner: object = None) -> "Self": ...
    @overload
    def __get__(self, instance: Bound[Blocking], owner: object = None) -> Callable[P, T]: ...
    @overload
    def __get__(self, instance: Bound[Awaiting], owner: object = None) -> Callable[P, Coroutine[Any, Any, T]]: ...
    def __get__(self, instance: Bound[Any] | None, owner: object = None) -> Any:
        if instance is None:
            return self

        def bound(*args: P.args, **kwargs: P.kwargs) -> Any:
            return instance.runner.run(self.plan(instance, *args, **kwargs))

        bound.__doc__ = self.__doc__
        return bound


class iteration(Generic[P, T]):  # noqa: N801  a decorator
    """A method that returns Items becomes an iterator, or an asynchronous one."""

    def __init__(self, items: Callable[Concatenate[Any, P], Items[T]]) -> None:
        self.made = items
        self.__doc__ = items.__doc__
        self.__wrapped__ = items

    @overload
    def __get__(self, instance: None, owner: object = None) -> "Self": ...
    @overload
    def __get__(self, instance: Bound[Blocking], owner: object = None) -> Callable[P, Iterator[T]]: ...
    @overload
    def __get__(self, instance: Bound[Awaiting], owner: object = None) -> Callable[P, AsyncIterator[T]]: ...
    def __get__(self, instance: Bound[Any] | None, owner: object = None) -> Any:
        if instance is None:
            return self

        def bound(*args: P.args, **kwargs: P.kwargs) -> Any:
            return instance.runner.items(self.made(instance, *args, **kwargs).plan)

        bound.__doc__ = self.__doc__
        return bound


class LongMethod(Generic[P, T_co, J_co]):
    """A method that can take long: call it to wait for its end, or ``start`` it for its job."""

    def __init__(self, instance: Bound[Any], described: Callable[Concatenate[Any, P], Long[Any]]) -> None:
        self._instance = instance
        self._described = described
        self.__doc__ = described.__doc__

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> T_co:
        """Send the call and wait for its end."""
        plan = self._instance.carry_out(self._described(self._instance, *args, **kwargs))
        return self._instance.runner.run(plan)  # type: ignore[no-any-return]

    def start(self, *args: P.args, **kwargs: P.kwargs) -> J_co:
        """Send the call and return its job, which goes on by itself; it has ended already if there was little to do."""
        plan = self._instance.begin(self._described(self._instance, *args, **kwargs))
        return self._instance.runner.run(plan)  # type: ignore[no-any-return]


class long_operation(Generic[P, T]):  # noqa: N801  a decorator
    """A method that describes a long call becomes a LongMethod."""

    def __init__(self, described: Callable[Concatenate[Any, P], Long[T]]) -> None:
        self.described = described
        self.__doc__ = described.__doc__
        self.__wrapped__ = described

    @overload
    def __get__(self, instance: None, owner: object = None) -> "Self": ...
    @overload
    def __get__(self, instance: Bound[Blocking], owner: object = None) -> "LongMethod[P, T, Job]": ...
    @overload
    def __get__(
        self, instance: Bound[Awaiting], owner: object = None
    ) -> "LongMethod[P, Coroutine[Any, Any, T], Coroutine[Any, Any, Job]]": ...
    def __get__(self, instance: Bound[Any] | None, owner: object = None) -> Any:
        return self if instance is None else LongMethod(instance, self.described)
