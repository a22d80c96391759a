"""Everything a client can do, in groups: the same for both kinds of clients."""

from collections.abc import Mapping
from typing import Any

from elemento_storage.client.exchange import M, Plan, Repeat, operation
from elemento_storage.client.exports import ExportGroup, MigrationGroup
from elemento_storage.client.group import Group, decoded, json_request, uid
from elemento_storage.client.images import CloudInit, Isos
from elemento_storage.client.protection import Backups, Snapshots
from elemento_storage.client.retry import Retries
from elemento_storage.client.server import Jobs, ServerGroup
from elemento_storage.client.uploads import Uploads
from elemento_storage.client.volumes import Volumes


class Groups(Group[M]):
    """A server as its clients see it, on behalf of one of them. ``uid`` None: whoever the token says, or nobody."""

    def __init__(self, runner: M, client: str | None, retries: Retries) -> None:
        super().__init__(runner, None if client is None else uid(client), retries)
        common = (runner, self.uid, retries)
        self.volumes = Volumes[M](*common)
        self.isos = Isos[M](*common)
        self.cloudinit = CloudInit[M](*common)
        self.snapshots = Snapshots[M](*common)
        self.backups = Backups[M](*common)
        self.exports = ExportGroup[M](*common)
        self.migrations = MigrationGroup[M](*common)
        self.uploads = Uploads[M](*common)
        self.jobs = Jobs[M](*common)
        self.server = ServerGroup[M](*common)

    def on_behalf_of(self, client: str | None) -> "Groups[M]":
        """The same server for another client, over the same connections."""
        return Groups(self.runner, client, self._retries)

    @operation
    def call(
        self, path: str, body: Mapping[str, Any] | None = None, *, safe: bool = False, key: str | None = None
    ) -> Plan[Any]:
        """A call by its path, for what has no method here: its answer as JSON.

        ``safe``: it changes nothing, so it may be repeated; ``key``: its Idempotency-Key.
        """
        headers = None if key is None else {"Idempotency-Key": key}
        repeat = Repeat.SAFE if safe or key is not None else Repeat.NEVER
        response = yield from self._send(json_request(path, body or {}, repeat, headers))
        return decoded(response, Any)
