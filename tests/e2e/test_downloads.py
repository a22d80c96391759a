"""Volumes out of the launched server: bytes, images, extents and checksums, as clients fetch them."""

import contextlib
import hashlib
import json
import os
import random
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.clients import eventually
from tests.e2e.invariants import assert_clean
from tests.exporting import export, refused_export, unexport
from tests.live import ALICE, BOB, LiveServer, live_server, make_location

MIB = 1 << 20
BLOCK = 4 * MIB
NAME = 'Čech/ "disk"\r\n1'


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """One server for all tests here, which hangs up on clients soon."""
    with live_server(
        tmp_path_factory.mktemp("downloads"), "--reader-stall", "1", "--reader-grace", "0.5", "--overcommit", "0"
    ) as one:
        yield one


@pytest.fixture
def server(running: LiveServer) -> LiveServer:
    return running


def filled(server: LiveServer, mebibytes: int = 8, image_format: str = "raw", **more: Any) -> tuple[str, bytes]:
    """A volume with data and holes, and what a guest would read."""
    vid = server.create(size=mebibytes * MIB / 1e9, **more)
    content = bytearray(mebibytes * MIB)
    some = random.Random(mebibytes)
    with (server.directory(vid) / "data.img").open("r+b") as image:
        for offset in range(MIB // 2, len(content), 3 * MIB):
            content[offset : offset + 200_000] = some.randbytes(200_000)
            image.seek(offset)
            image.write(content[offset : offset + 200_000])
    if image_format != "raw":
        owner = more.get("owner", ALICE)
        server.call("update/convert", {"vid": vid, "creatorID": owner, "format": "qcow2"})
    if image_format == "compressed":
        compress(server, vid)
    return vid, bytes(content)


def compress(server: LiveServer, vid: str) -> None:
    """Make a qcow2 volume's image one that only QEMU can read."""
    path = server.directory(vid) / "data.qcow2"
    smaller = path.with_name("smaller")
    subprocess.run(["qemu-img", "convert", "-c", "-f", "qcow2", "-O", "qcow2", path, smaller], check=True)
    smaller.rename(path)


def get(server: LiveServer, vid: str, what: str = "data", **headers: str) -> httpx.Response:
    return server.http.get(f"volumes/{vid}/{what}", headers={k.replace("_", "-"): v for k, v in headers.items()})


def code(response: httpx.Response) -> tuple[int, str]:
    return response.status_code, response.json()["code"]


# -- the bytes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("image_format", ["raw", "qcow2", "compressed"])
def test_a_guests_bytes_whatever_the_format(server: LiveServer, image_format: str) -> None:
    vid, content = filled(server, image_format=image_format)
    response = get(server, vid)
    assert response.status_code == 200
    assert response.content == content
    assert response.headers["content-length"] == str(len(content))
    assert response.headers["accept-ranges"] == "bytes"
    assert response.headers["content-type"] == "application/octet-stream"
    assert response.headers["content-disposition"] == 'attachment; filename="disk.img"'
    head = server.http.head(f"volumes/{vid}/data")
    assert head.content == b""
    for name in ("content-length", "etag", "content-disposition", "content-type"):
        assert head.headers[name] == response.headers[name]


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
def test_ranges(server: LiveServer, image_format: str) -> None:
    vid, content = filled(server, image_format=image_format)
    size = len(content)
    for text, start, stop in (
        ("0-0", 0, 1),
        (f"{MIB // 2 - 100}-{MIB}", MIB // 2 - 100, MIB + 1),
        (f"{size - 10}-", size - 10, size),
        ("-5000", size - 5000, size),
    ):
        response = get(server, vid, range=f"bytes={text}")
        assert response.status_code == 206
        assert response.content == content[start:stop]
        assert response.headers["content-range"] == f"bytes {start}-{stop - 1}/{size}"
    refused = get(server, vid, range=f"bytes={size}-")
    assert code(refused) == (416, "range-not-satisfiable")
    assert refused.headers["content-range"] == f"bytes */{size}"


def test_several_ranges_at_once(server: LiveServer) -> None:
    vid, content = filled(server)
    response = get(server, vid, range=f"bytes=0-9,{MIB // 2}-{MIB // 2 + 99},-1")
    assert response.status_code == 206
    kind, _, boundary = response.headers["content-type"].partition("; boundary=")
    assert kind == "multipart/byteranges"
    assert len(response.content) == int(response.headers["content-length"])
    pieces = response.content.split(f"--{boundary}".encode())
    assert pieces[0] == b"\r\n"
    assert pieces[-1] == b"--\r\n"
    bodies = [piece.partition(b"\r\n\r\n")[2].removesuffix(b"\r\n") for piece in pieces[1:-1]]
    assert bodies == [content[:10], content[MIB // 2 : MIB // 2 + 100], content[-1:]]
    assert f"Content-Range: bytes 0-9/{len(content)}".encode() in pieces[1]


def test_who_has_the_bytes_is_told_so(server: LiveServer) -> None:
    vid, _ = filled(server)
    etag = get(server, vid, range="bytes=0-0").headers["etag"]
    known = get(server, vid, if_none_match=etag)
    assert (known.status_code, known.content, known.headers["etag"]) == (304, b"", etag)
    assert get(server, vid, if_match=etag, range="bytes=0-0").status_code == 206
    assert code(get(server, vid, if_match='"other"')) == (412, "precondition-failed")


def test_a_broken_download_goes_on_and_never_mixes(server: LiveServer) -> None:
    vid, content = filled(server, 16)
    with server.http.stream("GET", f"volumes/{vid}/data") as response:
        etag = response.headers["etag"]
        first = next(response.iter_bytes(MIB))
    rest = get(server, vid, range=f"bytes={len(first)}-", if_range=etag)
    assert rest.status_code == 206
    assert first + rest.content == content
    with (server.directory(vid) / "data.img").open("r+b") as image:
        image.write(b"changed")
    again = get(server, vid, range=f"bytes={len(first)}-", if_range=etag)
    assert again.status_code == 200
    assert again.headers["etag"] != etag
    assert again.content == b"changed" + content[7:]


def test_an_image_that_changes_meanwhile_is_not_finished(server: LiveServer) -> None:
    """As a writer would that heeds no lock: the client sees that something is missing."""
    vid, _ = filled(server, 64)
    with pytest.raises(httpx.HTTPError), server.http.stream("GET", f"volumes/{vid}/data") as response:
        pieces = response.iter_raw(65536)
        next(pieces)
        with (server.directory(vid) / "data.img").open("r+b") as image:
            image.write(b"x")
        for _ in pieces:
            pass
    assert get(server, vid, range="bytes=0-0").content == b"x"


def test_a_name_of_any_kind_makes_a_safe_file_name(server: LiveServer) -> None:
    vid, _ = filled(server, 1, name=NAME)
    told = server.http.head(f"volumes/{vid}/data?format=qcow2").headers["content-disposition"]
    assert told == "attachment; filename=\"ech_disk_1.qcow2\"; filename*=UTF-8''%C4%8Cech%20disk1.qcow2"


def test_curl_goes_on_where_it_was_broken_off(server: LiveServer, tmp_path: Path) -> None:
    vid, content = filled(server)
    target = tmp_path / "disk.img"
    target.write_bytes(content[: 3 * MIB + 17])
    url = f"{server.address}volumes/{vid}/data"
    subprocess.run(["curl", "-sS", "--fail", "-C", "-", "-o", target, url], check=True, timeout=60)
    assert target.read_bytes() == content
    target.unlink()
    subprocess.run(["curl", "-sS", "--fail", "-O", "-J", url], check=True, timeout=60, cwd=tmp_path)
    assert target.read_bytes() == content


# -- images ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["raw", "qcow2"])
@pytest.mark.parametrize("target", ["qcow2", "vmdk"])
def test_images_of_other_formats(server: LiveServer, source: str, target: str, tmp_path: Path) -> None:
    vid, content = filled(server, image_format=source)
    saved, raw = tmp_path / f"disk.{target}", tmp_path / "disk.img"
    response = get(server, vid, f"data?format={target}")
    saved.write_bytes(response.content)
    raw.write_bytes(content)
    assert len(response.content) == int(response.headers["content-length"]) < len(content)
    assert f'filename="disk.{target}"' in response.headers["content-disposition"]
    told = json.loads(subprocess.check_output(["qemu-img", "info", "-f", target, "--output=json", saved]))
    assert told["virtual-size"] == len(content)
    assert "backing-filename" not in told
    subprocess.run(["qemu-img", "compare", "-f", target, "-F", "raw", saved, raw], check=True)
    subprocess.run(["qemu-img", "check", "-f", target, saved], check=True)
    half = get(server, vid, f"data?format={target}", range="bytes=70000-", if_range=response.headers["etag"])
    assert half.status_code == 206
    assert half.content == response.content[70000:]


def test_each_format_has_its_own_tag(server: LiveServer) -> None:
    vid, _ = filled(server, 1)
    tags = [server.http.head(f"volumes/{vid}/data?format={one}").headers["etag"] for one in ("raw", "qcow2", "vmdk")]
    assert len(set(tags)) == 3
    assert get(server, vid).headers["etag"] == tags[0]


def test_nothing_but_what_a_guest_sees_gets_out(server: LiveServer, tmp_path: Path) -> None:
    """A snapshot inside the image, which nobody here made: it may be older than the volume's being public."""
    vid, content = filled(server, image_format="qcow2")
    path = server.directory(vid) / "data.qcow2"
    secret = b"secret of the past" * 4096
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", f"write -P 0x42 0 {MIB}", path], check=True, capture_output=True)
    subprocess.run(["qemu-img", "snapshot", "-c", "old", path], check=True)
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", f"write -z 0 {MIB // 2}", path], check=True, capture_output=True)
    assert secret
    assert b"\x42" * 65536 in path.read_bytes()
    response = get(server, vid, "data?format=qcow2")
    saved = tmp_path / "disk.qcow2"
    saved.write_bytes(response.content)
    told = json.loads(subprocess.check_output(["qemu-img", "info", "-f", "qcow2", "--output=json", saved]))
    assert "snapshots" not in told
    assert get(server, vid).content[: MIB // 2] == bytes(MIB // 2)
    assert len(content) == told["virtual-size"]


def test_a_linked_clone_is_whole(server: LiveServer, tmp_path: Path) -> None:
    """What it stands on is in what is downloaded, and its name is not."""
    vid, content = filled(server, image_format="qcow2")
    clone = server.call("clone", {"volume_id": vid, "creatorID": ALICE, "linked": True})["vid"]
    path = server.directory(clone) / "data.qcow2"
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", "write -q -P 7 0 65536", path], check=True)
    expected = b"\7" * 65536 + content[65536:]
    assert get(server, clone).content == expected
    response = get(server, clone, "data?format=qcow2")
    assert vid.encode() not in response.content[: 2 * MIB]
    saved = tmp_path / "disk.qcow2"
    saved.write_bytes(response.content)
    subprocess.run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", saved, tmp_path / "disk.img"], check=True)
    assert (tmp_path / "disk.img").read_bytes() == expected
    assert get(server, vid).content == content


@pytest.mark.parametrize("what", ["data?format=vdi", "extents?limit=0", "extents?start=-1", "checksum?algorithm=md5"])
def test_what_is_not_offered(server: LiveServer, what: str) -> None:
    vid, _ = filled(server, 1)
    assert code(get(server, vid, what)) == (400, "invalid-value")


# -- extents -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
def test_only_the_data_has_to_be_fetched(server: LiveServer, image_format: str) -> None:
    vid, content = filled(server, image_format=image_format)
    page = get(server, vid, "extents").json()
    assert (page["vid"], page["size"], page["next"]) == (vid, len(content), None)
    fetched = bytearray(len(content))
    data_bytes = 0
    position = 0
    for one in page["extents"]:
        assert one["start"] == position
        position += one["length"]
        if not one["zero"]:
            data_bytes += one["length"]
            wanted = f"bytes={one['start']}-{position - 1}"
            part = get(server, vid, range=wanted, if_match=page["etag"])
            assert part.status_code == 206
            fetched[one["start"] : position] = part.content
    assert position == len(content)
    assert bytes(fetched) == content
    assert data_bytes < len(content) / 3


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
def test_extents_of_an_image_in_pieces_come_in_pages(server: LiveServer, image_format: str) -> None:
    size = 64 * MIB
    vid = server.create(size=size / 1e9, format=image_format)
    if image_format == "raw":
        with (server.directory(vid) / "data.img").open("r+b") as image:
            for offset in range(0, size, 131072):
                os.pwrite(image.fileno(), b"x" * 4096, offset)
    else:
        commands = [part for offset in range(0, size, 131072) for part in ("-c", f"write -q {offset} 4096")]
        path = server.directory(vid) / "data.qcow2"
        subprocess.run(["qemu-io", "-f", "qcow2", *commands, path], check=True)
    whole = get(server, vid, "extents").json()
    assert len(whole["extents"]) == 2 * size // 131072
    paged: list[dict[str, Any]] = []
    start: int | None = 0
    pages = 0
    while start is not None:
        page = get(server, vid, f"extents?start={start}&limit=100").json()
        assert len(page["extents"]) <= 100
        paged += page["extents"]
        start, pages = page["next"], pages + 1
    assert paged == whole["extents"]
    assert pages == 11
    assert get(server, vid, f"extents?start={size + 5}").json()["extents"] == []


# -- checksums ---------------------------------------------------------------------------------------------


def test_a_checksum_is_the_same_whatever_the_format(server: LiveServer) -> None:
    vid, content = filled(server, 10)
    hashes = [hashlib.sha256(content[start : start + BLOCK]).digest() for start in range(0, len(content), BLOCK)]
    expected = {
        "vid": vid,
        "algorithm": "sha256",
        "method": "blocks",
        "block_size": BLOCK,
        "checksum": hashlib.sha256(b"".join(hashes)).hexdigest(),
        "size": len(content),
    }
    assert get(server, vid, "checksum").json() == expected
    plain = get(server, vid, "checksum?method=plain").json()
    assert plain["checksum"] == hashlib.sha256(content).hexdigest()
    assert plain["block_size"] is None
    blake = get(server, vid, "checksum?algorithm=blake2b").json()["checksum"]
    server.call("update/convert", {"vid": vid, "creatorID": ALICE, "format": "qcow2"})
    assert get(server, vid, "checksum").json() == expected
    assert get(server, vid, "checksum?method=plain").json() == plain
    assert get(server, vid, "checksum?algorithm=blake2b").json()["checksum"] == blake


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
def test_a_checksum_of_nothing_takes_no_time(server: LiveServer, image_format: str) -> None:
    size = 100 * 2**30
    vid = server.create(size=size / 1e9, format=image_format)
    started = time.monotonic()
    found = get(server, vid, "checksum").json()["checksum"]
    assert time.monotonic() - started < 1.0
    assert found == hashlib.sha256(hashlib.sha256(bytes(BLOCK)).digest() * (size // BLOCK)).hexdigest()


def test_a_checksum_can_be_a_job_and_be_cancelled(server: LiveServer) -> None:
    vid = server.create(size=2000)
    begun = get(server, vid, "checksum?method=plain", prefer="respond-async")
    assert begun.status_code == 202
    job = begun.json()["job"]
    eventually(lambda: server.http.get(f"jobs/{job}").json()["progress"] > 0)
    shown = server.http.get(f"jobs/{job}").json()
    assert (shown["purpose"], shown["volume_id"]) == ("checksum", vid)
    locked = server.post("update", {"vid": vid, "creatorID": ALICE, "name": "x"})
    assert code(locked) == (423, "volume-locked")
    assert server.http.delete(f"jobs/{job}").status_code == 200
    eventually(lambda: server.http.get(f"jobs/{job}").json()["state"] == "cancelled")
    eventually(lambda: server.post("update", {"vid": vid, "creatorID": ALICE, "name": "x"}).status_code == 200)


# -- who may, and when -------------------------------------------------------------------------------------

EVERYTHING = ("data", "data?format=qcow2", "extents", "checksum", "checksum?method=plain")


@pytest.mark.parametrize("what", EVERYTHING)
def test_a_private_volume_is_not_there_for_others(server: LiveServer, what: str) -> None:
    vid, _ = filled(server, 1, private=True)
    joined = "&" if "?" in what else "?"
    for method in ("GET", "HEAD") if what.startswith("data") else ("GET",):
        stranger = server.http.request(method, f"volumes/{vid}/{what}{joined}client_uid={BOB}")
        nobody = server.http.request(method, f"volumes/{'9' * 32}/{what}{joined}client_uid={BOB}")
        assert stranger.status_code == nobody.status_code == 404
        assert stranger.text == nobody.text.replace("9" * 32, vid)
    assert get(server, vid, f"{what}{joined}client_uid={ALICE}").status_code == 200
    stranger = server.http.get(
        f"volumes/{vid}/{what}{joined}client_uid={BOB}", headers={"Prefer": "respond-async", "If-None-Match": "*"}
    )
    assert stranger.status_code == 404


def test_a_stranger_learns_nothing_while_the_owner_reads(server: LiveServer) -> None:
    vid, _ = filled(server, 64, private=True)
    with server.http.stream("GET", f"volumes/{vid}/data?client_uid={ALICE}") as response:
        assert response.status_code == 200
        assert server.http.get(f"volumes/{vid}/data?client_uid={BOB}").status_code == 404
        assert server.http.head(f"volumes/{vid}/data?client_uid={BOB}").status_code == 404


def test_what_is_public_is_for_everybody(server: LiveServer) -> None:
    vid, content = filled(server, 1)
    assert get(server, vid, f"data?client_uid={BOB}").content == content


@pytest.mark.parametrize("given", ["nonsense", "9" * 31, "9" * 33])
def test_what_is_no_volume(server: LiveServer, given: str) -> None:
    assert code(server.http.get(f"volumes/{given}/data")) == (404, "volume-not-found")


def test_a_uuid_is_an_id_too(server: LiveServer) -> None:
    vid, content = filled(server, 1)
    dashed = f"{vid[:8]}-{vid[8:12]}-{vid[12:16]}-{vid[16:20]}-{vid[20:]}".upper()
    assert get(server, dashed).content == content


def test_an_iso_that_waits_has_no_bytes(server: LiveServer) -> None:
    iso = {"creatorID": ALICE, "name": "x", "isotype": "tool", "os_family": "linux", "size": 0.01}
    vid = server.call("iso/create", {**iso, "tool_scope": "drivers", "tool_version": "1"})["vid"]
    for what in EVERYTHING:
        assert code(get(server, vid, what)) == (409, "volume-waiting")


def test_readers_share_and_keep_writers_out(server: LiveServer) -> None:
    vid, content = filled(server, 64)
    with server.http.stream("GET", f"volumes/{vid}/data") as response:
        assert get(server, vid, range="bytes=0-0").status_code == 206
        assert get(server, vid, "checksum").status_code == 200
        for path, body in (
            ("destroy", {"volume_id": vid}),
            ("update/resize", {"vid": vid, "creatorID": ALICE, "size": 1}),
            ("update/convert", {"vid": vid, "creatorID": ALICE, "format": "qcow2"}),
            ("export", {"volume_id": vid, "client_uid": ALICE}),
        ):
            assert code(server.post(path, body)) == (423, "volume-locked"), path
        assert b"".join(response.iter_bytes()) == content
    # Whoever wants to change it does not wait for a reader that has gone.
    get(server, vid, range="bytes=0-0")
    server.call("update", {"vid": vid, "creatorID": ALICE, "name": "renamed"})
    get(server, vid, range="bytes=0-0")
    server.call("destroy", {"volume_id": vid})


def test_a_guest_does_not_keep_the_owner_waiting_for_as_long_as_it_reads(server: LiveServer) -> None:
    vid, content = filled(server, 64)
    body = {"vid": vid, "creatorID": ALICE, "name": "mine"}
    query = f"GET /api/v1.0/volumes/{vid}/data?client_uid={BOB} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
    taken = 0
    with socket.create_connection(("127.0.0.1", server.port), 10) as guest:
        guest.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        guest.sendall(query.encode())
        guest.recv(65536)
        assert code(server.post("update", body)) == (423, "volume-locked")
        began = time.monotonic()
        others = server.http.get(f"volumes/{vid}/data?client_uid={BOB}")
        assert code(others) == (423, "volume-locked")
        assert get(server, vid, range="bytes=0-9").status_code == 206, "the owner's own are let in"
        with contextlib.suppress(ConnectionError):
            while piece := guest.recv(2 * MIB):  # it gets on, slowly
                taken += len(piece)
                time.sleep(0.03)
                assert time.monotonic() - began < 5
    assert taken < len(content)
    eventually(lambda: server.post("update", body).status_code == 200, 5)
    assert server.info(vid)["name"] == "mine"
    eventually(lambda: server.http.head(f"volumes/{vid}/data?client_uid={BOB}").status_code == 200, 10)


def test_what_a_guest_may_write_to_is_not_read(server: LiveServer) -> None:
    vid, content = filled(server)
    export(server, vid, protocol="local")
    for what in EVERYTHING:
        assert code(get(server, vid, what)) == (409, "volume-exported")
    unexport(server, vid)
    assert get(server, vid).content == content


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
def test_what_is_exported_to_be_read_can_be_read(server: LiveServer, image_format: str) -> None:
    vid, content = filled(server, image_format=image_format, readonly=True)
    export(server, vid, protocol="local")
    assert get(server, vid).content == content
    unexport(server, vid)


def test_nothing_is_exported_while_it_is_read(server: LiveServer) -> None:
    vid, _ = filled(server, 64)
    with server.http.stream("GET", f"volumes/{vid}/data"):
        assert refused_export(server, vid, protocol="local")[0] == 423
    eventually(lambda: server.post("export", {"volume_id": vid, "client_uid": ALICE}).status_code == 200)
    unexport(server, vid)


# -- faults ------------------------------------------------------------------------------------------------


def hang(server: LiveServer, vid: str, what: str = "data") -> socket.socket:
    """A client that asks and then takes nothing."""
    client = socket.create_connection(("127.0.0.1", server.port))
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.sendall(f"GET /api/v1.0/volumes/{vid}/{what} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())
    return client


@pytest.mark.parametrize("image_format", ["raw", "compressed"])
def test_a_client_that_hangs_holds_nothing_for_long(server: LiveServer, image_format: str) -> None:
    vid, _ = filled(server, 64, image_format=image_format)
    with contextlib.ExitStack() as clients:
        for _ in range(12):  # more than there are threads
            clients.enter_context(hang(server, vid))
        began = time.monotonic()
        assert get(server, vid, range="bytes=0-99").status_code == 206
        assert server.info(vid)["name"] == "disk"
        assert time.monotonic() - began < 1.0
        eventually(lambda: not list(server.directory(vid).glob("*.ignore")), 10)
    assert not list(server.run_dir.glob("r/*"))


def test_a_client_that_goes_away_lets_go(server: LiveServer) -> None:
    vid, _ = filled(server, 64, image_format="compressed")
    with hang(server, vid) as client:
        client.recv(1)
        assert list(server.directory(vid).glob("*.ignore"))
    eventually(lambda: not list(server.directory(vid).glob("*.ignore")), 5)
    server.call("destroy", {"volume_id": vid})


def test_an_image_that_cannot_be_read_is_an_error(server: LiveServer) -> None:
    vid, _ = filled(server, image_format="qcow2")
    path = server.directory(vid) / "data.qcow2"
    with path.open("r+b") as image:
        image.seek(40)  # where the L1 table is
        image.write(b"\xff" * 8)
    assert code(get(server, vid)) == (409, "image-damaged")
    assert str(server.root) not in get(server, vid).text


def test_a_backing_file_is_never_followed(server: LiveServer) -> None:
    vid, _ = filled(server, 1, image_format="qcow2")
    path = server.directory(vid) / "data.qcow2"
    subprocess.run(["qemu-img", "rebase", "-u", "-f", "qcow2", "-b", "/etc/passwd", "-F", "raw", path], check=True)
    for what in EVERYTHING:
        response = get(server, vid, what)
        assert response.status_code in (404, 409), what
        assert b"root:" not in response.content


@pytest.mark.parametrize("step", ["read.locked", "read.opened", "read.daemon-started", "in the middle"])
def test_killed_while_it_is_read(tmp_path: Path, step: str) -> None:
    make_location(tmp_path / "mnt")
    env = {} if step == "in the middle" else {"ELEMENTO_STORAGE_FAULTPOINT": f"kill:{step}"}
    with live_server(tmp_path, env=env) as server:
        vid, content = filled(server, 64, image_format="compressed")
        if env:
            with pytest.raises(httpx.HTTPError):
                get(server, vid)
            server.wait_dead()
        else:
            with hang(server, vid):
                eventually(lambda: list(server.run_dir.glob("r/*/nbd")))
                server.kill()
        server.start()
        eventually(lambda: not list(server.run_dir.glob("r/*")))
        assert_clean(server)
        assert get(server, vid).content == content


def test_a_server_that_stops_breaks_it_off(tmp_path: Path) -> None:
    with live_server(tmp_path) as server:
        vid, _ = filled(server, 64)
        with hang(server, vid) as client:
            client.recv(4096)
            began = time.monotonic()
            assert server.stop() == 0
            assert time.monotonic() - began < 5
        server.start()
        assert_clean(server)


def test_many_at_once_are_flat_in_memory(server: LiveServer) -> None:
    assert server.process is not None
    status = Path(f"/proc/{server.process.pid}/status")

    def resident_mb() -> float:
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmRSS"))
        return int(line.split()[1]) / 1024

    vid, _ = filled(server, 256)
    get(server, vid, range="bytes=0-9")
    before = resident_mb()
    for image_format in ("raw", "qcow2", "vmdk"):
        with server.http.stream("GET", f"volumes/{vid}/data?format={image_format}") as response:
            for _ in response.iter_raw(MIB):
                pass
    assert resident_mb() - before < 20
