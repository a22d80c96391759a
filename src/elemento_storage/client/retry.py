"""Repeating what failed, where that is safe (docs/client.md, *What is repeated*)."""

import random
from dataclasses import dataclass
from typing import Final

from elemento_storage.client.errors import (
    ApiError,
    ClientError,
    ConnectionBroken,
    OutcomeUnknown,
    Unreachable,
    error_of_answer,
)
from elemento_storage.client.exchange import Plan, Repeat, Request, Response, Send, Sleep

#: Nothing was carried out, whatever the call: the server or a proxy turned it away at the door.
_TURNED_AWAY: Final = frozenset({429})
#: Of a call that may be repeated: it may go well the next time.
_PASSING: Final = frozenset({429, 503, 504})


@dataclass(frozen=True, kw_only=True)
class Retries:
    """How patiently a call is repeated: ``attempts`` in all, with pauses that double from ``first_pause_s``.

    A server's Retry-After counts instead of a pause, up to ``longest_pause_s``. ``while_locked_s``: how long a call
    that found the volume locked (423) is repeated; a call that was refused has changed nothing.
    """

    attempts: int = 5
    first_pause_s: float = 0.2
    longest_pause_s: float = 10.0
    while_locked_s: float = 0.0

    def pause_s(self, attempt: int, retry_after_s: float | None) -> float | None:
        """How long to wait after the first, second … attempt; None: it is too long to wait."""
        if retry_after_s is not None:
            return retry_after_s if retry_after_s <= self.longest_pause_s else None
        longest = min(self.first_pause_s * 2 ** (attempt - 1), self.longest_pause_s)
        # Not all at the same moment, and not at once.
        return float(longest * random.uniform(0.5, 1.0))  # noqa: S311  no secret


def exchange(request: Request, retries: Retries) -> Plan[Response]:
    """Send a request, as often as it takes and is safe; its good answer.

    Raises Unreachable, ConnectionBroken, OutcomeUnknown, ApiError, BadAnswer.
    """
    attempt, locked_s = 0, 0.0
    while True:
        attempt += 1
        retry_after_s = None
        problem: ClientError
        try:
            response: Response = yield Send(request)
        except Unreachable as error:
            problem = error
        except ConnectionBroken as error:
            if request.repeat is Repeat.NEVER:
                raise unknown(request, error) from error
            problem = error
        else:
            if response.status < 400:
                return response
            refused = error_of_answer(response.status, response.body, response.headers.get("x-request-id", ""))
            retry_after_s = seconds_of(response.headers.get("retry-after"))
            if response.status == 423 and locked_s < retries.while_locked_s:
                pause_s = min(retry_after_s or retries.first_pause_s, retries.while_locked_s - locked_s)
                yield Sleep(pause_s)
                locked_s += pause_s
                attempt -= 1
                continue
            if not _may_pass(request, refused):
                raise refused
            problem = refused
        pause = retries.pause_s(attempt, retry_after_s)
        if attempt >= retries.attempts or pause is None:
            raise problem
        yield Sleep(pause)


def unknown(request: Request, error: ClientError) -> OutcomeUnknown:
    """The error of a change whose answer did not come."""
    return OutcomeUnknown(
        f"{error.message}; {request.path} may have been carried out, or not: look at the volume before you try again"
    )


def seconds_of(header: str | None) -> float | None:
    """Retry-After in seconds; a date counts as none."""
    return float(header) if header and header.isascii() and header.isdigit() and len(header) < 10 else None


def _may_pass(request: Request, error: ClientError) -> bool:
    if not isinstance(error, ApiError):
        return False
    return error.status in (_PASSING if request.repeat is Repeat.SAFE else _TURNED_AWAY)
