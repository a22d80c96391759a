"""Requests per second of ``info``, beside a web application that does nothing."""

import contextlib
import json
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.live import free_port, make_location

from bench.connection import Connection
from bench.context import ROOT, Context, require_program, words
from bench.measure import Section, alternate, compare, figures
from bench.volumes import make_volumes

TITLE = "Answering `info`"
REMARKS = [
    "wrk in a process of its own, one thread, 16 keep-alive connections, POST with a JSON body, the same for both "
    "sides; one server process each. The bare application has one Starlette route, reads no body and answers the "
    "bytes that ours gave for one volume: uvicorn with uvloop and httptools, as ours.",
    "*One volume*: ours looks at its directory on disk once a second. *1,000 volumes in turn*: ours looks at each "
    "one's directory again when it has not done so for a second.",
]

_VOLUMES = 1_000
_CONNECTIONS = 16
_RATE = re.compile(r"Requests/sec:\s+([\d.]+)")
_SCRIPT = """\
local ids = {{ {ids} }}
local headers = {{["Content-Type"] = "application/json"}}
local requests = {{}}
for number, id in ipairs(ids) do
    requests[number] = wrk.format("POST", nil, headers, '{{"volume_id": "' .. id .. '"}}')
end
local last = 0
request = function()
    last = last % #requests + 1
    return requests[last]
end
"""


def run(context: Context) -> Section:
    """All rows."""
    wrk = require_program("wrk", "wrk")
    seconds = 1 if context.quick else 3
    root = context.directory("mnt")
    ids = make_volumes(make_location(root), _VOLUMES)
    one, many = _script(context.work / "one.lua", ids[:1]), _script(context.work / "many.lua", ids)
    time.sleep(2.5)

    with context.server(root) as server:
        connection = Connection(server.listen_host, server.port)
        answer = connection.post("info", {"volume_id": ids[0]})
        connection.close()
        assert json.loads(answer)["volumeID"] == ids[0]

        def rate(port: int, script: Path) -> Sequence[float]:
            flags = ("-t", 1, "-c", _CONNECTIONS, "-d", f"{seconds}s", "-s", script)
            command = words([wrk, *flags, f"http://127.0.0.1:{port}/api/v1.0/info"])
            output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            found = _RATE.search(output)
            if found is None or "Non-2xx" in output or "Socket errors" in output:
                raise RuntimeError(f"wrk: {output}")
            return [float(found[1])]

        with _bare(context, answer) as bare_port:
            for port in (server.port, bare_port):
                rate(port, one)
            ours_one, bare_one, ours_many, bare_many = alternate(
                context.rounds(10),
                lambda: rate(server.port, one),
                lambda: rate(bare_port, one),
                lambda: rate(server.port, many),
                lambda: rate(bare_port, many),
            )
    unit, peer = "per s", "bare Starlette"
    return Section(
        TITLE,
        [
            compare("one volume", figures(unit, ours_one), peer, figures(unit, bare_one)),
            compare("1,000 volumes in turn", figures(unit, ours_many), peer, figures(unit, bare_many)),
        ],
        REMARKS,
    )


def _script(path: Path, ids: Sequence[str]) -> Path:
    path.write_text(_SCRIPT.format(ids=", ".join(f'"{volume_id}"' for volume_id in ids)))
    return path


@contextlib.contextmanager
def _bare(context: Context, answer: bytes) -> Iterator[int]:
    """The bare application's port."""
    port = free_port()
    file = context.work / "answer.json"
    file.write_bytes(answer)
    process = subprocess.Popen(words([sys.executable, "-m", "bench.bare", port, file]), cwd=ROOT)
    try:
        deadline = time.monotonic() + 20
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit("bench: the bare application does not start")
            time.sleep(0.05)
        yield port
    finally:
        process.terminate()
        process.wait(10)
