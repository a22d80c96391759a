"""What every use case works with."""

from collections.abc import Mapping
from dataclasses import dataclass

from elemento_storage.catalog.catalog import Catalog
from elemento_storage.catalog.linked_clones import ancestors
from elemento_storage.catalog.location import Location, differs
from elemento_storage.config import Settings
from elemento_storage.errors import FormatUnsupported, HasSnapshots
from elemento_storage.feed import Feed
from elemento_storage.jobs import Jobs
from elemento_storage.model import Volume, VolumeFormat
from elemento_storage.service.access import audience
from elemento_storage.service.export_markers import ExportMarkers
from elemento_storage.stores.base import Image, SnapshotStore, Store


@dataclass(frozen=True)
class Core:
    """The server's parts below the use cases."""

    settings: Settings
    catalog: Catalog
    stores: Mapping[VolumeFormat, Store]
    snapshot_stores: Mapping[VolumeFormat, SnapshotStore]  #: those of them that keep snapshots
    jobs: Jobs
    feed: Feed
    markers: ExportMarkers

    def store(self, image_format: VolumeFormat) -> Store:
        """The store that keeps a format. Raises FormatUnsupported."""
        try:
            return self.stores[image_format]
        except KeyError:
            raise FormatUnsupported(f"this server does not keep {image_format} volumes") from None

    def snapshot_store(self, image_format: VolumeFormat) -> SnapshotStore:
        """The store that keeps snapshots of a format. Raises FormatUnsupported."""
        try:
            return self.snapshot_stores[image_format]
        except KeyError:
            raise FormatUnsupported(f"a volume of format {image_format} has no snapshots") from None

    def image(self, location: Location, volume: Volume) -> Image:
        """A volume's image with all that it stands on. Raises ImageDamaged when some of that is missing."""
        below = (Image(location.place(one.volume_id), one.meta.format) for one in ancestors(location, volume))
        return Image(location.place(volume.volume_id), volume.meta.format, tuple(below))


def require_no_snapshots(volume: Volume, advice: str) -> None:
    """Raises HasSnapshots: the operation makes another image, and what the present one holds besides would be lost."""
    if volume.snapshots:
        raise HasSnapshots(
            f"the volume has {volume.snapshots} snapshots, which would be lost: {advice}", snapshots=volume.snapshots
        )


def announce(feed: Feed, before: Volume | None, after: Volume | None) -> None:
    """Put a change of the index into the feed, whoever made it."""
    subject = after or before
    if subject is None or not differs(before, after):
        return
    kind = "volume.created" if before is None else "volume.removed" if after is None else "volume.changed"
    feed.publish(
        kind,
        subject.volume_id,
        before=audience(before) if before else None,
        after=audience(after) if after else None,
    )
