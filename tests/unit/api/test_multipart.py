from collections.abc import AsyncIterator

import httpx
import pytest

from elemento_storage.api.multipart import Form
from elemento_storage.errors import InvalidValue

BOUNDARY = "----7MA4YWxkTrZu0gW"
CONTENT_TYPE = f"multipart/form-data; boundary={BOUNDARY}"


def part(name: str, value: bytes, filename: str | None = None) -> bytes:
    told = f'; filename="{filename}"' if filename is not None else ""
    return f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"{told}\r\n\r\n'.encode() + value + b"\r\n"


END = f"--{BOUNDARY}--\r\n".encode()


async def in_pieces(body: bytes, step: int) -> AsyncIterator[bytes]:
    for start in range(0, len(body), step):
        yield body[start : start + step]


async def read(body: bytes, step: int = 1000, content_type: str = CONTENT_TYPE) -> tuple[dict[str, str], bytes]:
    form = Form(content_type, in_pieces(body, step))
    fields = await form.fields()
    return fields, b"".join([piece async for piece in form.file()])


@pytest.mark.parametrize("step", [1, 3, 50, 100_000])
async def test_fields_and_a_file_in_pieces_of_any_size(step: int) -> None:
    data = b"\r\n--" + bytes(range(256)) * 20 + f"\r\n--{BOUNDARY[:-1]}".encode()
    body = part("creatorID", b"a" * 32) + part("name", "größer".encode()) + part("file", data, "../../x.img") + END
    assert await read(body, step) == ({"creatorID": "a" * 32, "name": "größer"}, data)


async def test_what_real_clients_send() -> None:
    request = httpx.Request(
        "POST", "http://h/", data={"name": "disk"}, files={"file": ("../../../etc/cron.d/x", b"12345")}
    )
    assert await read(request.read(), 7, request.headers["content-type"]) == ({"name": "disk"}, b"12345")


async def test_a_file_by_its_filename_or_by_its_field() -> None:
    assert (await read(part("image", b"123", "a") + END))[1] == b"123"
    assert (await read(part("file", b"123") + END))[1] == b"123"
    assert (await read(part("file", b"") + END))[1] == b""


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (part("name", b"x") + END, "no file"),
        (b"", "no file"),
        (part("file", b"123", "a") + part("name", b"x") + END, "after the file"),
        (part("file", b"123", "a") + part("file", b"456", "b") + END, "after the file"),
        (part("file", b"123", "a"), "ends in the middle"),
        (part("name", b"x" * 70_000) + part("file", b"1") + END, "more than 65536"),
        (part("name", b"\xff") + part("file", b"1") + END, "no text"),
        (b"nonsense", "cannot be read"),
        (part("x" * 70_000, b"1") + END, "more than 65536|cannot be read"),
    ],
)
async def test_what_is_no_such_form(body: bytes, said: str) -> None:
    with pytest.raises(InvalidValue, match=said):
        await read(body)


@pytest.mark.parametrize(
    "content_type", ["multipart/form-data", "multipart/form-data; boundary=", "x; boundary=" + "x" * 71]
)
async def test_a_boundary_has_to_be_there(content_type: str) -> None:
    with pytest.raises(InvalidValue, match="boundary"):
        await read(END, content_type=content_type)
