"""What an export may use: given with it, changed while it runs, brought back with it."""

import time

import pytest

from tests.clients import QemuIo
from tests.exporting import export, new_volume, refused_export, state, wait_healthy
from tests.live import ALICE, BOB, LiveServer

_KIB = 1024
_REQUESTS = 120


def seconds(client: QemuIo) -> float:
    """How long so many small writes take, one after the other. (Reads of holes are not counted by QEMU.)"""
    started = time.monotonic()
    for number in range(_REQUESTS):
        client.succeed(f"write -P 1 {number * 4 * _KIB} {4 * _KIB}")
    return time.monotonic() - started


def is_free(client: QemuIo) -> bool:
    """Whether nothing holds the writes up; what others do on the machine may, once or twice."""
    return any(seconds(client) < 1 for _ in range(5))


@pytest.mark.parametrize(("protocol", "image_format"), [("iscsi", "raw"), ("iscsi", "qcow2"), ("nbd", "qcow2")])
def test_limits_are_changed_while_the_export_runs(shared: LiveServer, protocol: str, image_format: str) -> None:
    vid = new_volume(shared, format=image_format)
    with QemuIo(export(shared, vid, protocol=protocol)["qemu"]) as client:
        assert is_free(client)
        limited = export(shared, vid, limits={"iops": 50})
        assert limited["limits"]["iops"] == 50
        assert seconds(client) > 1.5
        assert state(shared, vid)["limits"]["iops"] == 50
        shared.kill_daemons(f"/v/{vid}/")
        wait_healthy(shared, vid)
        assert seconds(client) > 1.5
        assert export(shared, vid, limits={})["limits"]["iops"] == 0
        assert is_free(client)


def test_each_nbd_export_has_its_own(shared: LiveServer) -> None:
    vid = new_volume(shared, shareable=True)
    slow = export(shared, vid, ALICE, protocol="nbd", limits={"iops_write": 50})
    fast = export(shared, vid, BOB, protocol="local")
    with QemuIo(slow["qemu"]) as one, QemuIo(fast["qemu"]) as other:
        assert seconds(one) > 1.5
        assert is_free(other)


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        ({"iops": 5, "iops_read": 5}, "give the total or the parts"),
        ({"bps_burst": 5}, "without a limit that it exceeds"),
        ({"bps": 10, "bps_burst": 5}, "less than the limit"),
        ({"iops": -1}, "iops"),
        ({"speed": 1}, "speed"),
        ({"iops": "many"}, "iops"),
        ([], "limits"),
    ],
)
def test_limits_that_cannot_be(shared: LiveServer, limits: object, said: str) -> None:
    status, code, sentence = refused_export(shared, new_volume(shared), limits=limits)
    assert (status, code) == (400, "invalid-value")
    assert said in sentence


def test_exports_of_one_file_share_their_limits(shared: LiveServer) -> None:
    vid = new_volume(shared, shareable=True)
    export(shared, vid, ALICE, limits={"bps": 10_000_000})
    assert refused_export(shared, vid, BOB, limits={"bps": 20_000_000})[:2] == (409, "export-differs")
    export(shared, vid, BOB, limits={"bps": 10_000_000})
