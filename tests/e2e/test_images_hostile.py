"""Images and web servers that mean harm, or are broken: what comes of each, and that nothing is left of it."""

import os
import struct
import subprocess
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.invariants import assert_clean
from tests.images import DISK_BYTES, compressed, disk_bytes, iso_bytes, make_image, patched, sha256
from tests.live import ALICE, LiveServer, live_server, make_location
from tests.web import Web, web_server

SECRET = Path("/etc/shadow")


@pytest.fixture(scope="module")
def web() -> Iterator[Web]:
    with web_server() as one:
        yield one


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    flags = ("--download-allow", "127.0.0.1", "--download-stall", "1", "--bin-retention", "0")
    with live_server(tmp_path_factory.mktemp("server"), *flags) as one:
        yield one


@pytest.fixture(autouse=True)
def nothing_is_left(server: LiveServer) -> Iterator[None]:
    yield
    assert server.listed() == {}
    assert_clean(server)


@pytest.fixture(scope="module")
def qcow2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_image(tmp_path_factory.mktemp("images"), "disk.qcow2", "qcow2")


def create(server: LiveServer, url: str, **more: Any) -> httpx.Response:
    return server.post("create/url", {"creatorID": ALICE, "name": "hostile", "url": url, **more})


def refused(server: LiveServer, url: str, status: int, code: str, **more: Any) -> dict[str, Any]:
    response = create(server, url, **more)
    answer: dict[str, Any] = response.json()
    assert (response.status_code, answer.get("code")) == (status, code), (answer, server.log()[-2000:])
    assert str(server.root) not in response.text
    return answer


def taken(server: LiveServer, url: str, content: bytes, **more: Any) -> None:
    response = create(server, url, **more)
    assert response.status_code == 200, (response.text, server.log()[-2000:])
    vid = response.json()["vid"]
    assert (server.directory(vid) / "data.img").read_bytes() == content
    server.call("destroy", {"volume_id": vid})


# -- images ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["raw", "qcow2"])
def test_nothing_of_another_file_reaches_a_client(
    server: LiveServer, web: Web, qcow2: Path, tmp_path: Path, target: str
) -> None:
    backed = tmp_path / "backed.qcow2"
    make = ("qemu-img", "create", "-q", "-f", "qcow2")
    subprocess.run([*make, "-u", "-F", "raw", "-b", SECRET, backed, "1M"], check=True)
    refused(server, web.put("/backed", backed), 409, "image-refused", format=target)
    refused(server, web.put("/backed2", backed), 409, "image-refused", format=target, source_format="qcow2")
    outside = tmp_path / "outside.qcow2"
    subprocess.run([*make, "-o", f"data_file={tmp_path / 'data'}", outside, "1M"], check=True)
    content = outside.read_bytes().replace(str(tmp_path / "data").encode(), str(SECRET).encode())
    refused(server, web.put("/outside", content), 409, "image-refused", format=target)
    vmdk = make_image(tmp_path, "disk.vmdk", "vmdk").read_bytes()
    hint = b'parentFileNameHint="/etc/shadow"\n'
    refused(server, web.put("/hint", vmdk[:600] + hint + vmdk[600 + len(hint) :]), 409, "image-refused", format=target)
    flat = b'# Disk DescriptorFile\nversion=1\nCID=1\nparentCID=ffffffff\ncreateType="monolithicFlat"\n'
    flat += b'RW 2048 FLAT "/etc/shadow" 0\n'
    refused(server, web.put("/flat", flat.ljust(4096, b"\n")), 409, "image-refused", format=target)
    # a sparse header without capacity, whose descriptor names the file
    inside = struct.pack("<4sIIQQQQ", b"KDMV", 1, 3, 0, 128, 1, 20).ljust(512, b"\0") + flat.ljust(20 * 512, b"\0")
    refused(server, web.put("/inside", inside.ljust(1 << 20, b"\0")), 409, "image-refused", format=target)
    differencing = patched(make_image(tmp_path, "disk.vhdx", "vhdx"), 0x310004, "<I", 2)
    refused(server, web.put("/differencing", differencing), 409, "image-damaged", format=target)


def test_sizes_that_cannot_be(server: LiveServer, web: Web, qcow2: Path) -> None:
    giant = patched(qcow2, 20, ">IQII", 21, 2**63, 0, 1 << 22)
    refused(server, web.put("/9eb", giant), 409, "image-refused")
    exabyte = bytearray(qcow2.read_bytes())
    struct.pack_into(">IQII", exabyte, 20, 21, 2**60, 0, 1 << 21)
    exabyte += bytes((16 << 20) + (4 << 20))
    struct.pack_into(">Q", exabyte, 40, 4 << 20)  # its first table, of 16 MiB
    struct.pack_into(">Q", exabyte, 48, 2 << 20)
    refused(server, web.put("/1eb", bytes(exabyte)), 507, "no-room")
    refused(server, web.put("/l1", patched(qcow2, 36, ">I", 2**31)), 409, "image-refused")
    refused(server, web.put("/encrypted", patched(qcow2, 32, ">I", 2)), 409, "image-refused")


def test_truncated_images(server: LiveServer, web: Web, qcow2: Path, tmp_path: Path) -> None:
    content = qcow2.read_bytes()
    for length in (5, 90, len(content) // 2, len(content) - 65536):
        refused(server, web.put("/cut", content[:length]), 409, "image-damaged", source_format="qcow2")
    for image_format in ("vmdk", "vdi", "vhd", "vhdx"):
        whole = make_image(tmp_path, f"disk.{image_format}", image_format).read_bytes()
        url = web.put("/cut", whole[: len(whole) * 2 // 3])
        refused(server, url, 409, "image-damaged", source_format=image_format)
    packed = compressed(qcow2, "xz").read_bytes()
    refused(server, web.put("/cut", packed[: len(packed) // 2]), 409, "image-damaged")
    refused(server, web.put("/bad", packed[:1000] + b"\xff" * 100 + packed[1100:]), 409, "image-damaged")


def test_tables_that_contradict_each_other(server: LiveServer, web: Web, qcow2: Path) -> None:
    content = bytearray(qcow2.read_bytes())
    (l1_offset,) = struct.unpack_from(">Q", content, 40)
    (l2_entry,) = struct.unpack_from(">Q", content, l1_offset)
    l2_offset = l2_entry & 0x00FFFFFFFFFFFE00
    first = content[l2_offset : l2_offset + 8]
    content[l2_offset + 8 : l2_offset + 16] = first  # two places of the disk in one cluster
    struct.pack_into(">Q", content, l2_offset + 16, l1_offset | 1 << 63)  # and the first table is data too
    answer = refused(server, web.put("/crossed", bytes(content)), 409, "image-damaged", format="qcow2")
    assert answer["findings"]["corruptions"] > 0


def test_a_bomb_stops_at_the_room_there_is(tmp_path: Path, web: Web, server: LiveServer) -> None:
    make_location(tmp_path / "mnt", max_total_size="200M")
    packer = zlib.compressobj(1, wbits=31)
    bomb = b"".join(packer.compress(bytes(1 << 20)) for _ in range(400)) + packer.flush()
    with live_server(tmp_path, "--download-allow", "127.0.0.1", "--bin-retention", "0") as small:
        started = time.monotonic()
        refused(small, web.put("/bomb", bomb), 507, "no-room")
        assert time.monotonic() - started < 10
        assert_clean(small)
        small.stop()
        small.flags = (*small.flags, "--image-max-size", "100000000")
        small.start()
        refused(small, web.put("/bomb", bomb), 413, "image-too-large")
        refused(small, web.put("/large", bytes(1), announced=200_000_000), 413, "image-too-large")
        assert_clean(small)


def test_memory_is_no_target_either(server: LiveServer, web: Web, tmp_path: Path) -> None:
    source = tmp_path / "source"
    with source.open("wb") as file:
        file.truncate(1 << 20)
    packed = subprocess.run(["zstd", "-c", "--ultra", "--long=31", source], stdout=subprocess.PIPE, check=True).stdout
    window = bytearray(packed)  # RFC 8878: the window's size, where it is not that of the content
    window[4] &= ~0x20 & 0xFF
    refused(server, web.put("/window", bytes([*window[:5], 0xF8, *window[5:]])), 409, "image-refused")


# -- servers -----------------------------------------------------------------------------------------------


def test_a_wrong_checksum(server: LiveServer, web: Web) -> None:
    content = disk_bytes()
    url = web.put("/disk", content)
    answer = refused(server, url, 409, "checksum-mismatch", checksum=f"sha256:{'0' * 64}")
    assert answer["actual"] == sha256(content)
    for wrong in ("sha256:12", "md5:d41d8cd98f00b204e9800998ecf8427e", "sha512:" + "0" * 64):
        assert create(server, url, checksum=wrong).json()["key"] == "checksum"
    taken(server, url, content, checksum=sha256(content).upper().replace("SHA256", "sha256"))


def test_five_dropped_connections(server: LiveServer, web: Web) -> None:
    content = disk_bytes()
    url = web.put("/drops", content, drops=[1_000_000, 0, 65536, 2_000_001, 1])
    taken(server, url, content)
    asked = web.pages["/drops"].asked
    assert len(asked) == 6
    assert [one.get("Range") for one in asked] == [
        None,
        "bytes=1000000-",
        "bytes=1000000-",
        "bytes=1065536-",
        "bytes=3065537-",
        "bytes=3065538-",
    ]
    assert {one.get("If-Range") for one in asked[1:]} == {'"one"'}


def test_a_server_that_cannot_go_on_where_it_broke(server: LiveServer, web: Web) -> None:
    content = disk_bytes()
    taken(
        server,
        web.put("/again", content, ranges=False, drops=[1_000_000, 2_000_000]),
        content,
        checksum=sha256(content),
    )
    taken(server, web.put("/nameless", content, etag=None, drops=[1_000_000, 2_000_000]), content)
    refused(server, web.put("/never", content, ranges=False, drops=[1_000_000] * 9), 502, "download-failed")


def test_a_file_that_changes_meanwhile(server: LiveServer, web: Web) -> None:
    content = disk_bytes()
    other = bytes(reversed(content))
    url = web.put("/changes", content, drops=[1_000_000])
    web.pages["/changes"].swapped = type(web.pages["/changes"])(other, etag='"two"')
    taken(server, url, other)


def test_lengths_that_are_not_true(server: LiveServer, web: Web) -> None:
    content = disk_bytes()
    url = web.put("/short", content, announced=len(content) + 1000)
    answer = refused(server, url, 502, "download-failed")
    assert "of 8389608 bytes" in answer["error"]
    refused(server, web.put("/long", content, announced=len(content) - 512), 502, "download-failed")
    refused(server, web.put("/more", content, extra=b"x" * 10), 502, "download-failed")
    refused(server, web.put("/unsized", content, unsized=True), 502, "download-failed")
    taken(server, web.put("/unsized2", content, unsized=True), content, checksum=sha256(content))
    taken(server, web.put("/chunked", content, chunked=True), content)
    refused(
        server, web.put("/broken-chunks", content, chunked=True, drops=[1000] * 9, etag=None), 502, "download-failed"
    )


def test_a_server_that_stalls_or_trickles(server: LiveServer, web: Web) -> None:
    content = disk_bytes()
    url = web.put("/stalls", content, stalls_after=1 << 20)
    web.pages["/stalls"].swapped = type(web.pages["/stalls"])(content)
    taken(server, url, content)
    assert [one.get("Range") for one in web.pages["/stalls"].asked] == [None, f"bytes={1 << 20}-"]
    url = web.put("/trickles", content, piece_bytes=10, pause_s=0.05)
    web.pages["/trickles"].swapped = type(web.pages["/trickles"])(content)
    taken(server, url, content)


def test_errors_of_the_server(server: LiveServer, web: Web) -> None:
    content = disk_bytes()
    taken(server, web.put("/busy", content, statuses=[503, 429, 500]), content)
    for status in (401, 403, 404, 410, 418):
        answer = refused(server, web.put("/gone", status=status), 502, "download-failed")
        assert answer["error"] == f"http://127.0.0.1 answers {status}"
    assert len(web.pages["/gone"].asked) == 1


def test_where_redirects_may_lead(server: LiveServer, web: Web) -> None:
    content = disk_bytes()
    url = web.put("/target?secret", content)
    web.pages["/target"] = web.pages["/target?secret"]
    taken(server, web.put("/hop", redirect="/hop2"), content) if web.put("/hop2", redirect=url) else None
    for forbidden in ("file:///etc/shadow", "ftp://127.0.0.1/x", "gopher://127.0.0.1:7772/_x"):
        refused(server, web.put("/elsewhere", redirect=forbidden), 400, "url-refused")
    port = server.port
    for address in (
        f"127.0.0.2:{port}",
        f"[::1]:{port}",
        f"0.0.0.0:{port}",
        f"[::ffff:127.0.0.2]:{port}",
        "169.254.1.1",
    ):
        answer = refused(
            server, web.put("/elsewhere", redirect=f"http://{address}/api/v1.0/version"), 400, "url-refused"
        )
        assert answer["key"] == "url"
    refused(server, web.put("/round", redirect="/round"), 502, "download-failed")
    assert len(web.pages["/round"].asked) == 11


def test_urls_that_are_no_use(server: LiveServer, web: Web) -> None:
    for url in ("file:///etc/shadow", "http://", "nonsense", "http://user:secret@127.0.0.1/", 7):
        response = create(server, url)  # type: ignore[arg-type]
        assert (response.status_code, response.json()["key"]) == (400, "url")
        assert "secret" not in response.text


def test_the_network_of_the_server_is_out_of_reach_by_default(tmp_path: Path, web: Web) -> None:
    url = web.put("/inner", disk_bytes())
    with live_server(tmp_path) as careful:
        for one in (url, url.replace("127.0.0.1", "localhost"), f"http://127.0.0.1:{careful.port}/api/v1.0/version"):
            refused(careful, one, 400, "url-refused")
    assert web.pages["/inner"].asked == []


def test_https_believes_those_whom_the_system_believes(tmp_path: Path, web: Web) -> None:
    certificate, other = tmp_path / "one.pem", tmp_path / "other.pem"
    for path in (certificate, other):
        make = ["openssl", "req", "-x509", "-nodes", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"]
        make += ["-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
        subprocess.run([*make, "-keyout", path, "-out", tmp_path / "part.pem"], check=True, capture_output=True)
        path.write_bytes(path.read_bytes() + (tmp_path / "part.pem").read_bytes())
    content = disk_bytes()
    believing = {"SSL_CERT_FILE": str(certificate)}
    with (
        web_server(certificate=certificate) as good,
        web_server(certificate=other) as bad,
        live_server(tmp_path, "--download-allow", "127.0.0.1", "--bin-retention", "0", env=believing) as safe,
    ):
        url = good.put("/disk", content).replace("127.0.0.1", "localhost")
        taken(safe, url, content)
        answer = refused(safe, good.address + "/disk", 502, "download-failed")  # the certificate is of another name
        assert "certificate" in answer["error"]
        refused(safe, bad.put("/disk", content).replace("127.0.0.1", "localhost"), 502, "download-failed")
        down = good.put("/down", redirect=web.put("/plain", content)).replace("127.0.0.1", "localhost")
        answer = refused(safe, down, 400, "url-refused")
        assert "give a checksum" in answer["error"]
        taken(safe, down, content, checksum=sha256(content))
        drops = good.put("/drops", content, drops=[1_000_000, 10]).replace("127.0.0.1", "localhost")
        taken(safe, drops, content)


def test_cancelling(server: LiveServer, web: Web) -> None:
    url = web.put("/endless", disk_bytes(), stalls_after=1 << 20)
    for wait_for in (0, 1 << 20):
        begun = server.post("create/url", {"creatorID": ALICE, "name": "x", "url": url}, Prefer="respond-async")
        job_id = begun.json()["job"]
        deadline = time.monotonic() + 10
        while (server.http.get(f"jobs/{job_id}").json()["bytes"] or 0) < wait_for:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        started = time.monotonic()
        assert server.http.delete(f"jobs/{job_id}").status_code == 200
        while (job := server.http.get(f"jobs/{job_id}").json())["state"] == "cancelling":
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert (job["state"], job["error"]["code"]) == ("cancelled", "job-cancelled")
        assert time.monotonic() - started < 0.7, "it waited for the connection"


def test_an_iso_cannot_be_anything_else(server: LiveServer, web: Web, qcow2: Path) -> None:
    body = {"creatorID": ALICE, "name": "x", "isotype": "tool", "os_family": "linux"}
    for content in (qcow2.read_bytes(), bytes(DISK_BYTES), iso_bytes(1000)[:100_000], b""):
        response = server.post("iso/create/url", {**body, "url": web.put("/not.iso", content)})
        assert (response.status_code, response.json()["code"]) == (400, "not-an-iso")


@pytest.mark.parametrize("stage", ["downloading", "unpacking", "converting"])
def test_a_disk_that_runs_full(tmp_path: Path, web: Web, qcow2: Path, stage: str) -> None:
    """The room is there when it is asked for, and taken by somebody else before it is used."""
    location = make_location(tmp_path / "mnt")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=30M", "tmpfs", location], check=True)
    try:
        make_location(tmp_path / "mnt")
        noise = make_image(tmp_path, "noise.qcow2", "qcow2", content=os.urandom(DISK_BYTES))
        source = compressed(noise, "gzip") if stage == "unpacking" else noise
        url = web.put("/full", source, piece_bytes=1 << 20, pause_s=0.05)
        filler = {"downloading": 26, "unpacking": 16, "converting": 16}[stage]
        with live_server(tmp_path, "--download-allow", "127.0.0.1", "--overcommit", "0") as small:
            (location / "filler").write_bytes(bytes(filler << 20))
            answer = refused(small, url, 507, "no-room")
            assert "full" in answer["error"] or "refuses" in answer["error"]
            assert_clean(small)
            (location / "filler").unlink()
            vid = create(small, url).json()["vid"]
            assert small.info(vid)["size"] == DISK_BYTES
    finally:
        subprocess.run(["umount", "-l", location], check=True)
