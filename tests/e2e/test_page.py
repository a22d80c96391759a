"""The web page in a real browser: getting in, the overview, the list of volumes, what it weighs, how fast it is."""

import gzip
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Browser, Page, expect

from elemento_storage.api.page import BUILT, SECURITY_HEADERS
from tests.browser import NARROW, chromium, visit
from tests.live import ALICE, BINARY, BOB, LiveServer, live_server, make_location

MANY = 10_000


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as one:
        yield one


def origin(server: LiveServer) -> str:
    return server.address.removesuffix("/api/v1.0/")


# -- what is served ----------------------------------------------------------------------------------------


def test_the_page_is_served_with_its_policy_and_what_it_names_is_there(running: LiveServer) -> None:
    start = httpx.get(origin(running))
    assert start.status_code == 200
    assert {name: start.headers[name] for name in SECURITY_HEADERS} == SECURITY_HEADERS
    names = json.loads((Path(BUILT) / "manifest.json").read_text())
    script = httpx.get(f"{origin(running)}/{names['index.html']['file']}", headers={"Accept-Encoding": "gzip"})
    assert (script.headers["Content-Encoding"], script.headers["Content-Type"]) == (
        "gzip",
        "text/javascript; charset=utf-8",
    )
    assert httpx.get(f"{origin(running)}/assets/none.js").status_code == 404
    assert httpx.post(origin(running)).status_code == 404


def test_the_first_view_weighs_less_than_400_kb(browser: Browser, running: LiveServer) -> None:
    """Everything that is fetched for it: markup, scripts, styles, fonts, pictures, as gzip sends it."""
    fetched: set[str] = set()
    with visit(browser, running) as tab:
        tab.page.on("request", lambda request: fetched.add(request.url.removeprefix(tab.origin)))
        tab.go()
        tab.live()
        tab.page.wait_for_load_state("load")
    files = [Path(BUILT) / one.lstrip("/") for one in fetched if one.startswith("/assets/")] + [
        Path(BUILT) / "index.html"
    ]
    weights = {one.name: min(len(gzip.compress(one.read_bytes())), one.stat().st_size) for one in files}
    assert sum(weights.values()) <= 400_000, weights


def test_the_first_paint_takes_less_than_a_second_and_a_half(browser: Browser, running: LiveServer) -> None:
    with visit(browser, running) as tab:
        tab.go()
        painted_ms = tab.page.evaluate(
            "new Promise(done => new PerformanceObserver(list => done(list.getEntries()"
            ".find(one => one.name === 'first-contentful-paint').startTime))"
            ".observe({type: 'paint', buffered: true}))"
        )
    assert painted_ms <= 1500


# -- getting in --------------------------------------------------------------------------------------------


def test_on_a_trusted_machine_one_is_straight_in(browser: Browser, running: LiveServer) -> None:
    with visit(browser, running) as tab:
        tab.go()
        expect(tab.page.get_by_role("heading", name="Overview")).to_be_visible()
        expect(tab.page.get_by_role("heading", name="disk", exact=True)).to_be_visible()


def test_a_token_lets_one_in_until_it_is_revoked(browser: Browser, tmp_path: Path) -> None:
    make_location(tmp_path / "mnt")
    with live_server(tmp_path, "--auth", "tokens") as server:
        token, admin = (make_token(server, client, *flags) for client, flags in ((ALICE, ()), (BOB, ("--admin",))))
        headers = {"Authorization": f"Bearer {admin['token']}"}
        for owner, name in ((ALICE, "mine"), (BOB, "not mine")):
            body = {"creatorID": owner, "name": name, "size": 0.01, "private": True}
            assert server.http.post("create", json=body, headers=headers).status_code == 200
        with visit(browser, server) as tab:
            tab.go()
            expect(tab.page.get_by_role("heading", name="Log in")).to_be_visible()
            assert tab.axe() == []
            tab.screenshot("login")
            tab.page.get_by_label("Token").fill("est_0_0")
            tab.page.get_by_role("button", name="Log in").click()
            expect(tab.page.get_by_text("not known here")).to_be_visible()
            tab.page.get_by_label("Token").fill(token["token"])
            tab.page.keyboard.press("Enter")
            tab.live()
            tab.page.goto(f"{tab.origin}/#/volumes")
            expect(tab.page.get_by_role("link", name="mine", exact=True)).to_be_visible()
            expect(tab.page.get_by_text("not mine")).to_have_count(0)
            tab.page.reload()  # the tab remembers
            expect(tab.page.get_by_role("link", name="mine", exact=True)).to_be_visible()
            revoke_token(server, token["id"])
            tab.page.get_by_role("link", name="Overview").click()
            expect(tab.page.get_by_role("heading", name="Log in", level=1)).to_be_visible()
            assert tab.page.evaluate("sessionStorage.length + localStorage.length") == 0


# -- the volumes -------------------------------------------------------------------------------------------


def test_what_changes_is_seen_as_it_happens(browser: Browser, running: LiveServer) -> None:
    with visit(browser, running) as tab:
        tab.go("volumes")
        tab.live()
        vid = running.create("appears by itself", private=True)
        link = tab.page.get_by_role("link", name="appears by itself")
        expect(link).to_be_visible()
        running.call("update", {"vid": vid, "creatorID": ALICE, "name": "has another name"})
        expect(tab.page.get_by_role("link", name="has another name")).to_be_visible()
        running.call("destroy", {"volume_id": vid})
        expect(tab.page.get_by_role("link", name="has another name")).to_have_count(0)


def test_the_page_finds_its_way_back_to_a_server_that_was_away(browser: Browser, tmp_path: Path) -> None:
    make_location(tmp_path / "mnt")
    with live_server(tmp_path) as server, visit(browser, server) as tab:
        tab.go("volumes")
        tab.live()
        server.kill()
        expect(tab.page.locator("[data-live=false]")).to_be_visible()
        server.start()
        server.create("made meanwhile")
        tab.live()
        expect(tab.page.get_by_role("link", name="made meanwhile")).to_be_visible()


@pytest.fixture(scope="module")
def crowded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A server with ten thousand volumes. Their files are made here: to create them takes a minute."""
    base = tmp_path_factory.mktemp("crowded")
    location = make_location(base / "mnt")
    for number in range(MANY):
        vid = f"{number:032x}"
        directory = location / f"vid.{vid}.elimg"
        directory.mkdir()
        meta = {
            "volumeID": vid,
            "creatorID": ALICE if number % 3 else BOB,
            "size": (number + 1) * 10**6,
            "name": f"disk {number:05}",
            "format": "raw",
            "private": number % 5 == 0,
        }
        (directory / "meta.json").write_text(json.dumps(meta))
        with (directory / "data.img").open("wb") as image:
            image.truncate(meta["size"] // 512 * 512)  # type: ignore[operator]
    with live_server(base) as one:
        yield one


def test_ten_thousand_volumes_are_searched_filtered_and_sorted(browser: Browser, crowded: LiveServer) -> None:
    with visit(browser, crowded) as tab:
        tab.go("volumes")
        count, page = tab.page.get_by_role("status").last, tab.page
        expect(count).to_have_text("10,000 volumes")
        assert page.locator("tbody tr").count() < 100
        assert page.get_by_role("table").get_attribute("aria-rowcount") == str(MANY + 1)
        page.get_by_label("Search by name").fill("disk 0999")
        found = [one for one in range(MANY) if "0999" in f"disk {one:05} {one:032x}"]
        expect(count).to_have_text(f"{len(found)} of 10,000 volumes")
        page.get_by_label("State").select_option("private")
        private = [one for one in found if one % 5 == 0]
        expect(count).to_have_text(f"{len(private)} of 10,000 volumes")
        page.get_by_role("button", name="Size").click()
        page.get_by_role("button", name="Size").click()
        expect(page.locator("tbody tr").first).to_contain_text("disk 09995")
        expect(page.get_by_role("columnheader", name="Size")).to_have_attribute("aria-sort", "descending")
        page.get_by_label("Search by name").fill("nothing is called so")
        expect(page.get_by_text("No volume is like that")).to_be_visible()


def test_ten_thousand_volumes_scroll_at_fifty_frames_a_second(browser: Browser, crowded: LiveServer) -> None:
    with visit(browser, crowded) as tab:
        tab.go("volumes")
        expect(tab.page.get_by_role("link", name="disk 00000")).to_be_visible()
        best = max(frames_per_second(tab.page) for _ in range(3))
        expect(tab.page.get_by_role("link", name="disk 00000")).to_have_count(0)
    assert best >= 50


def frames_per_second(page: Page, seconds: float = 1.0) -> float:
    """While it scrolls by 40 pixels a frame, of which every tenth is a leap of a hundred rows."""
    script = """async (seconds) => {
        const scroller = document.querySelector('.es-scroller');
        const frame = () => new Promise(requestAnimationFrame);
        const begin = await frame();
        let frames = 0, now = begin;
        while (now - begin < seconds * 1000) {
            scroller.scrollTop += frames % 10 ? 40 : 4400;
            now = await frame();
            frames++;
        }
        return frames * 1000 / (now - begin);
    }"""
    return float(page.evaluate(script, seconds))


# -- for everybody -----------------------------------------------------------------------------------------


def test_a_telephone_is_wide_enough_to_get_about(browser: Browser, running: LiveServer) -> None:
    with visit(browser, running, NARROW) as tab:
        tab.go()
        tab.page.get_by_role("button", name="Navigation").click()
        assert tab.axe() == []
        tab.screenshot("navigation-narrow")
        tab.page.get_by_role("link", name="Volumes", exact=True).click()
        expect(tab.page.get_by_role("heading", name="Volumes", level=1)).to_be_visible()
        expect(tab.page.get_by_role("link", name="Bin")).to_have_count(0)


def test_the_keyboard_is_enough(browser: Browser, running: LiveServer) -> None:
    with visit(browser, running) as tab:
        tab.go()
        tab.page.keyboard.press("Tab")
        expect(tab.page.get_by_role("link", name="Skip to content")).to_be_focused()
        tab.page.keyboard.press("Enter")
        expect(tab.page.locator("#main")).to_be_focused()
        tab.page.get_by_role("link", name="Volumes", exact=True).focus()
        tab.page.keyboard.press("Enter")
        expect(tab.page.get_by_role("heading", name="Volumes", level=1)).to_be_focused()
        tab.page.get_by_role("button", name="Create volume").focus()
        tab.page.keyboard.press("Enter")
        expect(tab.page.get_by_role("dialog")).to_be_visible()
        expect(tab.page.get_by_role("textbox", name="Name")).to_be_focused()
        tab.page.keyboard.press("Escape")
        expect(tab.page.get_by_role("dialog")).to_have_count(0)
        expect(tab.page.get_by_role("button", name="Create volume")).to_be_focused()


# -- tokens ------------------------------------------------------------------------------------------------


def make_token(server: LiveServer, client: str, *flags: str) -> dict[str, str]:
    told = subprocess.run(
        [str(BINARY), "token", "create", client, *flags, "--json", "--state-dir", str(server.state_dir)],
        check=True,
        capture_output=True,
    )
    made: dict[str, str] = json.loads(told.stdout)
    return made


def revoke_token(server: LiveServer, token_id: str) -> None:
    subprocess.run([str(BINARY), "token", "revoke", token_id, "--state-dir", str(server.state_dir)], check=True)
