"""What goes wrong with a cluster, as errors of the operating system: the catalog treats a pool as it does a disk."""

import contextlib
import errno
from collections.abc import Iterator
from typing import Final

from elemento_storage.errors import CephDenied, CephNotInstalled, CephUnavailable, LocationUnavailable

FENCED: Final = errno.ESHUTDOWN  #: what a client on the cluster's blocklist is told
NOT_INSTALLED: Final = (
    "the packages python3-rados and python3-rbd are not there, or not of this Python: install them, and run the server "
    "with Debian's own Python"
)
_NO_ANSWER: Final = (
    "the cluster does not answer: it has no quorum, too few OSDs, or cannot be reached; whether the last change was "
    "made is not known until it does"
)
_SENTENCES: Final = {
    errno.ETIMEDOUT: _NO_ANSWER,
    errno.EPERM: "the key does not allow it: give the user 'profile rbd' on the monitors and on the pool",
    errno.EACCES: "the key is refused: compare it with `ceph auth get`",
    errno.ENOENT: "there is no such pool, configuration file or key: look at 'ceph' in settings.json",
    errno.ENOSPC: "the pool or the cluster is full",
    errno.EDQUOT: "the pool's quota is used up",
    FENCED: "another server has shut this one out, because it gave no sign of life for too long; it connects anew",
}


class CephFault(OSError):
    """The cluster did not do it. ``strerror`` is a sentence that says what to look at."""

    unavailable: type[LocationUnavailable]

    def __init__(self, number: int, sentence: str | None = None) -> None:
        super().__init__(number, sentence or _SENTENCES.get(number) or f"the cluster answers errno {number}")
        denied = number in (errno.EPERM, errno.EACCES)
        self.unavailable = CephDenied if denied else CephUnavailable


class ImageGone(CephFault):
    """There is no such image in the pool."""

    def __init__(self, name: str) -> None:
        super().__init__(errno.ENODATA, f"image {name} is not in the pool: somebody removed or renamed it")


class NotInstalled(CephFault):
    """The bindings cannot be loaded."""

    def __init__(self) -> None:
        super().__init__(errno.ELIBACC, NOT_INSTALLED)
        self.unavailable = CephNotInstalled


@contextlib.contextmanager
def ceph_faults() -> Iterator[None]:
    """Turn what the bindings raise into CephFault."""
    try:
        yield
    except Exception as error:
        # The classes of the bindings cannot be named without loading them; all their errors have an errno.
        if type(error).__module__ not in ("rados", "rbd"):
            raise
        number: object = getattr(error, "errno", None)
        raise CephFault(abs(number) if isinstance(number, int) and number else errno.EIO) from error
