"""What people do in the web page: volumes and their exports, uploads, the library, cloud-init; in a real browser."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.browser import NARROW, Visit, chromium, visit
from tests.exporting import unexport_everything
from tests.images import iso_bytes
from tests.live import ALICE, LiveServer, live_server, make_location
from tests.screenshots import VIEWS, furnish

MIB = 2**20


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as one:
        yield one


def opened(tab: Visit, route: str) -> Page:
    tab.go(route)
    tab.live()
    return tab.page


def choose(page: Page, action: str) -> None:
    """One of the actions of a volume."""
    page.get_by_role("button", name="Actions").click()
    page.get_by_role("menuitem", name=action).click()


def press(page: Page, name: str) -> None:
    """The button of the dialog."""
    page.get_by_role("dialog").get_by_role("button", name=name, exact=True).click()


def fill(page: Page, name: str, text: str) -> None:
    """A field of the dialog."""
    page.get_by_role("dialog").get_by_role("textbox", name=name).fill(text)


# -- volumes -----------------------------------------------------------------------------------------------


def test_a_volume_is_made_changed_and_destroyed_with_a_way_back(browser: Browser, running: LiveServer) -> None:
    with visit(browser, running) as tab:
        page = opened(tab, "volumes")
        page.get_by_role("button", name="Create volume").click()
        fill(page, "Name", "made here")
        fill(page, "Owner", ALICE)
        page.get_by_label("Size in GB").fill("0.01")
        press(page, "Create")
        page.get_by_role("button", name="Show it").click()
        expect(page.get_by_role("heading", name="made here", level=1)).to_be_visible()
        vid = next(iter(running.listed()))

        choose(page, "Edit…")
        fill(page, "Name", "renamed <b>&amp;")
        page.get_by_label("Private").uncheck()
        press(page, "Save")
        expect(page.get_by_role("heading", name="renamed <b>&amp;", level=1)).to_be_visible()
        assert running.info(vid)["private"] is False

        choose(page, "Resize…")
        page.get_by_label("New size in GB").fill("0.02")
        press(page, "Resize")
        expect(page.get_by_text("20 MB (")).to_be_visible()

        choose(page, "Convert to raw…")
        press(page, "Convert to raw")
        expect(page.get_by_text("Convert renamed <b>&amp;: done")).to_be_visible()
        assert running.info(vid)["format"] == "raw"

        choose(page, "Clone…")
        fill(page, "Name of the clone", "the twin")
        press(page, "Clone")
        expect(page.get_by_text("Clone renamed <b>&amp;: done")).to_be_visible()
        assert "the twin" in [one["name"] for one in running.listed().values()]

        choose(page, "Destroy")
        expect(page.get_by_text("is in the bin")).to_be_visible()
        assert vid not in running.listed()
        page.get_by_role("button", name="Undo").click()
        expect(page.get_by_text("is back")).to_be_visible()
        assert vid in running.listed()


def test_snapshots_are_taken_restored_and_deleted(browser: Browser, running: LiveServer) -> None:
    vid = running.create("kept", format="qcow2")
    with visit(browser, running) as tab:
        page = opened(tab, f"volumes/{vid}")
        page.get_by_role("button", name="Take snapshot").click()
        fill(page, "Name", "before")
        press(page, "Take snapshot")
        page.get_by_role("button", name="Restore before").click()
        press(page, "Restore")
        expect(page.get_by_text("Restore kept: done")).to_be_visible()
        expect(page.get_by_role("button", name="Delete")).to_have_count(2)
        page.get_by_role("button", name="Delete before", exact=True).click()
        expect(page.get_by_text("before was deleted")).to_be_visible()
        page.reload()
        expect(page.get_by_role("button", name="Delete")).to_have_count(1)


def test_an_export_tells_how_to_attach_it(browser: Browser, running: LiveServer) -> None:
    vid = running.create("for a guest", size=0.01, format="qcow2")
    try:
        with visit(browser, running) as tab:
            page = opened(tab, f"volumes/{vid}")
            page.get_by_role("button", name="Export", exact=True).click()
            press(page, "Export")
            dialog = page.get_by_role("dialog")
            expect(dialog.get_by_text("qemu-system-x86_64")).to_contain_text("driver=nbd")
            assert tab.axe() == []
            dialog.get_by_role("tab", name="libvirt").click()
            expect(dialog.get_by_label("For virsh attach-device, or inside <devices>", exact=True)).to_contain_text(
                "<disk type='network'"
            )
            dialog.get_by_role("tab", name="Address").click()
            uri = dialog.locator("pre").filter(has_text="nbd://").inner_text()
            told = subprocess.run(["nbdinfo", "--size", uri], check=True, capture_output=True, text=True).stdout
            assert int(told) == 10_000_384  # whole sectors
            dialog.get_by_role("button", name="Close").last.click()
            expect(page.get_by_text("healthy")).to_be_visible()
    finally:
        unexport_everything(running)


def test_what_the_server_refuses_is_said(browser: Browser, running: LiveServer) -> None:
    vid = running.create("too small", size=0.01)
    with visit(browser, running) as tab:
        page = opened(tab, f"volumes/{vid}")
        choose(page, "Resize…")
        page.get_by_label("New size in GB").fill("900000")
        press(page, "Resize")
        expect(page.get_by_role("dialog").get_by_text("No location has room")).to_be_visible()
        assert tab.axe() == []
        page.keyboard.press("Escape")
        expect(page.get_by_role("dialog")).to_have_count(0)


# -- what comes from outside -------------------------------------------------------------------------------


def test_an_upload_goes_on_after_a_reload(browser: Browser, running: LiveServer, tmp_path: Path) -> None:
    image, other = tmp_path / "guest.img", tmp_path / "other.img"
    content = os.urandom(12 * MIB)
    image.write_bytes(content)
    other.write_bytes(os.urandom(12 * MIB))
    with visit(browser, running) as tab:
        page = opened(tab, "uploads")
        page.on("dialog", lambda dialog: dialog.accept())  # "leave the page?"
        slow = page.context.new_cdp_session(page)
        slow.send("Network.enable")
        speed = {"offline": False, "latency": 0, "downloadThroughput": -1, "uploadThroughput": 2 * MIB}
        slow.send("Network.emulateNetworkConditions", speed)
        page.get_by_label("File", exact=True).set_input_files(image)
        page.get_by_label("Keep it as").select_option("raw")
        page.get_by_role("textbox", name="Owner").fill(ALICE)
        page.get_by_role("button", name="Upload", exact=True).click()
        expect(page.locator("[data-upload=sending]")).to_contain_text("MB/s", timeout=15_000)
        assert tab.axe() == []
        tab.screenshot("uploading")
        page.reload()
        slow.send("Network.emulateNetworkConditions", {**speed, "uploadThroughput": -1})
        expect(page.get_by_text("guest was broken off at")).to_be_visible()
        assert uploads(running)[0]["offset"] > 0
        again = page.get_by_label("Choose guest.img again")
        again.set_input_files(other)
        expect(page.get_by_text("This is not the file that was begun")).to_be_visible()
        again.set_input_files(image)
        expect(page.locator("[data-upload=done]")).to_be_visible()
        page.get_by_role("link", name="guest", exact=True).click()
        expect(page.get_by_role("heading", name="guest", level=1)).to_be_visible()
    (vid,) = [one["volumeID"] for one in running.listed().values() if one["name"] == "guest"]
    assert running.http.get(f"volumes/{vid}/data").content == content


def uploads(server: LiveServer) -> list[dict[str, int]]:
    found: list[dict[str, int]] = server.http.get("uploads").json()
    return found


def test_an_iso_image_is_added_and_filled(browser: Browser, running: LiveServer, tmp_path: Path) -> None:
    image = tmp_path / "installer.iso"
    image.write_bytes(iso_bytes())
    with visit(browser, running) as tab:
        page = opened(tab, "library")
        page.get_by_role("button", name="Add ISO").click()
        fill(page, "Name", "an installer")
        page.get_by_label("From").select_option("upload")
        page.get_by_role("combobox", name="System").fill("linux")
        fill(page, "Flavour", "debian")
        fill(page, "Owner", ALICE)
        press(page, "Next")
        expect(page.get_by_role("heading", name="Upload the content of an installer")).to_be_visible()
        page.get_by_label("File", exact=True).set_input_files(image)
        page.get_by_role("button", name="Upload", exact=True).click()
        expect(page.locator("[data-upload=done]")).to_be_visible()
        page.get_by_role("link", name="ISO library").click()
        expect(page.get_by_text("system · linux debian")).to_be_visible()
        expect(page.get_by_text("no content yet")).to_have_count(0)


def test_what_is_no_image_is_refused_in_words(browser: Browser, running: LiveServer, tmp_path: Path) -> None:
    image = tmp_path / "not.iso"
    image.write_bytes(b"nothing" * 4096)
    with visit(browser, running) as tab:
        page = opened(tab, "uploads")
        page.get_by_label("File", exact=True).set_input_files(image)
        page.get_by_role("combobox", name="System").fill("linux")
        page.get_by_role("button", name="Upload", exact=True).click()
        expect(page.locator("[data-upload=failed]")).to_contain_text("ISO 9660")


def test_a_seed_is_made_of_user_data_that_is_yaml(browser: Browser, running: LiveServer) -> None:
    with visit(browser, running) as tab:
        page = opened(tab, "cloud-init")
        page.get_by_role("textbox", name="Name").fill("web-1-seed")
        page.get_by_role("textbox", name="Owner").fill(ALICE)
        page.get_by_label("user-data", exact=True).fill("#cloud-config\nhostname: web-1\n  users: [\n")
        expect(page.get_by_text("Line 2:").first).to_be_visible()
        expect(page.get_by_role("button", name="Make the seed")).to_be_disabled()
        assert tab.axe() == []
        page.get_by_role("button", name="Write user-data for me").click()
        page.get_by_label("Host name").fill("web-1")
        page.get_by_label("Packages").fill("nginx git")
        page.get_by_role("button", name="Write it").click()
        expect(page.get_by_label("user-data", exact=True)).to_have_value(
            "#cloud-config\nhostname: web-1\nmanage_etc_hosts: true\nusers:\n  - name: debian\n    groups: sudo\n"
            "    shell: /bin/bash\n    sudo: ALL=(ALL) NOPASSWD:ALL\n"
            "package_update: true\npackages:\n  - nginx\n  - git\n"
        )
        page.get_by_role("button", name="Make the seed").click()
        expect(page.get_by_text("web-1-seed is there")).to_be_visible()
        expect(page.get_by_role("link", name="web-1-seed")).to_be_visible()
    (seed,) = [one for one in running.listed().values() if one["name"] == "web-1-seed"]
    assert (seed["format"], seed["cloudinit"], seed.get("waiting", False)) == ("iso", True, False)
    data = running.http.get(f"volumes/{seed['volumeID']}/data", params={"client_uid": ALICE}).content
    assert b"hostname: web-1" in data


def test_the_charts_are_there_for_eyes_and_as_tables(browser: Browser, running: LiveServer) -> None:
    with visit(browser, running) as tab:
        page = opened(tab, "")
        chart = page.get_by_role("figure", name="Location disk")
        expect(chart.locator("path.es-line")).to_have_count(2)
        expect(chart.get_by_text("Size of volumes:")).to_be_visible()
        assert page.get_by_role("table", name="Traffic of the disks").get_by_role("row").count() >= 3
        page.get_by_role("button", name="24 h").click()
        expect(chart.locator("path.es-line")).to_have_count(2)


# -- every view --------------------------------------------------------------------------------------------


def test_every_view_is_for_everybody(browser: Browser, tmp_path: Path) -> None:
    """axe finds nothing, nothing is wider than a telephone; the pictures are kept to be looked at."""
    make_location(tmp_path / "mnt", "fast", max_total_size="2T", max_volumes=200)
    make_location(tmp_path / "mnt", "archive")
    with live_server(tmp_path, "--overcommit", "0") as server:
        views = {**{one or "overview": one for one in VIEWS}, "volume": f"volumes/{furnish(server)}"}
        for kind, viewport, dark in (("light", None, False), ("dark", None, True), ("narrow", NARROW, False)):
            with visit(browser, server, viewport, dark=dark) as tab:
                for name, route in views.items():
                    tab.go(route)
                    tab.live()
                    assert tab.axe() == [], (name, kind)
                    assert tab.overflow() == 0, (name, kind)
                    tab.screenshot(f"{name}-{kind}")
