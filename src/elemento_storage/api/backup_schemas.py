"""Requests and answers of the calls about backups."""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct, field

from elemento_storage.api.decode import Uid
from elemento_storage.api.schemas import Name, Request

_MODE = Literal["auto", "full", "incremental"]
Lease = Annotated[float, Meta(ge=1, le=604_800, description="seconds, from 1 to 604800")]
Kept = Annotated[int, Meta(ge=1, le=10_000, description="a whole number from 1 to 10000")]
Days = Annotated[float, Meta(gt=0, le=36_500, description="a number of days greater than 0")]
Period = Annotated[
    str,
    Meta(pattern=r"^(off|[1-9][0-9]{0,4}[mhdw])$", description="off, or a number and m, h, d or w, such as 24h"),
]
TimeOfDay = Annotated[
    str, Meta(pattern=r"^([01][0-9]|2[0-3]):[0-5][0-9]$", description="a time of day in UTC, such as 02:30")
]


class BackupRequest(Request):
    """``backups/create``: a backup of a volume as it is now."""

    vid: Uid
    creator_id: Uid = field(name="creatorID")
    mode: _MODE = "auto"
    name: Name = ""


class BackupsRequest(Request):
    """``backups``: the client's, of one volume or of all."""

    client_uid: Uid | None = None
    vid: Uid | None = None


class OneBackupRequest(Request):
    """``backups/delete`` and ``backups/verify``: one backup."""

    backup: Uid
    creator_id: Uid = field(name="creatorID")


class RestoreBackupRequest(Request):
    """``backups/restore``: as a new volume, or over the content of ``vid``."""

    backup: Uid
    creator_id: Uid = field(name="creatorID")
    vid: Uid | None = None
    name: Name | None = None


class OpenBackupRequest(Request):
    """``backups/open``: this moment of a volume, for another backup program."""

    vid: Uid
    creator_id: Uid = field(name="creatorID")
    since: Uid | None = None
    lease: Lease = 3600.0


class RenewBackupRequest(Request):
    """``backups/renew``: a session that lasts longer."""

    session: Uid
    creator_id: Uid = field(name="creatorID")
    lease: Lease = 3600.0


class CloseBackupRequest(Request):
    """``backups/close``: the end of a session; ``saved`` when the program has everything."""

    session: Uid
    creator_id: Uid = field(name="creatorID")
    saved: bool = False


class SessionsRequest(Request):
    """``backups/sessions`` and ``backups/schedules``: the client's."""

    client_uid: Uid | None = None


class ScheduleRequest(Request):
    """``backups/schedule``: when a volume is backed up, and how long that is kept."""

    vid: Uid
    creator_id: Uid = field(name="creatorID")
    every: Period
    at: TimeOfDay | None = None
    keep: Kept | None = None
    keep_days: Days | None = None
    full_every: Kept | None = None


class BackupAnswer(Struct, kw_only=True):
    """A backup."""

    backup: str
    vid: str
    creator_id: str = msgspec.field(name="creatorID")
    name: str
    created: str
    mode: str
    reason: str | None
    parent: str | None
    size: int
    size_on_disk: int = msgspec.field(name="sizeOnDisk")
    format: str
    location: str
    scheduled: bool
    sha256: str
    damaged: str | None


class DeletedBackupAnswer(Struct, kw_only=True):
    """A backup that is gone."""

    backup: str


class SessionAnswer(Struct, kw_only=True):
    """A session of another backup program."""

    session: str
    vid: str
    uri: str
    size: int
    since: str | None
    context: str | None
    tracked: bool
    reason: str | None
    ends: str


class ScheduleAnswer(Struct, kw_only=True):
    """A schedule, and how it gets on."""

    vid: str
    every: str
    at: str | None = None
    keep: int | None = None
    keep_days: float | None = None
    full_every: int | None = None
    last: str | None = None
    next: str | None = None
    running: bool = False
    failures: int = 0
    reason: str | None = None
