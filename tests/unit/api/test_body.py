from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.requests import Request

from elemento_storage.api.body import FormFile, read_form, read_json
from elemento_storage.errors import BodyTooLarge, InvalidRequest, UnsupportedMediaType

FORM = b"--x\r\nContent-Disposition: form-data; name=%s\r\n\r\n%s\r\n"
FILE = b'--x\r\nContent-Disposition: form-data; name="file"; filename="%s"\r\n\r\n%s\r\n'
END = b"--x--\r\n"


def request(pieces: Iterable[bytes], content_type: str | None = "multipart/form-data; boundary=x") -> Request:
    waiting = [{"type": "http.request", "body": piece, "more_body": True} for piece in pieces]
    waiting.append({"type": "http.request", "body": b"", "more_body": False})

    async def receive() -> dict[str, object]:
        return waiting.pop(0)

    headers = [] if content_type is None else [(b"content-type", content_type.encode())]
    return Request({"type": "http", "method": "POST", "path": "/", "headers": headers}, receive)


@pytest.mark.parametrize("content_type", [None, "application/json", "application/merge-patch+json; charset=utf-8"])
async def test_json_comes_in_pieces(content_type: str | None) -> None:
    assert await read_json(request([b"{", b"}"], content_type), 2) == b"{}"


async def test_json_has_a_limit_and_a_type() -> None:
    with pytest.raises(BodyTooLarge):
        await read_json(request([b"{", b"}"], None), 1)
    with pytest.raises(UnsupportedMediaType):
        await read_json(request([b"{}"], "text/plain"), 100)
    assert await read_json(request([], "text/plain"), 100) == b""


async def test_fields_and_files() -> None:
    body = FORM % (b"data", b"{}") + FILE % (b"user-data", b"\x00\xff\r\n--") + FILE % (b"b", b"") + END
    form = await read_form(request([body]), most_bytes=1000, most_files=2)
    assert form.fields == {"data": "{}"}
    assert form.files == [FormFile("file", "user-data", b"\x00\xff\r\n--"), FormFile("file", "b", b"")]


@given(st.binary(max_size=300), st.integers(1, 40))
async def test_a_file_arrives_byte_for_byte_however_it_is_cut(content: bytes, step: int) -> None:
    content = content.replace(b"--x", b"")
    body = FILE % (b"f", content) + END
    pieces = [body[start : start + step] for start in range(0, len(body), step)]
    form = await read_form(request(pieces), most_bytes=len(body), most_files=1)
    assert form.files == [FormFile("file", "f", content)]


async def test_limits_of_a_form() -> None:
    body = FILE % (b"a", b"1") + FILE % (b"b", b"2") + END
    with pytest.raises(BodyTooLarge):
        await read_form(request([body]), most_bytes=len(body) - 1, most_files=2)
    with pytest.raises(InvalidRequest, match="Too many files"):
        await read_form(request([body]), most_bytes=len(body), most_files=1)
    with pytest.raises(InvalidRequest, match="Too many fields"):
        await read_form(request([FORM % (b"a", b"1") * 33 + END]), most_bytes=10_000, most_files=1)


@pytest.mark.parametrize("cut", [1, 10, 60, 75, -4, -7])
async def test_a_form_that_breaks_off_is_refused(cut: int) -> None:
    body = FILE % (b"a", b"0123456789") + END
    with pytest.raises(InvalidRequest, match="the form in the body cannot be read"):
        await read_form(request([body[:cut]]), most_bytes=1000, most_files=1)


@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        ("multipart/form-data", b""),
        ("multipart/form-data; boundary=", FILE % (b"a", b"") + END),
        ("multipart/form-data; boundary=y", FILE % (b"a", b"") + END),
        ("multipart/form-data; boundary=x", b"nothing of the kind"),
        ("multipart/form-data; boundary=x", b"--x\r\n\r\nno header\r\n--x--\r\n"),
        ("multipart/form-data; boundary=x", b"--x\r\nContent-Disposition: form-data\r\n\r\nno name\r\n--x--\r\n"),
        ("multipart/form-data; boundary=x", b""),
    ],
)
async def test_what_is_no_form_is_refused(content_type: str, body: bytes) -> None:
    with pytest.raises(InvalidRequest, match="the form in the body cannot be read"):
        await read_form(request([body], content_type), most_bytes=1000, most_files=1)
