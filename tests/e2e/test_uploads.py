"""Resumable uploads to the letter of tus 1.0.0, against the launched server."""

import base64
import contextlib
import hashlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import tus
from tests.clients import eventually
from tests.e2e.test_auth import bearer, make_token
from tests.live import ALICE, BOB, LiveServer, live_server, make_location
from tests.unit.support import small_file_system

MIB = 1 << 20
DATA = os.urandom(MIB)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """One server for all tests of this file."""
    with live_server(tmp_path_factory.mktemp("uploads")) as one:
        yield one


@pytest.fixture(autouse=True)
def nothing_left(server: LiveServer) -> Iterator[None]:
    """Every test ends its uploads, or the server has."""
    yield
    for upload in server.http.get("uploads").json():
        if upload["state"] == "receiving":
            tus.end(server, upload["upload_id"])
    eventually(lambda: tus.places(server) == [], 5)


def image_of(server: LiveServer, vid: str) -> bytes:
    return (server.directory(vid) / "data.img").read_bytes()


# -- core --------------------------------------------------------------------------------------------------


def test_options_tell_what_is_spoken(server: LiveServer) -> None:
    for path in ("uploads", "uploads/", f"uploads/{'1' * 32}"):
        response = server.http.options(path)
        assert response.status_code == 204
        assert response.headers["Tus-Resumable"] == response.headers["Tus-Version"] == "1.0.0"
        assert response.headers["Tus-Max-Size"].isdigit()
        assert "sha1" in response.headers["Tus-Checksum-Algorithm"].split(",")
        assert set(response.headers["Tus-Extension"].split(",")) == {
            *("creation", "creation-with-upload", "creation-defer-length", "expiration", "checksum", "termination"),
            *("concatenation", "elemento-sparse"),
        }


def test_an_upload_in_three_steps_becomes_a_volume(server: LiveServer) -> None:
    created = tus.begin(server, MIB, name="größer", private=True, filename="../../etc/passwd")
    assert created.status_code == 201
    assert created.headers["X-Ignored-Keys"] == "filename"
    assert created.headers["Upload-Expires"].endswith("GMT")
    upload = created.headers["Location"].rpartition("/")[2]
    assert created.headers["Location"] == f"/api/v1.0/uploads/{upload}"
    asked = tus.head(server, upload)
    assert asked.status_code == 200
    assert asked.headers["Upload-Offset"] == "0"
    assert asked.headers["Upload-Length"] == str(MIB)
    assert asked.headers["Cache-Control"] == "no-store"
    assert asked.headers["Elemento-State"] == "receiving"
    assert asked.headers["Upload-Metadata"] == created.request.headers["Upload-Metadata"]
    at = 0
    for size in (1, 300_000, MIB - 300_001):
        sent = tus.patch(server, upload, at, DATA[at : at + size])
        at += size
        assert sent.status_code == 204, sent.text
        assert sent.headers["Upload-Offset"] == str(at)
        assert sent.headers["Upload-Expires"].endswith("GMT")
        assert server.post("info", {"volume_id": upload}).status_code == (200 if at == MIB else 404)
    assert sent.headers["Elemento-Volume"] == upload
    assert sent.headers["Elemento-State"] == "done"
    assert server.http.get(f"jobs/{sent.headers['Elemento-Job']}").json()["state"] == "done"
    assert image_of(server, upload) == DATA
    volume = server.info(upload)
    assert (volume["name"], volume["private"], volume["size"], volume["creatorID"]) == ("größer", True, MIB, ALICE)
    asked = tus.head(server, upload)
    assert asked.headers["Upload-Offset"] == asked.headers["Upload-Length"] == str(MIB)
    assert asked.headers["Elemento-Volume"] == upload
    again = tus.patch(server, upload, MIB, b"")
    assert (again.status_code, again.headers["Upload-Offset"]) == (204, str(MIB))
    assert tus.patch(server, upload, 0, b"x").status_code == 409
    assert tus.patch(server, upload, MIB, b"x").status_code == 413
    assert tus.end(server, upload).status_code == 204
    assert tus.head(server, upload).status_code == 404
    assert server.info(upload)["size"] == MIB, "the volume stays"


def test_every_answer_is_in_a_version(server: LiveServer) -> None:
    upload = tus.begun(server, 10)
    for response in (
        server.http.head(f"uploads/{upload}"),
        server.http.patch(f"uploads/{upload}", headers={"Tus-Resumable": "0.2.2"}, content=b""),
        server.http.post("uploads", headers={"Upload-Length": "1"}),
        server.http.delete(f"uploads/{upload}"),
    ):
        assert response.status_code == 412
        assert response.headers["Tus-Version"] == "1.0.0"
    missing = tus.head(server, "1" * 32)
    assert missing.status_code == 404
    assert "Upload-Offset" not in missing.headers
    assert missing.headers["Tus-Resumable"] == "1.0.0"
    refused = tus.patch(server, "1" * 32, 0, b"x")
    assert (refused.status_code, refused.json()["code"]) == (404, "upload-not-found")


def test_wrong_offsets_change_nothing(server: LiveServer) -> None:
    upload = tus.begun(server, 100)
    assert tus.patch(server, upload, 0, b"a" * 10).status_code == 204
    for wrong in (0, 9, 11, 100, 2**62):
        refused = tus.patch(server, upload, wrong, b"b" * 10)
        assert (refused.status_code, refused.json()["code"]) == (409, "upload-offset-mismatch")
        assert refused.json()["offset"] == 10
    for text in ("-1", "x", "1.0", ""):
        assert tus.patch(server, upload, 10, b"b", Upload_Offset=text).status_code == 400
    assert tus.patch(server, upload, 10, b"b", Content_Type="application/octet-stream").status_code == 415
    assert tus.patch(server, upload, 10, b"b" * 91).status_code == 413
    assert tus.offset(server, upload) == 10
    assert tus.content_of(server, upload).read_bytes() == b"a" * 10


def test_the_method_can_be_overridden(server: LiveServer) -> None:
    upload = tus.begun(server, 100)
    headers = {"Tus-Resumable": "1.0.0", "Upload-Offset": "0", "Content-Type": tus.OFFSET}
    sent = server.http.post(f"uploads/{upload}", headers={**headers, "X-HTTP-Method-Override": "PATCH"}, content=b"abc")
    assert (sent.status_code, sent.headers["Upload-Offset"]) == (204, "3")
    assert server.http.post(f"uploads/{upload}", headers=headers, content=b"abc").status_code == 405
    ended = server.http.post(
        f"uploads/{upload}", headers={"Tus-Resumable": "1.0.0", "X-HTTP-Method-Override": "DELETE"}
    )
    assert ended.status_code == 204
    assert tus.head(server, upload).status_code == 404


# -- what breaks -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunked", [False, True])
def test_a_broken_connection_keeps_what_arrived(server: LiveServer, chunked: bool) -> None:
    upload = tus.begun(server, MIB)
    with tus.broken_off(server, upload, 0, MIB, DATA[:700_001], chunked=chunked):
        eventually(lambda: _busy(server, upload))
    eventually(lambda: tus.offset(server, upload) == 700_001)
    assert tus.patch(server, upload, 700_001, DATA[700_001:]).status_code == 204
    assert image_of(server, upload) == DATA


def test_two_clients_on_one_upload(server: LiveServer) -> None:
    upload = tus.begun(server, MIB)
    with tus.broken_off(server, upload, 0, MIB, DATA[:500_000]) as first:
        eventually(lambda: _busy(server, upload))
        refused = tus.patch(server, upload, 0, b"x" * 10)
        assert refused.json()["code"] == "upload-busy"
        assert refused.headers["Retry-After"] == "1"
        first.sendall(DATA[500_000:])
        assert first.recv(4096).startswith(b"HTTP/1.1 204")
    assert image_of(server, upload) == DATA


def test_the_connection_goes_on_after_a_body(server: LiveServer) -> None:
    """Bodies bypass the parser: what follows in the same connection is a request, to the byte."""
    upload = tus.begun(server, MIB)
    with tus.broken_off(server, upload, 0, 600_000, DATA[:100_000]) as one:
        follow = f"HEAD /api/v1.0/uploads/{upload} HTTP/1.1\r\nHost: 127.0.0.1\r\nTus-Resumable: 1.0.0\r\n\r\n".encode()
        one.sendall(DATA[100_000:600_000] + follow)
        said = b""
        while said.count(b"\r\n\r\n") < 2:
            said += one.recv(65536)
    first, second, _ = said.split(b"\r\n\r\n")
    assert first.startswith(b"HTTP/1.1 204")
    assert second.startswith(b"HTTP/1.1 200")
    assert b"upload-offset: 600000" in second.lower()


def test_expect_100_continue(server: LiveServer) -> None:
    upload = tus.begun(server, 3)
    for at, said in ((1, b"HTTP/1.1 409"), (0, b"HTTP/1.1 100 Continue\r\n\r\n")):
        with socket.create_connection((server.listen_host, server.port), 10) as one:
            one.sendall(
                f"PATCH /api/v1.0/uploads/{upload} HTTP/1.1\r\nHost: 127.0.0.1\r\nTus-Resumable: 1.0.0\r\n"
                f"Upload-Offset: {at}\r\nContent-Type: {tus.OFFSET}\r\nContent-Length: 2\r\n"
                "Expect: 100-continue\r\n\r\n".encode()
            )
            assert one.recv(4096).startswith(said), "what is refused is refused before the body was sent"
            if at == 0:
                one.sendall(b"ab")
                assert one.recv(4096).startswith(b"HTTP/1.1 204")


def test_a_checksum_that_is_wrong_keeps_nothing(server: LiveServer) -> None:
    upload = tus.begun(server, MIB)
    assert tus.patch(server, upload, 0, DATA[:1000]).status_code == 204
    for name in ("sha1", "sha256", "md5"):
        wrong = base64.b64encode(hashlib.new(name, b"something else").digest()).decode()
        refused = tus.patch(server, upload, 1000, DATA[1000:], Upload_Checksum=f"{name} {wrong}")
        assert (refused.status_code, refused.json()["code"]) == (460, "upload-checksum-mismatch")
        assert tus.offset(server, upload) == 1000
        assert tus.content_of(server, upload).stat().st_size == 1000
    for unknown in ("crc32 AAAA", "sha1", "sha1 ???"):
        assert tus.patch(server, upload, 1000, b"x", Upload_Checksum=unknown).status_code == 400
    with tus.broken_off(server, upload, 1000, 5, b"") as one:
        one.close()
    right = base64.b64encode(hashlib.sha1(DATA[1000:]).digest()).decode()
    sent = eventually(
        lambda: (
            (r := tus.patch(server, upload, 1000, DATA[1000:], Upload_Checksum=f"sha1 {right}")).status_code != 423
            and r
        )
    )
    assert sent.status_code == 204
    assert image_of(server, upload) == DATA


# -- creation ----------------------------------------------------------------------------------------------


def test_the_first_bytes_may_come_with_the_creation(server: LiveServer) -> None:
    created = tus.begin(server, MIB, DATA[:1000])
    assert (created.status_code, created.headers["Upload-Offset"]) == (201, "1000")
    upload = created.headers["Location"].rpartition("/")[2]
    assert tus.offset(server, upload) == 1000
    whole = tus.begin(server, MIB, DATA)
    assert (whole.status_code, whole.headers["Upload-Offset"]) == (201, str(MIB))
    assert image_of(server, whole.headers["Elemento-Volume"]) == DATA
    assert tus.begin(server, 10, DATA[:11]).status_code == 413
    assert tus.begin(server, 10, DATA[:5], Content_Type="text/plain").status_code == 415


def test_a_length_that_is_told_later(server: LiveServer) -> None:
    upload = tus.begun(server, None, Upload_Defer_Length="1")
    asked = tus.head(server, upload)
    assert asked.headers["Upload-Defer-Length"] == "1"
    assert "Upload-Length" not in asked.headers
    assert tus.patch(server, upload, 0, DATA[:600_000]).status_code == 204
    assert tus.patch(server, upload, 600_000, DATA[600_000:700_000], Upload_Length="599999").status_code == 400
    assert tus.patch(server, upload, 600_000, DATA[600_000:700_000], Upload_Length=str(MIB)).status_code == 204
    assert tus.head(server, upload).headers["Upload-Length"] == str(MIB)
    assert tus.patch(server, upload, 700_000, b"", Upload_Length="999999").status_code == 400
    sent = tus.patch(server, upload, 700_000, DATA[700_000:])
    assert sent.status_code == 204, sent.text
    assert image_of(server, upload) == DATA
    assert server.info(upload)["size"] == MIB


@pytest.mark.parametrize(
    ("told", "key"),
    [
        ({"bare": True, "name": "disk"}, "creatorID"),
        ({"bare": True, "creatorID": ALICE}, "name"),
        ({"creatorID": "x"}, "creatorID"),
        ({"format": "vmdk"}, "format"),
        ({"size": "-1"}, "size"),
        ({"private": "perhaps"}, "private"),
        ({"bootable": True, "shareable": True}, "shareable"),
        ({"checksum": "md5:1234"}, "checksum"),
        ({"source_format": "iso9660"}, "source_format"),
        ({"Upload_Metadata": "name d"}, "Upload-Metadata"),
    ],
)
def test_metadata_that_is_wrong(server: LiveServer, told: dict[str, Any], key: str) -> None:
    refused = tus.begin(server, 10, **told)
    assert refused.status_code == 400, refused.text
    assert refused.json()["key"] == key
    assert refused.json()["error"].startswith("request was badly formatted.")


def test_more_than_there_is_room_for(server: LiveServer) -> None:
    assert tus.begin(server, 2**63).status_code == 413
    refused = tus.begin(server, 2**62)
    assert (refused.status_code, refused.json()["code"]) == (507, "no-room")


def test_the_checksum_of_the_whole(server: LiveServer) -> None:
    right = f"sha256:{hashlib.sha256(DATA).hexdigest()}"
    for steps in ((DATA,), (DATA[:500_000], DATA[500_000:])):
        upload, at = tus.begun(server, MIB, checksum=right), 0
        for piece in steps:
            assert tus.patch(server, upload, at, piece).status_code == 204
            at += len(piece)
        assert image_of(server, upload) == DATA


def test_what_is_refused_has_a_clear_end(server: LiveServer) -> None:
    wrong = f"sha256:{hashlib.sha256(b'else').hexdigest()}"
    upload = tus.begun(server, MIB, checksum=wrong)
    refused = tus.patch(server, upload, 0, DATA)
    assert refused.status_code in (400, 422), refused.text
    assert server.post("info", {"volume_id": upload}).status_code == 404
    asked = tus.head(server, upload)
    assert asked.status_code == 410
    assert "Upload-Offset" not in asked.headers
    told = server.http.get(f"uploads/{upload}").json()
    assert told["state"] == "failed"
    assert told["error"]["code"]
    again = tus.patch(server, upload, MIB, b"")
    assert (again.status_code, again.json()["code"]) == (422, "upload-failed")
    assert tus.places(server) == []
    assert tus.end(server, upload).status_code == 204
    assert tus.head(server, upload).status_code == 404


def test_an_empty_upload_is_no_image(server: LiveServer) -> None:
    assert tus.begin(server, 0).json()["key"] == "Upload-Length"
    upload = tus.begun(server, None, Upload_Defer_Length="1")
    assert tus.patch(server, upload, 0, b"", Upload_Length="0").json()["key"] == "Upload-Length"


# -- zeros -------------------------------------------------------------------------------------------------


def test_zeros_are_holes_sent_or_not(server: LiveServer) -> None:
    image = DATA[:65536] + bytes(8 * MIB) + DATA[65536:131072] + bytes(MIB)
    plain = tus.begun(server, len(image))
    assert tus.patch(server, plain, 0, image).status_code == 204
    sparse = tus.begun(server, len(image))
    body = tus.sparse_body((DATA[:65536], 8 * MIB), (DATA[65536:131072], 0), (b"", MIB))
    sent = tus.patch(server, sparse, 0, body, Content_Type=tus.SPARSE)
    assert (sent.status_code, sent.headers["Upload-Offset"]) == (204, str(len(image)))
    for upload in (plain, sparse):
        assert image_of(server, upload) == image
        assert server.info(upload)["sizeOnDisk"] <= 4 * 65536


def test_a_sparse_body_that_breaks_off_or_says_too_much(server: LiveServer) -> None:
    upload = tus.begun(server, MIB)
    body = tus.sparse_body((DATA[:1000], 5000), (DATA[6000:7000], 0))
    broken = tus.patch(server, upload, 0, body[:-1], Content_Type=tus.SPARSE)
    assert (broken.status_code, broken.json()["code"]) == (408, "upload-stalled")
    assert tus.offset(server, upload) == 6999
    for frames in (((b"", MIB),), ((b"x", 2**63),), ((b"", 2**64 - 1),)):
        assert tus.patch(server, upload, 6999, tus.sparse_body(*frames), Content_Type=tus.SPARSE).status_code == 413
    rest = tus.sparse_body((DATA[6999:], 0))
    assert tus.patch(server, upload, 6999, rest, Content_Type=tus.SPARSE).status_code == 204
    assert image_of(server, upload) == DATA[:1000] + bytes(5000) + DATA[6000:]
    deferred = tus.begun(server, None, Upload_Defer_Length="1")
    assert tus.patch(server, deferred, 0, rest, Content_Type=tus.SPARSE).status_code == 400


# -- termination, concatenation ----------------------------------------------------------------------------


def test_termination_removes_at_once_also_what_is_arriving(server: LiveServer) -> None:
    upload = tus.begun(server, MIB)
    path = tus.content_of(server, upload)
    with tus.broken_off(server, upload, 0, MIB, DATA[:1000]):
        eventually(lambda: _busy(server, upload))
        assert tus.end(server, upload).status_code == 204
    assert not path.parent.exists()
    for response in (tus.head(server, upload), tus.patch(server, upload, 0, b"x"), tus.end(server, upload)):
        assert response.status_code == 404
    assert tus.places(server) == []


def part(server: LiveServer, data: bytes, **more: str) -> str:
    upload = tus.begun(server, len(data), bare=True, Upload_Concat="partial", **more)
    assert tus.patch(server, upload, 0, data).status_code == 204
    return f"/api/v1.0/uploads/{upload}"


def test_parts_are_put_together_in_the_order_told(server: LiveServer) -> None:
    tail, first = part(server, DATA[300_000:]), part(server, DATA[:300_000])
    asked = tus.head(server, first[-32:])
    assert (asked.headers["Upload-Concat"], asked.headers["Upload-Offset"]) == ("partial", "300000")
    address = str(server.http.base_url.join(tail))
    final = tus.begin(server, None, Upload_Concat=f"final;{first} {address}", name="whole")
    assert final.status_code == 201, final.text
    upload = final.headers["Location"][-32:]
    assert final.headers["Elemento-Volume"] == upload
    assert image_of(server, upload) == DATA
    asked = tus.head(server, upload)
    assert asked.headers["Upload-Concat"] == f"final;{first} {address}"
    assert asked.headers["Upload-Offset"] == asked.headers["Upload-Length"] == str(MIB)
    assert tus.patch(server, upload, MIB, b"x").status_code == 403
    assert tus.head(server, first[-32:]).status_code == 404, "the parts are gone"


def test_parts_that_cannot_be_put_together(server: LiveServer) -> None:
    whole = part(server, DATA[:1000])
    begun = tus.begun(server, 1000, bare=True, Upload_Concat="partial")
    plain = tus.begun(server, 1000)
    for parts, status in (
        (f"{whole} /api/v1.0/uploads/{begun}", 400),
        (f"{whole} /api/v1.0/uploads/{plain}", 400),
        (f"{whole} /api/v1.0/uploads/{'1' * 32}", 404),
        ("/etc/passwd", 400),
        ("", 400),
    ):
        assert tus.begin(server, None, Upload_Concat=f"final;{parts}").status_code == status, parts
    assert tus.begin(server, 1000, Upload_Concat=f"final;{whole}").status_code == 400
    assert tus.offset(server, whole[-32:]) == 1000
    assert tus.begin(server, None, Upload_Concat=f"final;{whole} {whole}").status_code in (201, 422)


# -- who may -----------------------------------------------------------------------------------------------


def test_somebody_elses_upload_is_none(server: LiveServer) -> None:
    upload = tus.begun(server, 10)
    as_bob = {"client_uid": BOB}
    assert tus.head(server, upload, **as_bob).status_code == 404
    assert tus.end(server, upload, **as_bob).status_code == 404
    headers = {"Tus-Resumable": "1.0.0", "Upload-Offset": "0", "Content-Type": tus.OFFSET}
    assert server.http.patch(f"uploads/{upload}", params=as_bob, headers=headers, content=b"x").status_code == 404
    assert server.http.get(f"uploads/{upload}", params=as_bob).status_code == 404
    assert server.http.get("uploads", params=as_bob).json() == []
    own = server.http.get("uploads", params={"client_uid": ALICE}).json()
    assert [one["upload_id"] for one in own if one["state"] == "receiving"] == [upload]
    assert tus.offset(server, upload) == 0


# -- servers of their own ----------------------------------------------------------------------------------


def test_an_upload_that_rests_too_long_is_removed(tmp_path: Path) -> None:
    with live_server(tmp_path, "--upload-expiry", "1") as server:
        resting, done = tus.begun(server, 100), tus.begun(server, MIB)
        assert tus.patch(server, resting, 0, b"x").status_code == 204
        assert tus.patch(server, done, 0, DATA).status_code == 204
        eventually(lambda: tus.head(server, resting).status_code in (404, 410), 5)
        eventually(lambda: tus.places(server) == [], 5)
        eventually(lambda: tus.head(server, done).status_code == 404, 5)
        assert server.info(done)["size"] == MIB
        assert server.http.get("uploads").json() == []


def test_a_client_that_stalls_counts_as_gone(tmp_path: Path) -> None:
    with live_server(tmp_path, "--upload-stall", "0.3") as server:
        for chunked in (False, True):
            upload = tus.begun(server, MIB)
            with tus.broken_off(server, upload, 0, MIB, DATA[:1000], chunked=chunked) as one:
                assert one.recv(4096).startswith(b"HTTP/1.1 408")
                assert tus.offset(server, upload) == 1000


def test_an_upload_outlives_kill_and_stop(tmp_path: Path) -> None:
    with live_server(tmp_path) as server:
        upload = tus.begun(server, MIB)
        assert tus.patch(server, upload, 0, DATA[:1000]).status_code == 204
        with tus.broken_off(server, upload, 1000, MIB - 1000, DATA[1000:900_000]):
            eventually(lambda: _busy(server, upload))
            server.kill()
        server.start()
        assert tus.offset(server, upload) == 1000, "what was acknowledged, and not a byte that might be lost"
        with tus.broken_off(server, upload, 1000, MIB - 1000, DATA[1000:500_000]):
            eventually(lambda: _busy(server, upload))
            server.stop()
        server.start()
        assert tus.offset(server, upload) == 500_000, "a stop is a connection that breaks"
        assert tus.patch(server, upload, 500_000, DATA[500_000:]).status_code == 204
        assert image_of(server, upload) == DATA


def _busy(server: LiveServer, upload: str) -> bool:
    """Whether somebody writes it. Asking changes nothing."""
    return tus.patch(server, upload, 0, b"").status_code == 423


def test_another_server_goes_on_and_two_exclude_each_other(tmp_path: Path) -> None:
    with live_server(tmp_path) as first:
        second = LiveServer(first.root, tmp_path / "state2")
        second.start()
        try:
            upload = tus.begun(first, MIB)
            assert tus.patch(first, upload, 0, DATA[:1000]).status_code == 204
            with tus.broken_off(first, upload, 1000, MIB - 1000, b"x"):
                eventually(lambda: _busy(first, upload))
                assert tus.patch(second, upload, 1000, b"y").status_code == 423
            eventually(lambda: not _busy(first, upload))
            at = tus.offset(second, upload)
            sent = tus.patch(second, upload, at, DATA[at:])
            assert sent.status_code == 204, sent.text
            assert first.info(upload)["size"] == MIB
        finally:
            second.stop()
            second.clean_exports()
            second.http.close()


def test_a_disk_that_fills_up(tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        stack.enter_context(small_file_system(tmp_path / "mnt" / "disk", 16))
        make_location(tmp_path / "mnt")
        server = stack.enter_context(live_server(tmp_path, "--overcommit", "0"))
        upload = tus.begun(server, 64 * MIB)
        data = os.urandom(32 * MIB)
        refused = tus.patch(server, upload, 0, data)
        assert (refused.status_code, refused.json()["code"]) == (507, "no-room")
        kept = tus.offset(server, upload)
        assert tus.content_of(server, upload).read_bytes()[:kept] == data[:kept]
        assert server.http.get("health").status_code == 200
        assert tus.end(server, upload).status_code == 204
        assert tus.places(server) == []


def test_tokens_belong_to_their_clients(tmp_path: Path) -> None:
    with live_server(tmp_path, "--auth", "tokens") as server:
        alice, bob = (bearer(make_token(server.state_dir, client)) for client in (ALICE, BOB))
        length = {"Tus-Resumable": "1.0.0", "Upload-Length": "10"}
        assert server.http.post("uploads", headers=length).status_code == 401
        named = {**length, "Upload-Metadata": tus.metadata({"name": "x"})}
        upload = server.http.post("uploads", headers={**named, **alice}).headers["Location"][-32:]
        stolen = {**length, "Upload-Metadata": tus.metadata({"name": "x", "creatorID": ALICE})}
        assert server.http.post("uploads", headers={**stolen, **bob}).status_code == 403
        version = {"Tus-Resumable": "1.0.0"}
        assert server.http.head(f"uploads/{upload}", headers={**version, **bob}).status_code == 404
        assert server.http.head(f"uploads/{upload}", headers={**version, **alice}).status_code == 200
        assert server.http.head(f"uploads/{upload}", headers=version).status_code == 401
        assert server.http.get("uploads", headers=bob).json() == []
