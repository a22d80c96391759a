"""import of directories and images that lie in a location's elemento-import."""

import contextlib
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.invariants import assert_clean, read_pattern, write_pattern
from tests.live import ALICE, BOB, LiveServer, live_server, make_location

UID = "0123456789abcdef0123456789abcdef"


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """One server for all tests here, with a small second location."""
    root = tmp_path_factory.mktemp("shared")
    make_location(root / "mnt", "disk")
    make_location(root / "mnt", "small", max_volume_size="1M")
    for name in ("disk", "small"):
        (root / "mnt" / name / "elemento-import").mkdir()
    with live_server(root) as one:
        yield one


@pytest.fixture
def drop(running: LiveServer) -> Path:
    """The directory for imports, empty."""
    return running.root / "disk" / "elemento-import"


def put(drop: Path, name: str, image_format: str = "raw", size: str = "2M") -> Path:
    path = drop / name
    subprocess.run(["qemu-img", "create", "-q", "-f", image_format, path, size], check=True)
    command = ["qemu-io", "-f", image_format, "-c", "write -P 5 131072 65536", str(path)]
    subprocess.run(command, check=True, capture_output=True)
    return path


def put_directory(server: LiveServer, drop: Path, name: str, **meta: Any) -> tuple[Path, bytes]:
    """A volume's directory as another server has left it."""
    vid = server.create(name="elsewhere", bus="scsi")
    pattern = write_pattern(server, vid, 4)
    path = server.directory(vid).rename(drop / name)
    told = json.loads((path / "meta.json").read_text())
    (path / "meta.json").write_text(json.dumps({**told, "volumeID": "", "vendor-key": [1], **meta}))
    server.call("rescan")
    return path, pattern


def imported(server: LiveServer, entry: str, location: str = "disk", **more: Any) -> str:
    path = f"{location}/elemento-import/{entry}"
    return str(server.call("import", {"creatorID": ALICE, "path": path, **more})["vid"])


def refused(server: LiveServer, path: str, **more: Any) -> tuple[int, str]:
    response = server.post("import", {"creatorID": ALICE, "path": path, **more})
    return response.status_code, response.json()["code"]


@pytest.mark.parametrize(
    ("ending", "image_format", "becomes"),
    [("img", "raw", "raw"), ("qcow2", "qcow2", "qcow2"), ("vmdk", "vmdk", "raw"), ("VHDX", "vhdx", "raw")],
)
def test_an_image(
    running: LiveServer, drop: Path, ending: str, image_format: str, becomes: str, tmp_path: Path
) -> None:
    source = put(drop, f"web 1.{ending}", image_format)
    inode = source.stat().st_ino
    vid = imported(running, source.name)
    info = running.info(vid)
    assert (info["name"], info["format"], info["creatorID"], info["size"]) == ("web 1", becomes, ALICE, 2 << 20)
    assert read_pattern(running, vid, tmp_path) == b"\x05" * 65536
    assert list(drop.iterdir()) == []
    (data,) = running.directory(vid).glob("data.*")
    assert data.stat().st_nlink == 1
    assert (data.stat().st_ino == inode) == (image_format == becomes), "nothing was copied that could stay"
    assert_clean(running)


def test_what_is_asked_for_counts(running: LiveServer, drop: Path) -> None:
    vid = imported(
        running, put(drop, "one.img").name, name="named", private=True, bus="ide", bootable=True, format="qcow2"
    )
    info = running.info(vid)
    assert [info[key] for key in ("name", "private", "bus", "bootable", "format")] == [
        *("named", True, "ide", True, "qcow2")
    ]


def test_a_volumes_directory(running: LiveServer, drop: Path, tmp_path: Path) -> None:
    path, pattern = put_directory(running, drop, f"vid.{UID}.elimg")
    inode = (path / "data.img").stat().st_ino
    assert imported(running, path.name, name="here") == UID
    info = running.info(UID)
    assert (info["name"], info["creatorID"], info["bus"]) == ("here", ALICE, "scsi")
    assert read_pattern(running, UID, tmp_path) == pattern
    told = json.loads((running.directory(UID) / "meta.json").read_text())
    assert (told["volumeID"], told["vendor-key"]) == (UID, [1])
    assert (running.directory(UID) / "data.img").stat().st_ino == inode
    assert_clean(running)
    again, _ = put_directory(running, drop, f"vid.{UID}.elimg")
    assert refused(running, str(again)) == (409, "volume-exists")
    again.rename(drop / "copy")
    assert imported(running, "copy") not in ("", UID)
    running.call("destroy", {"volume_id": UID})


def test_what_is_no_volume(running: LiveServer, drop: Path) -> None:
    path, _ = put_directory(running, drop, "broken")
    relative = "disk/elemento-import/broken"
    meta = (path / "meta.json").read_text()
    (path / "meta.json").write_text("{")
    assert refused(running, relative) == (400, "invalid-value")
    (path / "meta.json").write_text(meta)
    lock = path / f"elemento.convert.{UID}.ignore"
    lock.touch()
    assert refused(running, relative) == (409, "conflict")
    lock.unlink()
    (path / "link").symlink_to("/etc/shadow")
    assert refused(running, relative) == (400, "invalid-value")
    (path / "link").unlink()
    data = path / "data.img"
    data.rename(drop / "kept")
    data.symlink_to("/etc/shadow")
    assert refused(running, relative) == (400, "invalid-value")
    data.unlink()
    (drop / "kept").rename(data)
    vid = imported(running, "broken")
    running.call("destroy", {"volume_id": vid})


@pytest.mark.parametrize("as_directory", [False, True])
def test_hostile_images(running: LiveServer, drop: Path, as_directory: bool) -> None:
    secret = drop / "bad.qcow2"
    subprocess.run(
        ["qemu-img", "create", "-q", "-u", "-f", "qcow2", "-b", "/etc/shadow", "-F", "raw", secret, "1M"], check=True
    )
    path = secret
    if as_directory:
        path = drop / "bad"
        path.mkdir()
        secret.rename(path / "data.qcow2")
        (path / "meta.json").write_text('{"format": "qcow2"}')
    status, code = refused(running, str(path))
    assert (status, code) in ((409, "image-refused"), (400, "invalid-value"))
    assert path.exists()
    subprocess.run(["rm", "-r", path], check=True)
    assert_clean(running)


@pytest.mark.parametrize(
    "path",
    [
        *("disk/elemento-import", "disk/elemento-import/", "disk/elemento-import/../settings.json", "/etc/shadow"),
        *("nowhere/elemento-import/x.img", "disk/elemento-import/a/b.img", "disk/elemento-import/.hidden.img"),
        *("disk/elemento-import/\0.img", "../mnt/disk/x.img"),
    ],
)
def test_other_paths(running: LiveServer, path: str) -> None:
    assert refused(running, path) == (400, "invalid-value")


def test_what_else_is_refused(running: LiveServer, drop: Path, tmp_path: Path) -> None:
    assert refused(running, "disk/elemento-import/none.img") == (404, "import-not-found")
    (drop / "text.txt").write_text("x")
    assert refused(running, "disk/elemento-import/text.txt") == (400, "invalid-value")
    (drop / "text.txt").unlink()
    (drop / "link.img").symlink_to("/etc/shadow")
    assert refused(running, "disk/elemento-import/link.img") == (400, "invalid-value")
    (drop / "link.img").unlink()
    twice = put(drop, "twice.img")
    os.link(twice, tmp_path / "other-name")
    assert refused(running, "disk/elemento-import/twice.img") == (409, "conflict")
    twice.unlink()
    large = put(running.root / "small" / "elemento-import", "large.img")
    assert refused(running, str(large)) == (507, "no-room")
    assert large.exists()
    text = put(drop, "no.iso")
    assert refused(running, "disk/elemento-import/no.iso") == (400, "not-an-iso")
    text.unlink()
    large.unlink()
    assert_clean(running)
    assert_clean(running, "small")


@pytest.mark.parametrize("step", ["import.linked", "create.renamed", "import.unlinked"])
def test_killed_with_an_image(running: LiveServer, drop: Path, step: str, tmp_path: Path) -> None:
    put(drop, "victim.img")
    before = set(running.listed())
    body = {"creatorID": ALICE, "path": "disk/elemento-import/victim.img"}
    restarted(running, {"ELEMENTO_STORAGE_FAULTPOINT": f"kill:{step}"})
    with contextlib.suppress(httpx.HTTPError):
        running.post("import", body)
    running.wait_dead()
    restarted(running)
    assert_clean(running)
    if step == "import.unlinked":
        assert refused(running, body["path"]) == (404, "import-not-found")
    else:
        assert imported(running, "victim.img")
    assert list(drop.iterdir()) == []
    (vid,) = set(running.listed()) - before
    assert read_pattern(running, vid, tmp_path) == b"\x05" * 65536
    assert_clean(running)


@pytest.mark.parametrize("step", ["import.inspected", "import.prepared", "import.renamed"])
def test_killed_with_a_directory(running: LiveServer, drop: Path, step: str, tmp_path: Path) -> None:
    path, pattern = put_directory(running, drop, f"vid.{UID}.elimg")
    restarted(running, {"ELEMENTO_STORAGE_FAULTPOINT": f"kill:{step}"})
    body = {"creatorID": BOB, "path": str(path)}
    with contextlib.suppress(httpx.HTTPError):
        running.post("import", body, Idempotency_Key=f"import-{step}")
    running.wait_dead()
    restarted(running)
    assert_clean(running)
    assert running.call("import", body, Idempotency_Key=f"import-{step}")["vid"] == UID
    assert running.info(UID)["creatorID"] == BOB
    assert read_pattern(running, UID, tmp_path) == pattern
    assert_clean(running)
    running.call("destroy", {"volume_id": UID})


def restarted(server: LiveServer, env: dict[str, str] | None = None) -> None:
    if server.process is not None:
        server.stop()
    server.start(env)
