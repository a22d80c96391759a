"""All use cases of one server, put together."""

from dataclasses import dataclass

from elemento_storage.service.backup_restore import Restoring
from elemento_storage.service.backup_schedules import BackupSchedules
from elemento_storage.service.backup_sessions import BackupSessions
from elemento_storage.service.backups import Backups
from elemento_storage.service.clone import Cloning
from elemento_storage.service.cloud_metadata import CloudMetadata
from elemento_storage.service.convert import Converting
from elemento_storage.service.core import Core
from elemento_storage.service.create import Creating
from elemento_storage.service.downloads import Downloading
from elemento_storage.service.exporting import Exporting
from elemento_storage.service.history import History
from elemento_storage.service.idempotency import IdempotencyKeys
from elemento_storage.service.importing import Importing
from elemento_storage.service.intake import Intake
from elemento_storage.service.iso_library import IsoLibrary
from elemento_storage.service.migration import Migrating
from elemento_storage.service.replace_image import ReplacingImages
from elemento_storage.service.resize import Resizing
from elemento_storage.service.snapshots import Snapshotting
from elemento_storage.service.uploading import Uploading
from elemento_storage.service.volume_data import VolumeData
from elemento_storage.service.volumes import Volumes


@dataclass(frozen=True)
class Services:
    """What the API calls."""

    core: Core
    creating: Creating
    isos: IsoLibrary
    metadata: CloudMetadata
    volumes: Volumes
    resizing: Resizing
    converting: Converting
    cloning: Cloning
    replacing: ReplacingImages
    importing: Importing
    intake: Intake
    downloading: Downloading
    data: VolumeData
    uploading: Uploading
    exporting: Exporting
    migrating: Migrating
    snapshotting: Snapshotting
    backups: Backups
    restoring: Restoring
    backup_sessions: BackupSessions
    backup_schedules: BackupSchedules
    idempotency: IdempotencyKeys
    history: History
