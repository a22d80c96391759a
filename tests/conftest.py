"""Fixtures for all tests."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.ceph import CephCluster, ceph_cluster
from tests.live import LiveServer, live_server

REQUIRED_TOOLS = (
    *("qemu-img", "qemu-storage-daemon", "qemu-io", "setpriv", "prlimit", "setsid", "fusermount3", "tgtd", "tgtadm"),
    *("smbd", "smbstatus", "smbclient", "fio", "iscsi-test-cu", "iscsi-ls", "nbdinfo", "qemu-system-x86_64", "gcc"),
    *("ceph-mon", "ceph-osd", "ceph-mgr", "monmaptool", "ceph-authtool"),
    *("virt-xml-validate", "xmllint", "curl", "node", "xorriso", "blkid", "debootstrap", "debugfs", "chromium"),
    *("promtool", "systemd-analyze", "libvirtd", "virsh", "dpkg-deb"),
)


def pytest_sessionstart(session: pytest.Session) -> None:
    """A missing component is an error of the machine, said at once, and never a skipped test."""
    missing = [tool for tool in REQUIRED_TOOLS if shutil.which(tool) is None]
    if missing:
        pytest.exit(f"missing: {', '.join(missing)}; run `make setup`", returncode=3)
    for name in list(os.environ):
        if name.startswith("ELEMENTO_STORAGE_"):
            del os.environ[name]


@pytest.fixture(scope="session")
def ceph() -> Iterator[CephCluster]:
    """One Ceph cluster for all tests of the session. Who breaks it mends it."""
    with ceph_cluster() as one:
        yield one


@pytest.fixture
def server(tmp_path: Path) -> Iterator[LiveServer]:
    """A running server with one unlimited location."""
    with live_server(tmp_path) as running:
        yield running
