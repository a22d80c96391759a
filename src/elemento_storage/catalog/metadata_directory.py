"""The directory of a cloud-init metadata volume that holds the files of its seed (docs/on-disk-format.md).

People change these files by hand, and other servers wrote them: what is found there counts, and what cannot be one of
ours is left alone.
"""

import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from elemento_storage.durable import fsync_directory, replace
from elemento_storage.faultpoints import reached

METADATA_DIRECTORY: Final = "cloud-init-metadata"
_NAME: Final = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}", re.ASCII)
_OURS: Final = "elemento."
_EXPECTED: Final = re.compile(r"elemento\.([0-9]{1,9})\.expected", re.ASCII)


def is_file_name(name: str) -> bool:
    """Whether a file of a seed may have this name; ``elemento.…`` are the server's own."""
    return _NAME.fullmatch(name) is not None and not name.startswith(_OURS)


def expected_file(expected: int) -> str:
    """The name of the file that says how many there will be, as seen from the volume's directory."""
    return f"{METADATA_DIRECTORY}/{_OURS}{expected}.expected"


@dataclass(frozen=True)
class MetadataFiles:
    """What is there."""

    lengths: Mapping[str, int]  #: bytes by name, of the files that go into the seed
    expected: int | None  #: how many there will be; None where nothing says it
    left_out: tuple[str, ...] = field(default=())  #: names that no file of a seed can have, and what is no file


def list_files(directory: str) -> MetadataFiles | None:
    """What is in a volume's metadata directory; None when it has none. Blocks. Raises OSError."""
    try:
        names = sorted(os.listdir(f"{directory}/{METADATA_DIRECTORY}"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    lengths: dict[str, int] = {}
    expected: int | None = None
    left_out = []
    for name in names:
        if match := _EXPECTED.fullmatch(name):
            expected = max(int(match[1]), expected or 0)
        elif name.startswith((".", _OURS)):
            continue  # an editor's, or another product's
        else:
            status = os.lstat(f"{directory}/{METADATA_DIRECTORY}/{name}")
            if is_file_name(name) and stat.S_ISREG(status.st_mode):
                lengths[name] = status.st_size
            else:
                left_out.append(name)
    return MetadataFiles(lengths, expected, tuple(left_out))


def read_files(directory: str, names: list[str], most_bytes: int) -> dict[str, bytes]:
    """The files' contents, of each ``most_bytes`` at the most. Blocks. Raises OSError."""
    contents = {}
    for name in names:
        path = f"{directory}/{METADATA_DIRECTORY}/{name}"
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        with open(descriptor, "rb") as file:
            contents[name] = file.read(most_bytes)
    return contents


def put_files(directory: str, contents: Mapping[str, bytes]) -> None:
    """Add or replace files, each in one durable step. Blocks. Raises OSError."""
    for name, content in contents.items():
        # The temporary file is made where those of a writer that died are looked for.
        replace(f"{directory}/{METADATA_DIRECTORY}/{name}", content, made_in=directory)
        reached("metadata.received")
    fsync_directory(directory)


def put_seed(path: str, image: bytes) -> None:
    """Replace a volume's image in one durable step. Blocks. Raises OSError."""
    replace(path, image)
    reached("metadata.replaced")
