"""``client.volumes``: volumes from their creation to the bin."""

from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal

from elemento_storage.client.downloads import Downloaded, Fetcher
from elemento_storage.client.exchange import Emit, Items, Long, Plan, Repeat, iteration, long_operation, operation
from elemento_storage.client.exchange import M as Kind
from elemento_storage.client.group import Size, decoded, gigabytes, json_request, uid
from elemento_storage.client.types import (
    Binned,
    Checksum,
    Converted,
    Created,
    CreatedFromUrl,
    Destroyed,
    Extents,
    Has,
    OnProgress,
    Owned,
    Resized,
    Room,
    Updated,
    Volume,
)
from elemento_storage.client.uploads import Sender

# Names for lists, because a method below is called list.
Listed = list[Volume]
Bins = list[Binned]
Creations = list[Created]
PAGE: Final = 1000  #: volumes that are asked for at a time


class Volumes(Sender[Kind], Fetcher[Kind]):
    """Volumes. Sizes are bytes, or texts such as ``20G`` (10^9) and ``20GiB`` (2^30)."""

    # -- a volume comes into being ---------------------------------------------------------------------------

    @long_operation
    def create(
        self,
        name: str,
        size: Size,
        *,
        private: bool | None = None,
        readonly: bool | None = None,
        shareable: bool | None = None,
        bootable: bool | None = None,
        clonable: bool | None = None,
        alg: str | None = None,
        format: str | None = None,  # noqa: A002  the API's word
        bus: str | None = None,
        preallocation: str | None = None,
        ceph: bool | None = None,
        idempotency_key: str | None = None,
        on_progress: OnProgress | None = None,
    ) -> Long[Created]:
        """A new, empty volume of the client's; ``ceph``: as an image of a Ceph pool."""
        body = new_volume(
            name, size, private, clonable, alg, format, bus, readonly=readonly, shareable=shareable, bootable=bootable
        )
        body |= {"creatorID": self.uid, "preallocation": preallocation, "ceph": ceph}
        is_short = preallocation in (None, "off")
        return Long("create", body, Created, idempotency_key or "", on_progress, is_short=is_short)

    @long_operation
    def create_many(
        self,
        volumes: Sequence[Mapping[str, Any]],
        *,
        idempotency_key: str | None = None,
        on_progress: OnProgress | None = None,
    ) -> Long[Creations]:
        """All of them or none; each is what ``create`` takes, as a mapping."""
        bodies = []
        for one in volumes:
            told = {"creatorID": self.uid, **one, "size": gigabytes(one["size"])}
            bodies.append({key: value for key, value in told.items() if value is not None})
        is_short = all(one.get("preallocation", "off") == "off" for one in bodies)
        key = idempotency_key or ""
        return Long("create/multiple", {"volumes": bodies}, Creations, key, on_progress, is_short=is_short)

    @long_operation
    def create_from_url(
        self,
        name: str,
        url: str,
        *,
        size: Size | None = None,
        checksum: str | None = None,
        source_format: str | None = None,
        compression: str | None = None,
        private: bool | None = None,
        readonly: bool | None = None,
        shareable: bool | None = None,
        bootable: bool | None = None,
        clonable: bool | None = None,
        alg: str | None = None,
        format: str | None = None,  # noqa: A002
        bus: str | None = None,
        idempotency_key: str | None = None,
        on_progress: OnProgress | None = None,
    ) -> Long[CreatedFromUrl]:
        """A volume from an image that the server fetches from the web. ``checksum``: ``sha256:…`` or ``sha512:…``."""
        body = new_volume(
            name, size, private, clonable, alg, format, bus, readonly=readonly, shareable=shareable, bootable=bootable
        )
        body |= {"creatorID": self.uid, "url": url, "checksum": checksum}
        body |= {"source_format": source_format, "compression": compression}
        return Long("create/url", body, CreatedFromUrl, idempotency_key or "", on_progress)

    @operation
    def upload(
        self,
        path: str,
        name: str,
        *,
        size: Size | None = None,
        source_format: str | None = None,
        compression: str | None = None,
        private: bool | None = None,
        readonly: bool | None = None,
        shareable: bool | None = None,
        bootable: bool | None = None,
        clonable: bool | None = None,
        alg: str | None = None,
        format: str | None = None,  # noqa: A002
        bus: str | None = None,
        checksum: str | None = None,
        verify: bool = False,
        resume_file: str | None = None,
        on_progress: OnProgress | None = None,
    ) -> Plan[Volume]:
        """A volume of an image file. A connection that breaks is followed by another that goes on.

        ``resume_file``: where to note the upload's id, so that the same call in a new process goes on as well.
        ``verify``: read the file first, and let the server compare; or give its ``checksum``. Holes are not sent.
        """
        body = new_volume(
            name, size, private, clonable, alg, format, bus, readonly=readonly, shareable=shareable, bootable=bootable
        )
        body |= {"source_format": source_format, "compression": compression, "checksum": checksum}
        verify = verify and checksum is None
        return self.send_file(path, body, resume_file=resume_file, verify=verify, on_progress=on_progress)

    @operation
    def download(
        self,
        volume_id: str,
        path: str,
        *,
        format: str = "raw",  # noqa: A002
        verify: bool = False,
        overwrite: bool = False,
        on_progress: OnProgress | None = None,
    ) -> Plan[Downloaded]:
        """A volume as an image file: ``raw``, ``qcow2`` or ``vmdk``. The same call again goes on where one broke off.

        ``verify``: compare with the server's checksum before the file gets its name; raw only.
        """
        return self.fetch_file(volume_id, path, format, verify=verify, overwrite=overwrite, on_progress=on_progress)

    @long_operation
    def clone(
        self,
        volume_id: str,
        *,
        name: str | None = None,
        private: bool | None = None,
        format: str | None = None,  # noqa: A002
        location: str | None = None,
        linked: bool | None = None,
        idempotency_key: str | None = None,
        on_progress: OnProgress | None = None,
    ) -> Long[Created]:
        """A new volume of the client's that holds what another one holds now."""
        body = {
            "volume_id": uid(volume_id),
            "creatorID": self.uid,
            "name": name,
            "private": private,
            "format": format,
            "location": location,
            "linked": linked,
        }
        return Long("clone", body, Created, idempotency_key or "", on_progress)

    @long_operation
    def import_(
        self,
        path: str,
        *,
        name: str | None = None,
        private: bool | None = None,
        bootable: bool | None = None,
        bus: str | None = None,
        format: str | None = None,  # noqa: A002
        idempotency_key: str | None = None,
        on_progress: OnProgress | None = None,
    ) -> Long[Created]:
        """A volume of something that lies in a location's directory ``elemento-import``. For admins."""
        body = {
            "creatorID": self.uid,
            "path": path,
            "name": name,
            "private": private,
            "bootable": bootable,
            "bus": bus,
            "format": format,
        }
        return Long("import", body, Created, idempotency_key or "", on_progress)

    # -- looking ---------------------------------------------------------------------------------------------

    @iteration
    def list(
        self,
        *,
        name: str | None = None,
        format: str | None = None,  # noqa: A002
        iso_type: str | None = None,
        os_family: str | None = None,
        os_flavour: str | None = None,
        os_version: str | None = None,
        tool_scope: str | None = None,
        tool_version: str | None = None,
        sort: str | None = None,
        include_locked: bool = True,
        page: int = PAGE,
    ) -> Items[Volume]:
        """The volumes that the client can see, ``page`` at a time. ``name`` may have ``*`` and ``?``."""
        body = {
            "client_uid": self.uid,
            "name": name,
            "format": format,
            "iso_type": iso_type,
            "os_family": os_family,
            "os_flavour": os_flavour,
            "os_version": os_version,
            "tool_scope": tool_scope,
            "tool_version": tool_version,
            "sort": sort,
            "include_locked": include_locked,
            "limit": page,
        }
        return Items(self._pages(body))

    def _pages(self, body: Mapping[str, Any]) -> Plan[None]:
        cursor: str | None = None
        while True:
            request = json_request("accessible", {**body, "cursor": cursor}, Repeat.SAFE)
            response = yield from self._send(request)
            for volume in decoded(response, Listed):
                yield Emit(volume)
            cursor = response.headers.get("x-next-cursor")
            if cursor is None:
                return

    @operation
    def get(self, volume_id: str) -> Plan[Volume]:
        """One volume."""
        return self._read("info", Volume, volume_id=uid(volume_id), client_uid=self.uid)

    @operation
    def exists(self, volume_id: str) -> Plan[bool]:
        """Whether the server has a volume that the client may see."""
        answer = yield from self._read("has", Has, volume_id=uid(volume_id), client_uid=self.uid)
        return answer.has

    @operation
    def room(self, *sizes: Size) -> Plan[Room]:
        """Whether volumes of these sizes would find room together."""
        if len(sizes) == 1:
            return self._read("cancreate", Room, size=gigabytes(sizes[0]))
        return self._read("cancreate/multiple", Room, sizes=[gigabytes(size) for size in sizes])

    @operation
    def extents(self, volume_id: str, *, start: int = 0, limit: int | None = None) -> Plan[Extents]:
        """Where the data of a volume is, a page of it."""
        return self._look(f"volumes/{uid(volume_id)}/extents", Extents, start=start, limit=limit)

    @long_operation
    def checksum(
        self,
        volume_id: str,
        *,
        algorithm: Literal["sha256", "blake2b"] = "sha256",
        method: Literal["blocks", "plain"] = "blocks",
        on_progress: OnProgress | None = None,
    ) -> Long[Checksum]:
        """A checksum of what a guest sees, the same whatever the volume's format."""
        query = {"client_uid": self.uid, "algorithm": algorithm, "method": method}
        path = f"volumes/{uid(volume_id)}/checksum"
        return Long(path, query, Checksum, None, on_progress, "GET")

    # -- changing --------------------------------------------------------------------------------------------

    @operation
    def update(
        self,
        volume_id: str,
        *,
        name: str | None = None,
        private: bool | None = None,
        readonly: bool | None = None,
        shareable: bool | None = None,
        bootable: bool | None = None,
        clonable: bool | None = None,
        alg: str | None = None,
        bus: str | None = None,
        if_match: str | None = None,
    ) -> Plan[Updated]:
        """Change what is said of a volume; what is None stays. ``if_match``: only if it is still in that state."""
        body = {
            "vid": uid(volume_id),
            "creatorID": self.uid,
            "name": name,
            "private": private,
            "readonly": readonly,
            "shareable": shareable,
            "bootable": bootable,
            "clonable": clonable,
            "alg": alg,
            "bus": bus,
        }
        headers = None if if_match is None else {"If-Match": if_match}
        response = yield from self._send(json_request("update", body, Repeat.NEVER, headers))
        updated: Updated = decoded(response, Updated)
        return updated

    @operation
    def resize(self, volume_id: str, size: Size) -> Plan[Resized]:
        """Grow a volume to ``size``."""
        return self._change("update/resize", Resized, vid=uid(volume_id), creatorID=self.uid, size=gigabytes(size))

    @long_operation
    def convert(self, volume_id: str, format: str, *, on_progress: OnProgress | None = None) -> Long[Converted]:  # noqa: A002
        """Convert a volume to ``raw`` or ``qcow2``."""
        body = {"vid": uid(volume_id), "creatorID": self.uid, "format": format}
        return Long("update/convert", body, Converted, None, on_progress)

    @operation
    def transfer(self, volume_id: str, new_owner: str) -> Plan[Owned]:
        """Give a volume to another client."""
        return self._change("transfer", Owned, vid=uid(volume_id), creatorID=self.uid, newCreatorID=uid(new_owner))

    @long_operation
    def compact(self, volume_id: str, *, on_progress: OnProgress | None = None) -> Long[Owned]:
        """Make a linked clone independent of what it stands on."""
        body = {"vid": uid(volume_id), "creatorID": self.uid}
        return Long("overlay/compact", body, Owned, None, on_progress)

    @long_operation
    def reset(self, volume_id: str, *, on_progress: OnProgress | None = None) -> Long[Owned]:
        """Throw away what a volume holds, for good."""
        body = {"vid": uid(volume_id), "creatorID": self.uid}
        return Long("reset", body, Owned, None, on_progress)

    # -- the bin ---------------------------------------------------------------------------------------------

    @operation
    def destroy(self, volume_id: str) -> Plan[Destroyed]:
        """Move a volume into the bin."""
        return self._change("destroy", Destroyed, volume_id=uid(volume_id), creatorID=self.uid)

    @operation
    def binned(self) -> Plan[Bins]:
        """The client's destroyed volumes, oldest first."""
        return self._read("bin", Bins, client_uid=self.uid)

    @operation
    def restore(self, volume_id: str) -> Plan[Volume]:
        """Bring a volume back from the bin."""
        return self._change("restore", Volume, volume_id=uid(volume_id), client_uid=self.uid)


def new_volume(
    name: str,
    size: Size | None,
    private: bool | None,
    clonable: bool | None,
    alg: str | None,
    format: str | None,  # noqa: A002
    bus: str | None,
    **more: Any,
) -> dict[str, Any]:
    """The keys that every call has that makes a volume."""
    body = {"name": name, "size": gigabytes(size), "private": private, "clonable": clonable, "alg": alg}
    return {**body, "format": format, "bus": bus, **more}
