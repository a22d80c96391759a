import json
import re

import pytest
from msgspec.structs import replace

from elemento_storage.exports.record import ExportRecord, Protocol, client_of, decode_record, export_id, new_secret
from tests.unit.support import ALICE, BOB, uid

VOLUME = uid(0xABC)
RECORD = ExportRecord(
    volume_id=VOLUME,
    client=ALICE,
    protocol=Protocol.ISCSI,
    server=uid(3),
    host="häuschen",
    created="2025-02-05 23:34:07.1850",
    readonly=True,
    initiator="iqn.1993-08.org.debian:a",
    addresses=("10.0.0.1", "fd00::/8"),
    user="vabc",
    secret="s3cret",
    port=10809,
    migration=uid(9),
)


def changed(**values: object) -> bytes:
    """The record's JSON with other values."""
    return json.dumps({**json.loads(RECORD.encode()), **values}).encode()


def test_what_is_written_is_read() -> None:
    assert decode_record(RECORD.encode(), VOLUME) == RECORD
    assert RECORD.encode().count(b"\n") == 1
    assert RECORD.encode().endswith(b"\n")


def test_the_name_is_client_xor_volume() -> None:
    assert export_id(ALICE, VOLUME) == f"{int(ALICE, 16) ^ 0xABC:032x}"
    assert export_id(VOLUME, VOLUME) == "0" * 32
    assert client_of(export_id(BOB, VOLUME), VOLUME) == BOB
    assert RECORD.target_name == f"iqn.2004-10.cloud.elemento:01:{export_id(ALICE, VOLUME)}"


def test_what_an_older_server_did_not_write_has_a_default() -> None:
    few = {"volumeID": VOLUME, "client": ALICE, "protocol": "nbd", "server": uid(3)}
    assert decode_record(json.dumps(few).encode(), VOLUME) == ExportRecord(
        volume_id=VOLUME, client=ALICE, protocol=Protocol.NBD, server=uid(3)
    )
    assert decode_record(changed(of_a_newer_server=[1]), VOLUME) == RECORD


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"\n", b"\0" * 100, bytes(range(256)), b"{", b"[]", b"null", b"1e999", b'"x"', b"{}", b"\xff\xfe"),
        *(b"[" * 60_000, b'{"a":' * 10_000, b"9" * 60_000, b'"' + b"x" * 65_000, RECORD.encode()[:-10], b" " * 65_536),
        b'{"volumeID":"\\ud800","client":"a","protocol":"nbd","server":"b"}',
        changed(volumeID=uid(0xABD)),
        changed(volumeID=None),
        changed(client="nobody"),
        changed(client=ALICE.upper()),
        changed(client="../" * 10 + "ab"),
        changed(client="１" * 32),
        changed(server=""),
        changed(server=ALICE[:-1]),
        changed(protocol="floppy"),
        changed(protocol=["nbd"]),
        changed(addresses="10.0.0.1"),
        changed(addresses=[1]),
        changed(readonly="yes"),
        changed(port="10809"),
        changed(port=2**70),
        changed(port=1.5),
        changed(user=None),
    ],
)
def test_what_is_not_ours_is_nothing(content: bytes) -> None:
    assert decode_record(content, VOLUME) is None


@pytest.mark.parametrize("port", [-1, 65536, 2**31])
def test_a_port_that_is_none(port: int) -> None:
    assert decode_record(changed(port=port), VOLUME) is None


@pytest.mark.parametrize(
    "values",
    [
        {"user": "a,password=b"},
        {"secret": "a,b"},
        {"secret": "a\0b"},
        {"initiator": "iqn.1993-08.org.debian:a,initiator-address=ALL"},
        {"addresses": ["10.0.0.1,x=y"]},
        {"addresses": ["ALL", "10.0.0.1 "]},
    ],
)
def test_what_would_be_more_than_one_parameter_for_tgtd(values: dict[str, object]) -> None:
    assert decode_record(changed(**values), VOLUME) is None


def test_secrets_are_as_chap_takes_them() -> None:
    made = {new_secret() for _ in range(100)}
    assert len(made) == 100
    assert all(re.fullmatch(r"[A-Za-z0-9]{12,16}", one) for one in made)


def test_other_clients_have_other_names() -> None:
    assert replace(RECORD, client=BOB).target_name != RECORD.target_name
