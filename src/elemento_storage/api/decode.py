"""From a request's bytes to a typed request, with the contract's sentences for everything that is wrong."""

import contextlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from functools import cache
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints
from urllib.parse import quote

import msgspec

from elemento_storage.errors import InvalidValue, MissingKey, NotJSON
from elemento_storage.model import MAX_NAME_BYTES, gigabytes_to_bytes, normalise_uid

R = TypeVar("R", bound=msgspec.Struct)

UID_PATTERN = r"^([0-9a-fA-F]{32}|[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12})$"
Uid = Annotated[str, msgspec.Meta(pattern=UID_PATTERN, description="32 hex digits, or a UUID with dashes")]

# The document calls the same thing volume_id in one call and vid in the next.
_SYNONYMS = {
    "volume_id": ("vid", "volumeID"),
    "vid": ("volume_id", "volumeID"),
    "client_uid": ("creatorID",),
    "creatorID": ("client_uid",),
    "tool_scope": ("scope",),
    "tool_version": ("version",),
}
_VALUE_PATH = re.compile(r" - at `\$\.?([^`\[]*)[^`]*`$")
_SHOWN = 80
_INTERESTING_HEADER_CHARACTERS = " ,;:-_.()[]{}/"


@dataclass(frozen=True)
class _Key:
    name: str
    required: bool
    is_uid: bool
    is_whole_number: bool
    is_number_or_text: bool
    is_flag: bool
    allowed: str


def parse_object(body: bytes) -> dict[str, Any]:
    """The JSON object of a body; an empty body is an empty object. Raises NotJSON."""
    if not body.strip():
        return {}
    try:
        values = msgspec.json.decode(body)
    except RecursionError:
        raise NotJSON("the body is nested too deeply") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise NotJSON(f"the body is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise NotJSON("the body is not a JSON object")
    return values


def decode(
    values: Mapping[str, Any], kind: type[R], *, fill: Mapping[str, str] | None = None, from_query: bool = False
) -> tuple[R, list[str]]:
    """A request of type ``kind``, and the keys that were ignored. Raises MissingKey, InvalidValue.

    A key that is null counts as absent. ``fill`` are values for absent keys. ``from_query``: values are texts.
    """
    keys = _keys(kind)
    given = {name: value for name, value in values.items() if value is not None}
    wanted: dict[str, Any] = {}
    used = set()
    for key in keys:
        for name in (key.name, *_SYNONYMS.get(key.name, ())):
            if name in given:
                wanted[key.name] = given[name]
                used.add(name)
                break
        else:
            if fill and key.name in fill:
                wanted[key.name] = fill[key.name]
    # The first key that is wrong is named, in the order of the document.
    for key in keys:
        if key.name not in wanted:
            if key.required:
                raise MissingKey(key.name)
        elif key.is_uid and isinstance(wanted[key.name], str):
            uid = normalise_uid(wanted[key.name])
            if uid is None:
                raise InvalidValue(
                    f"'{key.name}' is {_show(wanted[key.name])}, it has to be 32 hex digits", key=key.name
                )
            wanted[key.name] = uid
        elif key.is_whole_number and isinstance(wanted[key.name], float) and wanted[key.name].is_integer():
            wanted[key.name] = int(wanted[key.name])  # JSON knows one kind of number: 5.0 is 5
        elif from_query and key.is_flag:
            wanted[key.name] = {"true": True, "false": False}.get(wanted[key.name], wanted[key.name])
        elif from_query and key.is_number_or_text and isinstance(wanted[key.name], str):
            with contextlib.suppress(ValueError):
                wanted[key.name] = float(wanted[key.name])
    try:
        request = msgspec.convert(wanted, kind, strict=not from_query)
    except msgspec.ValidationError as error:
        raise _invalid(error, keys, wanted) from None
    if from_query:
        for spec in msgspec.structs.fields(kind):
            # The text "null" is no way to leave a key out of a query.
            if spec.encode_name in wanted and getattr(request, spec.name) is None:
                raise InvalidValue(f"'{spec.encode_name}' is 'null': leave it out", key=spec.encode_name)
    return request, [name for name in values if name not in used and name not in {key.name for key in keys}]


def checked_name(name: str, *, key: str = "name") -> str:
    """The name of a volume. Raises InvalidValue."""
    if "\0" in name:
        raise InvalidValue(f"'{key}' contains a NUL character", key=key)
    if len(name.encode()) > MAX_NAME_BYTES:
        raise InvalidValue(f"'{key}' has to be a text of at most {MAX_NAME_BYTES} bytes", key=key)
    return name


def size_bytes(key: str, size_gb: float) -> int:
    """The bytes of a size in GB. Raises InvalidValue."""
    try:
        return gigabytes_to_bytes(size_gb)
    except ValueError as error:
        raise InvalidValue(f"'{key}' is {size_gb!r}, {error}", key=key) from None


def _invalid(error: msgspec.ValidationError, keys: tuple[_Key, ...], wanted: Mapping[str, Any]) -> InvalidValue:
    text = str(error)
    match = _VALUE_PATH.search(text)
    name = match.group(1).split(".")[0] if match else ""
    key = next((key for key in keys if key.name == name), None)
    if key is None:
        return InvalidValue(text)
    if isinstance(wanted[name], dict):
        return InvalidValue(f"'{name}': {text[:1].lower()}{text[1:]}", key=name)
    nested = "" if isinstance(wanted[name], str | int | float | bool) else f" ({text})"
    return InvalidValue(f"'{name}' is {_show(wanted[name])}, it has to be {key.allowed}{nested}", key=name)


def _show(value: object) -> str:
    text = repr(value) if isinstance(value, str | int | float | bool) else type(value).__name__
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


@cache
def _keys(kind: type[msgspec.Struct]) -> tuple[_Key, ...]:
    hints = get_type_hints(kind, include_extras=True)
    return tuple(
        _Key(
            name=field.encode_name,
            required=field.required,
            is_uid=_is_uid(hints[field.name]),
            is_whole_number=_kinds(hints[field.name]) == {int},
            is_flag=_kinds(hints[field.name]) == {bool},
            is_number_or_text=_kinds(hints[field.name]) >= {float, str},
            allowed=_describe(hints[field.name]),
        )
        for field in msgspec.structs.fields(kind)
    )


def _alternatives(hint: Any) -> list[Any]:
    origin = get_origin(hint)
    if origin is None or origin in (list, dict):
        return [hint]
    if origin in (Annotated, Literal):
        return [hint]
    return [alternative for part in get_args(hint) if part is not type(None) for alternative in _alternatives(part)]


def _bare(hint: Any) -> Any:
    return get_args(hint)[0] if get_origin(hint) is Annotated else hint


def _kinds(hint: Any) -> set[Any]:
    return {_bare(part) for part in _alternatives(hint)}


def _is_uid(hint: Any) -> bool:
    return any(
        isinstance(meta, msgspec.Meta) and meta.pattern == UID_PATTERN
        for part in _alternatives(hint)
        for meta in get_args(part)[1:]
    )


def _describe(hint: Any) -> str:
    return " or ".join(dict.fromkeys(_describe_one(part) for part in _alternatives(hint)))


def _describe_one(hint: Any) -> str:
    if get_origin(hint) is Annotated:
        base, *metas = get_args(hint)
        told = next((meta.description for meta in metas if isinstance(meta, msgspec.Meta) and meta.description), None)
        return told or _describe(base)
    if get_origin(hint) is list:
        return "a list"
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(get_args(hint))
    if isinstance(hint, type) and issubclass(hint, Enum):
        return "one of " + ", ".join(member.value for member in hint)
    return {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}.get(hint, "an object")


def ignored_keys(names: list[str]) -> dict[str, str]:
    """The header that names ignored keys: at most twenty, shortened, and in plain ASCII."""
    listed = ", ".join(quote(name[:_SHOWN], safe=_INTERESTING_HEADER_CHARACTERS) for name in names[:20])
    return {"X-Ignored-Keys": listed} if names else {}
