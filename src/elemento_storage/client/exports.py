"""``client.exports`` and ``client.migrations``: volumes within reach of hypervisors."""

from collections.abc import Sequence
from typing import Any

import msgspec

from elemento_storage.client.exchange import M as Kind
from elemento_storage.client.exchange import Plan, operation
from elemento_storage.client.group import Group, uid
from elemento_storage.client.types import Exported, Exports, Limits, Migration, Unexported

Migrations = list[Migration]


class ExportGroup(Group[Kind]):
    """Exports. Without ``to``, to the client itself."""

    @operation
    def create(
        self,
        volume_id: str,
        *,
        to: str | None = None,
        protocol: str | None = None,
        readonly: bool | None = None,
        initiator: str | None = None,
        addresses: Sequence[str] | None = None,
        limits: Limits | None = None,
    ) -> Plan[Exported]:
        """Put a volume within reach of a client: ``iscsi``, ``nbd``, ``smb`` or ``local``. The same again if it is."""
        body = {"volume_id": uid(volume_id), "client_uid": self._named(to), "protocol": protocol, "readonly": readonly}
        return self._change("export", Exported, **body, **_who(initiator, addresses, limits))

    @operation
    def delete(self, volume_id: str, *, to: str | None = None) -> Plan[Unexported]:
        """Take it away; when this returns the client can no longer write."""
        return self._change("unexport", Unexported, volume_id=uid(volume_id), client_uid=self._named(to))

    @operation
    def list(self, volume_id: str | None = None) -> Plan[Exports]:
        """Exports of the client's volumes and those made for it; all, if the client is nobody."""
        vid = None if volume_id is None else uid(volume_id)
        return self._read("exports", Exports, client_uid=self.uid, volume_id=vid)

    def _named(self, client: str | None) -> str | None:
        return self.uid if client is None else uid(client)


class MigrationGroup(Group[Kind]):
    """Live migration of guests between two clients."""

    @operation
    def prepare(
        self,
        volume_ids: Sequence[str],
        source: str,
        destination: str,
        *,
        protocol: str | None = None,
        readonly: bool | None = None,
        initiator: str | None = None,
        addresses: Sequence[str] | None = None,
        limits: Limits | None = None,
        deadline_s: float | None = None,
    ) -> Plan[Migration]:
        """Give the destination an export of each volume beside the source's."""
        body = {
            "volume_ids": [uid(one) for one in volume_ids],
            "source": uid(source),
            "destination": uid(destination),
            "protocol": protocol,
            "readonly": readonly,
            "deadline": deadline_s,
        }
        return self._change("livemigration/prepare", Migration, **body, **_who(initiator, addresses, limits))

    @operation
    def conclude(self, *, migration: str | None = None, volume_id: str | None = None) -> Plan[Migration]:
        """Take the source's exports away; when this returns the source can no longer write."""
        return self._change("livemigration/conclude", Migration, **_which(migration, volume_id))

    @operation
    def revert(self, *, migration: str | None = None, volume_id: str | None = None) -> Plan[Migration]:
        """Take the destination's exports away; the source's stay as they were."""
        return self._change("livemigration/revert", Migration, **_which(migration, volume_id))

    @operation
    def list(self) -> Plan[Migrations]:
        """The migrations that are not over. For admins."""
        return self._read("livemigration", Migrations)


def _who(initiator: str | None, addresses: Sequence[str] | None, limits: Limits | None) -> dict[str, Any]:
    return {
        "initiator": initiator,
        "addresses": None if addresses is None else [*addresses],
        "limits": None if limits is None else msgspec.to_builtins(limits),
    }


def _which(migration: str | None, volume_id: str | None) -> dict[str, Any]:
    return {
        "migration": None if migration is None else uid(migration),
        "volume_id": None if volume_id is None else uid(volume_id),
    }
