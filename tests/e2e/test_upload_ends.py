"""How uploads end before, at and after their last byte: refused early, foreseen, as a waiting volume's content."""

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests import tus
from tests.clients import eventually
from tests.e2e.invariants import assert_clean
from tests.e2e.test_hung_location import Hangable, hangable
from tests.images import DISK_BYTES, compressed, iso_bytes, make_image
from tests.live import ALICE, BOB, LiveServer, live_server, make_location
from tests.unit.support import small_file_system

__all__ = ["hangable"]

MIB = 1 << 20
KEYS = {"creatorID": ALICE, "name": "disk"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """One server for all tests of this file, whose volumes may be no larger than 100 MB."""
    root = tmp_path_factory.mktemp("upload-ends")
    make_location(root / "mnt", max_volume_size="100M")
    with live_server(root, "--overcommit", "0") as one:
        yield one


@pytest.fixture(autouse=True)
def nothing_left(server: LiveServer) -> Iterator[None]:
    yield
    for upload in server.http.get("uploads").json():
        if upload["state"] == "receiving":
            tus.end(server, upload["upload_id"])
    eventually(lambda: tus.places(server) == [], 5)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A qcow2 image of more than 64 KiB."""
    return make_image(tmp_path_factory.mktemp("images"), "disk.qcow2", "qcow2").read_bytes()


def reserved(server: LiveServer, upload: str) -> int:
    """Bytes that are reserved for an upload."""
    (place,) = (server.root / "disk" / ".elemento" / "staging").glob(f"{upload}.*.lasting")
    return int(place.name.split(".")[1])


def with_size(image: bytes, size: int) -> bytes:
    return image[:24] + size.to_bytes(8, "big") + image[32:]


def backed(image: bytes) -> bytes:
    """The same with a backing file."""
    return image[:8] + (1024).to_bytes(8, "big") + (11).to_bytes(4, "big") + image[20:]


def told(response: httpx.Response) -> tuple[int, str]:
    return response.status_code, response.json()["code"]


# -- what the first bytes say ------------------------------------------------------------------------------


def test_room_for_the_disk_is_reserved_when_its_header_is_there(server: LiveServer, image: bytes) -> None:
    upload = tus.begun(server, len(image))
    assert reserved(server, upload) < DISK_BYTES
    assert tus.patch(server, upload, 0, image[:30_000]).status_code == 204
    assert reserved(server, upload) < DISK_BYTES
    assert tus.patch(server, upload, 30_000, image[30_000:100_000]).status_code == 204
    assert reserved(server, upload) == DISK_BYTES
    assert tus.patch(server, upload, 100_000, image[100_000:]).status_code == 204
    assert server.info(upload)["size"] == DISK_BYTES


@pytest.mark.parametrize("sparse", [False, True])
def test_what_can_be_no_volume_is_not_waited_for(server: LiveServer, image: bytes, sparse: bool) -> None:
    content = backed(image)[:100_000]
    upload = tus.begun(server, 50 * MIB)
    body = tus.sparse_body((content, 4096)) if sparse else content
    more = {"Content_Type": tus.SPARSE} if sparse else {}
    refused = tus.patch(server, upload, 0, body, **more)
    assert told(refused) == (422, "upload-failed")
    assert refused.json()["reason"] == "image-refused"
    assert tus.head(server, upload).status_code == 410
    assert server.http.get(f"uploads/{upload}").json()["error"]["code"] == "image-refused"
    assert tus.places(server) == []
    assert told(tus.patch(server, upload, 100_000, b"x")) == (422, "upload-failed")
    assert tus.end(server, upload).status_code == 204


def test_a_body_that_is_refused_within_ends_where_it_is(server: LiveServer, image: bytes) -> None:
    """What is left of it is no request, and the next one on the connection is heard."""
    content = backed(image)
    assert len(content) > MIB
    with httpx.Client(base_url=server.address, timeout=20) as client:
        upload = tus.begun(server, len(content))
        headers = {"Tus-Resumable": "1.0.0", "Upload-Offset": "0", "Content-Type": tus.OFFSET}
        assert client.patch(f"uploads/{upload}", headers=headers, content=content).status_code == 422
        assert client.get("version").status_code == 200


def test_a_bomb_is_refused_before_it_is_there(server: LiveServer, image: bytes) -> None:
    upload = tus.begun(server, len(image))
    huge = with_size(image, 200_000_000)
    assert told(tus.patch(server, upload, 0, huge[:100_000])) == (507, "no-room")
    assert tus.offset(server, upload) >= 65536, "what arrived is kept: there may be room later"
    assert told(tus.patch(server, upload, tus.offset(server, upload), b"x")) == (507, "no-room")
    assert server.http.get(f"uploads/{upload}").json()["state"] == "receiving"
    eight_exabytes = tus.begun(server, len(image))
    refused = tus.patch(server, eight_exabytes, 0, with_size(image, 2**63 - 512)[:100_000])
    assert told(refused) == (422, "upload-failed")
    assert refused.json()["reason"] in ("image-refused", "image-damaged")


def test_a_body_that_has_to_be_verified_is_not_looked_at_before(server: LiveServer, image: bytes) -> None:
    content = backed(image)
    upload = tus.begun(server, len(content))
    wrong = tus.patch(server, upload, 0, content[:100_000], Upload_Checksum="sha1 2jmj7l5rSw0yVb/vlWAYkK/YBwk=")
    assert wrong.status_code == 460
    assert tus.head(server, upload).status_code == 200


def test_one_request_is_refused_early_too(server: LiveServer, image: bytes) -> None:
    for content, expected in (
        (backed(image), (409, "image-refused")),
        (with_size(image, 200_000_000), (507, "no-room")),
    ):
        assert told(server.http.put("create/upload", params=KEYS, content=content)) == expected
        form = server.http.post("create/upload", data=KEYS, files={"file": ("x", content)})
        assert told(form) == expected
    assert server.http.put("create/upload", params=KEYS, content=image).status_code == 200


def test_killed_while_it_is_refused(tmp_path: Path, image: bytes) -> None:
    with live_server(tmp_path, env={"ELEMENTO_STORAGE_FAULTPOINT": "kill:upload.released"}) as one:
        upload = tus.begun(one, len(image))
        with pytest.raises(httpx.HTTPError):
            tus.patch(one, upload, 0, backed(image)[:100_000])
        one.wait_dead()
        one.start()
        eventually(lambda: tus.head(one, upload).status_code == 404, 5)
        assert_clean(one)
        assert tus.places(one) == []


@pytest.mark.parametrize("packed", [False, True])
def test_a_disk_that_runs_full_after_the_last_byte(tmp_path: Path, packed: bool) -> None:
    """The room is there when the header is looked at, and taken by somebody else before the conversion."""
    path = make_image(tmp_path, "noise.qcow2", "qcow2", content=os.urandom(DISK_BYTES))
    content = (compressed(path, "gzip") if packed else path).read_bytes()
    with small_file_system(tmp_path / "mnt" / "disk", 30) as disk:
        make_location(tmp_path / "mnt")
        with live_server(tmp_path, "--overcommit", "0") as one:
            (disk / "filler").write_bytes(bytes(16 * MIB))
            upload = tus.begun(one, len(content))
            refused = tus.patch(one, upload, 0, content)
            assert told(refused) == (422, "upload-failed")
            assert refused.json()["reason"] == "no-room"
            assert tus.places(one) == []
            assert_clean(one)
            put = one.http.put("create/upload", params=KEYS, content=content)
            assert told(put) == (507, "no-room")
            assert_clean(one)
            (disk / "filler").unlink()
            assert one.http.put("create/upload", params=KEYS, content=content).status_code == 200


def test_a_location_that_hangs_keeps_its_uploads_and_nobody_elses(tmp_path: Path, hangable: Hangable) -> None:
    data = os.urandom(MIB)
    with live_server(tmp_path, "--disk-timeout", "2", "--heartbeat", "0.5", "--lease", "30") as one:
        stuck = tus.begun(one, MIB)
        assert list((tmp_path / "behind" / ".elemento" / "staging").glob(f"{stuck}.*"))
        assert tus.patch(one, stuck, 0, data[:1000]).status_code == 204
        hangable.hang()
        answers: list[httpx.Response] = []
        sending = threading.Thread(target=lambda: answers.append(tus.patch(one, stuck, 1000, data[1000:])))
        sending.start()
        try:
            other = tus.begun(one, MIB)
            assert tus.patch(one, other, 0, data).status_code == 204
            assert (one.directory(other) / "data.img").read_bytes() == data
        finally:
            hangable.go_on()
        sending.join(30)
        if answers[0].status_code != 204:  # it was told to come again
            at = eventually(lambda: tus.head(one, stuck).headers.get("Upload-Offset"), 20)
            assert tus.patch(one, stuck, int(at), data[int(at) :]).status_code == 204
        assert (one.directory(stuck, "nas") / "data.img").read_bytes() == data
        eventually(lambda: tus.places(one, "nas") == [], 10)
        assert_clean(one, "nas")
        assert_clean(one)


# -- volumes that wait for their content -------------------------------------------------------------------


def waiting(server: LiveServer, **more: object) -> str:
    body = {"creatorID": ALICE, "name": "drivers", "isotype": "tool", "os_family": "linux", "size": 0.01, **more}
    return str(server.call("iso/create", body)["vid"])


def content_of(server: LiveServer, vid: str) -> bytes:
    return (server.directory(vid) / "data.iso").read_bytes()


def test_a_waiting_volume_is_filled_by_tus(server: LiveServer) -> None:
    vid = waiting(server)
    content = iso_bytes(1000)
    upload = tus.begun(server, len(content), bare=True, volume_id=vid, creatorID=ALICE)
    assert upload == vid, "an upload's id is the volume's"
    assert told(tus.begin(server, len(content), bare=True, volume_id=vid, creatorID=ALICE))[0] == 409
    assert tus.patch(server, upload, 0, content[:100_000]).status_code == 204
    assert server.post("export", {"volume_id": vid, "client_uid": ALICE}).status_code == 409
    done = tus.patch(server, upload, 100_000, content[100_000:])
    assert (done.status_code, done.headers["Elemento-Volume"]) == (204, vid)
    assert content_of(server, vid) == content
    assert server.info(vid)["size"] == len(content)
    assert told(tus.begin(server, 10, bare=True, volume_id=vid, creatorID=ALICE)) == (409, "conflict")


def test_a_waiting_volume_is_filled_in_one_request(server: LiveServer) -> None:
    vid = waiting(server)
    content = iso_bytes(200)
    answer = server.http.put("iso/create/upload", params={"volume_id": vid, "creatorID": ALICE}, content=content)
    assert answer.status_code == 200, answer.text
    assert (answer.json()["vid"], answer.json()["name"]) == (vid, "drivers")
    assert content_of(server, vid) == content
    again = server.http.put("iso/create/upload", params={"volume_id": vid, "creatorID": ALICE}, content=content)
    assert told(again) == (409, "conflict")


def test_what_is_no_iso_leaves_a_volume_waiting(server: LiveServer, image: bytes) -> None:
    vid = waiting(server)
    bad = tus.begun(server, len(image), bare=True, volume_id=vid, creatorID=ALICE)
    refused = tus.patch(server, bad, 0, image[:100_000])
    assert (refused.json()["code"], refused.json()["reason"]) == ("upload-failed", "not-an-iso")
    assert tus.places(server) == []
    put = server.http.put("iso/create/upload", params={"volume_id": vid, "creatorID": ALICE}, content=b"short")
    assert told(put) == (400, "not-an-iso")
    content = iso_bytes(100)
    good = tus.begun(server, len(content), bare=True, volume_id=vid, creatorID=ALICE)
    assert tus.patch(server, good, 0, content).status_code == 204
    assert content_of(server, vid) == content


def test_only_its_owner_fills_a_volume(server: LiveServer) -> None:
    public, private = waiting(server), waiting(server, private=True)
    for vid, expected in ((public, (403, "not-owner")), (private, (404, "volume-not-found"))):
        assert told(tus.begin(server, 10, bare=True, volume_id=vid, creatorID=BOB)) == expected
        put = server.http.put("iso/create/upload", params={"volume_id": vid, "creatorID": BOB}, content=iso_bytes(100))
        assert told(put) == expected
    begun = tus.begun(server, 10, bare=True, volume_id=private, creatorID=ALICE)
    assert tus.head(server, begun, client_uid=BOB).status_code == 404
    assert tus.end(server, begun, client_uid=BOB).status_code == 404


def test_a_filling_that_is_ended_leaves_the_volume_waiting(server: LiveServer) -> None:
    vid = waiting(server)
    upload = tus.begun(server, MIB, bare=True, volume_id=vid, creatorID=ALICE)
    assert tus.patch(server, upload, 0, iso_bytes(512)[:100_000]).status_code == 204
    assert tus.end(server, upload).status_code == 204
    assert server.info(vid)["name"] == "drivers"
    assert (server.directory(vid) / "data.iso").stat().st_blocks == 0
    server.call("destroy", {"volume_id": vid})


@pytest.mark.parametrize("step", ["intake.filled", "upload.finished", "intake.adopted"])
def test_killed_while_it_is_filled(tmp_path: Path, step: str) -> None:
    content = iso_bytes(600)
    with live_server(tmp_path, env={"ELEMENTO_STORAGE_FAULTPOINT": f"kill:{step}"}) as one:
        vid = waiting(one)
        upload = tus.begun(one, len(content), bare=True, volume_id=vid, creatorID=ALICE)
        with pytest.raises(httpx.HTTPError):
            tus.patch(one, upload, 0, content)
        one.wait_dead()
        one.start()
        eventually(lambda: tus.head(one, upload).headers.get("Elemento-State") == "done", 10)
        assert content_of(one, vid) == content
        assert one.info(vid)["size"] == len(content)
        eventually(lambda: tus.places(one) == [], 5)
        assert_clean(one)


def test_random_bytes_are_a_raw_disk(server: LiveServer) -> None:
    """What has no header is looked at, and let in as it is."""
    content = os.urandom(MIB)
    upload = tus.begun(server, MIB)
    assert tus.patch(server, upload, 0, content).status_code == 204
    assert (server.directory(upload) / "data.img").read_bytes() == content
