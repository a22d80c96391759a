"""The vendor's published command line, unmodified, against the gateway in front of two servers."""

import os
import pty
import select
import subprocess
import termios
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.gateway import PASSWORD, USER, Gateway, live_gateway, published_ports, server_tables, url_of, user_tables
from tests.live import ALICE, LiveServer, live_server, make_location

ENVIRONMENT = Path(__file__).parents[2] / ".venv" / "vendor-cli"


@dataclass
class Site:
    """Two servers, and the gateway in front of them."""

    one: LiveServer
    two: LiveServer
    gateway: Gateway


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with (
        published_ports() as (client_port, login_port),
        live_server(tmp_path_factory.mktemp("one")) as one,
        live_server(tmp_path_factory.mktemp("two")) as two,
    ):
        # Room for one volume of 1 GB and a small one on the first server; what is larger goes to the second.
        make_location(one.root, "disk", max_total_size="1.5G")
        one.call("rescan")
        tables = f"{server_tables(one=url_of(one), two=url_of(two))}\n{user_tables()}"
        directory = tmp_path_factory.mktemp("gateway")
        with live_gateway(directory, tables, client_port=client_port, login_port=login_port) as gateway:
            for path in ENVIRONMENT.glob("lib/*/site-packages/.elemento_login_cookie"):
                path.unlink()
            yield Site(one, two, gateway)
            for path in ENVIRONMENT.glob("lib/*/site-packages/.elemento_login_cookie"):
                path.unlink()


def elemento(*words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TERM": "dumb", "PYTHONWARNINGS": "ignore"}
    return subprocess.run(
        [ENVIRONMENT / "bin" / "elemento", *words],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        stdin=subprocess.DEVNULL,
        env=environment,
    )


def typed(*answers: str, words: tuple[str, ...]) -> tuple[int, str]:
    """The command at a terminal, where somebody types an answer to each question; its status and what it said."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [ENVIRONMENT / "bin" / "elemento", *words],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, "TERM": "dumb", "PYTHONWARNINGS": "ignore"},
        start_new_session=True,
    )
    os.close(theirs)
    said, left = "", list(answers)
    deadline = time.monotonic() + 60
    try:
        while process.poll() is None or select.select([ours], [], [], 0)[0]:
            assert time.monotonic() < deadline, said
            if select.select([ours], [], [], 0.1)[0]:
                try:
                    said += os.read(ours, 65536).decode(errors="replace")
                except OSError:  # the other end is closed: Linux says EIO
                    break
            # A password is asked for without an echo, and typed too early it would be lost with the switch to that.
            is_asked = "Write username" in said if len(left) == len(answers) else "Password" in said and _is_quiet(ours)
            if left and is_asked:
                os.write(ours, f"{left.pop(0)}\r".encode())
    finally:
        if process.poll() is None:
            process.kill()
        process.wait(10)
        os.close(ours)
    return process.returncode, said


def _is_quiet(terminal: int) -> bool:
    return not termios.tcgetattr(terminal)[3] & termios.ECHO


def test_a_user_logs_in_makes_finds_and_destroys_volumes(site: Site) -> None:
    # Before the login nothing is shown, to nobody.
    assert site.gateway.client.get("accessible").status_code == 401

    status, said = typed(USER, PASSWORD, words=("auth", "login"))
    assert "Login successful" in said, said
    assert status == 0
    whoami = elemento("auth", "whoami")
    assert (whoami.returncode, "'authenticated': True" in whoami.stdout, USER in whoami.stdout) == (0, True, True)
    assert "Storage client \x1b[38;5;221monline" in elemento("info", "status").stdout

    empty = elemento("volume", "list")
    assert (empty.returncode, "Volume ID" in empty.stdout) == (0, True), empty

    assert "Volume can be created on 2 servers" in elemento("volume", "cancreate", "--size", "1").stdout
    assert "Volume can be created on 1 servers" in elemento("volume", "cancreate", "--size", "2").stdout
    assert "No server available" in elemento("volume", "cancreate", "--size", "2000000").stdout

    first = elemento("volume", "create", "--size", "1", "--private", "1")
    second = elemento("volume", "create", "--size", "2")
    assert (first.returncode, second.returncode) == (0, 0), (first, second)
    [small], [large] = list(site.one.listed()), list(site.two.listed())
    assert (site.one.info(small)["private"], site.one.info(small)["creatorID"]) == (True, ALICE)
    assert small in first.stdout
    assert large in second.stdout

    told = elemento("volume", "list")
    rows = {row.split("│")[1].strip(): row for row in told.stdout.splitlines() if row.startswith("│")}
    assert {small, large} <= set(rows), told.stdout
    assert f"127.0.0.1:{site.one.port}" in rows[small]
    assert "2GB" in rows[large].replace(" ", "")
    shown = elemento("volume", "info", large)
    assert (shown.returncode, large in shown.stdout) == (0, True), shown

    assert elemento("volume", "destroy", large).returncode == 0
    assert site.two.listed() == {}
    assert elemento("volume", "destroy", large).returncode != 0
    assert elemento("volume", "info", large).returncode != 0


def test_with_one_server_down_the_rest_is_served_and_it_is_said(site: Site) -> None:
    site.gateway.log_in()
    typed(USER, PASSWORD, words=("auth", "login"))
    here, there = site.two.create("here"), site.one.create("there")
    site.one.kill()
    told = elemento("volume", "list")
    assert (told.returncode, here in told.stdout, there in told.stdout) == (0, True, False), told
    assert "server one does not answer" in site.gateway.log()
    made = elemento("volume", "create", "--size", "1")
    assert made.returncode == 0
    assert '"silent"' in made.stdout  # the command line shows the answer as it is
    assert elemento("volume", "info", here).returncode == 0
    assert elemento("volume", "destroy", here).returncode == 0
    # It may be there or not: it is not said to be gone.
    assert elemento("volume", "destroy", there).returncode != 0
    site.one.start()
    assert elemento("volume", "destroy", there).returncode == 0
    assert "server one answers again" in site.gateway.log()


def test_after_the_logout_nobody_is_served(site: Site) -> None:
    typed(USER, PASSWORD, words=("auth", "login"))
    assert elemento("auth", "logout").returncode == 0
    assert site.gateway.client.get("accessible").status_code == 401
    status, said = typed(USER, "wrong password", words=("auth", "login"))
    assert status != 0
    assert "Something went wrong" in said
