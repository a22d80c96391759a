"""What tgtd prints, as the real one printed it (1.0.85), and what it might."""

import pytest

from elemento_storage.exports.tgtd import Target, parse_targets

NAME = "iqn.2004-10.cloud.elemento:01:" + "a" * 32
OUTPUT = f"""\
Target 1: {NAME}
    System information:
        Driver: iscsi
        State: ready
    I_T nexus information:
        I_T nexus: 3
            Initiator: iqn.1993-08.org.debian:01:abc alias: host
            Connection: 0
                IP Address: 127.0.0.1
        I_T nexus: 12
            Initiator: iqn.2004-10.cloud.elemento:probe:0 alias: none
            Connection: 0
                IP Address: 127.0.0.1
    LUN information:
        LUN: 0
            Type: controller
            SCSI ID: IET     00010000
            SCSI SN: beaf10
            Size: 0 MB, Block size: 1
            Online: Yes
            Removable media: No
            Prevent removal: No
            Readonly: No
            SWP: No
            Thin-provisioning: No
            Backing store type: null
            Backing store path: None
            Backing store flags:
        LUN: 1
            Type: disk
            SCSI ID: 00000000000000000000000000001234
            SCSI SN: 00000000000000000000000000001234
            Size: 8 MB, Block size: 512
            Online: Yes
            Removable media: No
            Prevent removal: No
            Readonly: Yes
            SWP: No
            Thin-provisioning: Yes
            Backing store type: rdwr
            Backing store path: /run/es/v/1234/lun-0-8388608
            Backing store flags:
    Account information:
        vabc
        vdef (outgoing)
    ACL information:
        ALL
        iqn.1993-08.org.debian:01:abc
Target 20: iqn.2001-04.com.example:by-hand
    System information:
        Driver: iscsi
        State: ready
    I_T nexus information:
    LUN information:
        LUN: 0
            Type: controller
            Online: Yes
            Backing store path: None
    Account information:
    ACL information:
"""


def test_everything_is_read() -> None:
    found = parse_targets(OUTPUT)
    assert set(found) == {NAME, "iqn.2001-04.com.example:by-hand"}
    target = found[NAME]
    assert (target.tid, target.path, target.online, target.readonly) == (1, "/run/es/v/1234/lun-0-8388608", True, True)
    assert target.initiators == [(3, "iqn.1993-08.org.debian:01:abc"), (12, "iqn.2004-10.cloud.elemento:probe:0")]
    assert target.acl == ["ALL", "iqn.1993-08.org.debian:01:abc"]
    assert target.accounts[0] == "vabc"
    assert found["iqn.2001-04.com.example:by-hand"] == Target(20, "iqn.2001-04.com.example:by-hand")


def test_a_lun_that_is_offline() -> None:
    text = OUTPUT.replace("Online: Yes", "Online: No").replace("/run/es/v/1234/lun-0-8388608", "None")
    target = parse_targets(text)[NAME]
    assert (target.path, target.online) == (None, False)


@pytest.mark.parametrize("text", ["", "\n\n", "rubbish\n        more", "Target x: y\n    LUN information:"])
def test_what_names_no_target_is_none(text: str) -> None:
    assert parse_targets(text) == {}


def test_every_beginning_of_an_answer_can_be_read() -> None:
    for length in range(len(OUTPUT)):
        assert len(parse_targets(OUTPUT[:length])) <= 2
