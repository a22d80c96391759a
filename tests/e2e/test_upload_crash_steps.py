"""SIGKILL of the real server at every named step of an upload's life, a restart, and a look at everything."""

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

from tests import tus
from tests.clients import eventually
from tests.e2e.invariants import assert_clean
from tests.live import LiveServer, live_server

DATA = os.urandom(600 * 512)
HALF = 150_000


@dataclass
class Known:
    """What a client was told before the server died."""

    uploads: list[str] = field(default_factory=list)
    acknowledged: dict[str, int] = field(default_factory=dict)
    ended: bool = False

    def begin(self, server: LiveServer, length: int | None, **more: object) -> str:
        upload = tus.begun(server, length, **more)
        self.uploads.append(upload)
        self.acknowledged[upload] = 0
        return upload

    def patch(self, server: LiveServer, upload: str, at: int, data: bytes) -> None:
        assert tus.patch(server, upload, at, data).status_code == 204
        self.acknowledged[upload] = at + len(data)


def upload(server: LiveServer, known: Known) -> None:
    one = known.begin(server, len(DATA))
    known.patch(server, one, 0, DATA[:HALF])
    known.patch(server, one, HALF, DATA[HALF:])


def end(server: LiveServer, known: Known) -> None:
    one = known.begin(server, len(DATA))
    known.patch(server, one, 0, DATA[:HALF])
    known.ended = True
    tus.end(server, one)


def parts(server: LiveServer, known: Known) -> None:
    addresses = []
    for piece in (DATA[:HALF], DATA[HALF:]):
        one = known.begin(server, len(piece), bare=True, Upload_Concat="partial")
        known.patch(server, one, 0, piece)
        addresses.append(f"/api/v1.0/uploads/{one}")
    known.ended = True
    tus.begin(server, None, Upload_Concat=f"final;{' '.join(addresses)}")


def refused(server: LiveServer, known: Known) -> None:
    one = known.begin(server, len(DATA), checksum=f"sha256:{'0' * 64}")
    known.ended = True
    tus.patch(server, one, 0, DATA)


FLOWS: dict[str, Callable[[LiveServer, Known], None]] = {
    "upload": upload,
    "end": end,
    "parts": parts,
    "refused": refused,
}


#: Beside our own: what is between a place and a volume. The others of the intake's have tests of their own.
MORE_STEPS = {"intake.adopted", "create.renamed"}


def test_kill_at_every_step(tmp_path: Path) -> None:
    trace, killed = tmp_path / "trace", set[str]()
    with live_server(tmp_path, "--lease", "1.5", "--heartbeat", "0.4") as server:
        for flow in FLOWS.values():
            server.kill()
            server.start({"ELEMENTO_STORAGE_FAULTPOINT": f"trace:{trace}"})
            flow(server, Known())
            reached = {step for step in trace.read_text().split() if step.startswith("upload.")} | MORE_STEPS
            for step in sorted(reached - killed):
                server.kill()
                server.start({"ELEMENTO_STORAGE_FAULTPOINT": f"kill:{step}"})
                known = Known()
                with contextlib.suppress(httpx.HTTPError):
                    flow(server, known)
                    pytest.fail(f"{step} was not reached")
                server.wait_dead()
                server.start()
                for one in known.uploads:
                    _assert_resumable(server, one, known)
            killed |= reached
        assert len(killed) >= 12
        for one in server.http.get("uploads").json():
            if one["state"] == "receiving":  # recorded, and its client was not told: it would rest until it expires
                assert tus.end(server, one["upload_id"]).status_code == 204
        _eventually_empty(server)
        for vid in server.listed():
            assert (server.directory(vid) / "data.img").read_bytes() == DATA
        assert_clean(server)


def _assert_resumable(server: LiveServer, one: str, known: Known) -> None:
    asked = tus.head(server, one)
    if known.ended and asked.status_code in (404, 410):
        return
    assert asked.status_code == 200, "what was acknowledged is gone"
    at = int(asked.headers["Upload-Offset"])
    assert at >= known.acknowledged[one]
    length = int(asked.headers["Upload-Length"])
    if asked.headers.get("Upload-Concat") == "partial":
        assert tus.end(server, one).status_code == 204
    elif at < length:
        assert tus.patch(server, one, at, DATA[at:]).status_code in (204, 400, 422)
    else:
        eventually(lambda: tus.head(server, one).headers.get("Elemento-State") in ("done", None))


def _eventually_empty(server: LiveServer) -> None:
    with contextlib.suppress(AssertionError):
        eventually(lambda: tus.places(server) == [], 20)
    assert tus.places(server) == [], server.log()[-3000:]
