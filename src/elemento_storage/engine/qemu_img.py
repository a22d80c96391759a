"""qemu-img: creating, growing and converting images offline. Every format is forced, never guessed from content."""

import asyncio
import contextlib
import errno
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from elemento_storage import process
from elemento_storage.engine.image_header import Parent
from elemento_storage.errors import NoRoom, ToolFailed, ToolMissing
from elemento_storage.model import Preallocation, VolumeFormat

_QUICK = process.Limits(timeout_s=60, address_space_bytes=2 * 2**30, cpu_s=60)
_CHECK = process.Limits(timeout_s=300, address_space_bytes=4 * 2**30)
_FULL: Final = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FULL_WORDS: Final = ("no space left on device", "disk quota exceeded", "file too large", "image size is too large")
_PERCENT = re.compile(r"\((\d+\.\d+)/100%\)")


def find() -> str:
    """The path of qemu-img. Raises ToolMissing."""
    path = shutil.which("qemu-img")
    if path is None:
        raise ToolMissing("qemu-img is not installed; `make setup` installs it, the Debian package is qemu-utils")
    return path


_versions: dict[tuple[str, int], str] = {}


async def version(program: str | None = None) -> str:
    """The version of qemu-img, or another program of QEMU's, such as ``10.0.2``; asked again when the file changes.

    Raises ToolMissing, ToolFailed.
    """
    path = program or find()
    identity = (path, os.stat(path).st_mtime_ns)
    if identity not in _versions:
        output = (await process.run([path, "--version"], _QUICK)).stdout
        match = re.search(r"version (\d+(?:\.\d+)+)", output)
        _versions[identity] = match.group(1) if match else output.strip()
    return _versions[identity]


async def create(
    path: str,
    image_format: VolumeFormat,
    size_bytes: int,
    *,
    preallocation: Preallocation = Preallocation.OFF,
    timeout_s: float = 60.0,
    cancel: asyncio.Event | None = None,
) -> None:
    """Create an image. Raises ToolFailed, ToolTimeout, JobCancelled."""
    await process.run(
        [
            find(),
            "create",
            "-q",
            "-f",
            image_format.value,
            "-o",
            f"preallocation={preallocation.value}",
            "--",
            path,
            str(size_bytes),
        ],
        process.Limits(timeout_s=timeout_s),
        cancel=cancel,
    )


async def create_overlay(path: str, parent: Parent, size_bytes: int) -> None:
    """Create a qcow2 image that stands on another volume's and holds nothing yet. Raises ToolFailed.

    ``-u``: the image's directory is not yet beside the parent's, so QEMU does not find it from here.
    """
    backing = ("-u", "-b", parent.backing_file, "-F", parent.format.value)
    await process.run([find(), "create", "-q", "-f", "qcow2", *backing, "--", path, str(size_bytes)], _QUICK)


async def grow(path: str, image_format: VolumeFormat, size_bytes: int) -> None:
    """Set a larger virtual size; the new room reads as zeros. Raises ToolFailed."""
    argv = [find(), "resize", "-q", "-f", image_format.value, "--", path, str(size_bytes)]
    try:
        await process.run(argv, _QUICK)
    except ToolFailed as error:
        # Bitmaps of what was written that were not put away in good order are worthless, and QEMU grows no such image.
        if "is inconsistent" not in error.stderr:
            raise
        await _drop_dead_bitmaps(path, image_format)
        await process.run(argv, _QUICK)


async def _drop_dead_bitmaps(path: str, image_format: VolumeFormat) -> None:
    said = await process.run([find(), "info", "-f", image_format.value, "--output=json", "--", path], _QUICK)
    data = msgspec.json.decode(said.stdout, type=dict[str, Any]).get("format-specific", {}).get("data", {})
    for bitmap in data.get("bitmaps", ()):
        if "in-use" in bitmap["flags"]:
            remove = ("bitmap", "--remove", "-f", image_format.value, "--", path, str(bitmap["name"]))
            await process.run([find(), *remove], _QUICK)


async def cut(path: str, image_format: VolumeFormat, size_bytes: int) -> None:
    """Set a smaller virtual size, of an image that nobody uses yet. Raises ToolFailed."""
    await process.run(
        [find(), "resize", "-q", "--shrink", "-f", image_format.value, "--", path, str(size_bytes)], _QUICK
    )


@dataclass(frozen=True)
class Findings:
    """What is wrong with an image's own tables. Leaks lose room and nothing else."""

    corruptions: int
    leaks: int


async def check(path: str, image_format: VolumeFormat) -> Findings:
    """Look through an image's tables; nothing is repaired. Raises ToolFailed when it cannot be read at all."""
    argv = [find(), "check", "-f", image_format.value, "--output=json", "--", path]
    # 2: corruptions, 3: leaks only, 1: could not look at everything (qemu-img(1))
    finished = await process.run(argv, _CHECK, expected=frozenset({0, 1, 2, 3}))
    try:
        said = msgspec.json.decode(finished.stdout, type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise ToolFailed(argv, finished.status, finished.stderr) from error
    return Findings(int(said.get("corruptions", 0)) + int(said.get("check-errors", 0)), int(said.get("leaks", 0)))


async def convert(
    source: str,
    source_format: VolumeFormat | None,
    target: str,
    target_format: VolumeFormat,
    *,
    on_fraction: Callable[[float], None],
    timeout_s: float,
    cancel: asyncio.Event | None = None,
    options: Sequence[str] = (),
    cached: bool = False,
) -> None:
    """Copy what a guest would see in ``source`` into a new image. The result is not yet synced.

    ``source_format`` None: ``source`` is a ``json:`` name that says it. ``options`` are more of qemu-img(1).

    The target is written past the page cache (``-t none``): with the sync that has to follow it takes 0.7 of the time
    of a cached one (docs/bench.md), and a conversion does not push the guests' data out of memory. Where the file
    system refuses that (tmpfs, some FUSE), or if ``cached``, it is written through the cache. Raises ToolFailed,
    ToolTimeout, JobCancelled.
    """
    rest = ""

    def parse(piece: str) -> None:
        nonlocal rest
        text = rest + piece
        matches = list(_PERCENT.finditer(text))
        if matches:
            on_fraction(float(matches[-1].group(1)) / 100)
            text = text[matches[-1].end() :]
        rest = text[-32:]

    limits = process.Limits(timeout_s=timeout_s, address_space_bytes=4 * 2**30)

    async def run(*cache_mode: str) -> None:
        formats = (*(("-f", source_format.value) if source_format else ()), "-O", target_format.value)
        argv = [find(), "convert", "-p", *options, *cache_mode, *formats, "--", source, target]
        await process.run(argv, limits, on_output=parse, cancel=cancel)

    if cached:
        await run()
        return
    try:
        await run("-t", "none")
    except ToolFailed as error:
        if "O_DIRECT" not in error.stderr:
            raise
        await run()


@contextlib.contextmanager
def full_is_no_room() -> Iterator[None]:
    """What the system or a program says about a full file system, as NoRoom."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise NoRoom(f"the file system refuses more data: {error.strerror}") from error
        raise
    except ToolFailed as error:
        said = error.stderr.lower()
        if any(words in said for words in _FULL_WORDS):
            raise NoRoom("the file system ran full in the middle; nothing was changed") from error
        raise


async def create_increment(path: str, size_bytes: int, backing_name: str | None) -> None:
    """Create an empty qcow2 image on top of another one, which is named relative to it and not opened.

    Without one it is a plain image. Raises ToolFailed.
    """
    qcow2 = VolumeFormat.QCOW2.value
    below = [] if backing_name is None else ["-u", "-b", backing_name, "-F", qcow2]
    await process.run([find(), "create", "-q", "-f", qcow2, *below, "--", path, str(size_bytes)], _QUICK)


async def commit(path: str, *, timeout_s: float) -> None:
    """Write what a qcow2 image holds into the one below it; the image itself stays as it is. Not synced.

    Raises ToolFailed, ToolTimeout.
    """
    limits = process.Limits(timeout_s=timeout_s, address_space_bytes=4 * 2**30)
    await process.run([find(), "commit", "-q", "-d", "-f", VolumeFormat.QCOW2.value, "--", path], limits)
