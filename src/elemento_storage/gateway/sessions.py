"""Who has logged in: one user for each account of this machine, until it logs out or the time is over.

The vendor's clients remember for themselves that they logged in, and not to which run of the gateway; so it is kept on
disk, and holds over restarts. The file has names and times, and no secret.
"""

import logging
import os
import time
from collections.abc import Callable

import msgspec

from elemento_storage.durable import replace
from elemento_storage.errors import ConfigurationError

log = logging.getLogger(__name__)


class Session(msgspec.Struct, frozen=True, kw_only=True):
    """``since``: seconds since 1970."""

    username: str
    since: float


class Sessions:
    """``sessions.json`` in the state directory. Changing them blocks."""

    def __init__(self, state_dir: str, lasts_s: float, clock: Callable[[], float] = time.time) -> None:
        self._path = f"{state_dir}/sessions.json"
        self._lasts_s = lasts_s
        self._clock = clock
        self._by_account: dict[int, Session] = {}

    def open(self) -> None:
        """Read what an earlier run has left. Raises ConfigurationError."""
        try:
            os.makedirs(os.path.dirname(self._path), mode=0o700, exist_ok=True)
            with open(self._path, "rb") as file:
                self._by_account = msgspec.json.decode(file.read(), type=dict[int, Session])
        except FileNotFoundError:
            pass
        except OSError as error:
            raise ConfigurationError(
                f"{self._path} cannot be used: {error.strerror}; give another state-dir in the configuration"
            ) from error
        except msgspec.DecodeError as error:
            log.warning("%s is damaged, everybody has to log in again: %s", self._path, error)

    def username(self, account: int) -> str | None:
        """The user that the account logged in as, if it still counts."""
        session = self._by_account.get(account)
        if session is None or not 0 <= self._clock() - session.since < self._lasts_s:
            return None
        return session.username

    def begin(self, account: int, username: str) -> None:
        """The account is this user from now on. On disk when it returns. Raises OSError."""
        self._write({**self._by_account, account: Session(username=username, since=self._clock())})

    def end(self, account: int) -> None:
        """The account is nobody again. On disk when it returns. Raises OSError."""
        if account in self._by_account:
            self._write({one: session for one, session in self._by_account.items() if one != account})

    def _write(self, sessions: dict[int, Session]) -> None:
        replace(self._path, msgspec.json.encode({str(one): session for one, session in sessions.items()}), mode=0o600)
        self._by_account = sessions
