"""Internal snapshots of a qcow2 image that nobody has open, by qemu-img; ``live_snapshots`` is for one that is served.

What a snapshot holds is shared with the image by reference counts, so that making one copies tables and no data.
qemu-img writes the counts first, then the one thing that makes the change visible, then what follows from it; killed in
between it leaves an image whose content is right and whose counts are too high (docs/decisions/0016). ``repair``
puts the counts right.
"""

import re
from typing import Any, Final

import msgspec

from elemento_storage import process
from elemento_storage.engine import qemu_img
from elemento_storage.engine.qcow2_snapshots import InternalSnapshot
from elemento_storage.errors import ImageInUse, ToolFailed
from elemento_storage.model import VolumeFormat

_FORMAT: Final = ("-f", VolumeFormat.QCOW2.value)
_MEMORY: Final = 4 * 2**30
_LOCKED: Final = re.compile(r'Failed to get (shared )?"[a-z ]+" lock')


async def _run(arguments: list[str], timeout_s: float, expected: frozenset[int] = frozenset({0})) -> process.Finished:
    """Raises ImageInUse when another program has the image open, ToolFailed, ToolTimeout."""
    limits = process.Limits(timeout_s=timeout_s, address_space_bytes=_MEMORY)
    try:
        return await process.run([qemu_img.find(), *arguments], limits, expected=expected)
    except ToolFailed as error:
        if _LOCKED.search(error.stderr):
            raise ImageInUse("another program has the image open: end it first") from error
        raise


def _forced(path: str) -> list[str]:
    """The image for ``qemu-img snapshot``, which would guess its format: it has no -f."""
    escaped = path.replace(",", ",,")
    return ["--image-opts", f"driver=qcow2,discard=unmap,file.driver=file,file.discard=unmap,file.filename={escaped}"]


async def take(path: str, tag: str, timeout_s: float) -> None:
    """Add a snapshot of what the image holds now; on disk when it returns. Raises ImageInUse, ToolFailed."""
    await _run(["snapshot", "-q", "-c", tag, *_forced(path)], timeout_s)


async def apply(path: str, snapshot: InternalSnapshot, timeout_s: float) -> None:
    """Make the image what it was, its virtual size included; the snapshot stays. Raises ImageInUse, ToolFailed.

    Killed in the middle it is neither what it was nor what it shall be, and the snapshot is whole: done again, it is
    done. What the image knows about which blocks changed (dirty bitmaps) would be wrong afterwards and goes before.
    """
    for name in await _bitmaps(path, timeout_s):
        await _run(["bitmap", "--remove", *_FORMAT, "--", path, name], timeout_s)
    # By the key: QEMU looks for it before it looks for a name, and a name may be there twice.
    await _run(["snapshot", "-q", "-a", snapshot.key, *_forced(path)], timeout_s)


async def remove(path: str, snapshot: InternalSnapshot, timeout_s: float) -> None:
    """Take a snapshot away and give back what only it held. Raises ImageInUse, ToolFailed."""
    await _run(["snapshot", "-q", "-d", snapshot.tag, *_forced(path)], timeout_s)


async def repair(path: str, timeout_s: float) -> None:
    """Put reference counts right after something was killed; nothing of the content changes. Raises ToolFailed."""
    await _run(["check", "-q", *_FORMAT, "-r", "all", "--", path], timeout_s, frozenset({0, 3}))


async def _bitmaps(path: str, timeout_s: float) -> list[str]:
    said = (await _run(["info", *_FORMAT, "--output=json", "--", path], timeout_s)).stdout
    data = msgspec.json.decode(said, type=dict[str, Any]).get("format-specific", {}).get("data", {})
    return [str(bitmap["name"]) for bitmap in data.get("bitmaps", ())]
