"""When a volume is backed up: ``backup-schedule.json`` in its directory, and the arithmetic of it. Files block."""

import contextlib
import os
import re
from typing import Final

import msgspec

from elemento_storage.catalog.volume_directory import SCHEDULE_FILE
from elemento_storage.durable import fsync_directory, replace

_LARGEST_BYTES: Final = 65536
_SECONDS: Final = {"m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_EVERY: Final = re.compile(r"([1-9][0-9]{0,4})([mhdw])", re.ASCII)
_AT: Final = re.compile(r"([01][0-9]|2[0-3]):([0-5][0-9])", re.ASCII)
SHORTEST_S: Final = 300
LONGEST_S: Final = 366 * 86400


class Schedule(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What the file says."""

    creator_id: str = msgspec.field(name="creatorID")  #: who made it; of another owner's volume it means nothing
    every: str  #: such as 24h
    at: str = ""  #: the time of day in UTC at which the periods begin, such as 02:30
    keep: int | None = None  #: how many of its backups
    keep_days: float | None = None
    full_every: int | None = None  #: of so many, one is a full one
    since: float  #: when it was made, seconds since the epoch

    @property
    def period_s(self) -> int:
        """The same as ``every``. Raises ValueError for what is none."""
        return parse_period(self.every)

    def slot(self, moment: float) -> int:
        """Which period a moment is in; one backup is due in each."""
        return int((moment - self._origin) // self.period_s)

    def begin_of(self, slot: int) -> float:
        """When a period begins."""
        return self._origin + slot * self.period_s

    @property
    def _origin(self) -> float:
        if not self.at:
            return self.since
        hours, minutes = self.at.split(":")
        return (self.since // 86400) * 86400 + int(hours) * 3600 + int(minutes) * 60


def parse_period(text: str) -> int:
    """Seconds of ``30m``, ``24h``, ``7d``, ``2w``. Raises ValueError."""
    match = _EVERY.fullmatch(text)
    if match is None:
        raise ValueError("not a number and m, h, d or w, such as 24h")
    period_s = int(match[1]) * _SECONDS[match[2]]
    if not SHORTEST_S <= period_s <= LONGEST_S:
        raise ValueError("less than 5 minutes or more than a year")
    return period_s


def is_time_of_day(text: str) -> bool:
    """Whether it is one, such as 02:30."""
    return _AT.fullmatch(text) is not None


def read_schedule(directory: str) -> Schedule | None:
    """A volume's schedule; None when it has none, or none that means anything. Raises OSError."""
    try:
        descriptor = os.open(f"{directory}/{SCHEDULE_FILE}", os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    try:
        schedule = msgspec.json.decode(os.read(descriptor, _LARGEST_BYTES), type=Schedule)
        parse_period(schedule.every)
    except (ValueError, RecursionError):  # of msgspec, too
        return None
    finally:
        os.close(descriptor)
    return schedule if not schedule.at or is_time_of_day(schedule.at) else None


def write_schedule(directory: str, schedule: Schedule) -> None:
    """Durable when it returns. Raises OSError."""
    replace(f"{directory}/{SCHEDULE_FILE}", msgspec.json.encode(schedule) + b"\n")


def remove_schedule(directory: str) -> None:
    """The volume has none any more. Idempotent. Raises OSError."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(f"{directory}/{SCHEDULE_FILE}")
    fsync_directory(directory)
