"""What a guest sees of a volume, out of the server: its bytes as an image, where the data is, and checksums."""

import asyncio
import contextlib
import hashlib
import os
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from itertools import islice
from typing import Final

from elemento_storage.disk import Disk
from elemento_storage.engine.checksum import CHECKSUMS, Algorithm
from elemento_storage.engine.content import Content, Extent, FileContent, OpenFile, Part, Readable
from elemento_storage.engine.image_header import BadHeader, qcow2_header
from elemento_storage.engine.qcow2_layout import Qcow2Layout
from elemento_storage.engine.vmdk_layout import VmdkLayout
from elemento_storage.model import Volume, VolumeFormat
from elemento_storage.progress import Progress
from elemento_storage.service.access import Actor
from elemento_storage.service.core import Core
from elemento_storage.service.read_sessions import Reader, ReadSessions, Session
from elemento_storage.service.shares import Shares

_MOST_CHECKSUMS: Final = 2  #: each takes all of the processor it gets
_MOST_CHECKSUMS_OF_ONE: Final = 1
_TELL_BYTES: Final = 64 * 2**20
_SETTLED_NS: Final = 2 * 10**9
_TAIL_BYTES: Final = 4096
_HEADER_BYTES: Final = 4096
_UNUSUAL: Final = re.compile(r"[^A-Za-z0-9._-]+", re.ASCII)
_LONGEST_NAME: Final = 100


class DataFormat(StrEnum):
    """What a volume can be had as."""

    RAW = "raw"
    QCOW2 = "qcow2"
    VMDK = "vmdk"


@dataclass(frozen=True)
class Image:
    """A volume in one format: bytes, how many, and a tag that is another when any of them is."""

    volume: Volume
    format: DataFormat
    tag: str
    is_strong: bool  #: whether the tag proves it: on some file systems two changes within a second look alike
    readable: Readable
    streams: Disk  #: the threads to read it in
    unwanted: asyncio.Event  #: the reading is to end, whatever is left
    _file: OpenFile

    @property
    def size_bytes(self) -> int:
        """How many bytes."""
        return self.readable.size_bytes

    def parts(self, start: int, stop: int) -> Iterator[Part]:
        """The bytes of a stretch; its end only if the image still is what it was. Blocks.

        Raises OSError, ImageChanged.
        """
        tail = max(start, stop - _TAIL_BYTES)
        yield from self.readable.parts(start, tail)
        self._file.require_unchanged()
        yield from self.readable.parts(tail, stop)


@dataclass(frozen=True)
class ExtentsPage:
    """What is in a part of a volume; ``next_start`` is where the rest begins."""

    image: Image
    extents: list[Extent]
    next_start: int | None


@dataclass(frozen=True)
class Checksum:
    """A checksum of what a guest sees."""

    volume: Volume
    algorithm: Algorithm
    method: str
    checksum: str
    size_bytes: int


class VolumeData:
    """The use cases that read a volume."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._catalog = core.catalog
        self.sessions = ReadSessions(core)
        self._checksums = Shares(_MOST_CHECKSUMS, _MOST_CHECKSUMS_OF_ONE)

    @contextlib.asynccontextmanager
    async def image(
        self, actor: Actor, volume_id: str, image_format: DataFormat = DataFormat.RAW
    ) -> AsyncIterator[Image]:
        """A volume in a format, to be read until the end.

        Raises VolumeNotFound, VolumeLocked, VolumeExported, VolumeWaiting, FormatUnsupported, ImageDamaged …
        """
        async with self.sessions.open(actor, volume_id) as reader:
            yield await self._image(reader, image_format)

    async def _image(self, reader: Reader, image_format: DataFormat) -> Image:
        session = reader.session
        readable = session.images.get(image_format)
        if readable is None:
            readable = await _MAKERS[image_format](session)
            session.images[image_format] = readable
        tag = f"{_tag(session)}-{image_format}"
        if isinstance(readable, Qcow2Layout | VmdkLayout):
            tag += f"-{readable.digest}"
        settled = _is_settled(session.file)
        return Image(
            session.volume, image_format, tag, settled, readable, session.streams, reader.unwanted, session.file
        )

    async def extents(self, actor: Actor, volume_id: str, start: int, limit: int) -> ExtentsPage:
        """Where the data is, from ``start`` on, in at most ``limit`` pieces. Raises what ``image`` does."""

        def look(content: Content) -> list[Extent]:
            return list(islice(content.extents(start, content.size_bytes), limit))

        async with self.sessions.open(actor, volume_id) as reader:
            session = reader.session
            image = await self._image(reader, DataFormat.RAW)
            content = await session.content()
            found = await session.run(look, content)
            await session.run(session.file.require_unchanged)
        rest = found[-1].stop if found else image.size_bytes
        return ExtentsPage(image, found, rest if rest < image.size_bytes else None)

    async def checksum(
        self, actor: Actor, volume_id: str, algorithm: Algorithm, method: str, progress: Progress
    ) -> Checksum:
        """The checksum of what a guest sees. Raises what ``image`` does, ImageChanged, JobCancelled."""
        loop = asyncio.get_running_loop()
        async with self.sessions.open(actor, volume_id) as reader:
            session = reader.session
            content = await session.content()
            size_bytes = content.size_bytes
            told = 0

            def on_bytes(done: int) -> None:
                nonlocal told
                progress.check()
                reader.check()
                if done - told >= _TELL_BYTES:
                    told = done
                    loop.call_soon_threadsafe(partial(progress.advance, done / size_bytes, "reading"))

            async with self._checksums.turn(actor.client, progress):
                found = await session.run(CHECKSUMS[method], content, algorithm, on_bytes)
            await session.run(session.file.require_unchanged)
            return Checksum(session.volume, algorithm, method, found, size_bytes)


def _tag(session: Session) -> str:
    facts = (session.volume.volume_id, session.volume.size_bytes, *session.file.identity)
    return hashlib.blake2b(repr(facts).encode(), digest_size=12).hexdigest()


def _is_settled(file: OpenFile) -> bool:
    """False where the file system keeps whole seconds, and the second of the last change is not over."""
    return file.modified_ns % 10**9 != 0 or time.time_ns() - file.modified_ns > _SETTLED_NS


async def _raw(session: Session) -> Readable:
    return await session.content()


async def _qcow2(session: Session) -> Readable:
    # The file as it is, if there is nothing in it but what a guest sees; it can be sent without QEMU.
    if session.volume.meta.format is VolumeFormat.QCOW2 and await session.run(_is_plain, session.file):
        return FileContent(session.file)
    return await session.run(Qcow2Layout, await session.content())


def _is_plain(file: OpenFile) -> bool:
    try:
        header = qcow2_header(os.pread(file.descriptor, _HEADER_BYTES, 0))
    except BadHeader:
        return False  # QEMU says what is wrong with it
    return header.parent is None and not header.has_history


async def _vmdk(session: Session) -> Readable:
    return await session.run(VmdkLayout, await session.content(), file_name(session.volume, DataFormat.VMDK))


_MAKERS: Final[dict[DataFormat, Callable[[Session], Awaitable[Readable]]]] = {
    DataFormat.RAW: _raw,
    DataFormat.QCOW2: _qcow2,
    DataFormat.VMDK: _vmdk,
}


def file_name(volume: Volume, image_format: DataFormat) -> str:
    """A name for a file that any system and any program takes: after the volume's, in plain ASCII."""
    name = _UNUSUAL.sub("_", volume.meta.name)[:_LONGEST_NAME].strip("._-") or "volume"
    if image_format is not DataFormat.RAW:
        return f"{name}.{image_format}"
    return f"{name}.{VolumeFormat.ISO if volume.meta.format is VolumeFormat.ISO else 'img'}"
