"""Published clients of tus as they are: they upload, break off, resume, also over a SIGKILL of the server; and curl."""

import io
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tusclient.client import TusClient
from tusclient.exceptions import TusCommunicationError

from tests import tus
from tests.live import ALICE, LiveServer, live_server

KIB = 1024
DATA = os.urandom(200 * KIB) + bytes(600 * KIB) + os.urandom(224 * KIB)
CHUNK = 100 * KIB
JS = Path(__file__).parent.parent / "js"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """One server for all tests of this file; it is killed and started again."""
    with live_server(tmp_path_factory.mktemp("clients")) as one:
        yield one


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image.img"
    path.write_bytes(DATA)
    return path


def restarted(server: LiveServer, faultpoint: str | None = None) -> None:
    if server.process is not None:
        server.stop()
    server.start({"ELEMENTO_STORAGE_FAULTPOINT": faultpoint} if faultpoint else None)


def assert_arrived(server: LiveServer, address: str | None) -> None:
    assert address is not None
    vid = address.rstrip("/").rpartition("/")[2]
    assert (server.directory(vid) / "data.img").read_bytes() == DATA
    assert server.info(vid)["name"] == "from outside"
    assert server.info(vid)["sizeOnDisk"] < len(DATA) - 450 * KIB
    assert tus.places(server) == []


METADATA = {"creatorID": ALICE, "name": "from outside"}


# -- tuspy -------------------------------------------------------------------------------------------------


def test_tuspy_uploads_with_checksums(server: LiveServer) -> None:
    client = TusClient(f"{server.address}uploads")
    uploader = client.uploader(file_stream=io.BytesIO(DATA), chunk_size=CHUNK, metadata=METADATA, upload_checksum=True)
    uploader.upload()
    assert_arrived(server, uploader.url)


def test_tuspy_breaks_off_and_resumes_over_a_kill(server: LiveServer) -> None:
    client, stream = TusClient(f"{server.address}uploads"), io.BytesIO(DATA)
    first = client.uploader(file_stream=stream, chunk_size=CHUNK, metadata=METADATA)
    first.upload(stop_at=3 * CHUNK)
    restarted(server, "kill:upload.synced:2")
    second = client.uploader(file_stream=stream, url=first.url, chunk_size=CHUNK)
    assert second.offset == 3 * CHUNK
    with pytest.raises(TusCommunicationError):
        second.upload()
    server.wait_dead()
    restarted(server)
    third = client.uploader(file_stream=stream, url=first.url, chunk_size=CHUNK)
    assert third.offset == 4 * CHUNK, "what was acknowledged"
    third.upload()
    assert_arrived(server, first.url)
    fourth = client.uploader(file_stream=stream, url=first.url)
    assert fourth.offset == len(DATA), "an upload that is done says so"


# -- tus-js-client -----------------------------------------------------------------------------------------


def run_js(server: LiveServer, image: Path, **options: Any) -> subprocess.Popen[str]:
    told = {"endpoint": f"{server.address}uploads", "path": str(image), "metadata": METADATA, **options}
    return subprocess.Popen(["node", JS / "upload.js", json.dumps(told)], stdout=subprocess.PIPE, text=True, cwd=JS)


def said(process: subprocess.Popen[str]) -> list[dict[str, Any]]:
    told, _ = process.communicate(timeout=60)
    return [json.loads(line) for line in told.splitlines()]


def test_tus_js_client_uploads_in_one_request(server: LiveServer, image: Path) -> None:
    told = said(run_js(server, image, uploadDataDuringCreation=True))
    assert [line for line in told if "retry" in line] == []
    assert_arrived(server, told[-1]["done"])


def test_tus_js_client_breaks_off_and_resumes(server: LiveServer, image: Path) -> None:
    told = said(run_js(server, image, chunkSize=CHUNK, stopAt=2 * CHUNK))
    address = next(line["url"] for line in told if "url" in line)
    assert tus.offset(server, address[-32:]) == 2 * CHUNK
    told = said(run_js(server, image, chunkSize=CHUNK, uploadUrl=address))
    assert told[0] == {"accepted": 3 * CHUNK}
    assert_arrived(server, told[-1]["done"])


def test_tus_js_client_goes_on_over_a_kill(server: LiveServer, image: Path) -> None:
    restarted(server, "kill:upload.advanced:4")
    process = run_js(server, image, chunkSize=CHUNK)
    server.wait_dead()
    restarted(server)
    told = said(process)
    assert {"retry": 0} in told
    assert_arrived(server, told[-1]["done"])
    accepted = [line["accepted"] for line in told if "accepted" in line]
    assert accepted == sorted(accepted)


def test_tus_js_client_uploads_parts_in_parallel(server: LiveServer, image: Path) -> None:
    told = said(run_js(server, image, parallelUploads=3))
    assert_arrived(server, told[-1]["done"])


def test_tus_js_client_does_not_try_for_ever(server: LiveServer, image: Path) -> None:
    wrong = {**METADATA, "checksum": f"sha256:{'0' * 64}"}
    told = said(run_js(server, image, metadata=wrong))
    assert "error" in told[-1]
    assert [line for line in told if "retry" in line][1:] == []


# -- curl --------------------------------------------------------------------------------------------------


def curl(*words: str) -> dict[str, Any]:
    ran = subprocess.run(["curl", "-sS", *words], capture_output=True, text=True, check=False, timeout=60)
    assert ran.returncode == 0, ran.stderr
    answer: dict[str, Any] = json.loads(ran.stdout)
    return answer


def test_curl_sends_a_file_a_form_and_a_pipe(server: LiveServer, image: Path) -> None:
    address = f"{server.address}create/upload"
    query = f"creatorID={ALICE}&name=from%20outside"
    for answer in (
        curl("-T", str(image), f"{address}?{query}"),
        curl("--data-binary", f"@{image}", "-H", "Content-Type: application/octet-stream", f"{address}?{query}"),
        curl("-H", "Transfer-Encoding: chunked", "-T", str(image), f"{address}?{query}"),
        curl("-F", f"creatorID={ALICE}", "-F", "name=from outside", "-F", f"file=@{image};filename=../../x", address),
    ):
        assert answer["img_format"] == "raw", answer
        assert answer["size"] == len(DATA) / 1e9
        assert_arrived(server, answer["vid"])
