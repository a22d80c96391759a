import pytest

from elemento_storage.errors import ExportDiffers, InvalidValue, ProtocolsExclude
from elemento_storage.exports.record import PATH_OF, ExportRecord, Protocol
from elemento_storage.service.exporting import ExportOptions, check_options, require_one_path, require_same
from tests.unit.support import ALICE, uid


def record(protocol: Protocol = Protocol.ISCSI, **more: object) -> ExportRecord:
    return ExportRecord(volume_id=uid(1), client=ALICE, protocol=protocol, server=uid(2), **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "initiator",
    [
        "iqn.1993-08.org.debian:01:abc",
        "iqn.2004-10.cloud.elemento:client:x",
        "eui.02004567A425678D",
        "naa.52004567BA64678D",
    ],
)
def test_names_of_initiators(initiator: str) -> None:
    check_options(ExportOptions(initiator=initiator))


@pytest.mark.parametrize(
    "initiator",
    [
        *("", "ALL", "iqn.", "iqn.1993-08", "iqn.1993-08.", "iqn.93-08.org.debian", "debian", "iqn.1993-08.org,name=x"),
        *("iqn.1993-08.org.debian:a\n", "iqn.1993-08.org.debian:a b", "iqn.1993-08.org.debian:é", "iqn.1993-08.a\0"),
        *(f"iqn.1993-08.{'a' * 201}", "eui.x,initiator-address=ALL", " iqn.1993-08.org.debian:a"),
    ],
)
def test_what_is_no_name_of_an_initiator(initiator: str) -> None:
    with pytest.raises(InvalidValue, match="'initiator'"):
        check_options(ExportOptions(initiator=initiator))


@pytest.mark.parametrize(
    "addresses",
    [[], ["10.0.0.1"], ["10.0.0.0/8", "192.168.1.7/32"], ["::1", "fd00::/8"], [f"10.0.0.{n}" for n in range(32)]],
)
def test_addresses(addresses: list[str]) -> None:
    check_options(ExportOptions(addresses=tuple(addresses)))


@pytest.mark.parametrize(
    "address",
    [
        *("", "ALL", "localhost", "10.0.0.1,initiator-name=x", "10.0.0.1\n", " 10.0.0.1", "10.0.0", "10.0.0.1/8"),
        *(
            "10.0.0.0/33",
            "10.0.0.0/-1",
            "::1/129",
            "fe80::1%eth0",
            "１０.0.0.1",
            "010.0.0.1",
            "10.0.0.0/8/8",
            "x" * 10_000,
        ),
    ],
)
def test_what_is_no_address(address: str) -> None:
    with pytest.raises(InvalidValue, match="'addresses'") as failure:
        check_options(ExportOptions(addresses=("10.0.0.1", address)))
    assert len(failure.value.message) < 300


def test_addresses_are_written_in_one_way() -> None:
    """tgtd reads no netmasks, and the same address written otherwise is no other export."""
    given = ("10.0.0.0/255.0.0.0", "10.0.0.1/32", "FD00:0:0::1", "fd00::1/128", "10.0.0.7")
    kept = check_options(ExportOptions(addresses=given)).addresses
    assert kept == ("10.0.0.0/8", "10.0.0.1", "fd00::1", "fd00::1", "10.0.0.7")


def test_too_many_addresses() -> None:
    with pytest.raises(InvalidValue, match="more than 32"):
        check_options(ExportOptions(addresses=tuple(f"10.0.{n // 250}.{n % 250}" for n in range(1000))))


@pytest.mark.parametrize("protocol", [Protocol.NBD, Protocol.LOCAL])
def test_what_qemu_cannot_keep_out_is_not_promised(protocol: Protocol) -> None:
    with pytest.raises(InvalidValue, match="'addresses'"):
        check_options(ExportOptions(protocol=protocol, addresses=("10.0.0.1",)))
    with pytest.raises(InvalidValue, match="'initiator'"):
        check_options(ExportOptions(protocol=protocol, initiator="iqn.1993-08.org.debian:a"))
    check_options(ExportOptions(protocol=protocol, addresses=()))


def test_a_name_and_an_address_together_would_let_in_who_has_one_of_them() -> None:
    with pytest.raises(InvalidValue, match="together"):
        check_options(ExportOptions(initiator="iqn.1993-08.org.debian:a", addresses=("10.0.0.1",)))


def test_what_is_not_said_is_as_it_is() -> None:
    require_same(record(readonly=True, initiator="iqn.1993-08.org.debian:a"), ExportOptions())


@pytest.mark.parametrize(
    ("options", "key"),
    [
        (ExportOptions(protocol=Protocol.NBD), "protocol"),
        (ExportOptions(readonly=True), "readonly"),
        (ExportOptions(initiator="iqn.1993-08.org.debian:b"), "initiator"),
        (ExportOptions(addresses=("10.0.0.2",)), "addresses"),
    ],
)
def test_another_way_than_the_present_one(options: ExportOptions, key: str) -> None:
    with pytest.raises(ExportDiffers, match=f"another '{key}'") as failure:
        require_same(record(addresses=("10.0.0.1",)), options)
    assert failure.value.details == {"key": key}


def test_one_path_at_a_time() -> None:
    for one in Protocol:
        for other in Protocol:
            if PATH_OF[one] is PATH_OF[other]:
                require_one_path(record(one), [record(other)])
            else:
                with pytest.raises(ProtocolsExclude, match=str(other)):
                    require_one_path(record(one), [record(other)])
    assert PATH_OF[Protocol.NBD] is PATH_OF[Protocol.LOCAL]
    assert PATH_OF[Protocol.ISCSI] is PATH_OF[Protocol.SMB]
    assert PATH_OF[Protocol.NBD] is not PATH_OF[Protocol.ISCSI]
