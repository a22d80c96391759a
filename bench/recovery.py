"""Many exports: making them, what they hold and use at rest, and how soon they are back after everything was killed."""

import os
import subprocess
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.live import LiveServer, make_location

from bench.connection import Connection
from bench.context import OWNER, Context, require_program, words
from bench.exports import memory_mb
from bench.measure import Row, Section, bounded, figures, timed

TITLE = "Many exports"
REMARKS = [
    "Volumes of 100 MB, raw and qcow2 in turn, over iSCSI, NBD and a local socket in turn; one call after the other. "
    "`export` answers when the export was used once as its client would. Nobody but the server uses them here.",
    "Memory is PSS (proc(5), smaps_rollup) of all storage daemons and of tgtd, divided by the number of exports; the "
    "server itself is not in it.",
    "CPU time is that of the server, and of all daemons, with heartbeats every five seconds, in which each export is "
    "used as its client would.",
    "Recovery: SIGKILL to the server and all daemons at once, then a start of the server. *Healthy* is when `exports` "
    "says so of all of them; *read back* is when, after that, qemu-io has found in each of them through its own "
    "protocol what was written there before; that is a process for each, two at a time.",
]

_COUNT = 200
_PROTOCOLS = ("iscsi", "nbd", "local")
_FORMATS = ("raw", "qcow2")
_SIZE_GB = 0.1
_PATTERN_BYTES = 65536
_RECOVERED_S = 120.0
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class _Client:
    """An export as a client has it: arguments of qemu-io, and the byte it has written."""

    arguments: tuple[str, ...]
    pattern: int

    def write(self) -> None:
        """Put the pattern there, flushed."""
        self._run(f"write -P {self.pattern} 0 {_PATTERN_BYTES}", "flush")

    def read(self) -> None:
        """Insist on finding it again."""
        self._run(f"read -P {self.pattern} 0 {_PATTERN_BYTES}")

    def _run(self, *commands: str) -> None:
        program = require_program("qemu-io", "qemu-utils")
        steps = [word for command in commands for word in ("-c", command)]
        done = subprocess.run(words([program, *self.arguments, *steps]), capture_output=True, text=True, check=False)
        if done.returncode or "failed" in done.stdout:
            raise RuntimeError(f"qemu-io {commands}: {done.stdout}{done.stderr}")


@dataclass
class _Times:
    export_s: dict[str, list[float]] = field(default_factory=dict)
    healthy_s: list[float] = field(default_factory=list)
    read_s: list[float] = field(default_factory=list)


def run(context: Context) -> Section:
    """All rows."""
    count = 30 if context.quick else _COUNT
    root = context.directory("mnt")
    make_location(root)
    times = _Times()
    with context.server(root) as server:
        clients = _export(server, count, times)
        _wait_healthy(server, count)
        memory = _memory(server, count)
        cpu = _cpu_at_rest(server, 10 if context.quick else 60)
        for _ in range(context.rounds(5)):
            _recover(server, clients, times)
    exports = [one for values in times.export_s.values() for one in values]
    rows = [bounded("`export`", figures("ms", exports, scale=1e3), at_most=100)]
    rows += [
        Row(f"`export`, {name}", figures("ms", values, scale=1e3)) for name, values in sorted(times.export_s.items())
    ]
    rows += [bounded(f"memory per export, {count} of them", figures("MB", [memory]), at_most=25)]
    rows += [Row(f"at rest: {name}", figures("% of a core", [used])) for name, used in cpu.items()]
    rows += [
        bounded(f"all {count} healthy after SIGKILL", figures("s", times.healthy_s), at_most=30),
        bounded(f"all {count} read back", figures("s", times.read_s), at_most=30),
    ]
    return Section(TITLE, rows, REMARKS)


def _export(server: LiveServer, count: int, times: _Times) -> list[_Client]:
    clients = []
    for number in range(count):
        protocol = _PROTOCOLS[number % len(_PROTOCOLS)]
        image_format = _FORMATS[number // len(_PROTOCOLS) % len(_FORMATS)]
        volume_id = server.create(f"disk-{number}", _SIZE_GB, OWNER, format=image_format)
        connection = Connection(server.listen_host, server.port)
        body = {"volume_id": volume_id, "client_uid": OWNER, "protocol": protocol}
        seconds = timed(lambda connection=connection, body=body: connection.post("export", body))  # type: ignore[misc]
        connection.close()
        times.export_s.setdefault(f"{protocol}, {image_format}", []).append(seconds)
        answer = server.call("export", body)  # the same again: where it is
        client = _client(answer, number % 255 + 1)
        client.write()
        clients.append(client)
    return clients


def _client(answer: dict[str, Any], pattern: int) -> _Client:
    where, credentials = answer["endpoint"], answer["credentials"]
    if "portal" not in where:
        return _Client(("-f", "raw", where["uri"]), pattern)
    options = (
        f"driver=iscsi,transport=tcp,portal={where['portal']},target={where['target']},lun={where['lun']},"
        f"initiator-name={where['initiator']},user={credentials['user']},password-secret=password"
    )
    return _Client(("--object", f"secret,id=password,data={credentials['password']}", "--image-opts", options), pattern)


def _states(server: LiveServer) -> Counter[str]:
    return Counter(one["state"] for one in server.call("exports")["exports"])


def _wait_healthy(server: LiveServer, count: int) -> None:
    deadline = time.monotonic() + _RECOVERED_S
    while (states := _states(server))["healthy"] != count:
        if time.monotonic() > deadline:
            raise RuntimeError(f"exports do not become healthy: {states}\n{server.log()[-3000:]}")
        time.sleep(0.1)


def _memory(server: LiveServer, count: int) -> float:
    """MB per export."""
    return sum(memory_mb(pid) for pid in server.daemons()) / count


def _cpu_at_rest(server: LiveServer, seconds: float) -> dict[str, float]:
    assert server.process is not None
    groups = {
        "the server": [server.process.pid],
        "its tgtd": list(server.daemons("/tgt/")),
        "its storage daemons": list(server.daemons("/v/")),
    }
    time.sleep(seconds / 4)  # what was begun before ends
    before = {name: _cpu_s(pids) for name, pids in groups.items()}
    started = time.monotonic()
    time.sleep(seconds)
    elapsed = time.monotonic() - started
    return {name: (_cpu_s(pids) - before[name]) / elapsed * 100 for name, pids in groups.items()}


def _cpu_s(pids: Sequence[int]) -> float:
    total = 0
    for pid in pids:
        words_of_stat = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
        total += int(words_of_stat[11]) + int(words_of_stat[12])
    return total / _TICKS


def _recover(server: LiveServer, clients: Sequence[_Client], times: _Times) -> None:
    server.kill()
    server.kill_daemons()
    started = time.monotonic()
    server.start(wait=False)
    server.wait_ready(60)
    _wait_healthy(server, len(clients))
    times.healthy_s.append(time.monotonic() - started)
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        list(pool.map(_Client.read, clients))
    times.read_s.append(time.monotonic() - started)
