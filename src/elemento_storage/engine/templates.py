"""Empty QCOW2 images without starting a program.

A new image of a given size always has the same bytes, and nearly all of them are zero. qemu-img makes the first
one of each size; its few non-zero pieces are kept and written out for the next ones. This is a cache, not a second
implementation of the format: what is written is what this host's qemu-img wrote.
"""

import asyncio
import os
import shutil
import tempfile
from collections import OrderedDict
from dataclasses import dataclass

from elemento_storage.durable import write_all
from elemento_storage.engine import qemu_img
from elemento_storage.model import VolumeFormat

_KEPT = 64
_PIECE_BYTES = 4096
_LARGEST_FILE_BYTES = 16 * 2**20  # a 64 TiB image has 1 MiB of L1 table; what is larger is left to qemu-img


@dataclass(frozen=True)
class ImageTemplate:
    """The non-zero pieces of an empty image, as (offset, bytes), and the file's length."""

    pieces: tuple[tuple[int, bytes], ...]
    file_bytes: int

    def write(self, path: str) -> None:
        """Create a new file with these bytes, not yet synced. Blocks. Raises FileExistsError."""
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        try:
            os.ftruncate(descriptor, self.file_bytes)
            for offset, piece in self.pieces:
                os.lseek(descriptor, offset, os.SEEK_SET)
                write_all(descriptor, piece)
        finally:
            os.close(descriptor)


class Qcow2Templates:
    """The most recently used sizes' templates."""

    def __init__(self) -> None:
        self._templates: OrderedDict[int, ImageTemplate] = OrderedDict()

    def at_hand(self, size_bytes: int) -> ImageTemplate | None:
        """The template for a virtual size, if it was made already."""
        template = self._templates.get(size_bytes)
        if template is not None:
            self._templates.move_to_end(size_bytes)
        return template

    async def get(self, size_bytes: int) -> ImageTemplate | None:
        """The template for a virtual size; None when such an image is too large to keep.

        Raises ToolFailed, ToolMissing.
        """
        template = self.at_hand(size_bytes)
        if template is None:
            directory = await asyncio.to_thread(tempfile.mkdtemp, prefix="elemento-template-")
            try:
                path = f"{directory}/image.qcow2"
                await qemu_img.create(path, VolumeFormat.QCOW2, size_bytes)
                template = await asyncio.to_thread(_read, path)
            finally:
                await asyncio.to_thread(shutil.rmtree, directory)
            if template is None:
                return None
            self._templates[size_bytes] = template
            if len(self._templates) > _KEPT:
                self._templates.popitem(last=False)
        return template


def _read(path: str) -> ImageTemplate | None:
    with open(path, "rb") as file:
        if os.fstat(file.fileno()).st_size > _LARGEST_FILE_BYTES:
            return None
        content = file.read()
    pieces: list[tuple[int, bytes]] = []
    for offset in range(0, len(content), _PIECE_BYTES):
        piece = content[offset : offset + _PIECE_BYTES]
        if piece.count(0) != len(piece):
            pieces.append((offset, piece))
    return ImageTemplate(tuple(pieces), len(content))
