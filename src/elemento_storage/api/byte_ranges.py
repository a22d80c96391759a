"""Conditional requests and ranges (RFC 9110, sections 13 and 14), for answers whose bytes have an entity tag."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from starlette.datastructures import Headers

from elemento_storage.errors import PreconditionFailed, RangeNotSatisfiable

MOST_RANGES: Final = 64
_ENTITY_TAG: Final = re.compile(r'(?:W/)?"[\x21\x23-\x7e\x80-\xff]*"')
_RANGES: Final = re.compile(r"bytes[ \t]*=(.*)", re.IGNORECASE)
_UNIT: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+[ \t]*=")
_RANGE: Final = re.compile(r"(\d*)-(\d*)", re.ASCII)
_LONGEST_NUMBER: Final = 19
_WEAK: Final = "W/"


@dataclass(frozen=True)
class ByteRange:
    """Bytes from ``start`` up to, and without, ``stop``."""

    start: int
    stop: int

    def content_range(self, size_bytes: int) -> str:
        """As the header ``Content-Range`` has it."""
        return f"bytes {self.start}-{self.stop - 1}/{size_bytes}"


def entity_tag(tag: str, *, strong: bool) -> str:
    """The header ``ETag``."""
    return f'"{tag}"' if strong else f'{_WEAK}"{tag}"'


def is_known(headers: Headers, etag: str) -> bool:
    """Whether the caller of a GET or HEAD has these bytes (``If-None-Match``).

    Raises PreconditionFailed when it wants others only (``If-Match``).
    """
    wanted = headers.getlist("if-match")
    if wanted and not _matches(wanted, etag, weakly=False):
        raise PreconditionFailed("the bytes are not those that If-Match names: begin again", etag=etag)
    known = headers.getlist("if-none-match")
    return bool(known) and _matches(known, etag, weakly=True)


def asked_ranges(headers: Headers, etag: str, size_bytes: int) -> Sequence[ByteRange] | None:
    """The ranges of a GET, in ascending order; None: all of it.

    A ``Range`` in units that are not bytes is ignored, and so is one whose ``If-Range`` names other bytes than these.
    Raises RangeNotSatisfiable, also for what is no range at all: to send everything is nothing such a caller expects.
    """
    text = headers.get("range")
    condition = headers.get("if-range")
    if text is None or (condition is not None and (condition.strip() != etag or etag.startswith(_WEAK))):
        return None
    match = _RANGES.fullmatch(text.strip())
    if match is None and _UNIT.match(text.strip()):
        return None
    specs = [spec.strip() for spec in match.group(1).split(",")] if match else []
    specs = [spec for spec in specs if spec]
    if not specs:
        raise _refusal("the header Range is not of the form bytes=FIRST-LAST", size_bytes)
    if len(specs) > MOST_RANGES:
        raise _refusal(f"the header Range has {len(specs)} ranges, at most {MOST_RANGES} are answered", size_bytes)
    found = [one for one in (_parse(spec, size_bytes) for spec in specs) if one is not None]
    if not found:
        raise _refusal(f"there are {size_bytes} bytes, and Range asks for none of them", size_bytes)
    if any(before.stop > after.start for before, after in pairwise(found)):
        raise _refusal("the ranges of the header Range overlap, or are not in ascending order", size_bytes)
    return found


def _parse(spec: str, size_bytes: int) -> ByteRange | None:
    match = _RANGE.fullmatch(spec)
    first, last = match.groups() if match else ("", "")
    if not (first or last) or max(len(first), len(last)) > _LONGEST_NUMBER:
        raise _refusal(f"{spec[:80]!r} in the header Range is not of the form FIRST-LAST", size_bytes)
    if not first:
        found = ByteRange(max(0, size_bytes - int(last)), size_bytes)
    else:
        if last and int(last) < int(first):
            raise _refusal(f"{spec!r} in the header Range ends before it begins", size_bytes)
        found = ByteRange(int(first), min(int(last) + 1, size_bytes) if last else size_bytes)
    return found if found.start < found.stop else None


def _refusal(reason: str, size_bytes: int) -> RangeNotSatisfiable:
    return RangeNotSatisfiable(reason, size=size_bytes)


def _matches(lines: Sequence[str], etag: str, *, weakly: bool) -> bool:
    """Whether any of the tags is this one. Strongly, a weak tag matches nothing."""
    text = ",".join(lines)
    if text.strip() == "*":
        return True
    tags = _ENTITY_TAG.findall(text)
    if weakly:
        return etag.removeprefix(_WEAK) in (tag.removeprefix(_WEAK) for tag in tags)
    return not etag.startswith(_WEAK) and etag in tags
