#!/usr/bin/python
# Apache-2.0
"""Exports of an Elemento storage server."""

from __future__ import annotations

DOCUMENTATION = r"""
module: export
short_description: Exports of an Elemento storage server
description:
  - Puts a volume within reach of a client, or takes it away, and does nothing where it is already so.
attributes:
  check_mode:
    support: full
    description: Says what would change, and changes nothing.
options:
  volume:
    description: The volume's id.
    type: str
    required: true
  client:
    description: The uid of the client that is to have it. With a user's token it is the token's own.
    type: str
  protocol:
    description: How it is reached.
    type: str
    choices: [iscsi, nbd, smb, local]
    default: iscsi
  readonly:
    description: Whether it is to be read only.
    type: bool
  initiator:
    description: For V(iscsi), the name of the initiator that is let in; not together with O(addresses).
    type: str
  addresses:
    description: For V(iscsi) and V(smb), the addresses that are let in.
    type: list
    elements: str
  state:
    description: Whether it is to be exported. When V(absent) is done the client can no longer write.
    type: str
    choices: [present, absent]
    default: present
  server:
    description: Where the server is, V(http://HOST:PORT) or V(https://HOST:PORT).
    type: str
    default: http://127.0.0.1:7772
  token:
    description: The token, for servers that want one.
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
- name: A host gets a disk over NBD
  elemento.storage.export:
    volume: 869eb9be6ca93760aa9db42f464093bd
    client: ffffffffffffffffffffffffffffffff
    protocol: nbd
  register: attached
- name: And gives it back
  elemento.storage.export:
    volume: 869eb9be6ca93760aa9db42f464093bd
    client: ffffffffffffffffffffffffffffffff
    state: absent
"""

RETURN = r"""
export:
  description: The answer of the server, with C(qemu), C(libvirt) and, where there are any, credentials. Use C(no_log).
  returned: when it is exported, and not in check mode before it is
  type: dict
"""

from ansible.module_utils.basic import AnsibleModule

from ..module_utils.server import ARGUMENTS, Refused, Server


def exported(server, volume, client):
    """Whether the volume is exported to the client now."""
    listed = server.call("exports", volume_id=volume, client_uid=client)["exports"]
    mine = None if client is None else client.replace("-", "").lower()
    return any(mine in (None, one["client_uid"]) for one in listed)


def main():
    """The module."""
    module = AnsibleModule(
        argument_spec={
            "volume": {"type": "str", "required": True},
            "protocol": {"type": "str", "choices": ["iscsi", "nbd", "smb", "local"], "default": "iscsi"},
            "readonly": {"type": "bool"},
            "initiator": {"type": "str"},
            "addresses": {"type": "list", "elements": "str"},
            "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
            **ARGUMENTS,
        },
        mutually_exclusive=[("initiator", "addresses")],
        supports_check_mode=True,
    )
    wanted = module.params
    server = Server(module)
    who = {"volume_id": wanted["volume"], "client_uid": wanted["client"]}
    how = {key: wanted[key] for key in ("protocol", "readonly", "initiator", "addresses")}
    try:
        if wanted["state"] == "present":
            server.call("info", **who)  # for a volume that is not there, the same error in check mode
        is_there = exported(server, wanted["volume"], wanted["client"])
        result = {"changed": is_there != (wanted["state"] == "present")}
        if wanted["state"] == "present":
            # The same again answers the same; asked for in another way the server refuses and says what differs.
            if is_there or not module.check_mode:
                result["export"] = server.call("export", **who, **how)
        elif is_there and not module.check_mode:
            server.call("unexport", **who)
    except Refused as error:
        server.refuse(error)
    module.exit_json(**result)


if __name__ == "__main__":
    main()
