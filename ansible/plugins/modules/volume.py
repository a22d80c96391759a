#!/usr/bin/python
# Apache-2.0
"""Volumes of an Elemento storage server."""

from __future__ import annotations

DOCUMENTATION = r"""
module: volume
short_description: Volumes of an Elemento storage server
description:
  - Makes, changes, grows, converts and destroys a volume, and does nothing where it is already so.
attributes:
  check_mode:
    support: full
    description: Says what would change, and changes nothing.
  diff_mode:
    support: full
    description: Shows what is and what will be of the options that are given.
options:
  vid:
    description: The volume, by its id. Without one it is found by O(name).
    type: str
  name:
    description: The volume's name. With O(vid), the name it is to have.
    type: str
  state:
    description: Whether there is to be such a volume. V(absent) moves it into the server's bin.
    type: str
    choices: [present, absent]
    default: present
  size:
    description: GB of 10^9 bytes, whole or fractional. Required for a new volume; grows one that is smaller.
    type: float
  format:
    description: The image's format; a volume of another is converted. V(raw) for a new volume.
    type: str
    choices: [raw, qcow2]
  private:
    description: Whether only its owner may see it.
    type: bool
  readonly:
    description: Whether it is exported read-only.
    type: bool
  shareable:
    description: Whether several clients may have it at once.
    type: bool
  bootable:
    description: Whether machines may boot from it; not together with O(shareable).
    type: bool
  bus:
    description: How machines see it.
    type: str
    choices: [virtio, scsi, sata, ide]
  server:
    description: Where the server is, V(http://HOST:PORT) or V(https://HOST:PORT).
    type: str
    default: http://127.0.0.1:7772
  token:
    description: The token, for servers that want one.
    type: str
  client:
    description: The uid of the client that the volume belongs to. With a user's token it is the token's own.
    type: str
  ca_path:
    description: PEM file of the authority that signed the server's certificate.
    type: path
  validate_certs:
    description: Whether the server has to prove who it is.
    type: bool
    default: true
  timeout:
    description: Seconds that a call may take.
    type: int
    default: 60
author: Elemento Storage Server maintainers
"""

EXAMPLES = r"""
- name: A disk of 20 GB
  elemento.storage.volume:
    name: web-1
    size: 20
    format: qcow2
    client: ffffffffffffffffffffffffffffffff
- name: It goes into the bin
  elemento.storage.volume:
    name: web-1
    state: absent
    client: ffffffffffffffffffffffffffffffff
"""

RETURN = r"""
volume:
  description: The volume as the server describes it, its id under C(volumeID); absent when it is gone.
  returned: when there is one
  type: dict
"""

import math
import uuid

from ansible.module_utils.basic import AnsibleModule

from ..module_utils.server import ARGUMENTS, Refused, Server

_SECTOR = 512
_PLAIN = ("name", "private", "readonly", "shareable", "bootable", "bus")


def size_bytes(gigabytes):
    """As the server rounds it."""
    return math.ceil(gigabytes * 10**9 / _SECTOR) * _SECTOR


class Volume:
    """The volume that the task is about."""

    def __init__(self, module):
        self.module = module
        self.wanted = module.params
        self.server = Server(module)
        self.client = self.wanted["client"]

    def find(self):
        """The volume as it is, or None."""
        if self.wanted["vid"]:
            try:
                return self.server.call("info", volume_id=self.wanted["vid"], client_uid=self.client)
            except Refused as error:
                if error.code == "volume-not-found":
                    return None
                raise
        # A name may hold what would be a pattern; so the server is asked for all, and the names are compared here.
        listed = self.server.call("accessible", client_uid=self.client, include_locked=True)
        named = [one for one in listed if one["name"] == self.wanted["name"]]
        if self.client is not None:
            named = [one for one in named if one["creatorID"] == self.client.replace("-", "").lower()]
        if len(named) > 1:
            self.module.fail_json(
                msg=f"there are {len(named)} volumes of the name {self.wanted['name']!r}: say which by vid",
                vids=[one["volumeID"] for one in named],
            )
        return named[0] if named else None

    def changes(self, present):
        """Of the options that are given, those that are otherwise: what is, and what will be."""
        before, after = {}, {}
        for key in _PLAIN:
            if self.wanted[key] is not None and self.wanted[key] != present[key]:
                before[key], after[key] = present[key], self.wanted[key]
        if self.wanted["format"] not in (None, present["format"]):
            before["format"], after["format"] = present["format"], self.wanted["format"]
        if self.wanted["size"] is not None:
            size = size_bytes(self.wanted["size"])
            if size < present["size"]:
                self.module.fail_json(msg=f"the volume has {present['size']} bytes, and a volume never shrinks")
            if size > present["size"]:
                before["size"], after["size"] = present["size"], size
        return before, after

    def create(self):
        """Make it; the answer of info."""
        for key in ("name", "size"):
            if self.wanted[key] is None:
                self.module.fail_json(msg=f"{key} is needed for a new volume")
        values = {key: self.wanted[key] for key in (*_PLAIN, "size", "format")}
        if self.module.check_mode:
            return None
        # A key of its own: a connection that breaks and is tried again by Ansible's client makes no second volume.
        made = self.server.call("create", key=uuid.uuid4().hex, creatorID=self.client, **values)
        return self.server.call("info", volume_id=made["vid"], client_uid=self.client)

    def change(self, present, after):
        """Do what is not so yet; the answer of info."""
        vid, client = present["volumeID"], self.client
        plain = {key: value for key, value in after.items() if key in _PLAIN}
        # bootable and shareable exclude each other, so both go in one call.
        if plain:
            self.server.call("update", vid=vid, creatorID=client, **plain)
        if "format" in after:
            self.server.call("update/convert", vid=vid, creatorID=client, format=after["format"])
        if "size" in after:
            self.server.call("update/resize", vid=vid, creatorID=client, size=self.wanted["size"])
        return self.server.call("info", volume_id=vid, client_uid=client)

    def present(self):
        """The result of ``state: present``."""
        there = self.find()
        if there is None:
            if self.wanted["vid"]:
                self.module.fail_json(msg=f"there is no volume {self.wanted['vid']}; ids are chosen by the server")
            after = {key: self.wanted[key] for key in (*_PLAIN, "size", "format") if self.wanted[key] is not None}
            made = self.create()
            return {"changed": True, "diff": {"before": {}, "after": after}, **({"volume": made} if made else {})}
        before, after = self.changes(there)
        if after and not self.module.check_mode:
            there = self.change(there, after)
        return {"changed": bool(after), "diff": {"before": before, "after": after}, "volume": there}

    def absent(self):
        """The result of ``state: absent``."""
        there = self.find()
        if there is None:
            return {"changed": False}
        if not self.module.check_mode:
            try:
                self.server.call("destroy", volume_id=there["volumeID"], creatorID=self.client)
            except Refused as error:
                if error.code != "volume-not-found":  # somebody else was faster
                    raise
        return {"changed": True, "diff": {"before": {"name": there["name"]}, "after": {}}}


def main():
    """The module."""
    module = AnsibleModule(
        argument_spec={
            "vid": {"type": "str"},
            "name": {"type": "str"},
            "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
            "size": {"type": "float"},
            "format": {"type": "str", "choices": ["raw", "qcow2"]},
            "private": {"type": "bool"},
            "readonly": {"type": "bool"},
            "shareable": {"type": "bool"},
            "bootable": {"type": "bool"},
            "bus": {"type": "str", "choices": ["virtio", "scsi", "sata", "ide"]},
            **ARGUMENTS,
        },
        required_one_of=[("vid", "name")],
        supports_check_mode=True,
    )
    volume = Volume(module)
    try:
        result = volume.present() if module.params["state"] == "present" else volume.absent()
    except Refused as error:
        volume.server.refuse(error)
    module.exit_json(**result)


if __name__ == "__main__":
    main()
