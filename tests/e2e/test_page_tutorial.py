"""docs/tutorial.md, done as it says: an image is uploaded in the page, exported, and booted by the command it shows."""

import re
import subprocess
from pathlib import Path

from playwright.sync_api import expect

from tests.browser import chromium, visit
from tests.guest.build import images
from tests.live import live_server

TUTORIAL = (Path(__file__).parents[2] / "docs" / "tutorial.md").read_text(encoding="utf-8")
LABELS = set(re.findall(r"\*\*(.+?)\*\*", TUTORIAL))
BOOT_S = 180


def test_a_new_user_gets_from_an_image_to_a_running_machine(tmp_path: Path) -> None:
    used = set()

    def label(text: str) -> str:
        """What the tutorial names."""
        assert text in LABELS
        used.add(text)
        return text

    image = images().new_boot_disk(tmp_path / "debian.raw", "booted by the tutorial")
    with live_server(tmp_path) as server, chromium() as browser, visit(browser, server) as tab:
        page = tab.page
        tab.go()
        tab.live()
        page.get_by_role("link", name=label("Uploads")).click()
        page.get_by_label(label("File"), exact=True).set_input_files(image)
        expect(page.get_by_role("textbox", name=label("Name of the volume"))).to_have_value("debian")
        expect(page.get_by_role("textbox", name=label("Owner"))).to_have_value("f" * 32)
        page.get_by_role("button", name=label("Upload"), exact=True).click()
        page.get_by_role("link", name="debian", exact=True).click()

        page.get_by_role("button", name=label("Export"), exact=True).click()
        dialog = page.get_by_role("dialog")
        expect(dialog.get_by_label(label("Over"))).to_have_value("nbd")
        dialog.get_by_role("button", name="Export", exact=True).click()
        expect(dialog.get_by_role("button", name=label("Copy")).first).to_be_visible()
        command = dialog.get_by_label("A virtual machine with this disk", exact=True).inner_text()
        assert command.startswith("qemu-system-x86_64 -accel kvm -accel tcg -m 1G \\\n")

        # Without KVM, as all guests of the tests: what virtual machines offer of it is not always able to boot one.
        emulated = command.replace("-accel kvm ", "")
        said = subprocess.run(
            ["bash", "-c", f"{emulated} -nographic"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=BOOT_S,
            check=True,
        ).stdout
        assert b"BOOT-MARKER booted by the tutorial" in said

        page.keyboard.press("Escape")
        page.get_by_role("button", name=label("End")).click()
        expect(page.get_by_text("Nobody reaches it now.")).to_be_visible()
        page.get_by_role("button", name=label("Actions")).click()
        page.get_by_role("menuitem", name=label("Destroy")).click()
        expect(page.get_by_role("button", name=label("Undo"))).to_be_visible()
        for view in (label("Bin"), label("Cloud-init")):
            page.get_by_role("link", name=view).click()
            expect(page.get_by_role("heading", name=view, level=1)).to_be_visible()
    assert used == LABELS
