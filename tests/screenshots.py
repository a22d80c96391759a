"""``python -m tests.screenshots FILE``: a picture of the overview, of a server that is made up for it."""

import sys
import tempfile
from pathlib import Path

from playwright.sync_api import expect

from tests.browser import chromium, visit
from tests.live import ALICE, BOB, LiveServer, live_server, make_location

VIEWS = ("", "volumes", "library", "cloud-init", "uploads", "exports", "jobs", "bin")


def furnish(server: LiveServer) -> str:
    """Volumes of every kind, some exported, one in the bin. The id of one that has something of everything."""
    first = server.create("web-1", 20, ALICE, format="qcow2", bootable=True)
    server.create("web-2", 20, ALICE, format="qcow2", bootable=True, private=True)
    server.create("database", 100, ALICE, format="raw")
    server.create("shared data", 500, BOB, format="qcow2", shareable=True)
    golden = server.create("debian-12 golden image", 8, BOB, format="qcow2", readonly=True, bootable=True)
    server.call("clone", {"volume_id": golden, "creatorID": ALICE, "name": "build-runner", "linked": True})
    server.call(
        "iso/create",
        {
            "creatorID": BOB,
            "name": "virtio-win",
            "isotype": "tool",
            "os_family": "windows",
            "tool_scope": "drivers",
            "tool_version": "0.1.266",
        },
    )
    server.call("snapshots/create", {"vid": first, "creatorID": ALICE, "name": "before the upgrade"})
    server.call("export", {"volume_id": first, "client_uid": ALICE, "protocol": "nbd"})
    server.call("destroy", {"volume_id": server.create("scratch", 1, ALICE)})
    return first


def main(target: Path) -> None:
    """Write the picture."""
    with tempfile.TemporaryDirectory(prefix="es-shot-") as directory:
        base = Path(directory)
        make_location(base / "mnt", "fast", max_total_size="2T", max_volumes=200)
        make_location(base / "mnt", "archive")
        with live_server(base, "--overcommit", "0") as server, chromium() as browser:
            furnish(server)
            with visit(browser, server) as tab:
                tab.go()
                tab.live()
                expect(tab.page.get_by_role("heading", name="archive")).to_be_visible()
                expect(tab.page.get_by_role("figure", name="Location fast")).to_be_visible()
                target.parent.mkdir(parents=True, exist_ok=True)
                tab.page.screenshot(path=target, animations="disabled")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
