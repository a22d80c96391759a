"""Who may do what (contract, section 4)."""

from dataclasses import dataclass

from elemento_storage.errors import NotOwner, VolumeNotFound
from elemento_storage.feed import Audience
from elemento_storage.model import Volume


@dataclass(frozen=True)
class Actor:
    """On whose behalf an operation runs. ``client`` None is the infrastructure itself, which may do everything."""

    client: str | None

    def may_see(self, volume: Volume) -> bool:
        """Private volumes are seen by their owner only."""
        return audience(volume).includes(self.client)

    def require_see(self, volume: Volume) -> None:
        """Raises VolumeNotFound: to a stranger a private volume does not exist."""
        if not self.may_see(volume):
            raise VolumeNotFound(volume.volume_id)

    def require_change(self, volume: Volume) -> None:
        """Only the owner changes, resizes, converts, destroys or transfers. Raises VolumeNotFound, NotOwner."""
        self.require_see(volume)
        if self.client is not None and self.client != volume.meta.creator_id:
            raise NotOwner("only the owner of the volume may do this", volume_id=volume.volume_id)


INFRASTRUCTURE = Actor(None)


def audience(volume: Volume) -> Audience:
    """Who may know of the volume."""
    return Audience(owner=volume.meta.creator_id, private=volume.meta.private)
