"""Listing volumes: filters, order, pages."""

import base64
import binascii
import fnmatch
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from operator import attrgetter

import msgspec

from elemento_storage.errors import InvalidValue
from elemento_storage.model import IsoInfo, Volume, VolumeFormat
from elemento_storage.service.access import Actor
from elemento_storage.service.core import Core

_LONGEST_PATTERN = 256

SortKey = Callable[[Volume], str | int]

SORT_KEYS: dict[str, SortKey] = {
    "volumeID": attrgetter("volume_id"),
    "name": attrgetter("meta.name"),
    "size": attrgetter("size_bytes"),
    "sizeOnDisk": attrgetter("allocated_bytes"),
    "lastUpdated": attrgetter("modified_ns"),
}


@dataclass(frozen=True, kw_only=True)
class Query:
    """What to list. ``name`` is a name or a pattern with ``*`` and ``?``; ``sort`` a key, descending with ``-``."""

    include_locked: bool = False
    name: str | None = None
    format: VolumeFormat | None = None
    iso: IsoInfo | None = None  #: what isoinfo.json has to say, where it is not None
    sort: str = "volumeID"
    limit: int | None = None
    cursor: str | None = None


@dataclass(frozen=True)
class Page:
    """Volumes, how many there are in all, and where to go on."""

    volumes: list[Volume]
    total: int
    next_cursor: str | None


class _Position(msgspec.Struct, array_like=True):
    sort: str
    value: str | int
    volume_id: str


async def list_volumes(core: Core, actor: Actor, query: Query) -> Page:
    """The volumes the actor may see. Raises InvalidValue for a sort key or cursor that is not ours."""
    key_name = query.sort.removeprefix("-")
    sort_key = SORT_KEYS.get(key_name)
    if sort_key is None:
        raise InvalidValue(f"'sort' is {query.sort!r}, it has to be one of {', '.join(SORT_KEYS)}", key="sort")
    after = _decode_cursor(query)
    await core.catalog.locations.refresh()
    found = list(_matching(core.catalog.locations.volumes(), actor, query))
    total = len(found)
    descending = query.sort.startswith("-")

    def order(volume: Volume) -> tuple[str | int, str]:
        return sort_key(volume), volume.volume_id

    found.sort(key=order, reverse=descending)
    if after is not None:
        position = (after.value, after.volume_id)
        found = [volume for volume in found if (order(volume) < position if descending else order(volume) > position)]
    next_cursor = None
    if query.limit is not None and len(found) > query.limit:
        found = found[: query.limit]
        value, volume_id = order(found[-1])
        encoded = msgspec.json.encode(_Position(query.sort, value, volume_id))
        next_cursor = base64.urlsafe_b64encode(encoded).decode().rstrip("=")
    return Page(found, total, next_cursor)


def _matching(volumes: Iterable[Volume], actor: Actor, query: Query) -> Iterable[Volume]:
    client = actor.client
    # A longer text is a whole name: compiling a pattern of any length would stop everybody else.
    is_pattern = query.name is not None and len(query.name) <= _LONGEST_PATTERN
    matches = fnmatch.fnmatchcase
    facts = msgspec.structs.asdict(query.iso).items() if query.iso is not None else ()
    iso = [(name, value) for name, value in facts if value is not None]
    for volume in volumes:
        meta = volume.meta
        if meta.private and client is not None and meta.creator_id != client:
            continue
        if volume.hidden and not query.include_locked:
            continue
        if query.format is not None and meta.format is not query.format:
            continue
        if query.name is not None and meta.name != query.name and not (is_pattern and matches(meta.name, query.name)):
            continue
        if iso and not _says(volume, iso):
            continue
        yield volume


def _says(volume: Volume, facts: list[tuple[str, str]]) -> bool:
    return volume.iso is not None and all(getattr(volume.iso, name) == value for name, value in facts)


def _decode_cursor(query: Query) -> _Position | None:
    if query.cursor is None:
        return None
    try:
        padded = query.cursor + "=" * (-len(query.cursor) % 4)
        position = msgspec.json.decode(base64.b64decode(padded, altchars=b"-_", validate=True), type=_Position)
    except (msgspec.DecodeError, binascii.Error, ValueError, RecursionError):
        raise InvalidValue("'cursor' is not one this server gave out", key="cursor") from None
    kind = str if query.sort.removeprefix("-") in {"volumeID", "name"} else int
    if position.sort != query.sort or not isinstance(position.value, kind):
        raise InvalidValue("'cursor' belongs to another 'sort': start again without it", key="cursor")
    return position
