"""A volume over SMB: the real smbd, the real FUSE file of a storage daemon, and a client that tries everything."""

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from smbprotocol.exceptions import SMBException
from smbprotocol.open import CreateDisposition, CreateOptions, FilePipePrinterAccessMask

from tests.live import ALICE, BOB, CAROL, LiveServer, free_port, live_server
from tests.smb_client import FILE, SmbClient, SmbFile, smb_client

MIB = 1 << 20
SIZE_GB = 0.02
REFUSED = (SMBException, OSError)
FORMATS = ("raw", "qcow2")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[LiveServer]:
    """A server that looks often."""
    with live_server(tmp_path, "--heartbeat", "0.5") as running:
        yield running


def shared(server: LiveServer, vid: str, client: str = BOB, **options: Any) -> dict[str, Any]:
    """The volume, exported over SMB."""
    body = {"volume_id": vid, "client_uid": client, "protocol": "smb", **options}
    answer: dict[str, Any] = server.call("export", body)
    return answer


def unshared(server: LiveServer, vid: str, client: str = BOB) -> None:
    server.call("unexport", {"volume_id": vid, "client_uid": client})


def eventually(check: Callable[[], object], timeout_s: float = 15) -> None:
    """Until it holds; what went wrong last is the failure."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            assert check()
        except (AssertionError, *REFUSED):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
        else:
            return


def healthy(server: LiveServer, vid: str) -> bool:
    exports = server.call("exports", {"volume_id": vid})["exports"]
    return bool(exports) and all(one["state"] == "healthy" for one in exports)


def shows_the_file(export: Mapping[str, Any]) -> bool:
    with smb_client(export) as client:
        return client.names() == [FILE]


def smbclient(export: Mapping[str, Any], command: str, *more: str) -> str:
    """Run smbclient as the export's user; what it says."""
    endpoint, credentials = export["endpoint"], export["credentials"]
    share = f"//{endpoint['server']}/{endpoint['share']}"
    done = subprocess.run(
        ["smbclient", "-A", "/dev/stdin", "-p", str(endpoint["port"]), *more, "-c", command, share],
        input=f"username = {credentials['user']}\npassword = {credentials['password']}\n",
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    return done.stdout + done.stderr


def image(server: LiveServer, vid: str, tmp_path: Path) -> bytes:
    """What is on the disk, when nobody has it open."""
    [data] = server.directory(vid).glob("data.*")
    image_format = "raw" if data.suffix == ".img" else "qcow2"
    if image_format == "qcow2":
        subprocess.run(["qemu-img", "check", "-q", data], check=True)
    plain = tmp_path / f"{vid}.plain"
    subprocess.run(["qemu-img", "convert", "-f", image_format, "-O", "raw", data, plain], check=True)
    return plain.read_bytes()


# -- data ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("image_format", FORMATS)
def test_what_a_client_writes_is_in_the_image(server: LiveServer, tmp_path: Path, image_format: str) -> None:
    vid = server.create(size=SIZE_GB, format=image_format)
    export = shared(server, vid)
    model = bytearray(export["size"])
    some = random.Random(1)
    with smb_client(export) as client:
        assert client.names() == [FILE]
        disk = client.open()
        assert disk.size() == export["size"]
        for number in range(150):
            length = some.choice([1, 511, 512, 4096, 65536, MIB])
            offset = some.randrange(len(model) - length)
            data = some.randbytes(length)
            disk.write(offset, data)
            model[offset : offset + length] = data
            if number % 20 == 0:
                disk.flush()
            offset = some.randrange(len(model) - length)
            assert disk.read(offset, length) == model[offset : offset + length]
    unshared(server, vid)
    assert image(server, vid, tmp_path) == model
    assert not server.daemons("/v/")


@pytest.mark.parametrize("image_format", FORMATS)
def test_two_clients_write_at_the_same_time_and_see_the_same(
    server: LiveServer, tmp_path: Path, image_format: str
) -> None:
    """Blocks of both lie next to each other, within one cluster and one page even."""
    vid = server.create(size=SIZE_GB, format=image_format, shareable=True)
    exports = [shared(server, vid, client) for client in (BOB, CAROL)]
    block, count = 2048, 1500
    failures: list[BaseException] = []

    def content(writer: int, number: int) -> bytes:
        return (b"%d:%d " % (writer, number)).ljust(16, b".") * (block // 16)

    def write(writer: int) -> None:
        try:
            with smb_client(exports[writer]) as client:
                disk = client.open()
                for number in random.Random(writer).sample(range(count), count):
                    disk.write((2 * number + writer) * block, content(writer, number))
                disk.flush()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=write, args=(writer,)) for writer in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures
    expected = b"".join(content(writer, number) for number in range(count) for writer in range(2))
    for export in exports:
        with smb_client(export) as client:
            disk = client.open()
            assert b"".join(disk.read(at, MIB) for at in range(0, 2 * MIB, MIB)) == expected[: 2 * MIB]
    for client_uid in (BOB, CAROL):
        unshared(server, vid, client_uid)
    assert image(server, vid, tmp_path)[: len(expected)] == expected


@pytest.mark.parametrize("image_format", FORMATS)
def test_a_client_of_iscsi_and_one_of_smb_see_the_same(server: LiveServer, tmp_path: Path, image_format: str) -> None:
    """iSCSI first: what it served until then is another file, for a raw image."""
    vid = server.create(size=SIZE_GB, format=image_format, shareable=True)
    scsi = server.call("export", {"volume_id": vid, "client_uid": ALICE, "protocol": "iscsi"})
    where, credentials = scsi["endpoint"], scsi["credentials"]
    url = f"iscsi://{credentials['user']}%{credentials['password']}@{where['portal']}/{where['target']}/1"

    def qemu_io(*commands: str) -> None:
        words = [word for command in commands for word in ("-c", command)]
        done = subprocess.run(["qemu-io", "-f", "raw", *words, url], capture_output=True, text=True, check=True)
        assert "verification failed" not in done.stdout

    qemu_io("write -P 1 0 1M", "flush")
    export = shared(server, vid)
    with smb_client(export) as client:
        disk = client.open()
        assert disk.read(0, MIB) == b"\1" * MIB
        qemu_io("write -P 2 512k 64k")
        assert disk.read(512 << 10, 64 << 10) == b"\2" * (64 << 10)
        disk.write(4096, b"\3" * 4096)
        qemu_io("read -P 1 0 4k", "read -P 3 4k 4k", "read -P 1 8k 4k", "read -P 2 512k 64k")
    unshared(server, vid)
    qemu_io("read -P 3 4k 4k", "write -P 4 1M 4k")
    unshared(server, vid, ALICE)
    found = image(server, vid, tmp_path)
    assert (found[4096], found[MIB], found[MIB + 4096]) == (3, 4, 0)


@pytest.mark.parametrize("image_format", FORMATS)
def test_zeroing_does_all_of_it_or_nothing(server: LiveServer, image_format: str) -> None:
    """Of a qcow2 image QEMU punches whole clusters only, and older ones left old bytes in the others."""
    vid = server.create(size=SIZE_GB, format=image_format)
    export = shared(server, vid)
    pattern = random.Random(2).randbytes(MIB)
    with smb_client(export) as client:
        disk = client.open()
        with contextlib.suppress(*REFUSED):
            disk.set_sparse()
        done = 0
        for offset, length in [(65536, 65536), (4096, 4096), (4096, 131072), (100, 5000), (512, 512), (0, MIB)]:
            disk.write(0, pattern)
            expected = bytearray(pattern)
            try:
                disk.zero(offset, length)
            except SMBException as error:
                assert "NOT_SUPPORTED" in str(error)
            else:
                expected[offset : offset + length] = bytes(length)
                done += 1
            assert disk.read(0, MIB) == expected
        assert done
        with contextlib.suppress(*REFUSED):
            disk.zero(export["size"] - 4096, 8192)
        assert disk.size() == export["size"]


def test_a_volume_that_grows_is_larger_for_a_client_that_has_it_open(server: LiveServer) -> None:
    for image_format in FORMATS:
        vid = server.create(size=SIZE_GB, format=image_format)
        with smb_client(shared(server, vid)) as client:
            disk = client.open()
            disk.write(0, b"before")
            server.call("update/resize", {"vid": vid, "creatorID": ALICE, "size": 2 * SIZE_GB})
            size = server.info(vid)["size"]
            eventually(lambda disk=disk, size=size: disk.size() == size)  # type: ignore[misc]
            disk.write(size - 512, b"e" * 512)
            assert disk.read(size - 512, 512) == b"e" * 512
            assert disk.read(0, 6) == b"before"
        eventually(lambda vid=vid: healthy(server, vid))  # type: ignore[misc]


# -- who gets in -----------------------------------------------------------------------------------------------


def test_only_the_user_of_the_export_gets_in(server: LiveServer) -> None:
    vid = server.create(size=SIZE_GB, shareable=True)
    other = server.create(size=SIZE_GB)
    export, same_volume, another = shared(server, vid), shared(server, vid, CAROL), shared(server, other, CAROL)
    for wrong in (
        {"password": "wrong"},
        {"password": ""},
        {"user": another["credentials"]["user"]},
        {"user": "root", "password": ""},
        {"user": "nobody", "password": ""},
        {"share": same_volume["endpoint"]["share"]},
        {"share": another["endpoint"]["share"]},
        {"share": "C$"},
    ):
        with pytest.raises(REFUSED), smb_client(export, **wrong):
            pass
    for right in (export, same_volume, another):
        with smb_client(right) as client:
            assert client.names() == [FILE]


def test_nobody_can_list_shares(server: LiveServer) -> None:
    export = shared(server, server.create(size=SIZE_GB))
    share, port = export["endpoint"]["share"], str(export["endpoint"]["port"])
    stranger = subprocess.run(
        ["smbclient", "-N", "-p", port, "-L", "127.0.0.1"], capture_output=True, text=True, timeout=30, check=False
    )
    assert "NT_STATUS_ACCESS_DENIED" in stranger.stdout + stranger.stderr
    assert share not in stranger.stdout
    assert "disk.img" in smbclient(export, "ls")
    credentials = f"username={export['credentials']['user']}\npassword={export['credentials']['password']}\n"
    listed = subprocess.run(
        ["smbclient", "-A", "/dev/stdin", "-p", port, "-L", "127.0.0.1"],
        input=credentials,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert share not in listed.stdout


def test_nothing_goes_over_the_wire_unencrypted(server: LiveServer) -> None:
    export = shared(server, server.create(size=SIZE_GB))
    for older in ("NT1", "SMB2_10", "SMB3_00", "SMB3_02"):
        assert "disk.img" not in smbclient(export, "ls", "--max-protocol", older)
    with smb_client(export) as client:
        disk = client.open()
        client.session.encrypt_data = client.tree.encrypt_data = False
        with pytest.raises(REFUSED):
            disk.read(0, 512)


def test_only_from_the_addresses_that_were_given(server: LiveServer) -> None:
    vid = server.create(size=SIZE_GB, shareable=True)
    # 127.0.0.1 is let in, because that is where the server itself looks from.
    export = shared(server, vid, addresses=["10.0.0.0/8", "127.0.0.2"])
    with smb_client(export, source="127.0.0.2") as client:
        assert client.names() == [FILE]
    with pytest.raises(REFUSED), smb_client(export, source="127.0.0.3"):
        pass
    everybody = shared(server, vid, CAROL)
    with smb_client(everybody, source="127.0.0.3") as client:
        assert client.names() == [FILE]


def test_a_read_only_export_is_read_only(server: LiveServer) -> None:
    vid = server.create(size=SIZE_GB, shareable=True)
    writable, readonly = shared(server, vid), shared(server, vid, CAROL, readonly=True)
    assert "ro" in readonly["prepare"][-1].split(" -o ")[1].split(",")
    with smb_client(writable) as client:
        client.open().write(0, b"data")
    with smb_client(readonly) as client:
        with pytest.raises(REFUSED):
            client.open()
        disk = client.open(access=FilePipePrinterAccessMask.GENERIC_READ)
        assert disk.read(0, 4) == b"data"
        changes: list[Callable[[], None]] = [
            lambda: disk.write(0, b"x"),
            lambda: disk.truncate(0),
            disk.delete,
            lambda: disk.zero(0, 65536),
        ]
        for change in changes:
            with pytest.raises(REFUSED):
                change()
        assert disk.read(0, 4) == b"data"


def test_a_read_only_volume_can_be_shared(server: LiveServer) -> None:
    vid = server.create(size=SIZE_GB, format="qcow2", readonly=True)
    export = shared(server, vid)
    assert export["readonly"]
    with smb_client(export) as client:
        assert client.open(access=FilePipePrinterAccessMask.GENERIC_READ).read(0, 512) == bytes(512)


# -- what a client cannot do -----------------------------------------------------------------------------------


@pytest.mark.parametrize("image_format", FORMATS)
def test_the_size_is_not_the_clients(server: LiveServer, tmp_path: Path, image_format: str) -> None:
    vid = server.create(size=SIZE_GB, format=image_format)
    export = shared(server, vid)
    size = export["size"]
    small = tmp_path / "small"
    small.write_bytes(b"overwritten")
    pattern = random.Random(3).randbytes(MIB)
    with smb_client(export) as client:
        disk = client.open()
        disk.write(size - MIB, pattern)
        for attempt in (
            lambda: disk.truncate(0),
            lambda: disk.truncate(4096),
            lambda: disk.truncate(2 * size),
            lambda: disk.allocate(4096),
            lambda: disk.write(size, b"x" * 512),
            lambda: disk.write(size - 512, pattern[-512:] * 2),
            lambda: client.open(disposition=CreateDisposition.FILE_OVERWRITE),
            lambda: client.open(disposition=CreateDisposition.FILE_OVERWRITE_IF),
            lambda: client.open(disposition=CreateDisposition.FILE_SUPERSEDE),
        ):
            with pytest.raises(REFUSED):
                attempt()
        with contextlib.suppress(*REFUSED):
            disk.allocate(2 * size)
        assert "NT_STATUS_NOT_SUPPORTED" in smbclient(export, f"put {small} {FILE}")
        assert disk.size() == size
        assert disk.read(size - MIB, MIB) == pattern
    unshared(server, vid)
    assert image(server, vid, tmp_path) == bytes(size - MIB) + pattern


def test_there_is_nothing_but_the_volume(server: LiveServer) -> None:
    vid = server.create(size=SIZE_GB)
    export = shared(server, vid)
    read = FilePipePrinterAccessMask.GENERIC_READ
    delete = FilePipePrinterAccessMask.DELETE
    with smb_client(export) as client:
        disk = client.open()
        disk.write(0, b"data")
        # A directory, a file, a stream; removed, renamed, and given other rights.
        for attempt in (
            lambda: client.open("new", disposition=CreateDisposition.FILE_CREATE),
            lambda: client.open(
                "new", disposition=CreateDisposition.FILE_CREATE, options=CreateOptions.FILE_DIRECTORY_FILE
            ),
            lambda: client.open(f"{FILE}:stream", disposition=CreateDisposition.FILE_OPEN_IF),
            lambda: client.open(access=delete),
            lambda: client.open(access=read | delete, options=CreateOptions.FILE_DELETE_ON_CLOSE),
            lambda: client.open(access=FilePipePrinterAccessMask.WRITE_DAC),
            lambda: client.open(access=FilePipePrinterAccessMask.WRITE_OWNER),
            disk.delete,
            lambda: disk.rename("other"),
            lambda: disk.rename("..\\other"),
        ):
            with pytest.raises(REFUSED):
                attempt()
        for name in (
            "..",
            "..\\engine.json",
            "..\\..\\..\\smb\\smbpasswd",
            f"{FILE}\\..\\..\\engine.json",
            "..//engine.json",
            "/etc/passwd",
            str(server.run_dir / "smb" / "smbpasswd").lstrip("/").replace("/", "\\"),
        ):
            with pytest.raises(REFUSED):
                client.open(name, access=read, options=0)
        assert client.names() == [FILE]
        assert disk.read(0, 4) == b"data"
    for command in (f"del {FILE}", f"rename {FILE} x", f"symlink {FILE} x", "mkdir x", f"chmod 777 {FILE}"):
        assert "NT_STATUS" in smbclient(export, command) or "UNIX CIFS" in smbclient(export, command)
    [view] = (server.run_dir / "v" / vid).glob("view-*")
    assert [one.name for one in view.iterdir()] == [FILE]


def test_the_kernel_keeps_volumes_apart(server: LiveServer) -> None:
    """Whatever smbd may be talked into: its users can open their own volume's file, and nothing else of ours."""
    first, second = server.create(size=SIZE_GB), server.create(size=SIZE_GB)
    shared(server, first)
    shared(server, second)
    lines = (server.run_dir / "smb" / "passwd").read_text().splitlines()
    users = {line.split(":")[4]: [int(number) for number in line.split(":")[2:4]] for line in lines}
    uid, gid = users[first]

    def can_open(path: Path) -> bool:
        words = ["head", "-c1", str(path)]
        done = subprocess.run(words, user=uid, group=gid, extra_groups=[], capture_output=True, check=False)
        return done.returncode == 0

    [own] = (server.run_dir / "v" / first).glob("view-*")
    [foreign] = (server.run_dir / "v" / second).glob("view-*")
    assert can_open(own / FILE)
    assert not can_open(foreign / FILE)
    for name in ("smb.conf", "smbpasswd", "private/secrets.tdb", "log/smbd"):
        assert not can_open(server.run_dir / "smb" / name)
    for name in ("engine.json", "qmp", "log"):
        assert not can_open(server.run_dir / "v" / first / name)


def test_a_password_is_shown_to_nobody(server: LiveServer) -> None:
    vid = server.create(size=SIZE_GB)
    seen: set[bytes] = set()
    stop = threading.Event()

    def look() -> None:
        while not stop.is_set():
            for entry in os.listdir("/proc"):
                for name in ("cmdline", "environ"):
                    with contextlib.suppress(OSError):
                        seen.add(Path(f"/proc/{entry}/{name}").read_bytes())

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        export = shared(server, vid)
        server.kill_daemons("/smb/")
        eventually(lambda: server.daemons("/smb/"))
        eventually(lambda: healthy(server, vid))
    finally:
        stop.set()
        watcher.join()
    secret = export["credentials"]["password"].encode()
    assert any(b"smbclient" in one for one in seen)
    assert not any(secret in one for one in seen)
    assert secret not in server.log().encode()
    for path in server.run_dir.rglob("*"):
        if path.is_file() and path.name != FILE:
            assert secret not in path.read_bytes(), path


# -- ends and new beginnings -----------------------------------------------------------------------------------


def test_when_unexport_answers_nothing_of_the_client_is_left(server: LiveServer) -> None:
    vid = server.create(size=SIZE_GB, shareable=True)
    export, other = shared(server, vid), shared(server, vid, CAROL)
    written = 0
    ended: list[BaseException] = []

    def write(disk: SmbFile) -> None:
        nonlocal written
        try:
            while True:
                disk.write(0, written.to_bytes(8, "little") * 8192)
                written += 1
        except BaseException as error:
            ended.append(error)

    with smb_client(export) as client, smb_client(other) as observer:
        watching = observer.open()
        writer = threading.Thread(target=write, args=(client.open(),), daemon=True)
        writer.start()
        eventually(lambda: written > 50)
        started = time.monotonic()
        unshared(server, vid)
        took = time.monotonic() - started
        last = watching.read(0, 65536)
        writer.join(5)
        assert ended
        time.sleep(0.3)
        assert watching.read(0, 65536) == last
        assert written - 1 <= int.from_bytes(last[:8], "little") <= written
    assert took < 5
    with pytest.raises(REFUSED), smb_client(export):
        pass
    files = "".join((server.run_dir / "smb" / name).read_text() for name in ("smb.conf", "passwd", "smbpasswd"))
    assert export["credentials"]["user"] not in files
    assert other["credentials"]["user"] in files


def test_exporting_again_gives_new_credentials(server: LiveServer) -> None:
    vid = server.create(size=SIZE_GB)
    old = shared(server, vid)
    assert shared(server, vid) == old
    unshared(server, vid)
    new = shared(server, vid)
    assert new["credentials"]["password"] != old["credentials"]["password"]
    with pytest.raises(REFUSED), smb_client(old):
        pass
    with smb_client(new) as client:
        assert client.names() == [FILE]


def test_many_at_the_same_time(server: LiveServer) -> None:
    """The first of them starts smbd, and the others wait for it."""
    volumes = [server.create(size=SIZE_GB) for _ in range(12)]
    with ThreadPoolExecutor(len(volumes)) as pool:
        exports = list(pool.map(lambda vid: shared(server, vid), volumes))
        assert all(pool.map(shows_the_file, exports))
        assert len(server.daemons("/smb/")) == 1
        list(pool.map(lambda vid: unshared(server, vid), volumes))
    conf = (server.run_dir / "smb" / "smb.conf").read_text()
    assert not any(export["endpoint"]["share"] in conf for export in exports)
    assert not server.daemons("/v/")


def test_smbd_comes_back_with_all_shares(server: LiveServer) -> None:
    volumes = [server.create(size=SIZE_GB) for _ in range(3)]
    exports = [shared(server, vid) for vid in volumes]
    with smb_client(exports[0]) as client:
        disk = client.open()
        disk.write(0, b"kept")
        [pid] = server.kill_daemons("/smb/")
        with pytest.raises(REFUSED):
            disk.read(0, 4)
    eventually(lambda: server.daemons("/smb/"))
    assert pid not in server.daemons("/smb/")
    for export in exports:
        eventually(lambda export=export: shows_the_file(export))  # type: ignore[misc]
    with smb_client(exports[0]) as client:
        assert client.open().read(0, 4) == b"kept"
    eventually(lambda: all(healthy(server, vid) for vid in volumes))


def test_a_process_of_smbd_that_hangs_is_ended_before_a_new_smbd_serves(server: LiveServer) -> None:
    """Otherwise its last write would come after the volume was taken from its client."""
    vid = server.create(size=SIZE_GB)
    export = shared(server, vid)
    with smb_client(export) as client:
        client.open()
        status = subprocess.check_output(["smbstatus", "-s", server.run_dir / "smb" / "smb.conf", "--json"])
        pids = {int(one["server_id"]["pid"]) for one in json.loads(status)["sessions"].values()}
        [child] = pids - set(server.daemons("/smb/"))
        os.kill(child, signal.SIGSTOP)
        server.kill_daemons("/smb/")
        eventually(lambda: server.daemons("/smb/"))
        eventually(lambda: _ended(child))


def test_the_storage_daemon_comes_back_and_clients_find_it(server: LiveServer, tmp_path: Path) -> None:
    vid = server.create(size=SIZE_GB, format="qcow2", shareable=True)
    exports = [shared(server, vid), shared(server, vid, CAROL)]
    with smb_client(exports[0]) as client:
        disk = client.open()
        disk.write(0, b"kept" * 1024)
        disk.flush()
        server.kill_daemons("/v/")
        with pytest.raises(REFUSED):
            while True:
                disk.read(0, 4096)
        eventually(lambda: server.daemons("/v/"))
    for export in exports:

        def reads(export: dict[str, Any] = export) -> bool:
            with smb_client(export) as client:
                return client.open().read(0, 4096) == b"kept" * 1024

        eventually(reads)
    # Nobody is left with a handle on what was there before.
    eventually(lambda: healthy(server, vid))
    assert len(list((server.run_dir / "v" / vid).glob("view-*"))) == 1
    for client_uid in (BOB, CAROL):
        unshared(server, vid, client_uid)
    assert image(server, vid, tmp_path).startswith(b"kept" * 1024)


def test_clients_notice_nothing_of_a_server_that_restarts(server: LiveServer) -> None:
    vid = server.create(size=SIZE_GB)
    export = shared(server, vid)
    with smb_client(export) as client:
        disk = client.open()
        disk.write(0, b"before")
        for end in (server.stop, server.kill):
            daemons = server.daemons()
            end()
            disk.write(0, b"during")
            server.start()
            eventually(lambda: healthy(server, vid))
            assert server.daemons() == daemons
            assert disk.read(0, 6) == b"during"
    unshared(server, vid)


def test_what_was_done_to_the_files_of_smbd_is_mended(server: LiveServer) -> None:
    vid = server.create(size=SIZE_GB)
    export = shared(server, vid)
    directory = server.run_dir / "smb"

    conf = (directory / "smb.conf").read_text()
    for name, content in (
        ("smb.conf", conf.partition(f"[{export['endpoint']['share']}]")[0]),
        ("smbpasswd", ""),
        ("passwd", "root:x:0:0::/:/bin/false\n"),
    ):
        (directory / name).write_text(content)
        eventually(lambda: shows_the_file(export))
    (directory / "smb.conf").write_text(conf + "[stranger]\n    path = /\n    guest ok = yes\n")
    eventually(lambda: "stranger" not in (directory / "smb.conf").read_text())
    assert shows_the_file(export)


def test_another_port_after_a_restart(server: LiveServer) -> None:
    vid = server.create(size=SIZE_GB)
    shared(server, vid)
    server.stop()
    server.smb_port = free_port()
    server.start()
    eventually(lambda: healthy(server, vid))
    export = shared(server, vid)
    assert export["endpoint"]["port"] == server.smb_port
    with smb_client(export) as client:
        assert client.names() == [FILE]


def test_a_port_that_somebody_else_has_is_told(server: LiveServer) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", server.smb_port))
        taken.listen()
        vid = server.create(size=SIZE_GB)
        answer = server.post("export", {"volume_id": vid, "client_uid": BOB, "protocol": "smb"})
        assert answer.status_code == 503
        assert "smb-port" in answer.json()["error"]
        assert not server.info(vid)["exported"]


def test_only_smb_is_missing_where_samba_is(tmp_path: Path) -> None:
    with live_server(tmp_path, env={"PATH": "/usr/bin"}) as server:  # smbd is in /usr/sbin
        vid = server.create(size=SIZE_GB)
        answer = server.post("export", {"volume_id": vid, "client_uid": BOB, "protocol": "smb"})
        assert answer.json()["code"] == "tool-missing"
        assert "smbd is not installed" in server.log()
        assert not server.info(vid)["exported"]
        server.call("export", {"volume_id": vid, "client_uid": BOB, "protocol": "local"})


def test_sessions_are_counted(server: LiveServer) -> None:
    vid = server.create(size=SIZE_GB)
    export = shared(server, vid)

    def sessions() -> int:
        [one] = server.call("exports", {"volume_id": vid})["exports"]
        return int(one["sessions"] or 0)  # not known before the first look

    clients = [SmbClient(export) for _ in range(2)]
    eventually(lambda: sessions() == 2)
    for client in clients:
        client.close()
    eventually(lambda: sessions() == 0)


def _ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] in "ZX"
    except OSError:
        return True
