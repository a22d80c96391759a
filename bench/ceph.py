"""Volumes in a Ceph pool, beside the bare bindings on the same cluster."""

import contextlib
import itertools
import json
import time

import msgspec
import rbd
from tests.ceph import POOL, ceph_cluster
from tests.live import make_location

from bench.connection import Connection
from bench.context import OWNER, Context
from bench.measure import Row, Section, alternate, bounded, compare, figures, timed
from elemento_storage.ceph.connection import PoolSettings
from elemento_storage.ceph.index import Record, State
from elemento_storage.ceph.pool import Pools

TITLE = "Volumes in a Ceph pool"
REMARKS = [
    "A cluster of one monitor and three OSDs on files of this machine, two copies of everything. The bare bindings: "
    "`rbd.RBD().create` in Python, one image of 1 GiB, without metadata or anything else. Ours: `ceph/create` over "
    "HTTP, with a record in the index that every server sees, the metadata in the image, and limits that were checked.",
    "*Listing*: `accessible`, received and parsed, more than a second after the last one. For this the volumes are "
    "records in the index only; no image is looked at to list it.",
]


def run(context: Context) -> Section:
    """All rows."""
    with ceph_cluster() as cluster, cluster.pool() as ioctx:
        root = context.directory("mnt")
        make_location(root, "pool", ceph=cluster.settings)
        numbers = itertools.count()

        def bare() -> list[float]:
            name = f"bare-{next(numbers)}"
            return [timed(lambda: rbd.RBD().create(ioctx, name, 1 << 30, features=5))]

        with context.server(root) as server, contextlib.closing(Connection(server.listen_host, server.port)) as http:
            body = {"creatorID": OWNER, "name": "disk", "size": 1}

            def ours() -> list[float]:
                return [timed(lambda: http.post("ceph/create", body))]

            bare(), ours()
            made, made_bare = alternate(context.rounds(60), ours, bare)
            rows = [
                compare(
                    "create",
                    figures("ms", made, scale=1e3),
                    "rbd.RBD().create",
                    figures("ms", made_bare, scale=1e3),
                    at_most=1.3,
                    paired=True,
                )
            ]
            rows += _listings(context, http, cluster.settings)
    return Section(TITLE, rows, REMARKS)


def _listings(context: Context, http: Connection, settings: dict[str, str]) -> list[Row]:
    pool = Pools("f" * 32, 30).get(msgspec.convert(settings, PoolSettings))
    pool.index.refresh()
    rows, count = [], len(pool.index.records)
    for wanted in (100, 500) if context.quick else (1_000, 5_000, 10_000):
        for number in range(count, wanted):
            vid = f"{number:032x}"
            meta = {"volumeID": vid, "creatorID": OWNER, "size": 1 << 30, "name": f"disk {number}", "format": "rbd"}
            record = Record(state=State.READY, size=1 << 30, meta=msgspec.Raw(json.dumps(meta).encode()))
            pool.index.change(vid, lambda _, record=record: record)  # type: ignore[misc]
        count = wanted

        def listed() -> list[float]:
            time.sleep(2)
            return [timed(lambda: json.loads(http.post("accessible", {"client_uid": OWNER})))]

        while len(json.loads(http.post("accessible", {"client_uid": OWNER}))) < wanted:
            time.sleep(1)
        (values,) = alternate(context.rounds(5), listed)
        rows.append(bounded(f"list {wanted:,} volumes of {POOL}", figures("ms", values, scale=1e3), at_most=100))
    pool.close()
    return rows
