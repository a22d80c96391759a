"""What every store can do. The core looks at the capabilities before it calls; no store raises "unsupported"."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from elemento_storage.disk import Disk, Place
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
    snapshots: frozenset[VolumeFormat]  #: keeps snapshots of these
    #: Of those the ones that keep them inside the image: who has it open has to change them, and ``restore_in_place``
    #: restores. The others' are files of their own.
    snapshots_inside: frozenset[VolumeFormat]
    link_format: VolumeFormat | None = None
    files: bool = True  #: an image is a file in the volume's directory, which can be replaced and read as such


@dataclass(frozen=True)
class StoredSnapshot:
    """A snapshot as its bytes say. ``snapshot_id`` is a uid, also of one that another tool has made."""

    snapshot_id: str
    tag: str  #: what the one who made the bytes calls it: our uid, or anything
    created_ns: int
    size_bytes: int  #: what a guest would see
    allocated_bytes: int | None  #: of its own file; None where it shares the image's
    key: str = ""  #: the image's own name for it
    vm_state_bytes: int = 0  #: memory of a guest, saved by another tool; nothing here uses it
    is_ambiguous: bool = False  #: its tag does not tell it from others


@dataclass(frozen=True)
class SnapshotImage:
    """Where what a snapshot holds is read from: a file, or a snapshot inside one.

    One inside is read as ``qemu-img convert -l snapshot.id=KEY``, which shows it as long as the image is *now*.
    """

    path: str
    format: VolumeFormat
    size_bytes: int
    disk: Disk
    key: str | None = None


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

    async def size_bytes(self, place: Place, image_format: VolumeFormat) -> int:
        """The size that the image itself says. Raises OSError, BadHeader."""

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


class SnapshotStore(Store, Protocol):
    """A store that keeps snapshots.

    Whoever calls these sees to it that no two of them are under way on one volume. ``snapshot_id`` is a new uid where a
    snapshot is made.
    """

    async def snapshots(self, place: Place, image_format: VolumeFormat) -> list[StoredSnapshot]:
        """All of a volume's snapshots, oldest first, also while somebody writes to it. Raises ImageDamaged, OSError."""

    async def take_snapshot(
        self, place: Place, image_format: VolumeFormat, snapshot_id: str, progress: Progress
    ) -> None:
        """Keep what the volume holds, to which nobody writes. It calls ``progress.commit`` before the snapshot shows.

        Raises NoRoom, JobCancelled, ImageInUse, ToolFailed.
        """

    async def take_snapshot_at_once(
        self, place: Place, image_format: VolumeFormat, snapshot_id: str, progress: Progress
    ) -> bool:
        """The same for what the volume holds at one moment of the call, whoever writes to it; False where it cannot be.

        What a writer was told is written before the call is in it. Raises NoRoom, JobCancelled.
        """

    def copy_of_moment(self, place: Place, image_format: VolumeFormat, snapshot_id: str) -> tuple[str, str]:
        """For formats that are not ``snapshots_inside``: two paths, for what the engine that serves the volume copies.

        The first is the image to be, the second for what clients overwrite meanwhile.
        """

    async def publish_copy(
        self, place: Place, image_format: VolumeFormat, snapshot_id: str, progress: Progress
    ) -> None:
        """Make the copy a snapshot. It calls ``progress.commit`` before it shows. Raises NoRoom, JobCancelled."""

    async def set_aside(self, place: Place, image_format: VolumeFormat, snapshot_id: str, progress: Progress) -> None:
        """``take_snapshot`` of a volume that is about to be restored, for nothing where that can be."""

    async def restore_beside(
        self, place: Place, image_format: VolumeFormat, snapshot: StoredSnapshot, copy_path: str, progress: Progress
    ) -> None:
        """Write what a snapshot holds to ``copy_path`` (same file system), as an image that will be the volume's.

        Raises NoRoom, JobCancelled.
        """

    async def restore_in_place(self, place: Place, image_format: VolumeFormat, snapshot: StoredSnapshot) -> None:
        """Make the volume what it was. Killed in the middle the volume is useless until this is done again.

        Raises ImageInUse, ToolFailed.
        """

    async def delete_snapshot(self, place: Place, image_format: VolumeFormat, snapshot: StoredSnapshot) -> None:
        """Delete a snapshot; the volume and the others stay as they are. Raises ImageInUse, ToolFailed."""

    async def mend_snapshots(self, place: Place, image_format: VolumeFormat, snapshot_id: str) -> None:
        """After an operation on this snapshot was cut off: nothing of one half made is left, and no room is lost.

        Raises ToolFailed.
        """

    def snapshot_image(self, place: Place, image_format: VolumeFormat, snapshot: StoredSnapshot) -> SnapshotImage:
        """What to read to have a snapshot's content, also while somebody writes to the volume."""

    async def copy_snapshot(
        self, place: Place, target: VolumeFormat, source: SnapshotImage, alg: CloneAlgorithm, progress: Progress
    ) -> None:
        """``copy_from`` of what a snapshot holds, which is as large as the snapshot, also while somebody writes.

        One inside an image can be no larger than the volume is now. Raises NoRoom, JobCancelled, ToolFailed …
        """

    async def give_snapshot(
        self, place: Place, image_format: VolumeFormat, snapshot: StoredSnapshot, target: Place
    ) -> bool:
        """Make a snapshot the image of a new volume, and no snapshot any more; False where it would have to be copied.

        Raises OSError.
        """
