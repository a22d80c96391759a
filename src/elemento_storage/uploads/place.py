"""The reserved directory in which an upload's bytes arrive. Everything here blocks.

The mark tells whose the directory is. Between the reservation and the mark lies one step: a server that dies there
leaves an empty directory, which is anybody's to remove once it is older than a server is given to live without a sign.
"""

import os
import time
from typing import Final

from elemento_storage.durable import TEMPORARY_PREFIX, create, fsync_directory
from elemento_storage.faultpoints import reached
from elemento_storage.images.incoming import CONTENT

MARK: Final = f"{TEMPORARY_PREFIX}upload"


def prepare(directory: str) -> None:
    """Make the mark and the file for the bytes; their names are durable when it returns. Raises OSError."""
    create(f"{directory}/{MARK}", b"")
    create(f"{directory}/{CONTENT}", b"")
    fsync_directory(directory)
    fsync_directory(os.path.dirname(directory))
    reached("upload.prepared")


def is_abandoned(directory: str, age_s: float) -> bool:
    """Whether it is, or would have become, an upload's, and nobody touched it for so long. Raises OSError."""
    try:
        names = os.listdir(directory)
        old = time.time() - os.lstat(directory).st_mtime > age_s
    except (FileNotFoundError, NotADirectoryError):
        return False
    return old and (not names or MARK in names)
