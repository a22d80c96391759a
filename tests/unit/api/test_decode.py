import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elemento_storage.api.decode import decode, ignored_keys, parse_object
from elemento_storage.api.schemas import (
    AccessibleRequest,
    CanCreateManyRequest,
    CanCreateRequest,
    CreateManyRequest,
    CreateRequest,
    DestroyRequest,
    InfoRequest,
    Nothing,
    ResizeRequest,
    RevisionsRequest,
    TransferRequest,
    UpdateRequest,
)
from elemento_storage.errors import InvalidRequest, InvalidValue, MissingKey, NotJSON
from elemento_storage.model import Bus, CloneAlgorithm, Preallocation, VolumeFormat
from tests.unit.support import ALICE, BOB

DASHED = "AAAAAAAA-AAAA-AAAA-AAAA-AAAAAAAAAAAA"
CREATE = {"creatorID": ALICE, "name": "disk", "size": 1}
START = "request was badly formatted. "


def create(**changes: Any) -> CreateRequest:
    return decode({**CREATE, **changes}, CreateRequest)[0]


# -- bodies ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("body", [b"", b"  \r\n", b"{}", b" {} "])
def test_an_empty_body_is_an_empty_object(body: bytes) -> None:
    assert parse_object(body) == {}


@pytest.mark.parametrize(
    "body",
    [b"[]", b"5", b"null", b'"x"', b"{", b"{'a': 1}", b"{} x", b"\xff", b'{"a": NaN}', b"a=1&b=2",
     b'{"a": ' + b"[" * 100_000, b"[" * 100_000, b'{"a": "\\ud800"}', b'{"a": 1' + b"0" * 5000 + b"}"],
    ids=lambda body: repr(body[:12]),
)  # fmt: skip
def test_what_is_not_a_json_object_is_refused_in_the_documents_words(body: bytes) -> None:
    with pytest.raises(NotJSON) as caught:
        parse_object(body)
    assert caught.value.message.startswith(START)


@given(st.binary(max_size=80))
def test_any_body_is_an_object_or_refused(body: bytes) -> None:
    try:
        assert isinstance(parse_object(body), dict)
    except NotJSON:
        return


# -- keys --------------------------------------------------------------------------------------------------


def test_the_documents_body_of_create() -> None:
    body = {
        "creatorID": "f" * 32, "name": "test-create", "private": False, "readonly": False, "shareable": False,
        "bootable": False, "clonable": False, "alg": "no", "format": "qcow2", "bus": "virtio", "size": 1,
    }  # fmt: skip
    request, ignored = decode(body, CreateRequest)
    assert ignored == []
    assert (request.creator_id, request.name, request.size, request.clonable) == ("f" * 32, "test-create", 1, False)
    assert (request.alg, request.format, request.bus) == (CloneAlgorithm.NO, "qcow2", Bus.VIRTIO)


def test_defaults_of_create() -> None:
    request = create()
    assert (request.private, request.readonly, request.shareable, request.bootable) == (False, False, False, False)
    assert (request.format, request.bus, request.preallocation) == ("raw", Bus.VIRTIO, Preallocation.OFF)


@pytest.mark.parametrize(
    ("kind", "body", "key"),
    [
        (CreateRequest, {}, "creatorID"),
        (CreateRequest, {"creatorID": ALICE}, "name"),
        (CreateRequest, {"name": "x", "size": 1}, "creatorID"),
        (CreateRequest, {**CREATE, "name": None}, "name"),
        (CreateRequest, {"creatorID": ALICE, "name": "x", "sizes": 1}, "size"),
        (InfoRequest, {}, "volume_id"),
        (AccessibleRequest, {}, "client_uid"),
        (UpdateRequest, {"creatorID": ALICE}, "vid"),
        (ResizeRequest, {"vid": ALICE, "creatorID": ALICE}, "size"),
        (TransferRequest, {"vid": ALICE, "creatorID": ALICE}, "newCreatorID"),
    ],
)
def test_a_missing_key_is_named_as_the_document_shows(
    kind: type[msgspec.Struct], body: dict[str, Any], key: str
) -> None:
    with pytest.raises(MissingKey) as caught:
        decode(body, kind)
    assert caught.value.message == f"request was badly formatted. '{key}'"
    assert caught.value.details == {"key": key}


def test_the_first_wrong_key_in_the_documents_order_is_named() -> None:
    with pytest.raises(InvalidValue, match="'creatorID' is 'x'"):
        decode({"creatorID": "x"}, CreateRequest)


def test_null_counts_as_absent() -> None:
    request, ignored = decode({**CREATE, "private": None, "alg": None, "unknown": None}, CreateRequest)
    assert (request.private, request.alg) == (False, None)
    assert ignored == ["unknown"]


@pytest.mark.parametrize(
    ("kind", "spellings", "attribute"),
    [
        (InfoRequest, ("volume_id", "vid", "volumeID"), "volume_id"),
        (DestroyRequest, ("volume_id", "vid", "volumeID"), "volume_id"),
        (AccessibleRequest, ("client_uid", "creatorID"), "client_uid"),
    ],
)
def test_the_same_thing_under_the_documents_other_names(
    kind: type[msgspec.Struct], spellings: tuple[str, ...], attribute: str
) -> None:
    for spelling in spellings:
        request, ignored = decode({spelling: DASHED}, kind)
        assert getattr(request, attribute) == ALICE
        assert ignored == []


def test_the_calls_own_name_goes_before_another() -> None:
    request, ignored = decode({"vid": BOB, "volume_id": ALICE}, InfoRequest)
    assert request.volume_id == ALICE
    assert ignored == ["vid"]


def test_unknown_keys_are_named_and_no_error() -> None:
    _, ignored = decode({**CREATE, "servers": ["x"], "own": True}, CreateRequest)
    assert ignored == ["servers", "own"]
    assert decode({"x": 1}, Nothing)[1] == ["x"]


def test_a_token_fills_in_its_client_where_none_is_named() -> None:
    fill = {"creatorID": BOB, "client_uid": BOB}
    assert decode({"name": "x", "size": 1}, CreateRequest, fill=fill)[0].creator_id == BOB
    assert decode(CREATE, CreateRequest, fill=fill)[0].creator_id == ALICE
    assert decode({**CREATE, "creatorID": None}, CreateRequest, fill=fill)[0].creator_id == BOB
    assert decode({}, AccessibleRequest, fill=fill)[0].client_uid == BOB
    assert decode({"creatorID": ALICE}, AccessibleRequest, fill=fill)[0].client_uid == ALICE


# -- values ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("creatorID", "xyz", "32 hex digits"),
        ("creatorID", ALICE + "\n", "32 hex digits"),
        ("creatorID", 5, "32 hex digits"),
        ("creatorID", [ALICE], "32 hex digits"),
        ("name", 5, "a text of at most 4096 bytes"),
        ("name", "x" * 4097, "a text of at most 4096 bytes"),
        ("size", "1", "a number greater than 0"),
        ("size", 0, "a number greater than 0"),
        ("size", -1.5, "a number greater than 0"),
        ("size", True, "a number greater than 0"),
        ("private", "yes", "true or false"),
        ("private", 1, "true or false"),
        ("format", "vmdk", "one of raw, qcow2"),
        ("format", ["raw"], "one of raw, qcow2"),
        ("alg", "dd", "one of cp, rclone, rsync, no"),
        ("alg", False, "one of cp, rclone, rsync, no"),
        ("bus", "usb", "one of virtio, scsi, sata, ide"),
        ("preallocation", "all", "one of off, metadata, falloc, full"),
    ],
)
def test_a_wrong_value_is_told_with_its_key_and_what_is_allowed(key: str, value: object, allowed: str) -> None:
    with pytest.raises(InvalidValue) as caught:
        create(**{key: value})
    assert caught.value.message.startswith(f"{START}'{key}' is ")
    assert allowed in caught.value.message
    assert caught.value.details["key"] == key
    assert len(caught.value.message) < 400


def test_sizes_stay_as_they_were_given() -> None:
    for size in (1, 0.5, 1.0, 9_000_000_000):
        given_back = create(size=size).size
        assert (given_back, type(given_back)) == (size, type(size))


def test_wrong_values_inside_a_list_are_found() -> None:
    with pytest.raises(InvalidValue, match="'sizes'"):
        decode({"sizes": [1, None]}, CanCreateManyRequest)
    wrong_lists: list[Any] = [[], [5], {}, "x", [{}] * 101]
    for volumes in wrong_lists:
        with pytest.raises(InvalidValue, match="'volumes'"):
            decode({"volumes": volumes}, CreateManyRequest)


def test_a_size_to_ask_for_may_be_text() -> None:
    for size in (5, 0.5, "5", "0.5", "0.10", "5.0", "100000", "1000000"):
        assert decode({"size": size}, CanCreateRequest)[0].size == size
        (asked, _) = decode({"size": str(size)}, CanCreateRequest, from_query=True)
        assert float(asked.size) == float(size)
    wrong: list[Any] = ["", "0", "-1", "much", "nan", "inf", [5], True]
    for size in wrong:
        with pytest.raises(InvalidValue, match="'size'"):
            decode({"size": size}, CanCreateRequest)


def test_query_parameters_are_texts() -> None:
    query = {"client_uid": ALICE, "limit": "10", "include_locked": "true", "format": "raw"}
    request, _ = decode(query, AccessibleRequest, from_query=True)
    assert (request.limit, request.include_locked, request.format) == (10, True, VolumeFormat.RAW)
    assert decode({"since": "5"}, RevisionsRequest, from_query=True)[0].since == 5
    assert decode({"client_uid": ALICE, "name": "true"}, AccessibleRequest, from_query=True)[0].name == "true"
    for query in ({"limit": "many"}, {"limit": "0"}, {"limit": "10001"}, {"include_locked": "maybe"}):
        with pytest.raises(InvalidValue):
            decode({"client_uid": ALICE, **query}, AccessibleRequest, from_query=True)
    with pytest.raises(InvalidValue):
        decode({"client_uid": ALICE, "limit": "10"}, AccessibleRequest)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=6)
    | st.sampled_from([ALICE, DASHED, "raw", "cp", "sata", "nan", "inf", "1e400", "5"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)  # fmt: skip
keys = st.sampled_from(["creatorID", "name", "size", "private", "format", "alg", "bus", "vid", "volume_id", "limit"])
KINDS = [CreateRequest, AccessibleRequest, InfoRequest, UpdateRequest, CanCreateRequest, CreateManyRequest]


@given(st.dictionaries(keys | st.text(max_size=4), values), st.sampled_from(KINDS), st.booleans())
def test_any_object_is_a_request_or_refused_in_words(
    body: dict[str, Any], kind: type[msgspec.Struct], from_query: bool
) -> None:
    if from_query:
        body = {key: str(value) for key, value in body.items()}
    try:
        request, ignored = decode(body, kind, from_query=from_query)
    except InvalidRequest as error:
        assert error.message.startswith(START)
        assert len(error.message) < 600
        json.dumps(dict(error.details))
        return
    assert isinstance(request, kind)
    assert set(ignored) <= set(body)
    "".join(ignored_keys(ignored).values()).encode("ascii")


# -- the header of ignored keys ----------------------------------------------------------------------------


def test_ignored_keys_read_well() -> None:
    assert ignored_keys(["servers", "own"]) == {"X-Ignored-Keys": "servers, own"}
    assert ignored_keys([]) == {}


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=200), max_size=40))
def test_no_key_can_break_a_header(names: list[str]) -> None:
    line = ignored_keys(names).get("X-Ignored-Keys", "")
    assert line.isascii()
    assert line.isprintable()
    assert len(line) < 20 * 80 * 12 + 100
