"""``client.isos`` and ``client.cloudinit``: volumes to boot from, and what tells cloud-init what to do."""

import os
from collections.abc import Mapping
from typing import Any

from elemento_storage.client.exchange import Long, Plan, Repeat, Request, long_operation, operation
from elemento_storage.client.exchange import M as Kind
from elemento_storage.client.group import Group, Size, decoded, gigabytes, new_key, uid
from elemento_storage.client.multipart import form
from elemento_storage.client.types import CreatedFromUrl, CreatedIso, Metadata, OnProgress, Volume
from elemento_storage.client.uploads import Sender
from elemento_storage.client.volumes import new_volume


class Isos(Sender[Kind]):
    """The ISO library. ``isotype`` is ``os_generic`` (something to boot from) or ``tool``."""

    @operation
    def create(
        self,
        name: str,
        isotype: str,
        os_family: str,
        *,
        os_flavour: str | None = None,
        os_version: str | None = None,
        tool_scope: str | None = None,
        tool_version: str | None = None,
        private: bool | None = None,
        clonable: bool | None = None,
        alg: str | None = None,
        size: Size | None = None,
        idempotency_key: str | None = None,
    ) -> Plan[CreatedIso]:
        """An ISO volume that waits for its content; ``size`` is the room that is kept for it."""
        body = iso_facts(name, isotype, os_family, os_flavour, os_version, tool_scope, tool_version)
        body |= {"creatorID": self.uid, "private": private, "clonable": clonable, "alg": alg}
        return self._keyed("iso/create", CreatedIso, idempotency_key, **body, size=gigabytes(size))

    @long_operation
    def create_from_url(
        self,
        name: str,
        isotype: str,
        os_family: str,
        url: str,
        *,
        checksum: str | None = None,
        compression: str | None = None,
        os_flavour: str | None = None,
        os_version: str | None = None,
        tool_scope: str | None = None,
        tool_version: str | None = None,
        private: bool | None = None,
        clonable: bool | None = None,
        alg: str | None = None,
        idempotency_key: str | None = None,
        on_progress: OnProgress | None = None,
    ) -> Long[CreatedIso]:
        """An ISO volume that the server fetches from the web."""
        body = iso_facts(name, isotype, os_family, os_flavour, os_version, tool_scope, tool_version)
        body |= {"creatorID": self.uid, "private": private, "clonable": clonable, "alg": alg}
        body |= {"url": url, "checksum": checksum, "compression": compression}
        return Long("iso/create/url", body, CreatedIso, idempotency_key or "", on_progress)

    @long_operation
    def fill_from_url(
        self,
        volume_id: str,
        url: str,
        *,
        checksum: str | None = None,
        compression: str | None = None,
        idempotency_key: str | None = None,
        on_progress: OnProgress | None = None,
    ) -> Long[CreatedIso]:
        """Content from the web for an ISO volume that waits for it."""
        body = {"creatorID": self.uid, "vid": uid(volume_id), "url": url}
        body |= {"checksum": checksum, "compression": compression}
        return Long("iso/create/url", body, CreatedIso, idempotency_key or "", on_progress)

    @operation
    def upload(
        self,
        path: str,
        name: str,
        isotype: str,
        os_family: str,
        *,
        os_flavour: str | None = None,
        os_version: str | None = None,
        tool_scope: str | None = None,
        tool_version: str | None = None,
        private: bool | None = None,
        clonable: bool | None = None,
        alg: str | None = None,
        compression: str | None = None,
        verify: bool = False,
        resume_file: str | None = None,
        on_progress: OnProgress | None = None,
    ) -> Plan[Volume]:
        """An ISO volume of a local file; see ``volumes.upload``."""
        body = iso_facts(name, isotype, os_family, os_flavour, os_version, tool_scope, tool_version)
        body |= {"private": private, "clonable": clonable, "alg": alg, "compression": compression}
        return self.send_file(path, body, resume_file=resume_file, verify=verify, on_progress=on_progress)

    @operation
    def fill(
        self,
        volume_id: str,
        path: str,
        *,
        compression: str | None = None,
        verify: bool = False,
        resume_file: str | None = None,
        on_progress: OnProgress | None = None,
    ) -> Plan[Volume]:
        """Content of a local file for an ISO volume that waits for it."""
        body = {"volume_id": uid(volume_id), "compression": compression}
        return self.send_file(path, body, resume_file=resume_file, verify=verify, on_progress=on_progress)


class CloudInit(Group[Kind]):
    """Cloud images, and the volumes that cloud-init reads its instructions from."""

    @long_operation
    def create(
        self,
        name: str,
        url: str,
        *,
        size: Size | None = None,
        checksum: str | None = None,
        source_format: str | None = None,
        compression: str | None = None,
        private: bool | None = None,
        clonable: bool | None = None,
        alg: str | None = None,
        format: str | None = None,  # noqa: A002
        bus: str | None = None,
        idempotency_key: str | None = None,
        on_progress: OnProgress | None = None,
    ) -> Long[CreatedFromUrl]:
        """A bootable volume from a cloud image on the web, grown to ``size``."""
        body = new_volume(name, size, private, clonable, alg, format, bus, url=url, checksum=checksum)
        body |= {"creatorID": self.uid, "source_format": source_format, "compression": compression}
        return Long("cloudinit/create", body, CreatedFromUrl, idempotency_key or "", on_progress)

    @operation
    def create_metadata(
        self,
        name: str,
        expected_files: int,
        *,
        private: bool | None = None,
        bootable: bool | None = None,
        clonable: bool | None = None,
        alg: str | None = None,
        idempotency_key: str | None = None,
    ) -> Plan[Metadata]:
        """A metadata volume that waits for so many files."""
        body = {"creatorID": self.uid, "name": name, "expectedFiles": expected_files, "private": private}
        body |= {"bootable": bootable, "clonable": clonable, "alg": alg}
        return self._keyed("cloudinit/metadata", Metadata, idempotency_key, **body)

    @operation
    def add_files(self, volume_id: str, files: Mapping[str, bytes]) -> Plan[Metadata]:
        """Put files into a metadata volume; those that are there already are replaced, so it may be repeated."""
        data: dict[str, Any] = {"vid": uid(volume_id)}
        if self.uid is not None:
            data["creatorID"] = self.uid
        return self._form(data, files, None)

    @operation
    def create_seed(
        self, name: str, files: Mapping[str, bytes], *, private: bool | None = None, idempotency_key: str | None = None
    ) -> Plan[Metadata]:
        """A metadata volume with all its files at once: ``user-data``, ``meta-data``, ``network-data``, scripts."""
        data: dict[str, Any] = {"name": name, "expectedFiles": len(files)}
        data |= {key: value for key, value in (("creatorID", self.uid), ("private", private)) if value is not None}
        return self._form(data, files, idempotency_key or new_key())

    def _form(self, data: Mapping[str, Any], files: Mapping[str, bytes], key: str | None) -> Plan[Metadata]:
        content_type, body = form(data, {os.path.basename(name): content for name, content in files.items()})
        headers = {"Content-Type": content_type} | ({} if key is None else {"Idempotency-Key": key})
        response = yield from self._send(Request("POST", "cloudinit/metadata", body, headers, repeat=Repeat.SAFE))
        metadata: Metadata = decoded(response, Metadata)
        return metadata


def iso_facts(
    name: str,
    isotype: str,
    os_family: str,
    os_flavour: str | None,
    os_version: str | None,
    tool_scope: str | None,
    tool_version: str | None,
) -> dict[str, Any]:
    """What is said of an ISO volume."""
    return {
        "name": name,
        "isotype": isotype,
        "os_family": os_family,
        "os_flavour": os_flavour,
        "os_version": os_version,
        "tool_scope": tool_scope,
        "tool_version": tool_version,
    }
