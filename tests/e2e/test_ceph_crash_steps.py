"""SIGKILL of the real server at every named step of what it does in a pool, then a restart, then a look at the pool."""

import contextlib
import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
import rados
import rbd

from elemento_storage.ceph.index import INDEX_OBJECT
from tests.ceph import CephCluster
from tests.clients import eventually
from tests.live import ALICE, LiveServer, live_server, make_location

MIB = 1 << 20
SIZE_GB = 4 * MIB / 1e9
POOL = "crashes"

Body = dict[str, Any]


def _create(_: str) -> tuple[str, Body]:
    return "ceph/create", {"creatorID": ALICE, "name": "second", "size": SIZE_GB}


def _update(vid: str) -> tuple[str, Body]:
    return "update", {"vid": vid, "creatorID": ALICE, "name": "renamed"}


def _resize(vid: str) -> tuple[str, Body]:
    return "update/resize", {"vid": vid, "creatorID": ALICE, "size": 2 * SIZE_GB}


def _destroy(vid: str) -> tuple[str, Body]:
    return "destroy", {"volume_id": vid}


def _restore(vid: str) -> tuple[str, Body]:
    return "restore", {"volume_id": vid}


STEPS: list[tuple[Callable[[str], tuple[str, Body]], str]] = [
    (_create, "ceph.begun"),
    (_create, "create.allocated"),
    (_create, "ceph.described"),
    (_create, "ceph.published"),
    (_create, "create.renamed"),
    (_update, "ceph.rewritten"),
    (_resize, "resize.locked"),
    (_resize, "resize.grown"),
    (_destroy, "ceph.binned"),
    (_destroy, "ceph.doomed"),
    (_restore, "ceph.restored"),
]


@pytest.fixture(scope="module")
def server(ceph: CephCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    directory = tmp_path_factory.mktemp("ceph")
    ceph.make_pool(POOL)
    make_location(directory / "mnt", "pool", ceph={**ceph.settings, "pool": POOL})
    with live_server(directory, "--sweep-interval", "0.5", "--heartbeat", "0.5", "--lease", "3") as one:
        yield one


def records(ceph: CephCluster) -> dict[str, dict[str, Any]]:
    """What the index says, past the server."""
    with ceph.pool(POOL) as ioctx, rados.ReadOpCtx() as operation:
        pairs, _ = ioctx.get_omap_vals(operation, "", "v.", 1000)
        ioctx.operate_read_op(operation, INDEX_OBJECT)
        return {key[2:]: json.loads(content) for key, content in pairs}


def is_claimed(ceph: CephCluster, vid: str) -> bool:
    with ceph.pool(POOL) as ioctx:
        try:
            ioctx.read(f"elemento.claim.{vid}")
        except rados.ObjectNotFound:
            return False
    return True


@pytest.mark.parametrize(("asked", "step"), STEPS, ids=lambda one: one if isinstance(one, str) else one.__name__[1:])
def test_a_crash_leaves_all_or_nothing(
    server: LiveServer, ceph: CephCluster, asked: Callable[[str], tuple[str, Body]], step: str
) -> None:
    vid = server.call(*_create(""))["vid"]
    if asked is _restore:
        server.call("destroy", {"volume_id": vid})
    server.stop()
    flags = server.flags
    if step == "ceph.doomed":
        server.flags = (*flags, "--bin-retention", "0")
    server.start(env={"ELEMENTO_STORAGE_FAULTPOINT": f"kill:{step}"})
    path, body = asked(vid)
    with contextlib.suppress(httpx.HTTPError):
        server.post(path, body)
    server.wait_dead(10)
    server.flags = flags
    server.start()

    def is_settled() -> bool:
        left = list(server.directory(vid, "pool").glob("*.ignore"))
        return not left and all(one["state"] != "creating" for one in records(ceph).values())

    eventually(is_settled)
    known = records(ceph)
    ready = {one for one, record in known.items() if record["state"] == "ready"}
    with ceph.pool(POOL) as ioctx:
        assert set(rbd.RBD().list(ioctx)) == set(known), "no image without a volume, no volume without an image"
    listed = server.listed(include_locked=True)
    assert set(listed) == ready
    assert {one["volumeID"] for one in server.call("bin")} == set(known) - ready
    assert sorted(one.name for one in (server.root / "pool").glob("vid.*")) == sorted(
        f"vid.{one}.elimg" for one in ready
    )
    assert not list((server.root / "pool" / ".elemento" / "staging").iterdir())
    if vid in known and vid not in ready:
        server.call("restore", {"volume_id": vid})
    elif vid in ready:
        assert (listed[vid]["name"], listed[vid]["size"]) in {
            ("second", 4 * MIB),
            ("renamed", 4 * MIB),
            ("second", 8 * MIB),
        }
        with ceph.pool(POOL) as ioctx, rbd.Image(ioctx, vid, read_only=True) as image:
            assert image.size() == listed[vid]["size"]
        server.call("update", {"vid": vid, "creatorID": ALICE, "name": "works"})
    if vid in known:
        assert not is_claimed(ceph, vid)
