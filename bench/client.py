"""What the client library costs beside the HTTP client it is made of, and how long commands take."""

import subprocess
import time
from collections.abc import Callable, Sequence

import httpx
from tests.live import BINARY, make_location

from bench.context import OWNER, Context, words
from bench.measure import Section, alternate, bounded, compare, figures, timed
from bench.volumes import make_volumes
from elemento_storage.client import Client

TITLE = "Client library and command line"
REMARKS = [
    "*One volume*, *1,000 volumes*: `volumes.get` and `volumes.list` (typed answers) beside httpx's blocking client "
    "doing the same POST and Python's `json` reading the answer (dictionaries); one connection each, the same server.",
    "Commands are processes of their own, from start to exit; httpx imports rich where the development packages are "
    "installed, as here.",
]

_VOLUMES = 1_000


def run(context: Context) -> Section:
    """All rows."""
    root = context.directory("mnt")
    ids = make_volumes(make_location(root), _VOLUMES)
    with context.server(root, "--sweep-interval", "86400") as server:
        address = f"http://{server.listen_host}:{server.port}"
        with (
            Client(address, client=OWNER) as library,
            httpx.Client(base_url=f"{address}/api/v1.0/", trust_env=False) as bare,
        ):
            one = {"volume_id": ids[0], "client_uid": OWNER}
            every = {"client_uid": OWNER, "include_locked": True, "limit": _VOLUMES}

            def listed() -> None:
                assert sum(1 for _ in library.volumes.list()) == _VOLUMES

            def listed_bare() -> None:
                assert len(bare.post("accessible", json=every).json()) == _VOLUMES

            def command(*arguments: str) -> Callable[[], Sequence[float]]:
                line = words([BINARY, *arguments])
                return lambda: [timed(lambda: subprocess.run(line, check=True, stdout=subprocess.DEVNULL))]

            for _ in range(3):
                library.volumes.get(ids[0])
                bare.post("info", json=one)
                listed()
                listed_bare()
            got, got_bare, lists, lists_bare, helped, shown = alternate(
                context.rounds(20),
                lambda: [_each(100, lambda: library.volumes.get(ids[0]))],
                lambda: [_each(100, lambda: bare.post("info", json=one).json())],
                lambda: [_each(5, listed)],
                lambda: [_each(5, listed_bare)],
                command("--help"),
                command("volume", "list", "--server", address, "--client", OWNER),
            )
    peer = "httpx and json"
    return Section(
        TITLE,
        [
            compare(
                "one volume", figures("ms", got, scale=1e3), peer, figures("ms", got_bare, scale=1e3),
                at_most=1.2, paired=True,
            ),
            compare(
                "1,000 volumes", figures("ms", lists, scale=1e3), peer, figures("ms", lists_bare, scale=1e3),
                at_most=1.2, paired=True,
            ),
            bounded("`elemento-storage --help`", figures("ms", helped, scale=1e3), at_most=250),
            bounded("`volume list` of 1,000", figures("ms", shown, scale=1e3), at_most=500),
        ],
        REMARKS,
    )  # fmt: skip


def _each(times: int, work: Callable[[], object]) -> float:
    """Seconds that one of so many calls takes."""
    started = time.perf_counter()
    for _ in range(times):
        work()
    return (time.perf_counter() - started) / times
