import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.datastructures import Headers

from elemento_storage.api import tus_headers
from elemento_storage.errors import (
    BodyTooLarge,
    InvalidValue,
    MissingKey,
    StorageError,
    TusVersionUnsupported,
    UnsupportedMediaType,
)
from tests.unit.support import uid


def headers(**values: str) -> Headers:
    return Headers({name.replace("_", "-"): value for name, value in values.items()})


def encoded(**values: str) -> str:
    return ",".join(f"{key} {base64.b64encode(value.encode()).decode()}" for key, value in values.items())


@pytest.mark.parametrize("given_headers", [{}, {"Tus_Resumable": "0.2.2"}, {"Tus_Resumable": ""}])
def test_another_version(given_headers: dict[str, str]) -> None:
    with pytest.raises(TusVersionUnsupported):
        tus_headers.require_version(headers(**given_headers))
    tus_headers.require_version(headers(Tus_Resumable="1.0.0"))


@pytest.mark.parametrize("text", ["-1", "1.5", "", "0x10", "1e3", "²", "9" * 21, " "])
def test_a_number_of_bytes_is_digits(text: str) -> None:
    with pytest.raises(InvalidValue, match="Upload-Offset"):
        tus_headers.offset(headers(Upload_Offset=text))


def test_an_offset_has_to_be_there() -> None:
    with pytest.raises(MissingKey):
        tus_headers.offset(headers())
    assert tus_headers.offset(headers(Upload_Offset="0017")) == 17


def test_more_than_a_file_can_hold() -> None:
    with pytest.raises(BodyTooLarge):
        tus_headers.length(headers(Upload_Length=str(2**63)))


@pytest.mark.parametrize(
    ("header", "values"),
    [
        ("", {}),
        ("name ZGlzaw==", {"name": "disk"}),
        ("name ZGlzaw==,is_confidential", {"name": "disk", "is_confidential": ""}),
        ("name ZGlzaw==, empty , x eA==", {"name": "disk", "empty": "", "x": "x"}),
        ("binary //8=,x eA==", {"x": "x"}),
    ],
)
def test_metadata(header: str, values: dict[str, str]) -> None:
    assert tus_headers.parse_metadata(header) == values


@pytest.mark.parametrize(
    "header", ["a eA==,a eA==", "a eA==,,b eA==", "a x", "a e A==", "a ZGlzaw", "a é", "," * 70_000]
)
def test_metadata_that_is_none(header: str) -> None:
    with pytest.raises(InvalidValue, match="Upload-Metadata"):
        tus_headers.parse_metadata(header)


@given(st.dictionaries(st.text(st.characters(categories=("Ll", "Nd"), max_codepoint=127), min_size=1), st.text()))
def test_any_metadata(values: dict[str, str]) -> None:
    assert tus_headers.parse_metadata(encoded(**values)) == values


@given(st.text(st.characters(max_codepoint=255)))
def test_any_nonsense_is_metadata_or_refused(header: str) -> None:
    try:
        tus_headers.parse_metadata(header)
    except StorageError as error:
        assert isinstance(error, InvalidValue)


def test_what_a_creation_says() -> None:
    asked = tus_headers.creation(headers(Upload_Length="5", Upload_Metadata=encoded(name="disk")))
    assert (asked.length, asked.values, asked.concat, asked.parts) == (5, {"name": "disk"}, "", ())
    asked = tus_headers.creation(headers(Upload_Length="5", Upload_Concat="partial"))
    assert asked.is_part
    assert tus_headers.creation(headers(Upload_Defer_Length="1")).length is None
    concat = f"final;/api/v1.0/uploads/{uid(1)} http://h:1/api/v1/uploads/{uid(2)}/"
    asked = tus_headers.creation(headers(Upload_Concat=concat))
    assert (asked.parts, asked.length, asked.concat) == ((uid(1), uid(2)), None, concat)


@pytest.mark.parametrize(
    "given_headers",
    [
        {},
        {"Upload_Defer_Length": "2"},
        {"Upload_Defer_Length": "1", "Upload_Length": "5"},
        {"Upload_Concat": "partial"},
        {"Upload_Concat": "partial", "Upload_Defer_Length": "1"},
        {"Upload_Concat": "whole", "Upload_Length": "5"},
        {"Upload_Concat": "final;"},
        {"Upload_Concat": "final;/api/v1.0/uploads/../../etc/passwd"},
        {"Upload_Concat": f"final;/elsewhere/{uid(1)}"},
        {"Upload_Concat": "final;/api/v1.0/uploads/%2e%2e%2f"},
        {"Upload_Concat": f"final;/api/v1.0/uploads/{uid(1)}", "Upload_Length": "5"},
        {"Upload_Concat": "final;" + f"/api/v1.0/uploads/{uid(1)} " * 1001},
    ],
)
def test_a_creation_that_says_too_little_or_too_much(given_headers: dict[str, str]) -> None:
    with pytest.raises((InvalidValue, MissingKey)):
        tus_headers.creation(headers(**given_headers))


def test_checksums() -> None:
    assert tus_headers.checksum(headers()) is None
    assert tus_headers.checksum(headers(Upload_Checksum=f"sha1 {'A' * 27}=")) == ("sha1", bytes(20))
    for wrong in ("crc32 AAAA", f"SHA1 {'A' * 27}=", "sha1 !", "sha1 AAAA", "sha1", ""):
        with pytest.raises(InvalidValue, match="Upload-Checksum"):
            tus_headers.checksum(headers(Upload_Checksum=wrong))


def test_kinds_of_bodies() -> None:
    assert not tus_headers.is_sparse(headers(Content_Type="application/offset+octet-stream"))
    assert not tus_headers.is_sparse(headers(Content_Type="Application/Offset+Octet-Stream; x=y"))
    assert tus_headers.is_sparse(headers(Content_Type="application/vnd.elemento.sparse+octet-stream"))
    for wrong in ("", "application/octet-stream", "application/json"):
        with pytest.raises(UnsupportedMediaType):
            tus_headers.is_sparse(headers(Content_Type=wrong))


def test_a_time_that_is_too_far_away_for_headers() -> None:
    assert tus_headers.http_date(0) == "Thu, 01 Jan 1970 00:00:00 GMT"
    assert tus_headers.http_date(1e300).endswith("GMT")
