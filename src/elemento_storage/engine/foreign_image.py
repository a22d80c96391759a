"""Images from outside in the hands of qemu-img: opened by themselves, in a format that is forced, under limits.

What a header says was looked at before (``images/headers.py``); what is opened here names no other file. The second
line of defence is the name under which it is opened: with ``backing`` null QEMU opens none, whatever the image says.
"""

import asyncio
import json
import logging
from collections.abc import Callable
from typing import Any, Final

import msgspec

from elemento_storage import process
from elemento_storage.engine import qemu_img
from elemento_storage.errors import ImageDamaged, ToolFailed, ToolTimeout
from elemento_storage.model import VolumeFormat

log = logging.getLogger(__name__)

_LOOK: Final = process.Limits(timeout_s=60, address_space_bytes=2 * 2**30, cpu_s=30)
_CHECK: Final = process.Limits(timeout_s=600, address_space_bytes=4 * 2**30, cpu_s=300)
_WITH_BACKING: Final = {"qcow2", "vmdk"}
_WITH_CHECK: Final = {"qcow2", "vmdk", "vdi", "vhdx"}
# Compressed clusters are decompressed in QEMU's threads: many requests at once keep them busy. Then it is the processor
# that counts, and writing through the page cache, sync included, takes three quarters of the processor's time and is no
# slower (2 GiB, half of it data; medians of six). A raw target may be written in any order; a qcow2 one stays in order.
_AT_ONCE: Final = ("-m", "16")
_COMPRESSED: Final = {"qcow2", "vmdk"}


def _alone(path: str, driver: str) -> str:
    node: dict[str, Any] = {"driver": driver, "file": {"driver": "file", "filename": path}}
    if driver in _WITH_BACKING:
        node["backing"] = None
    return "json:" + json.dumps(node)


async def virtual_size(path: str, driver: str) -> int:
    """Bytes a guest would see, as QEMU's driver reads the image. Raises ImageDamaged, ToolMissing."""
    argv = [qemu_img.find(), "info", "--output=json", "--", _alone(path, driver)]
    said = await _look(argv, _LOOK, frozenset({0}))
    return int(said["virtual-size"])


async def require_sound(path: str, driver: str) -> None:
    """Look through the image's own tables, where QEMU can: what was cut short or contradicts itself goes no further.

    Raises ImageDamaged, ToolMissing.
    """
    if driver not in _WITH_CHECK:
        return
    argv = [qemu_img.find(), "check", "--output=json", "--", _alone(path, driver)]
    said = await _look(argv, _CHECK, frozenset({0, 1, 2, 3}))
    findings = {key: int(said.get(key, 0)) for key in ("corruptions", "check-errors")}
    if any(findings.values()):
        raise ImageDamaged(
            "the image's own tables contradict each other, or it was cut short: repair it first (qemu-img check)",
            findings=findings,
        )


async def _look(argv: list[str], limits: process.Limits, expected: frozenset[int]) -> dict[str, Any]:
    try:
        finished = await process.run(argv, limits, expected=expected)
        said = msgspec.json.decode(finished.stdout)
        if isinstance(said, dict):
            return said
    except ToolFailed as error:
        log.info("an image from outside is not let in: %s", error.for_the_log())
    except (ToolTimeout, msgspec.DecodeError) as error:
        log.info("an image from outside is not let in: %s", error)
    raise ImageDamaged(
        "QEMU cannot open the image with the memory and time it may take: it is damaged, or no such image"
    )


async def convert(
    path: str,
    driver: str,
    target: str,
    target_format: VolumeFormat,
    *,
    on_fraction: Callable[[float], None],
    timeout_s: float,
    cancel: asyncio.Event,
) -> None:
    """Copy what a guest would see into a new image. Not yet synced.

    Raises ImageDamaged, NoRoom, JobCancelled, ToolFailed, ToolTimeout.
    """
    options = (*_AT_ONCE, "-W") if target_format is VolumeFormat.RAW else _AT_ONCE
    try:
        with qemu_img.full_is_no_room():
            await qemu_img.convert(
                _alone(path, driver),
                None,
                target,
                target_format,
                on_fraction=on_fraction,
                timeout_s=timeout_s,
                cancel=cancel,
                options=options,
                cached=driver in _COMPRESSED,
            )
    except ToolFailed as error:
        if "error while writing" in error.stderr:
            raise
        log.info("an image from outside is not let in: %s", error.for_the_log())
        raise ImageDamaged("QEMU cannot read all of the image: it is damaged, or was cut short") from error


async def upgrade(path: str) -> None:
    """Make a qcow2 image of version 2 one of version 3, in place. Raises ToolFailed, ToolTimeout."""
    await process.run([qemu_img.find(), "amend", "-q", "-f", "qcow2", "-o", "compat=1.1", "--", path], _LOOK)
