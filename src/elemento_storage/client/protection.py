"""``client.snapshots`` and ``client.backups``."""

from elemento_storage.client.exchange import Long, Plan, long_operation, operation
from elemento_storage.client.exchange import M as Kind
from elemento_storage.client.group import Group, uid
from elemento_storage.client.types import (
    Backup,
    BackupDeleted,
    BackupSession,
    Created,
    OnProgress,
    Schedule,
    Snapshot,
    SnapshotDeleted,
    SnapshotRestored,
    Volume,
)

# Names for lists, because methods below are called list.
Snaps = list[Snapshot]
Backs = list[Backup]
Sessions = list[BackupSession]
Schedules = list[Schedule]


class Snapshots(Group[Kind]):
    """Snapshots of volumes, each named by its uid."""

    @operation
    def list(self, volume_id: str) -> Plan[Snaps]:
        """A volume's snapshots, oldest first."""
        return self._read("snapshots", Snaps, vid=uid(volume_id), client_uid=self.uid)

    @long_operation
    def create(
        self,
        volume_id: str,
        *,
        name: str | None = None,
        description: str | None = None,
        idempotency_key: str | None = None,
        on_progress: OnProgress | None = None,
    ) -> Long[Snapshot]:
        """Keep what a volume holds now, also while clients write to it."""
        body = {"vid": uid(volume_id), "creatorID": self.uid, "name": name, "description": description}
        return Long("snapshots/create", body, Snapshot, idempotency_key or "", on_progress)

    @long_operation
    def restore(
        self, volume_id: str, snapshot: str, *, keep: bool = False, on_progress: OnProgress | None = None
    ) -> Long[SnapshotRestored]:
        """Make a volume what it was; what it holds now is lost, unless ``keep`` makes a snapshot of it first."""
        body = {"vid": uid(volume_id), "creatorID": self.uid, "snapshot": uid(snapshot), "keep": keep}
        return Long("snapshots/restore", body, SnapshotRestored, None, on_progress)

    @long_operation
    def clone(
        self,
        volume_id: str,
        snapshot: str,
        *,
        name: str | None = None,
        private: bool | None = None,
        format: str | None = None,  # noqa: A002
        location: str | None = None,
        idempotency_key: str | None = None,
        on_progress: OnProgress | None = None,
    ) -> Long[Created]:
        """A new volume of the client's that holds what a snapshot does."""
        body = {
            "vid": uid(volume_id),
            "creatorID": self.uid,
            "snapshot": uid(snapshot),
            "name": name,
            "private": private,
            "format": format,
            "location": location,
        }
        return Long("snapshots/clone", body, Created, idempotency_key or "", on_progress)

    @long_operation
    def delete(self, volume_id: str, snapshot: str, *, on_progress: OnProgress | None = None) -> Long[SnapshotDeleted]:
        """Forget a snapshot."""
        body = {"vid": uid(volume_id), "creatorID": self.uid, "snapshot": uid(snapshot)}
        return Long("snapshots/delete", body, SnapshotDeleted, None, on_progress)


class Backups(Group[Kind]):
    """Backups, sessions for other backup programs, schedules."""

    @long_operation
    def create(
        self, volume_id: str, *, mode: str | None = None, name: str | None = None, on_progress: OnProgress | None = None
    ) -> Long[Backup]:
        """A backup of a volume as it is now. ``mode``: ``auto``, ``full`` or ``incremental``."""
        body = {"vid": uid(volume_id), "creatorID": self.uid, "mode": mode, "name": name}
        return Long("backups/create", body, Backup, None, on_progress)

    @operation
    def list(self, volume_id: str | None = None) -> Plan[Backs]:
        """The client's backups, oldest first."""
        return self._read("backups", Backs, client_uid=self.uid, vid=None if volume_id is None else uid(volume_id))

    @long_operation
    def restore(
        self,
        backup: str,
        *,
        volume_id: str | None = None,
        name: str | None = None,
        on_progress: OnProgress | None = None,
    ) -> Long[Volume]:
        """A new volume of a backup; or over the content of ``volume_id``."""
        body = {"backup": uid(backup), "creatorID": self.uid, "name": name}
        body |= {"vid": None if volume_id is None else uid(volume_id)}
        return Long("backups/restore", body, Volume, None, on_progress)

    @operation
    def delete(self, backup: str) -> Plan[BackupDeleted]:
        """Forget a backup; those that were made after it stay whole."""
        return self._change("backups/delete", BackupDeleted, backup=uid(backup), creatorID=self.uid)

    @long_operation
    def verify(self, backup: str, *, on_progress: OnProgress | None = None) -> Long[Backup]:
        """Read a backup and all that it needs, and compare."""
        body = {"backup": uid(backup), "creatorID": self.uid}
        return Long("backups/verify", body, Backup, None, on_progress)

    @operation
    def open(self, volume_id: str, *, since: str | None = None, lease_s: float | None = None) -> Plan[BackupSession]:
        """Serve this moment of a volume over NBD to another backup program, until ``close`` or the lease is over."""
        body = {"vid": uid(volume_id), "creatorID": self.uid, "lease": lease_s}
        body |= {"since": None if since is None else uid(since)}
        return self._change("backups/open", BackupSession, **body)

    @operation
    def renew(self, session: str, *, lease_s: float | None = None) -> Plan[BackupSession]:
        """Begin a session's lease anew."""
        return self._change("backups/renew", BackupSession, session=uid(session), creatorID=self.uid, lease=lease_s)

    @operation
    def close(self, session: str, *, saved: bool = False) -> Plan[BackupSession]:
        """End a session. ``saved``: the program has everything, and the next one may ask what changed since."""
        return self._change("backups/close", BackupSession, session=uid(session), creatorID=self.uid, saved=saved)

    @operation
    def sessions(self) -> Plan[Sessions]:
        """The open sessions."""
        return self._read("backups/sessions", Sessions, client_uid=self.uid)

    @operation
    def schedule(
        self,
        volume_id: str,
        every: str,
        *,
        at: str | None = None,
        keep: int | None = None,
        keep_days: float | None = None,
        full_every: int | None = None,
    ) -> Plan[Schedule]:
        """Back a volume up every period, such as ``24h``; ``off``: no more."""
        body = {"vid": uid(volume_id), "creatorID": self.uid, "every": every, "at": at}
        return self._change("backups/schedule", Schedule, **body, keep=keep, keep_days=keep_days, full_every=full_every)

    @operation
    def schedules(self) -> Plan[Schedules]:
        """The client's schedules."""
        return self._read("backups/schedules", Schedules, client_uid=self.uid)
