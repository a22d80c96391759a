"""Images from the web become volumes: formats, compression, sizes, and what the calls say of it."""

import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.invariants import assert_clean
from tests.images import DISK_BYTES, compressed, disk_bytes, iso_bytes, make_image, sha256
from tests.live import ALICE, BOB, LiveServer, live_server
from tests.web import Web, web_server


@pytest.fixture(scope="module")
def web() -> Iterator[Web]:
    with web_server() as one:
        yield one


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    flags = ("--download-allow", "127.0.0.1", "--bin-retention", "0")
    with live_server(tmp_path_factory.mktemp("server"), *flags) as one:
        yield one


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("images")
    for image_format in ("raw", "qcow2", "vmdk", "vdi", "vhd", "vhdx"):
        make_image(directory, f"disk.{image_format}", image_format)
    make_image(directory, "compressed.qcow2", "qcow2", "-c")
    make_image(directory, "old.qcow2", "qcow2", "-c", "-o", "compat=0.10")
    make_image(directory, "stream.vmdk", "vmdk", "-o", "subformat=streamOptimized")
    make_image(directory, "fixed.vhd", "vhd", "-o", "subformat=fixed,force_size=on")
    for name, program in (("disk.raw", "xz"), ("disk.raw", "gzip"), ("disk.qcow2", "zstd")):
        compressed(directory / name, program)
    return directory


def create(server: LiveServer, url: str, call: str = "create/url", **more: Any) -> dict[str, Any]:
    answer: dict[str, Any] = server.call(call, {"creatorID": ALICE, "name": "from the web", "url": url, **more})
    return answer


def guest_bytes(server: LiveServer, vid: str, tmp_path: Path) -> bytes:
    """What a guest would read."""
    (data,) = server.directory(vid).glob("data.*")
    if data.suffix != ".qcow2":
        return data.read_bytes()
    raw = tmp_path / "raw"
    subprocess.run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", data, raw], check=True)
    return raw.read_bytes()


CASES = [
    ("disk.raw", {}),
    ("disk.qcow2", {}),
    ("compressed.qcow2", {}),
    ("old.qcow2", {}),
    ("disk.vmdk", {}),
    ("stream.vmdk", {}),
    ("disk.vdi", {}),
    ("disk.vhd", {}),
    ("fixed.vhd", {"source_format": "vhd"}),
    ("disk.vhdx", {}),
    ("disk.raw.xz", {}),
    ("disk.raw.gzip", {"compression": "gzip", "source_format": "raw"}),
    ("disk.qcow2.zstd", {}),
]


@pytest.mark.parametrize("target", ["raw", "qcow2"])
@pytest.mark.parametrize(("name", "more"), CASES, ids=[name for name, _ in CASES])
def test_every_format_goes_in(
    server: LiveServer, web: Web, images: Path, tmp_path: Path, name: str, more: dict[str, str], target: str
) -> None:
    content = (images / name).read_bytes()
    answer = create(server, web.put(f"/{name}", content), format=target, checksum=sha256(content), **more)
    volume = server.info(answer["vid"])
    assert (volume["format"], volume["size"]) == (target, answer["size"] * 10**9)
    # VHD keeps sizes in cylinders, so QEMU rounds them up
    assert volume["size"] == DISK_BYTES or (name == "disk.vhd" and volume["size"] > DISK_BYTES)
    assert guest_bytes(server, answer["vid"], tmp_path)[:DISK_BYTES] == disk_bytes()
    if target == "qcow2":
        header = (server.directory(answer["vid"]) / "data.qcow2").read_bytes()[:8]
        assert header == b"QFI\xfb\0\0\0\x03", "not version 3"
    server.call("destroy", {"volume_id": answer["vid"]})
    assert_clean(server)


def test_the_answer_of_create_url(server: LiveServer, web: Web, images: Path) -> None:
    url = web.put("/answer", images / "disk.qcow2")
    answer = create(server, url, format="qcow2", private=True, bus="scsi", alg="rsync", bootable=True)
    vid = answer.pop("vid")
    assert answer == {
        "alg": "rsync",
        "bootable": True,
        "bus": "scsi",
        "clonable": True,
        "cloudinit": False,
        "creatorID": ALICE,
        "img_format": "qcow2",
        "name": "from the web",
        "private": True,
        "readonly": False,
        "shareable": False,
        "size": DISK_BYTES / 1e9,
        "url": url,
    }
    assert server.post("info", {"volume_id": vid, "client_uid": BOB}).status_code == 404
    server.call("destroy", {"volume_id": vid})


@pytest.mark.parametrize("target", ["raw", "qcow2"])
def test_a_cloud_image_grows(server: LiveServer, web: Web, images: Path, tmp_path: Path, target: str) -> None:
    url = web.put("/cloud.img", images / "compressed.qcow2")
    answer = create(server, url, "cloudinit/create", size=0.02, format=target)
    assert (answer["bootable"], answer["cloudinit"], answer["size"]) == (True, True, 0.02)
    volume = server.info(answer["vid"])
    assert (volume["size"], volume["bootable"], volume["cloudinit"]) == (20_000_256, True, True)
    content = guest_bytes(server, answer["vid"], tmp_path)
    assert content[:DISK_BYTES] == disk_bytes()
    assert not any(content[DISK_BYTES:])
    server.call("destroy", {"volume_id": answer["vid"]})


def test_a_smaller_size_cuts_nothing_off(server: LiveServer, web: Web, images: Path) -> None:
    answer = create(server, web.put("/small", images / "disk.raw"), size=0.001)
    assert server.info(answer["vid"])["size"] == DISK_BYTES
    server.call("destroy", {"volume_id": answer["vid"]})


def test_a_qcow2_image_is_kept_as_it_is(server: LiveServer, web: Web, images: Path) -> None:
    answer = create(server, web.put("/kept", images / "compressed.qcow2"), format="qcow2")
    kept = (server.directory(answer["vid"]) / "data.qcow2").read_bytes()
    assert kept == (images / "compressed.qcow2").read_bytes()
    server.call("destroy", {"volume_id": answer["vid"]})


def test_zeros_become_holes(server: LiveServer, web: Web) -> None:
    content = bytes(6 << 20) + b"end".ljust(512, b"\0")
    answer = create(server, web.put("/zeros", content))
    volume = server.info(answer["vid"])
    assert volume["size"] == len(content)
    assert volume["sizeOnDisk"] < 1 << 20
    server.call("destroy", {"volume_id": answer["vid"]})


def test_what_is_declared_raw_stays_raw(server: LiveServer, web: Web, images: Path) -> None:
    for name in ("disk.qcow2", "disk.raw.xz"):
        content = (images / name).read_bytes()
        answer = create(server, web.put("/declared", content), source_format="raw")
        kept = (server.directory(answer["vid"]) / "data.img").read_bytes()
        assert kept[: len(content)] == content
        assert len(kept) - len(content) < 512
        assert not any(kept[len(content) :])
        server.call("destroy", {"volume_id": answer["vid"]})


def test_an_iso_from_the_web(server: LiveServer, web: Web) -> None:
    content = iso_bytes()
    body = {"isotype": "os_generic", "os_family": "linux", "os_flavour": "debian", "os_version": "12"}
    answer = create(server, web.put("/debian.iso", content), "iso/create/url", checksum=sha256(content), **body)
    assert (answer["isotype"], answer["os_flavour"], answer["tool_scope"]) == ("os_generic", "debian", None)
    volume = server.info(answer["vid"])
    assert (volume["format"], volume["size"], volume["readonly"]) == ("iso", len(content), True)
    assert (volume["bootable"], volume["iso_type"]) == (True, "os_generic")
    assert (server.directory(answer["vid"]) / "data.iso").read_bytes() == content
    server.call("destroy", {"volume_id": answer["vid"]})
    for key in ("name", "isotype", "os_family"):
        wrong = {"creatorID": ALICE, "name": "x", "url": web.address, **body}
        del wrong[key]
        response = server.post("iso/create/url", wrong)
        assert (response.status_code, response.json()["key"]) == (400, key)


def test_content_for_an_iso_volume_that_waits(server: LiveServer, web: Web) -> None:
    body = {"creatorID": ALICE, "name": "waits", "isotype": "tool", "os_family": "windows", "size": 0.01}
    vid = server.call("iso/create", body)["vid"]
    fill = {"creatorID": ALICE, "vid": vid}
    not_iso = server.post("iso/create/url", {**fill, "url": web.put("/no.iso", bytes(100_000))})
    assert (not_iso.status_code, not_iso.json()["code"]) == (400, "not-an-iso")
    cut = server.post("iso/create/url", {**fill, "url": web.put("/cut.iso", iso_bytes(1000)[:100_000])})
    assert (cut.status_code, cut.json()["code"]) == (400, "not-an-iso")
    stranger = server.post("iso/create/url", {**fill, "creatorID": BOB, "url": web.put("/a.iso", iso_bytes())})
    assert stranger.status_code == 403
    assert server.info(vid)["size"] == 10_000_384
    assert_waiting(server, vid)
    answer = server.call("iso/create/url", {**fill, "url": web.put("/yes.iso", iso_bytes(70))})
    assert answer["vid"] == vid
    assert (server.directory(vid) / "data.iso").read_bytes() == iso_bytes(70)
    assert server.info(vid)["size"] == 70 * 2048
    assert json.loads((server.directory(vid) / "meta.json").read_bytes())["size"] == 70 * 2048
    again = server.post("iso/create/url", {**fill, "url": web.put("/yes.iso", iso_bytes(70))})
    assert (again.status_code, again.json()["code"]) == (409, "conflict")
    assert list((server.root / "disk" / ".elemento" / "staging").iterdir()) == []
    server.call("destroy", {"volume_id": vid})


def assert_waiting(server: LiveServer, vid: str) -> None:
    data = (server.directory(vid) / "data.iso").stat()
    assert data.st_blocks == 0
    assert list((server.root / "disk" / ".elemento" / "staging").iterdir()) == []


def test_a_download_is_a_job_with_bytes_rate_and_eta(server: LiveServer, web: Web, images: Path) -> None:
    url = web.put("/slow", images / "disk.raw", piece_bytes=1 << 19, pause_s=0.06)
    begun = server.post("create/url", {"creatorID": ALICE, "name": "slow", "url": url}, Prefer="respond-async")
    assert begun.status_code == 202
    seen = []
    while (job := server.http.get(f"jobs/{begun.json()['job']}").json())["state"] == "running":
        seen.append(job)
        time.sleep(0.05)
    assert job["state"] == "done", job
    assert job["purpose"] == "create/url"
    assert job["bytes"] == job["total_bytes"] == DISK_BYTES
    told = [one for one in seen if one["rate"] and 0 < one["bytes"] < DISK_BYTES]
    assert len({one["bytes"] for one in told}) >= 2
    figures = [(one["bytes"], one["rate"], one["eta"]) for one in told]
    assert all(0 <= eta < 10 and 1e6 < rate < 1e8 for _, rate, eta in figures), figures
    assert {one["phase"] for one in told} == {"downloading"}
    assert [one["progress"] for one in seen] == sorted(one["progress"] for one in seen)
    server.call("destroy", {"volume_id": job["result"]["vid"]})


def test_the_same_key_makes_one_volume(server: LiveServer, web: Web, images: Path) -> None:
    url = web.put("/once", images / "disk.raw")
    body = {"creatorID": ALICE, "name": "once", "url": url}
    first, second = (server.post("create/url", body, Idempotency_Key="one") for _ in range(2))
    assert first.json() == second.json()
    assert second.headers["idempotency-replayed"] == "true"
    assert len(web.pages["/once"].asked) == 1
    server.call("destroy", {"volume_id": first.json()["vid"]})
