"""The files of the web page as answers."""

from pathlib import Path

import pytest
from starlette.requests import Request
from starlette.responses import Response

from elemento_storage.api.page import SECURITY_HEADERS, Page


def request(path: str, method: str = "GET", **headers: str) -> Request:
    raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    return Request({"type": "http", "method": method, "path": path, "query_string": b"", "headers": raw})


@pytest.fixture
def page(tmp_path: Path) -> Page:
    (tmp_path / "assets").mkdir()
    (tmp_path / "index.html").write_text("<!doctype html>")
    (tmp_path / ".built").write_text("secret")
    (tmp_path / "assets" / "app-1.js").write_text("plain")
    (tmp_path / "assets" / "app-1.js.gz").write_text("gzipped")
    (tmp_path / "assets" / "app-1.js.br").write_text("brotli")
    return Page(str(tmp_path))


async def found(page: Page, path: str, **headers: str) -> Response:
    response = await page.answer(request(path, **headers))
    assert response is not None
    return response


async def test_what_has_a_hash_in_its_name_stays_and_the_rest_is_asked_for_every_time(page: Page) -> None:
    start = await found(page, "/")
    assert start.headers["cache-control"] == "no-cache"
    assert start.headers["content-type"] == "text/html; charset=utf-8"
    again = await found(page, "/", if_none_match=f'"other", W/{start.headers["etag"]}')
    assert (again.status_code, bytes(again.body)) == (304, b"")
    script = await found(page, "/assets/app-1.js")
    assert script.headers["cache-control"] == "public, max-age=31536000, immutable"
    assert script.headers["content-type"] == "text/javascript; charset=utf-8"
    for response in (start, again, script):
        assert {name: response.headers[name] for name in SECURITY_HEADERS} == SECURITY_HEADERS


@pytest.mark.parametrize(
    ("accepted", "body"),
    [
        ("", b"plain"),
        ("gzip, deflate", b"gzipped"),
        ("gzip, deflate, br", b"brotli"),
        ("gzip;q=1.0, br;q=0", b"gzipped"),
        ("zstd", b"plain"),
    ],
)
async def test_the_best_form_that_the_client_takes(page: Page, accepted: str, body: bytes) -> None:
    response = await found(page, "/assets/app-1.js", accept_encoding=accepted)
    assert bytes(response.body) == body
    assert response.headers["vary"] == "Accept-Encoding"
    assert response.headers.get("content-encoding") == {b"gzipped": "gzip", b"brotli": "br"}.get(body)
    assert response.headers["content-length"] == str(len(body))


async def test_forms_have_different_etags(page: Page) -> None:
    forms = {(await found(page, "/assets/app-1.js", accept_encoding=one)).headers["etag"] for one in ("", "gzip", "br")}
    assert len(forms) == 3


async def test_head_has_no_body(page: Page) -> None:
    response = await page.answer(request("/assets/app-1.js", "HEAD"))
    assert response is not None
    assert (bytes(response.body), response.headers["content-length"]) == (b"", "5")


@pytest.mark.parametrize(
    "path", ["/.built", "/assets", "/assets/", "/assets/../index.html", "//", "/assets/app-1.js.gz"]
)
async def test_nothing_else_is_there(page: Page, path: str) -> None:
    assert await page.answer(request(path)) is None


async def test_without_a_build_it_says_how_to_make_one(tmp_path: Path) -> None:
    page = Page(str(tmp_path / "none"))
    response = await found(page, "/")
    assert (response.status_code, response.media_type) == (200, "text/plain")
    assert b"make setup" in bytes(response.body)
    assert await page.answer(request("/assets/app-1.js")) is None
