"""Ranges and conditions as RFC 9110 has them."""

import pytest
from starlette.datastructures import Headers

from elemento_storage.api.byte_ranges import MOST_RANGES, ByteRange, asked_ranges, entity_tag, is_known
from elemento_storage.errors import PreconditionFailed, RangeNotSatisfiable

TAG = entity_tag("tag", strong=True)
WEAK = entity_tag("tag", strong=False)


def asked(text: str | None, size: int = 100, etag: str = TAG, **more: str) -> list[tuple[int, int]] | None:
    headers = {name.replace("_", "-"): value for name, value in more.items()}
    if text is not None:
        headers["range"] = text
    found = asked_ranges(Headers(headers), etag, size)
    return None if found is None else [(one.start, one.stop) for one in found]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, None),
        ("bytes=0-0", [(0, 1)]),
        ("bytes=10-", [(10, 100)]),
        ("bytes=-30", [(70, 100)]),
        ("bytes=-1000", [(0, 100)]),
        ("bytes=90-1000", [(90, 100)]),
        ("Bytes = 1-2 , 4-5", [(1, 3), (4, 6)]),
        ("bytes=,,1-2,", [(1, 3)]),
        ("bytes=0-1,200-300", [(0, 2)]),  # what is not there is left out
        ("lines=1-2", None),  # another unit is ignored
    ],
)
def test_ranges(text: str | None, expected: list[tuple[int, int]] | None) -> None:
    assert asked(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "bytes=100-",
        "bytes=-0",
        "bytes=5-4",
        "bytes=",
        "bytes=-",
        "bytes=a-b",
        "bytes=1-2-3",
        "bytes=\u00b2-2",
        "bytes=0-99999999999999999999",
        "nonsense",
        "bytes=0-10,5-20",
        "bytes=20-30,0-10",
        "bytes=" + ",".join(f"{n}-{n}" for n in range(0, 2 * MOST_RANGES + 2, 2)),
    ],
)
def test_ranges_that_are_refused(text: str) -> None:
    with pytest.raises(RangeNotSatisfiable) as refused:
        asked(text)
    assert refused.value.details["size"] == 100


def test_nothing_of_an_empty_image_can_be_had() -> None:
    assert asked(None, 0) is None
    with pytest.raises(RangeNotSatisfiable):
        asked("bytes=0-", 0)


def test_if_range() -> None:
    assert asked("bytes=1-2", if_range=TAG) == [(1, 3)]
    assert asked("bytes=1-2", if_range='"other"') is None
    assert asked("bytes=500-", if_range='"other"') is None
    assert asked("bytes=1-2", etag=WEAK, if_range=WEAK) is None  # a weak tag proves nothing about bytes
    assert asked("bytes=1-2", if_range="Wed, 21 Oct 2015 07:28:00 GMT") is None


def test_content_range() -> None:
    assert ByteRange(1, 3).content_range(100) == "bytes 1-2/100"


@pytest.mark.parametrize("known", [TAG, WEAK, "*", f'"a", {TAG}', f'W/"a",{WEAK}', '"a,b", "tag"'])
def test_if_none_match(known: str) -> None:
    assert is_known(Headers({"if-none-match": known}), TAG)
    assert is_known(Headers({"if-none-match": known}), WEAK)


@pytest.mark.parametrize("known", ['"other"', "tag", '"TAG"', ""])
def test_if_none_match_of_other_bytes(known: str) -> None:
    assert not is_known(Headers({"if-none-match": known}), TAG)


def test_if_match() -> None:
    assert not is_known(Headers({"if-match": TAG}), TAG)
    assert not is_known(Headers({"if-match": "*"}), WEAK)
    for wanted, etag in ((WEAK, TAG), (WEAK, WEAK), (TAG, WEAK), ('"other"', TAG)):
        with pytest.raises(PreconditionFailed):
            is_known(Headers({"if-match": wanted}), etag)
