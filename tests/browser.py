"""A real browser for the tests of the web page: Debian's Chromium, without a window."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, BrowserContext, Page, Request, expect, sync_playwright

from tests.live import LiveServer

ROOT = Path(__file__).parents[1]
SCREENSHOTS = ROOT / "build" / "screenshots"
AXE = ROOT / "web" / "node_modules" / "axe-core" / "axe.min.js"

WIDE = {"width": 1280, "height": 800}
NARROW = {"width": 380, "height": 740}

_FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    """The browser. It is started once for a module: that takes longer than most tests."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=list(_FLAGS))
        try:
            yield browser
        finally:
            browser.close()


@dataclass
class Visit:
    """One tab on one server, and everything that went wrong in it."""

    page: Page
    server: LiveServer
    complaints: list[str] = field(
        default_factory=list
    )  #: violations of the policy, errors of scripts, requests elsewhere

    @property
    def origin(self) -> str:
        return self.server.address.removesuffix("/api/v1.0/")

    def go(self, route: str = "") -> None:
        """Open a view. Its heading is there when this returns."""
        self.page.goto(f"{self.origin}/#/{route}")
        expect(self.page.get_by_role("heading", level=1)).to_be_visible()

    def live(self) -> None:
        """Until the page hears of changes."""
        expect(self.page.locator("[data-live=true]")).to_be_visible()

    def screenshot(self, name: str) -> Path:
        """Kept below build/screenshots, to be looked at."""
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        path = SCREENSHOTS / f"{name}.png"
        self.page.screenshot(path=path, animations="disabled")
        return path

    def axe(self) -> list[str]:
        """What axe finds wrong for people who use other than eyes and a mouse."""
        # Through the debugger, which the page's policy does not bind; a script element it would refuse.
        self.page.evaluate(AXE.read_text(encoding="utf-8"))
        found: dict[str, Any] = self.page.evaluate("axe.run(document, {resultTypes: ['violations']})")
        return [
            f"{one['id']}: {node['html'][:200]} {node['failureSummary'][:300]}"
            for one in found["violations"]
            for node in one["nodes"][:3]
        ]

    def overflow(self) -> int:
        """Pixels by which the page is wider than the window."""
        return int(self.page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth"))


@contextlib.contextmanager
def visit(
    browser: Browser, server: LiveServer, viewport: dict[str, int] | None = None, *, dark: bool = False
) -> Iterator[Visit]:
    """A fresh tab. Afterwards nothing may have gone wrong in it."""
    context = browser.new_context(
        viewport={"width": (viewport or WIDE)["width"], "height": (viewport or WIDE)["height"]},
        color_scheme="dark" if dark else "light",
        reduced_motion="reduce",
    )
    context.set_default_timeout(10_000)
    try:
        page = context.new_page()
        one = Visit(page, server)
        watch(one, context)
        yield one
        assert one.complaints == []
    finally:
        context.close()


def watch(one: Visit, context: BrowserContext) -> None:
    """Collect what a page may not do."""

    def on_request(request: Request) -> None:
        if not request.url.startswith((f"{one.origin}/", "blob:", "data:")):
            one.complaints.append(f"a request to {request.url}")

    context.on("request", on_request)
    one.page.on("pageerror", lambda error: one.complaints.append(f"an error: {error}"))
    one.page.on(
        "console",
        lambda message: (
            one.complaints.append(f"{message.type}: {message.text}")
            if message.type == "error" and "Failed to load resource" not in message.text
            else None
        ),
    )
