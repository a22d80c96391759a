"""Volumes as images of a Ceph pool; what is in a volume's directory is ``data.rbd``, which says where the image is."""

from collections.abc import Callable, Sequence
from typing import Final, NoReturn, TypeVar

from elemento_storage.ceph import images
from elemento_storage.ceph.connection import Handle
from elemento_storage.ceph.pool import ImageRef, Pools, read_ref
from elemento_storage.disk import Place
from elemento_storage.engine.block_node import VOLUME_NODE, BlockNode
from elemento_storage.model import CloneAlgorithm, Preallocation, VolumeFormat
from elemento_storage.progress import Progress
from elemento_storage.stores.base import Image, StoreCapabilities

T = TypeVar("T")

_RBD: Final = frozenset({VolumeFormat.RBD})
_NONE: Final[frozenset[VolumeFormat]] = frozenset()


class RbdStore:
    """Images of the format rbd, in whatever pool the directory's ``data.rbd`` names."""

    capabilities = StoreCapabilities(
        creates=_RBD,
        grows=_RBD,
        converts=_NONE,
        preallocates={VolumeFormat.RBD: frozenset({Preallocation.OFF})},
        copies=_NONE,
        parents=_NONE,
        snapshots=_NONE,
        snapshots_inside=_NONE,
        files=False,
    )

    def __init__(self, pools: Pools) -> None:
        self._pools = pools

    async def allocate(
        self,
        place: Place,
        image_format: VolumeFormat,
        size_bytes: int,
        preallocation: Preallocation,
        progress: Progress,
    ) -> None:
        """See Store.allocate."""
        await place.disk.run(self._allocate, place, size_bytes)

    def _allocate(self, place: Place, size_bytes: int) -> None:
        ref = read_ref(place.directory)
        self._pools.get(ref.settings).run(lambda handle: images.create(handle, ref.image, size_bytes))

    def image_at_hand(
        self, image_format: VolumeFormat, size_bytes: int, preallocation: Preallocation
    ) -> Callable[[str], None] | None:
        """See Store.image_at_hand."""
        return None

    async def grow(self, place: Place, image_format: VolumeFormat, size_bytes: int) -> None:
        """See Store.grow."""

        def grow_claimed(handle: Handle, ref: ImageRef) -> None:
            self._pools.get(ref.settings).claims.require(handle, place.volume_id)
            images.grow(handle, ref.image, size_bytes)

        await self._run(place, grow_claimed)

    async def size_bytes(self, place: Place, image_format: VolumeFormat) -> int:
        """See Store.size_bytes."""
        return await self._run(place, lambda handle, ref: images.size_bytes(handle, ref.image))

    async def _run(self, place: Place, work: Callable[[Handle, ImageRef], T]) -> T:
        def in_thread() -> T:
            ref = read_ref(place.directory)
            return self._pools.get(ref.settings).run(lambda handle: work(handle, ref))

        return await place.disk.run(in_thread)

    async def convert_beside(
        self, place: Place, source: VolumeFormat, target: VolumeFormat, copy_path: str, progress: Progress
    ) -> None:
        """See Store.convert_beside."""
        _not_asked_for()

    async def copy_from(
        self, place: Place, target: VolumeFormat, source: Image, alg: CloneAlgorithm, progress: Progress
    ) -> None:
        """See Store.copy_from."""
        _not_asked_for()

    async def shares_blocks(self, place: Place) -> bool:
        """See Store.shares_blocks."""
        return False

    async def link_to(self, place: Place, parent_id: str, parent: VolumeFormat, size_bytes: int) -> None:
        """See Store.link_to."""
        _not_asked_for()

    def node(
        self, place: Place, image_format: VolumeFormat, *, read_only: bool, below: Sequence[Image] = ()
    ) -> BlockNode:
        """See Store.node.

        Without librbd's cache: what a guest was told is written is on the OSDs then, and survives the daemon. No
        time-outs either: a guest's request waits until the cluster is there again, as for any disk.
        """
        try:
            ref = read_ref(place.directory)
        except OSError as error:
            return BlockNode((), read_only, problem=error.strerror or str(error))
        layer = {
            "driver": "rbd",
            "node-name": VOLUME_NODE,
            "pool": ref.pool,
            "image": ref.image,
            "user": ref.user,
            "conf": ref.conf,
            "cache": {"direct": True},
            "discard": "unmap",
            "read-only": read_only,
        }
        return BlockNode((layer,), read_only, write_through=True)

    def plain_file(self, place: Place, image_format: VolumeFormat) -> str | None:
        """See Store.plain_file."""
        return None


def _not_asked_for() -> NoReturn:
    raise AssertionError("the capabilities say that this store does not do it")
