import re
from datetime import UTC, datetime
from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elemento_storage.model import (
    GIGABYTE,
    MAX_VOLUME_BYTES,
    SECTOR_BYTES,
    VolumeFormat,
    format_last_updated,
    gigabytes_to_bytes,
    marker_name,
    new_uid,
    normalise_uid,
    parse_size,
    utc_now,
    volume_directory_name,
    volume_id_of_directory,
)
from tests.unit.support import ALICE, BOB

uids = st.uuids().map(lambda value: value.hex)


# -- uids --------------------------------------------------------------------------------------------------


@given(st.uuids(), st.booleans(), st.booleans())
def test_every_spelling_of_a_uuid_is_one_uid(value: object, dashed: bool, upper: bool) -> None:
    text = str(value) if dashed else str(value).replace("-", "")
    assert normalise_uid(text.upper() if upper else text) == str(value).replace("-", "")


@given(st.text(max_size=40) | st.text("0123456789abcdefABCDEF-\n\u0660\uff21", min_size=30, max_size=38))
def test_whatever_is_accepted_as_a_uid_is_32_hex_digits(text: str) -> None:
    found = normalise_uid(text)
    if found is not None:
        assert re.fullmatch("[0-9a-f]{32}", found)
        assert text.lower().replace("-", "") == found
        assert normalise_uid(found) == found


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a" * 31,
        "a" * 33,
        "g" * 32,
        "a" * 32 + "\n",
        " " + "a" * 32,
        "aaaaaaaaaaaa-aaaa-aaaa-aaaa-aaaaaaaa",
        "a-" * 16 + "aaaa",
        "\u0661" * 32,
        "{" + "a" * 32 + "}",
        "../" + "a" * 29,
    ],
)
def test_what_is_not_a_uid(text: str) -> None:
    assert normalise_uid(text) is None


def test_new_uids_are_uids_and_differ() -> None:
    made = {new_uid() for _ in range(100)}
    assert len(made) == 100
    assert all(normalise_uid(one) == one for one in made)


@given(uids)
def test_directory_name_and_back(volume_id: str) -> None:
    assert volume_directory_name(volume_id) == f"vid.{volume_id}.elimg"
    assert volume_id_of_directory(volume_directory_name(volume_id)) == volume_id


@pytest.mark.parametrize(
    "name",
    [
        f"vid.{'A' * 32}.elimg",
        f"vid.{'a' * 31}.elimg",
        f"vid.{'a' * 32}.elimg2",
        f"xvid.{'a' * 32}.elimg",
        f"vid.{'a' * 32}.elimg\n",
        "vid..elimg",
        "vid.elimg",
        "",
    ],
)
def test_what_is_not_a_volume_directory(name: str) -> None:
    assert volume_id_of_directory(name) is None


@given(uids, uids)
def test_marker_name_is_the_xor_of_both_uids(client: str, volume: str) -> None:
    name = marker_name(client, volume)
    match = re.fullmatch(r"iqn\.2004-10\.cloud\.elemento:01:([0-9a-f]{32})\.exported", name)
    assert match
    assert int(match[1], 16) ^ int(volume, 16) == int(client, 16)
    assert marker_name(volume, client) == name


def test_marker_name_keeps_leading_zeros() -> None:
    assert marker_name(ALICE, ALICE) == f"iqn.2004-10.cloud.elemento:01:{'0' * 32}.exported"
    assert marker_name(ALICE, BOB) == f"iqn.2004-10.cloud.elemento:01:{'1' * 32}.exported"


# -- formats -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "data_file"),
    [("raw", "data.img"), ("qcow2", "data.qcow2"), ("rbd", "data.rbd"), ("iso", "data.iso"), ("rdb", "data.rbd")],
)
def test_data_file_of_a_format(word: str, data_file: str) -> None:
    assert VolumeFormat(word).data_file == data_file


def test_unknown_formats_are_refused() -> None:
    for word in ("vmdk", "RAW", ""):
        with pytest.raises(ValueError, match="is not a valid"):
            VolumeFormat(word)


# -- sizes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size_gb", "size_bytes"),
    [
        (4, 4_000_000_000),
        (1, 1_000_000_000),
        (0.5, 500_000_256),  # 500,000,000 is no whole number of sectors
        (0.1, 100_000_256),
        (0.001, 1_000_448),
        (1e-9, 512),
        (5e-324, 512),
        (0.000000512, 512),
        (0.000000513, 1024),
    ],
)
def test_gigabytes_in_bytes(size_gb: float, size_bytes: int) -> None:
    assert gigabytes_to_bytes(size_gb) == size_bytes


@given(st.integers(1, 9_223_372_036) | st.floats(1e-12, 9e9))
def test_a_size_is_the_next_whole_sector_of_what_was_written(size_gb: float) -> None:
    exact = Fraction(Decimal(repr(size_gb))) * GIGABYTE
    size_bytes = gigabytes_to_bytes(size_gb)
    assert size_bytes % SECTOR_BYTES == 0
    assert exact <= size_bytes < exact + SECTOR_BYTES


@given(st.floats() | st.integers())
def test_a_size_is_either_refused_or_one_that_a_file_can_have(size_gb: float) -> None:
    try:
        size_bytes = gigabytes_to_bytes(size_gb)
    except ValueError:
        return
    assert 0 < size_bytes <= MAX_VOLUME_BYTES


@pytest.mark.parametrize(
    "size_gb", [0, 0.0, -0.0, -1, -0.5, float("nan"), float("inf"), float("-inf"), 9_223_372_037, 1e300, 10**400]
)
def test_sizes_no_volume_can_have(size_gb: float) -> None:
    with pytest.raises(ValueError, match=r"not|more"):
        gigabytes_to_bytes(size_gb)


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("50G", 50 * 10**9),
        ("50GB", 50 * 10**9),
        ("50Gi", 50 * 2**30),
        ("50GiB", 50 * 2**30),
        ("50gib", 50 * 2**30),
        ("50000000000", 50 * 10**9),
        ("50B", 50),
        ("1K", 1000),
        ("1Ki", 1024),
        ("1M", 10**6),
        ("1Mi", 2**20),
        ("1T", 10**12),
        ("1Ti", 2**40),
        ("1P", 10**15),
        ("1Pi", 2**50),
        ("0.5G", 5 * 10**8),
        ("0.5Gi", 2**29),
        ("1.5 TiB", 3 * 2**39),
        (" 2G ", 2 * 10**9),
        ("0", 0),
        ("0.1", 1),
        (50_000_000_000, 50 * 10**9),
        (0.5, 1),
        (1e12, 10**12),
    ],
)
def test_sizes_in_settings(text: str | float, size_bytes: int) -> None:
    assert parse_size(text) == size_bytes


@given(st.decimals(0, 10**6, places=3), st.sampled_from("KMGTP"), st.booleans(), st.sampled_from(["", "B"]))
def test_a_size_is_its_number_times_its_unit(number: Decimal, letter: str, binary: bool, suffix: str) -> None:
    factor = (1024 if binary else 1000) ** ("KMGTP".index(letter) + 1)
    exact = Fraction(number) * factor
    size_bytes = parse_size(f"{number}{letter}{'i' if binary else ''}{suffix}")
    assert exact <= size_bytes < exact + 1


@given(st.text(max_size=20) | st.text("0123456789.,-+eEKMGTPiB _", max_size=8))
def test_text_is_a_size_or_a_value_error(text: str) -> None:
    try:
        assert parse_size(text) >= 0
    except ValueError:
        return
    assert re.fullmatch(r"\s*[0-9].*", text, re.DOTALL)


@given(st.floats(0, 2**52))
def test_numbers_are_bytes_rounded_up(number: float) -> None:
    assert Fraction(number) <= parse_size(number) < Fraction(number) + 1


@pytest.mark.parametrize(
    "value",
    ["", "G", "-1G", "1e9", "1,5G", ".5G", "5.", "1 000", "0x10", "1GBi", "1i", "1E", "1\u0660", "1_0", True, -1, -0.5,
     float("nan"), float("inf")],
)  # fmt: skip
def test_what_is_not_a_size(value: str | float) -> None:
    with pytest.raises(ValueError, match="size"):
        parse_size(value)


# -- times -------------------------------------------------------------------------------------------------


def test_last_updated_has_the_form_of_the_document() -> None:
    moment = datetime(2025, 2, 5, 23, 34, 7, 185_000, UTC)
    assert format_last_updated(int(moment.timestamp()) * 10**9 + 185_000_000) == "2025-02-05 23:34:07.1850"
    assert format_last_updated(0) == "1970-01-01 00:00:00.0000"
    assert format_last_updated(-1) == "1969-12-31 23:59:59.9999"


@given(st.integers(0, 253_402_300_799 * 10**9))
def test_last_updated_is_utc_whatever_the_year(modified_ns: int) -> None:
    text = format_last_updated(modified_ns)
    seconds, rest = divmod(modified_ns, 10**9)
    assert text == f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S}.{rest:09}"[: len(text)]
    assert len(text) == len("2025-02-05 23:34:07.1850")


def test_now_is_iso_8601_in_utc() -> None:
    before = datetime.now(UTC).timestamp() - 0.001
    text = utc_now()
    assert text.endswith("Z")
    assert before <= datetime.fromisoformat(text).timestamp() <= datetime.now(UTC).timestamp()
