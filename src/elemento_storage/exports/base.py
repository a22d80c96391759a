"""What every exporter does. The reconciler knows exporters by this protocol only."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol as TypingProtocol

from elemento_storage.engine.volume_engine import Source, VolumeEngine
from elemento_storage.exports.attach import GuestDisk
from elemento_storage.exports.record import ExportRecord, Protocol


@dataclass(frozen=True)
class Attachment:
    """The way to a volume's bytes that its engine has made.

    ``paths`` is, for each export of a protocol that serves files, what it opens. ``is_viewed``: that is FUSE.
    ``is_plain``: that is the image itself.
    """

    engine: VolumeEngine
    source: Source
    paths: Mapping[str, str] = field(default_factory=dict)
    is_viewed: bool = False
    is_plain: bool = False


@dataclass(frozen=True)
class Presence:
    """What a daemon says it serves: behind which file, to how many. None is what it does not tell."""

    path: str | None = None
    sessions: int | None = None
    read_bytes: int | None = None
    written_bytes: int | None = None


@dataclass(frozen=True)
class Probe:
    """An export that was used just now, as a client would. ``sessions`` is None when only ``Presence`` tells."""

    latency_s: float
    sessions: int | None = None


@dataclass(frozen=True)
class Endpoint:
    """Where a client finds the export, and how to attach it."""

    address: Mapping[str, object]
    credentials: Mapping[str, str] = field(default_factory=dict)
    qemu: tuple[str, ...] = ()  #: arguments of qemu-system-*
    libvirt: str = ""  #: a <disk> element
    prepare: tuple[str, ...] = ()  #: shell commands to be run on the client before


class Exporter(TypingProtocol):
    """One protocol. Every method may be called again after it failed or was cut off: all of them are idempotent."""

    protocol: Protocol

    @property
    def pids(self) -> tuple[int, ...]:
        """Processes that serve exports of this protocol only, besides the volumes' engines."""

    async def publish(self, record: ExportRecord, attachment: Attachment) -> None:
        """Serve the export as its record says, and nothing else under its name. Raises ExportFailed."""

    async def withdraw(self, export_id: str, engine: VolumeEngine | None) -> None:
        """Stop serving it. When this returns its client's connections are closed and nothing of it is under way.

        ``engine`` is None for what belongs to no volume we know. Raises ExportFailed.
        """

    async def published(self) -> Mapping[str, Presence]:
        """Export ids that the daemon of this protocol serves now: asked, never remembered. Raises ExportFailed.

        Empty for a protocol that is served by the volumes' engines: ``publish`` and ``probe`` see to those.
        """

    async def probe(self, record: ExportRecord, attachment: Attachment) -> Probe:
        """Use the export as a client would. Raises ExportFailed with what is wrong."""

    def endpoint(self, record: ExportRecord, engine: VolumeEngine, disk: GuestDisk) -> Endpoint:
        """What to tell the client."""
