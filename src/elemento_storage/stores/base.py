"""What every store can do. The core looks at the capabilities before it calls; no store raises "unsupported"."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from elemento_storage.disk import Place
from elemento_storage.engine.block_node import BlockNode
from elemento_storage.model import CloneAlgorithm, Preallocation, VolumeFormat
from elemento_storage.progress import Progress


@dataclass(frozen=True)
class StoreCapabilities:
    """What a store does, as data."""

    creates: frozenset[VolumeFormat]
    grows: frozenset[VolumeFormat]
    converts: frozenset[VolumeFormat]  #: between each two of these
    preallocates: dict[VolumeFormat, frozenset[Preallocation]]
    copies: frozenset[VolumeFormat]  #: images of other volumes that it makes copies of, in the same format
    parents: frozenset[VolumeFormat]  #: images that one of ``link_format`` can stand on; empty: none can
    link_format: VolumeFormat | None = None


@dataclass(frozen=True)
class Image:
    """A volume's image: where it is, and the images it stands on, nearest first."""

    place: Place
    format: VolumeFormat
    below: tuple["Image", ...] = ()


class Store(Protocol):
    """Bytes of volumes below one directory each. A method's work is on disk when it returns, but for a new image."""

    capabilities: StoreCapabilities

    async def allocate(
        self,
        place: Place,
        image_format: VolumeFormat,
        size_bytes: int,
        preallocation: Preallocation,
        progress: Progress,
    ) -> None:
        """Make an empty image in a new volume's directory, which the caller syncs as a whole.

        Raises NoRoom, JobCancelled, ToolFailed.
        """

    def image_at_hand(
        self, image_format: VolumeFormat, size_bytes: int, preallocation: Preallocation
    ) -> Callable[[str], None] | None:
        """What ``allocate`` would do, as a function of the directory that blocks, but not for long.

        None where it takes more: a program, or a template that is not made yet. The function raises NoRoom, OSError.
        """

    async def grow(self, place: Place, image_format: VolumeFormat, size_bytes: int) -> None:
        """Make the image larger; idempotent. Raises NoRoom, ToolFailed."""

    async def convert_beside(
        self, place: Place, source: VolumeFormat, target: VolumeFormat, copy_path: str, progress: Progress
    ) -> None:
        """Write the image in another format to ``copy_path`` (same file system); the source stays as it is.

        Raises NoRoom, JobCancelled, ToolFailed.
        """

    async def copy_from(
        self, place: Place, target: VolumeFormat, source: Image, alg: CloneAlgorithm, progress: Progress
    ) -> None:
        """Make in a new volume's directory an image of what a guest sees in another volume, which nobody changes.

        It stands on no other image, and has neither snapshots nor bitmaps. ``alg`` says how where the format stays and
        the source is such an image too; anything else is converted. The result is on disk but for its name. Raises
        NoRoom, JobCancelled, ToolFailed, ToolMissing.
        """

    async def shares_blocks(self, place: Place) -> bool:
        """Whether a copy next to the original costs next to nothing there, until one of them is written to."""

    async def link_to(self, place: Place, parent_id: str, parent: VolumeFormat, size_bytes: int) -> None:
        """Make in a new volume's directory an image that stands on another volume's, beside which it will be.

        Raises NoRoom, ToolFailed.
        """

    def node(
        self, place: Place, image_format: VolumeFormat, *, read_only: bool, below: Sequence[Image] = ()
    ) -> BlockNode:
        """What a storage daemon opens to serve the volume; ``below`` are the images it stands on, nearest first."""

    def plain_file(self, place: Place, image_format: VolumeFormat) -> str | None:
        """The path of a file whose bytes are exactly what a guest sees; None if there is none."""
