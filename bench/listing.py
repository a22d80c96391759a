"""The full list of ten thousand volumes."""

import contextlib
import json
import time

from tests.live import make_location

from bench.connection import Connection
from bench.context import OWNER, Context
from bench.libvirt import private_libvirt
from bench.measure import Section, alternate, compare, figures, timed
from bench.volumes import make_pool_files, make_volumes

TITLE = "Listing 10,000 volumes"
REMARKS = [
    "Ours: `accessible`, every volume with all its keys, received and parsed by the client (Python's `json`). virsh: "
    "`vol-list --details`, all of its text received; it asks the daemon about each volume on its own.",
    "*Asked again at once* answers from the index. *After a pause* the server compares all volumes with the disk "
    "before it answers (it does so when the last look is older than a second, or than twenty times what a look "
    "takes); nothing had changed on disk. libvirt lists the files it saw at its last "
    "pool-refresh; a look for new ones is not in its figure.",
    "`vol-list` without `--details` gives names and paths only; it is shown as the least libvirt can do.",
]

_COUNT = 10_000


def run(context: Context) -> Section:
    """All rows."""
    count = _COUNT // 10 if context.quick else _COUNT
    root = context.directory("mnt")
    make_volumes(make_location(root), count)
    pool = context.directory("pool")
    make_pool_files(pool, count)
    # The server's own looks at the disk would fall into some rounds and not into others.
    with context.server(root, "--sweep-interval", "86400") as server, private_libvirt() as libvirt:

        def post(call: str, body: dict[str, str], times: int = 1) -> list[float]:
            with contextlib.closing(Connection(server.listen_host, server.port)) as connection:
                return [timed(lambda: json.loads(connection.post(call, body))) for _ in range(times)]

        pause_s = max(2.5, 40 * min(post("rescan", {}, 3)))
        accessible = {"client_uid": OWNER}

        def ours_after_pause() -> list[float]:
            time.sleep(pause_s)
            return post("accessible", accessible)

        with libvirt.session() as virsh:
            virsh.run(f"pool-create-as bench dir --target {pool}")

            def details() -> None:
                lines = virsh.run("vol-list bench --details").count("\n")
                assert lines >= count, lines

            again, paused, detailed, names = alternate(
                context.rounds(11),
                lambda: post("accessible", accessible, 3)[1:],  # the first may have looked at the disk
                ours_after_pause,
                lambda: [timed(details)],
                lambda: [virsh.timed("vol-list bench")],
            )
    peer = figures("ms", detailed, scale=1e3)
    least = figures("ms", names, scale=1e3)
    again_ms, paused_ms = figures("ms", again, scale=1e3), figures("ms", paused, scale=1e3)
    return Section(
        TITLE,
        [
            compare("asked again at once", again_ms, "virsh vol-list --details", peer, at_most=0.05),
            compare("after a pause", paused_ms, "virsh vol-list --details", peer, at_most=0.05),
            compare("asked again at once", again_ms, "virsh vol-list (names only)", least),
        ],
        REMARKS,
    )
