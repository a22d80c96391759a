"""From the files of a metadata volume to those of its seed, and what to tell the caller about them."""

from collections.abc import Mapping
from typing import Final

import yaml

USER_DATA: Final = "user-data"
META_DATA: Final = "meta-data"
NETWORK_DATA: Final = "network-data"
NETWORK_CONFIG: Final = "network-config"  #: under this name NoCloud looks for it
_EMPTY_USER_DATA: Final = b"#cloud-config\n{}\n"
_CHECKED_BYTES: Final = 256 * 1024  #: the parser takes a second per megabyte, and who sends more knows what it is

# https://cloudinit.readthedocs.io/en/latest/explanation/format.html
_CLOUD_CONFIG: Final = b"#cloud-config"
_ARCHIVE: Final = b"#cloud-config-archive"
_OTHER_BEGINNINGS: Final = (
    *(b"#!", b"#include", b"#cloud-boothook", b"#part-handler", b"## template:", b"#cloud-config-jsonp"),
    *(b"content-type:", b"mime-version:", b"\x1f\x8b"),
)


def seed_files(volume_id: str, files: Mapping[str, bytes]) -> tuple[dict[str, bytes], list[str]]:
    """The files of the seed, by the names that NoCloud looks for, and warnings about what was made up for it."""
    seed = dict(files)
    warnings = []
    if NETWORK_DATA in seed:
        network = seed.pop(NETWORK_DATA)
        if NETWORK_CONFIG in seed:
            warnings.append("network-config is in the seed as it is; network-data, which would become it, is left out")
        else:
            seed[NETWORK_CONFIG] = network
    seed.setdefault(META_DATA, f"instance-id: {volume_id}\n".encode())
    if USER_DATA not in seed:
        seed[USER_DATA] = _EMPTY_USER_DATA
        warnings.append("no user-data was sent: the seed has an empty one, without which cloud-init would ignore it")
    return seed, warnings


def check_file(name: str, content: bytes) -> list[str]:
    """Warnings about a file that cloud-init would not understand, or not as it is meant. Blocks for a moment."""
    if name == USER_DATA:
        return _check_user_data(content)
    if name in {META_DATA, NETWORK_DATA, NETWORK_CONFIG} and len(content) <= _CHECKED_BYTES:
        problem = _mapping_problem(content)
        if problem is not None:
            return [f"{name} {problem}"]
        if name == META_DATA and b"instance-id" not in content:
            return ["meta-data has no instance-id: a guest that was set up already will not notice another seed"]
    return []


def _check_user_data(content: bytes) -> list[str]:
    beginning = content.lstrip()[:64].lower()
    if not beginning or beginning.startswith((*_OTHER_BEGINNINGS, _ARCHIVE)):
        return []
    warnings = []
    if not beginning.startswith(_CLOUD_CONFIG):
        warnings.append("user-data does not begin with #cloud-config, #! or the like: cloud-init will ignore it")
    if len(content) <= _CHECKED_BYTES and (problem := _mapping_problem(content)) is not None:
        warnings.append(f"user-data {problem}")
    return warnings


def _mapping_problem(content: bytes) -> str | None:
    """What keeps a text from being a YAML mapping. Nothing is constructed: aliases cost nothing here."""
    documents = 0
    root = None
    before = None
    try:
        for event in yaml.parse(content, Loader=yaml.CSafeLoader):
            documents += isinstance(event, yaml.DocumentStartEvent)
            if isinstance(before, yaml.DocumentStartEvent):
                root = root or event
            before = event
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f" in line {mark.line + 1}" if mark is not None else ""
        return f"is not YAML: {getattr(error, 'problem', None) or 'it cannot be read as text'}{place}"
    if documents > 1:
        return "holds more than one YAML document: cloud-init takes one"
    if root is not None and not isinstance(root, yaml.MappingStartEvent):
        return "is YAML, but no mapping of keys to values"
    return None
