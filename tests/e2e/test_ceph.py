"""Volumes in a Ceph pool, through the launched server and a real cluster."""

import json
from collections.abc import Iterator

import pytest
import rados
import rbd

from elemento_storage.ceph.index import INDEX_OBJECT
from tests.ceph import CephCluster
from tests.clients import eventually
from tests.exporting import refusal
from tests.live import ALICE, BOB, LiveServer, live_server, make_location

MB = 1 << 20
SIZE_GB = 8 * MB / 1e9


@pytest.fixture(scope="module")
def server_on_pool(ceph: CephCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    directory = tmp_path_factory.mktemp("ceph")
    make_location(directory / "mnt")
    make_location(directory / "mnt", "pool", ceph=ceph.settings)
    with live_server(directory, "--sweep-interval", "1") as one:
        yield one


@pytest.fixture
def server(server_on_pool: LiveServer) -> LiveServer:
    return server_on_pool


def create(server: LiveServer, name: str = "disk", **more: object) -> str:
    body = {"creatorID": ALICE, "name": name, "size": SIZE_GB, **more}
    return str(server.call("ceph/create", body)["vid"])


def image_names(ceph: CephCluster) -> list[str]:
    with ceph.pool() as ioctx:
        return rbd.RBD().list(ioctx)


def image_meta(ceph: CephCluster, vid: str) -> dict[str, object]:
    with ceph.pool() as ioctx, rbd.Image(ioctx, vid, read_only=True) as image:
        meta: dict[str, object] = json.loads(dict(image.metadata_list())["elemento"])
        return meta


def test_create_makes_an_image_that_carries_its_own_metadata(server: LiveServer, ceph: CephCluster) -> None:
    answer = server.call("ceph/create", {"creatorID": ALICE, "name": "one", "size": SIZE_GB, "private": True})
    vid = answer["vid"]
    assert (answer["img_format"], answer["size"]) == ("rbd", SIZE_GB)
    shown = server.info(vid)
    assert (shown["format"], shown["ceph"], shown["size"], shown["location"]) == ("rbd", True, 8 * MB, "pool")
    with ceph.pool() as ioctx, rbd.Image(ioctx, vid, read_only=True) as image:
        assert image.size() == 8 * MB
    meta = image_meta(ceph, vid)
    assert meta == json.loads((server.directory(vid, "pool") / "meta.json").read_text())
    assert (meta["volumeID"], meta["creatorID"], meta["private"]) == (vid, ALICE, True)
    ref = json.loads((server.directory(vid, "pool") / "data.rbd").read_text())
    assert (ref["pool"], ref["image"], ref["conf"]) == ("elemento", vid, ceph.conf)
    assert vid in server.listed(ALICE)
    assert vid not in server.listed(BOB)
    assert refusal(server, "info", {"volume_id": vid, "client_uid": BOB})[:2] == (404, "volume-not-found")


def test_create_with_ceph_true_is_the_same_and_with_key_it_is_made_once(server: LiveServer) -> None:
    body = {"creatorID": ALICE, "name": "keyed", "size": SIZE_GB, "ceph": True}
    first = server.call("create", body, Idempotency_Key="once")
    assert server.call("create", body, Idempotency_Key="once") == first
    assert first["img_format"] == "rbd"
    assert server.info(first["vid"])["ceph"] is True
    assert server.call("create", {**body, "ceph": False, "format": "rbd"})["img_format"] == "rbd"
    assert refusal(server, "create", {**body, "format": "qcow2"})[:2] == (400, "invalid-value")
    assert refusal(server, "create", {**body, "preallocation": "full"})[:2] == (400, "invalid-value")


def test_files_and_images_do_not_mix(server: LiveServer) -> None:
    assert server.info(server.create())["location"] == "disk"
    vids = [
        one["vid"]
        for one in server.call(
            "create/multiple",
            {
                "volumes": [
                    {"creatorID": ALICE, "name": "a", "size": SIZE_GB, "ceph": True},
                    {"creatorID": ALICE, "name": "b", "size": SIZE_GB},
                ]
            },
        )
    ]
    assert [server.info(vid)["location"] for vid in vids] == ["pool", "disk"]


def test_update_and_transfer_are_in_the_pool_when_they_are_answered(server: LiveServer, ceph: CephCluster) -> None:
    vid = create(server)
    server.call("update", {"vid": vid, "creatorID": ALICE, "name": "renamed", "shareable": True})
    assert (image_meta(ceph, vid)["name"], image_meta(ceph, vid)["shareable"]) == ("renamed", True)
    server.call("transfer", {"vid": vid, "creatorID": ALICE, "newCreatorID": BOB})
    assert image_meta(ceph, vid)["creatorID"] == BOB
    assert refusal(server, "update", {"vid": vid, "creatorID": ALICE, "name": "x"})[:2] == (403, "not-owner")


def test_resize_grows_the_image_and_never_shrinks_it(server: LiveServer, ceph: CephCluster) -> None:
    vid = create(server)
    server.call("update/resize", {"vid": vid, "creatorID": ALICE, "size": 16 * MB / 1e9})
    with ceph.pool() as ioctx, rbd.Image(ioctx, vid, read_only=True) as image:
        assert image.size() == 16 * MB
    assert server.info(vid)["size"] == image_meta(ceph, vid)["size"] == 16 * MB
    smaller = {"vid": vid, "creatorID": ALICE, "size": SIZE_GB}
    assert refusal(server, "update/resize", smaller)[:2] == (409, "cannot-shrink")


def test_destroy_keeps_the_image_until_it_is_purged(server: LiveServer, ceph: CephCluster) -> None:
    vid = create(server)
    server.call("destroy", {"volume_id": vid})
    assert refusal(server, "info", {"volume_id": vid})[:2] == (404, "volume-not-found")
    assert vid in {one["volumeID"] for one in server.call("bin")}
    assert vid in image_names(ceph)
    server.call("restore", {"volume_id": vid})
    assert server.info(vid)["format"] == "rbd"
    assert server.directory(vid, "pool").exists()


def test_what_cannot_be_done_with_an_image_is_said(server: LiveServer) -> None:
    vid = create(server)
    own = {"vid": vid, "creatorID": ALICE}
    for path, body in (
        ("update/convert", {**own, "format": "qcow2"}),
        ("clone", {"volume_id": vid, "creatorID": ALICE}),
        ("reset", own),
        ("snapshots/create", own),
        ("backups/create", own),
    ):
        assert refusal(server, path, body)[:2] == (409, "format-unsupported"), path
    assert server.http.get(f"volumes/{vid}/data").status_code == 409


def test_a_server_that_has_lost_its_directory_takes_the_volumes_from_the_pool(
    server: LiveServer, ceph: CephCluster
) -> None:
    vid = create(server, "kept", private=True)
    before = server.info(vid)
    directory = server.directory(vid, "pool")
    for one in directory.iterdir():
        one.unlink()
    directory.rmdir()
    server.stop()
    server.start()
    after = server.info(vid)
    assert {**after, "lastUpdated": ""} == {**before, "lastUpdated": ""}


def test_an_index_that_is_lost_is_made_again_from_the_images(server: LiveServer, ceph: CephCluster) -> None:
    vid, binned = create(server, "kept"), create(server, "binned")
    server.call("destroy", {"volume_id": binned})
    with ceph.pool() as ioctx:
        ioctx.remove_object(INDEX_OBJECT)
    assert vid in server.listed()
    server.call("rescan")
    assert server.info(vid)["name"] == "kept"
    server.call("update", {"vid": vid, "creatorID": ALICE, "name": "changed"})
    assert image_meta(ceph, vid)["name"] == "changed"


def test_rescan_tells_of_images_that_came_and_went_behind_our_back(server: LiveServer, ceph: CephCluster) -> None:
    vid, foreign = create(server), "f" * 31 + "1"
    meta = json.dumps(
        {"volumeID": foreign, "creatorID": BOB, "size": 4 * MB, "name": "theirs", "format": "rbd", "ceph": True}
    )
    with ceph.pool() as ioctx:
        rbd.RBD().remove(ioctx, vid)
        rbd.RBD().create(ioctx, foreign, 4 * MB, features=5)
        rbd.RBD().create(ioctx, "somebody-elses", 4 * MB, features=5)
        rbd.RBD().create(ioctx, "e" * 32, 4 * MB, features=5)
        with rbd.Image(ioctx, foreign) as image:
            image.metadata_set("elemento", meta)
    report = server.call("rescan")
    assert foreign in report["added"]
    assert [one["reason"] for one in report["odd"] if vid in one["directory"]] == [
        "its image is not in the pool any more: somebody removed or renamed it"
    ]
    assert server.info(foreign)["name"] == "theirs"
    assert {"somebody-elses", "e" * 32} <= set(image_names(ceph))
    assert refusal(server, "info", {"volume_id": "e" * 32})[0] == 404
    status, code, sentence = refusal(server, "update/resize", {"vid": vid, "creatorID": ALICE, "size": 1})
    assert (status, code) == (503, "ceph-unavailable")
    assert "not in the pool" in sentence
    server.call("destroy", {"volume_id": vid})


def test_limits_of_the_location_hold(server: LiveServer, ceph: CephCluster) -> None:
    ceph.make_pool("tight")
    settings = {**ceph.settings, "pool": "tight"}
    make_location(server.root, "tight", ceph=settings, max_volumes=2, max_volume_size=f"{32 * MB}")
    try:
        server.call("locations")
        body = {"creatorID": ALICE, "name": "x", "size": 64 * MB / 1e9, "ceph": True}
        make_location(server.root, "pool", ceph=ceph.settings, max_volumes=1)
        server.call("locations")
        status, code, sentence = refusal(server, "create", body)
        assert (status, code) == (507, "no-room"), sentence
        assert "max-volume-size" in sentence
        small = {**body, "size": SIZE_GB}
        vids = [server.call("create", small)["vid"] for _ in range(2)]
        assert {server.info(vid)["location"] for vid in vids} == {"tight"}
        assert refusal(server, "create", small)[:2] == (507, "no-room")
        with ceph.pool("tight") as ioctx:
            assert sorted(rbd.RBD().list(ioctx)) == sorted(vids)
    finally:
        make_location(server.root, "pool", ceph=ceph.settings)
        (server.root / "tight" / "settings.json").unlink()
        server.call("locations")


def test_a_purge_removes_the_image(ceph: CephCluster, server: LiveServer) -> None:
    server.stop()
    flags, server.flags = server.flags, (*server.flags, "--bin-retention", "0")
    try:
        server.start()
        vid = create(server)
        server.call("destroy", {"volume_id": vid})
        eventually(lambda: vid not in image_names(ceph))
        assert vid not in {one["volumeID"] for one in server.call("bin")}
        with ceph.pool() as ioctx, pytest.raises(rados.ObjectNotFound):
            ioctx.read(f"elemento.claim.{vid}")
    finally:
        server.stop()
        server.flags = flags
        server.start()
