"""The lock that QEMU's own programs respect, taken by us for raw images (QEMU, block/file-posix.c).

QEMU locks bytes of an image file with open file description locks: byte 100+n says "I use permission n", byte 200+n "I
do not let others have permission n". A raw image served over NBD would let others write (QEMU shares that permission
there), so a storage daemon with a raw image gets a descriptor that holds these locks from us. It keeps it for as long
as it lives, whatever becomes of this process, and the kernel drops the locks when it ends.
"""

import fcntl
import os
import struct
from typing import Final

from elemento_storage.errors import ImageInUse

_FLOCK: Final = struct.Struct("hhqqi4x")  # struct flock of 64-bit Linux
_F_OFD_GETLK: Final = 36
_USES: Final = 100
_FORBIDS: Final = 200
_READ, _WRITE, _RESIZE = 0, 1, 3  # BLK_PERM_CONSISTENT_READ, BLK_PERM_WRITE, BLK_PERM_RESIZE


def lock_image(path: str, *, read_only: bool) -> int:
    """Open an image and lock it against writers; the descriptor holds the lock. Blocks. Raises ImageInUse, OSError."""
    uses = [_READ] if read_only else [_READ, _WRITE, _RESIZE]
    forbids = [_WRITE, _RESIZE]
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        for byte in (*(_USES + one for one in uses), *(_FORBIDS + one for one in forbids)):
            fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, byte, 1, 0))
        # Locked first, then looked: of two who come at the same time at least one sees the other.
        for byte in (*(_FORBIDS + one for one in uses), *(_USES + one for one in forbids)):
            asked = fcntl.fcntl(descriptor, _F_OFD_GETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0))
            if _FLOCK.unpack(asked)[0] != fcntl.F_UNLCK:
                raise ImageInUse("another program has the image open: end it first")
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor
