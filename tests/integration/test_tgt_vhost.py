"""native/tgt_vhost.c for real: tgtd with the library, qemu-storage-daemon below it, real initiators above."""

import contextlib
import json
import os
import random
import re
import select
import signal
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

NATIVE = Path(__file__).parents[2] / "native"
MIB = 1 << 20


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("native")
    subprocess.run(["make", "-s", "-C", NATIVE, f"out={out}"], check=True)
    return out / "tgt_vhost.so"


def wait_until(condition: Any, seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "in vain"
        time.sleep(0.01)


@dataclass
class Daemon:
    """A qemu-storage-daemon with one image, exported by vhost-user-blk."""

    image: Path
    image_format: str = "qcow2"
    file_options: str = ""
    export_options: str = ",writable=on"
    process: subprocess.Popen[bytes] | None = None

    @property
    def socket(self) -> Path:
        return self.image.with_suffix(".sock")

    def uri(self, more: str = "") -> str:
        return f"vhost-user-blk:///vol?socket={self.socket}{more}"

    @property
    def export(self) -> str:
        address = f"addr.type=unix,addr.path={self.socket}"
        return f"id=export,fixed-iothread=on,{address},num-queues=16{self.export_options}"

    def start(self) -> None:
        monitor = self.image.with_suffix(".qmp")
        read_only = "off" if "writable=on" in self.export_options else "on"
        self.process = subprocess.Popen(
            [
                "qemu-storage-daemon",
                *("--chardev", f"socket,id=monitor,path={monitor},server=on,wait=off"),
                *("--monitor", "chardev=monitor,mode=control"),
                *("--blockdev", self.file_options or f"driver=file,node-name=file,filename={self.image},discard=unmap"),
                *(
                    "--blockdev",
                    f"driver={self.image_format},node-name=vol,file=file,discard=unmap,read-only={read_only}",
                ),
                *("--export", f"type=vhost-user-blk,node-name=vol,{self.export}"),
            ],
            stdin=subprocess.DEVNULL,
        )
        wait_until(lambda: self.answers(self.socket))

    @staticmethod
    def answers(path: Path) -> bool:
        with socket.socket(socket.AF_UNIX) as connection, contextlib.suppress(OSError):
            connection.connect(str(path))
            return True
        return False

    def stop(self, how: signal.Signals = signal.SIGTERM) -> None:
        assert self.process
        self.process.send_signal(how)
        self.process.wait()

    def qmp(self, *commands: tuple[str, dict[str, Any]], event: str = "") -> None:
        """Runs the commands, then waits for the event if one is named."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(self.image.with_suffix(".qmp")))
            stream = connection.makefile("rw")
            stream.readline()
            seen = []
            for command, arguments in (("qmp_capabilities", {}), *commands):
                stream.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
                stream.flush()
                while True:
                    answer = json.loads(stream.readline())
                    assert "error" not in answer, answer
                    seen.append(answer.get("event"))
                    if "return" in answer:
                        break
            while event and event not in seen:
                seen.append(json.loads(stream.readline()).get("event"))


@dataclass
class Tgtd:
    """A private tgtd."""

    directory: Path
    preload: Path | None
    settings: dict[str, str] = field(default_factory=dict)
    control: str = ""
    port: int = 0
    targets: int = 0
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.control = str(self.port % 32000)
        environment = os.environ | self.settings | {"TGT_IPC_SOCKET": str(self.directory / "ipc")}
        if self.preload:
            environment["LD_PRELOAD"] = str(self.preload)
        with (self.directory / "tgtd.log").open("ab") as log, Path(os.devnull).open("rb") as nothing:
            self.process = subprocess.Popen(
                ["tgtd", "-f", "-C", self.control, "--iscsi", f"portal=127.0.0.1:{self.port}"],
                env=environment,
                stdin=nothing,  # not writable: tgtd may write to descriptor 0 while a path is exchanged
                stdout=log,
                stderr=log,
            )
        wait_until(lambda: self.admin("show", "target", check=False).returncode == 0)

    def admin(self, operation: str, mode: str, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["tgtadm", "-C", self.control, "--lld", "iscsi", "--op", operation, "--mode", mode, *words],
            env=os.environ | {"TGT_IPC_SOCKET": str(self.directory / "ipc")},
            check=check,
            capture_output=True,
            text=True,
        )

    def add(self, backing_store: str | Path) -> str:
        """A target with one logical unit; answers its URL."""
        self.targets += 1
        tid, name = str(self.targets), f"iqn.2004-10.test:{self.targets}"
        self.admin("new", "target", "--tid", tid, "--targetname", name)
        store = ("--backing-store", str(backing_store), "--bstype", "rdwr")
        self.admin("new", "logicalunit", "--tid", tid, "--lun", "1", *store)
        self.change(tid, "thin_provisioning=1")
        self.admin("bind", "target", "--tid", tid, "--initiator-address", "ALL")
        return f"iscsi://127.0.0.1:{self.port}/{name}/1"

    def change(self, tid: str, parameters: str) -> None:
        self.admin("update", "logicalunit", "--tid", tid, "--lun", "1", "--params", parameters)

    def log(self) -> str:
        return (self.directory / "tgtd.log").read_text()


class Session:
    """One iSCSI session, held by an interactive qemu-io."""

    def __init__(self, url: str, *options: str) -> None:
        self.process = subprocess.Popen(
            ["qemu-io", "-f", "raw", "-t", "writeback", *options, url],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self._until_prompt()

    def _until_prompt(self) -> str:
        assert self.process.stdout
        text = b""
        while not text.endswith(b"qemu-io> "):
            byte = os.read(self.process.stdout.fileno(), 4096)
            assert byte, text
            text += byte
        return text.removesuffix(b"qemu-io> ").decode()

    def __call__(self, command: str) -> str:
        assert self.process.stdin
        self.process.stdin.write(command.encode() + b"\n")
        self.process.stdin.flush()
        return self._until_prompt()

    def works(self, command: str) -> bool:
        return not re.search(r"failed|rror", self(command))

    def close(self) -> None:
        self.process.communicate(b"quit\n")


@pytest.fixture
def lab(tmp_path: Path, library: Path) -> Iterator["Lab"]:
    with contextlib.ExitStack() as cleanup:
        yield Lab(tmp_path, library, cleanup)


@dataclass
class Lab:
    directory: Path
    library: Path
    cleanup: contextlib.ExitStack

    def daemon(self, image_format: str = "qcow2", size: str = "64M", name: str = "vol", **options: Any) -> Daemon:
        daemon = Daemon(self.directory / f"{name}.{image_format}", image_format, **options)
        if not daemon.image.exists():
            subprocess.run(["qemu-img", "create", "-q", "-f", image_format, daemon.image, size], check=True)
        daemon.start()
        self.cleanup.callback(lambda: daemon.stop(signal.SIGKILL))
        return daemon

    def tgtd(self, *, shim: bool = True, **settings: str) -> Tgtd:
        directory = self.directory / f"tgtd-{shim}"
        directory.mkdir()
        tgtd = Tgtd(directory, self.library if shim else None, settings)
        tgtd.start()

        def end() -> None:
            assert tgtd.process
            died = tgtd.process.poll()
            tgtd.process.kill()
            tgtd.process.wait()
            assert died is None, tgtd.log()

        self.cleanup.callback(end)
        return tgtd

    def session(self, url: str, *options: str) -> Session:
        session = Session(url, *options)
        self.cleanup.callback(session.close)
        return session


def test_zeroes_and_discards_of_every_alignment_read_back_as_zeros(lab: Lab) -> None:
    session = lab.session(lab.tgtd().add(lab.daemon().uri()))
    assert session.works("write -P 7 0 64M")
    for offset, length in ((512, 512), (65024, 1536), (131072, 65536), (200 * 512, 300 * 512), (MIB, 8 * MIB + 512)):
        assert session.works(f"write -z -u {offset} {length}")
        assert session.works(f"read -P 0 {offset} {length}")
        assert session.works(f"read -P 7 {offset - 512} 512")
        assert session.works(f"read -P 7 {offset + length} 512")
    assert session.works("discard 20M 1536")
    assert session.works("read -P 7 20973056 512")  # behind it
    assert not session.works("read -P 7 0 1M"), "the comparison itself works"


def test_one_request_may_be_larger_than_a_server_takes(lab: Lab) -> None:
    session = lab.session(lab.tgtd().add(lab.daemon("raw", "128M").uri()))
    assert session.works("write -P 9 0 96M")
    assert session.works("read -P 9 0 96M")


def test_a_read_only_export_is_a_read_only_unit(lab: Lab) -> None:
    daemon = lab.daemon(export_options="")
    tgtd = lab.tgtd()
    url = tgtd.add(daemon.uri())
    assert "Readonly: Yes" in tgtd.admin("show", "target").stdout
    assert subprocess.run(["qemu-io", "-r", "-f", "raw", "-c", "read 0 1M", url], check=False).returncode == 0
    assert subprocess.run(["qemu-io", "-f", "raw", "-c", "write 0 1M", url], check=False).returncode != 0


@pytest.mark.parametrize("more", ["&socket", "&unflushed=lost", "&unflushed=kept&x=1", "%zz"])
def test_a_uri_that_is_not_understood_is_refused(lab: Lab, more: str) -> None:
    with pytest.raises(subprocess.CalledProcessError):
        lab.tgtd().add(lab.daemon().uri(more))


def test_without_the_library_the_export_or_the_daemon_nothing_is_opened(lab: Lab) -> None:
    daemon = lab.daemon()
    bare, tgtd = lab.tgtd(shim=False), lab.tgtd()
    with pytest.raises(subprocess.CalledProcessError):
        bare.add(daemon.uri())
    with pytest.raises(subprocess.CalledProcessError):
        tgtd.add(daemon.uri().replace(".sock", ".other"))
    daemon.stop()
    with pytest.raises(subprocess.CalledProcessError):
        tgtd.add(daemon.uri())


@pytest.mark.parametrize("kind", ["read", "write", "flush"])
def test_errors_of_the_daemon_reach_the_client(lab: Lab, kind: str) -> None:
    file = (
        f"driver=blkdebug,node-name=file,image.driver=file,image.filename={lab.directory}/vol.raw,"
        f"inject-error.0.event=none,inject-error.0.iotype={kind},inject-error.0.errno=28,inject-error.0.once=on"
    )
    session = lab.session(lab.tgtd().add(lab.daemon("raw", file_options=file).uri()))
    assert session.works("write 0 1M") is (kind != "write")
    assert session.works("flush") is (kind != "flush")
    assert session.works("read 0 1M") is (kind != "read")
    for command in ("read 0 1M", "write 0 1M", "flush"):
        assert session.works(command), "it was one error, not more"


def test_a_full_file_system_is_an_error_and_room_mends_it(lab: Lab) -> None:
    small = lab.directory / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8M", "none", small], check=True)
    lab.cleanup.callback(lambda: subprocess.run(["umount", "-l", small], check=True))
    session = lab.session(lab.tgtd().add(lab.daemon(name="small/vol").uri()))
    assert session.works("write -P 1 0 4M")
    assert not session.works("write -P 2 16M 16M")
    assert session.works("read -P 1 0 4M")
    subprocess.run(["mount", "-o", "remount,size=64M", small], check=True)
    assert session.works("write -P 2 16M 16M")
    assert session.works("flush")
    assert session.works("read -P 2 16M 16M")


@pytest.mark.parametrize(
    ("image_format", "more", "flushed", "told"),
    [
        ("qcow2", "", False, True),
        ("qcow2", "", True, False),
        ("raw", "&unflushed=kept", False, False),
    ],
)
def test_a_flush_after_writes_that_died_with_the_daemon_fails_once(
    lab: Lab, image_format: str, more: str, flushed: bool, told: bool
) -> None:
    daemon = lab.daemon(image_format)
    tgtd = lab.tgtd()
    session = lab.session(tgtd.add(daemon.uri(more)))
    assert session.works("write -P 5 0 1M")
    if flushed:
        assert session.works("flush")
    daemon.stop(signal.SIGKILL)
    daemon.start()
    assert session.works("read 8M 1M"), "reads go on"
    if flushed:
        assert session.works("read -P 5 0 1M")
    assert session.works("write -P 6 1M 1M")
    assert session.works("flush") is not told
    assert session.works("flush"), tgtd.log()
    assert session.works("write -f -P 6 2M 1M")
    assert ("the next flush fails" in tgtd.log()) is told


def test_a_write_through_the_cache_fails_once_too(lab: Lab) -> None:
    daemon = lab.daemon()
    session = lab.session(lab.tgtd().add(daemon.uri()))
    assert session.works("write -P 5 0 1M")
    daemon.stop(signal.SIGKILL)
    daemon.start()
    assert not session.works("write -f -P 6 2M 1M")
    assert session.works("write -f -P 6 2M 1M")


def test_the_loss_is_told_although_the_path_was_set_anew(lab: Lab) -> None:
    daemon = lab.daemon()
    tgtd = lab.tgtd()
    session = lab.session(tgtd.add(daemon.uri()))
    assert session.works("write -P 5 0 1M")
    daemon.stop(signal.SIGKILL)
    daemon.start()
    for change in ("online=0", f"path={daemon.uri()}", "online=1"):
        tgtd.change("1", change)
    assert session.works("write -P 6 1M 1M")
    assert not session.works("flush")
    assert session.works("flush")


def test_a_daemon_that_stays_away_is_an_error_in_time(lab: Lab) -> None:
    daemon = lab.daemon()
    session = lab.session(lab.tgtd(TGT_VHOST_RECONNECT="2").add(daemon.uri()))
    daemon.stop(signal.SIGKILL)
    start = time.monotonic()
    assert not session.works("read 0 1M")
    assert 1.5 < time.monotonic() - start < 5
    assert not session.works("read 0 1M")
    assert time.monotonic() - start < 6, "who comes later does not wait again"
    daemon.start()
    assert session.works("read 0 1M")


def test_a_request_that_every_daemon_dies_of_is_an_error_in_time(lab: Lab) -> None:
    path = lab.directory / "deadly.sock"
    listener = socket.socket(socket.AF_UNIX)
    lab.cleanup.callback(listener.close)
    listener.bind(str(path))
    listener.listen(64)

    def serve() -> None:
        """What a vhost-user-blk server says until everything is set up; the first request ends it."""
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            answers = {
                1: struct.pack("<Q", 1 << 32 | 1 << 30 | 1 << 9),  # features: virtio 1, more features, flush
                15: struct.pack("<Q", 1 << 9 | 1 << 3 | 1),  # configuration, acknowledgements, several queues
                17: struct.pack("<Q", 1),
                18: struct.pack("<Q", 0),
                24: struct.pack("<IIIQ", 0, 8, 0, MIB // 512),
            }
            descriptors: list[int] = []
            request = 0
            with connection:
                while request != 18:
                    head, more, _, _ = socket.recv_fds(connection, 12, 1)
                    if not head:
                        break
                    descriptors += more
                    request, _, length = struct.unpack("<III", head)
                    connection.recv(length, socket.MSG_WAITALL)
                    if answer := answers.get(request):
                        connection.sendall(struct.pack("<III", request, 5, len(answer)) + answer)
                select.select(descriptors[-1:], [], [])  # kicked
            for descriptor in descriptors:
                os.close(descriptor)

    threading.Thread(target=serve, daemon=True).start()
    tgtd = lab.tgtd(TGT_VHOST_RECONNECT="1")
    session = lab.session(tgtd.add(f"vhost-user-blk:///vol?socket={path}"))
    start = time.monotonic()
    assert not session.works("write 0 4k")
    assert 0.9 < time.monotonic() - start < 4


def test_what_was_flushed_outlives_every_kill_of_the_daemon(lab: Lab) -> None:
    daemon = lab.daemon(size="8G")  # most writes allocate: that is what a daemon that is killed forgets
    tgtd = lab.tgtd()
    session = lab.session(tgtd.add(daemon.uri()))
    over = threading.Event()
    kills = 0

    def kill_now_and_then() -> None:
        nonlocal kills
        while not over.wait(random.uniform(0.02, 0.2)):
            daemon.stop(signal.SIGKILL)
            daemon.start()
            kills += 1

    killer = threading.Thread(target=kill_now_and_then)
    killer.start()
    durable: dict[int, int] = {}
    failed = 0
    end = time.monotonic() + 12
    try:
        while time.monotonic() < end:
            batch = {random.randrange(131072): random.randrange(1, 250) for _ in range(8)}
            for block, pattern in batch.items():
                durable.pop(block, None)
                assert "rror" not in session(f"aio_write -q -P {pattern} {block * 65536} 65536")
            assert "rror" not in session("aio_flush")
            if session.works("flush"):
                durable |= batch
            else:
                failed += 1
    finally:
        over.set()
        killer.join()
    assert kills > 5
    assert durable
    for block, pattern in durable.items():
        assert session.works(f"read -P {pattern} {block * 65536} 65536"), (block, kills, failed)


def test_a_resize_under_load_is_seen_and_disturbs_nobody(lab: Lab) -> None:
    daemon = lab.daemon()
    tgtd = lab.tgtd()
    url = tgtd.add(daemon.uri())
    session = lab.session(url)
    bench = ["qemu-img", "bench", "-f", "raw", "-t", "none", "-w", "-d", "32", "-s", "4k", "-S", "1052672"]
    load = subprocess.Popen(
        [*bench, "-c", "60000", "--flush-interval", "64", url], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    for megabytes in range(80, 144, 16):
        time.sleep(0.2)
        daemon.qmp(("block-export-del", {"id": "export", "mode": "hard"}), event="BLOCK_EXPORT_DELETED")
        export = {
            "type": "vhost-user-blk",
            "id": "export",
            "node-name": "vol",
            "writable": True,
            "num-queues": 16,
            "fixed-iothread": True,
            "addr": {"type": "unix", "path": str(daemon.socket)},
        }
        resize = {"node-name": "vol", "size": megabytes * MIB}
        daemon.qmp(("block_resize", resize), ("block-export-add", export))
        for change in ("online=0", f"path={daemon.uri()}", "online=1"):
            tgtd.change("1", change)
    during = load.poll()
    output = load.communicate()[0]
    assert load.returncode == 0, (output, tgtd.log())
    assert during is None, "the load was over before the resizes were"
    again = lab.session(url)
    assert "128 MiB" in again("length")
    assert again.works("write -P 4 127M 1M")
    assert session.works("read 0 1M"), "the old session goes on"
    assert "flush fails" not in tgtd.log()


def fio(lab: Lab, urls: list[str], *words: str) -> None:
    """fio over iSCSI: through QEMU's initiator, as fio has none."""
    sock = lab.directory / "fio.sock"
    nodes = [
        word
        for number, url in enumerate(urls)
        for word in (
            *(
                "--blockdev",
                f"driver=iscsi,node-name=lun{number},transport=tcp,portal={url.split('/')[2]},"
                f"target={url.split('/')[3]},lun=1",
            ),
            *("--export", f"type=nbd,id=export{number},node-name=lun{number},name=lun{number},writable=on"),
        )
    ]
    initiator = subprocess.Popen(
        ["qemu-storage-daemon", "--nbd-server", f"addr.type=unix,addr.path={sock},max-connections=0", *nodes],
        stdin=subprocess.DEVNULL,
    )
    try:
        wait_until(lambda: Daemon.answers(sock))
        jobs = [
            word
            for number in range(len(urls))
            for word in (f"--name=lun{number}", f"--uri=nbd+unix:///lun{number}?socket={sock}", *words)
        ]
        done = subprocess.run(
            ["fio", "--ioengine=nbd", "--verify=crc32c", "--verify_fatal=1", "--rw=randwrite", *jobs],
            check=False,
            capture_output=True,
            text=True,
            cwd=lab.directory,
        )
        assert done.returncode == 0, done.stdout + done.stderr
    finally:
        initiator.kill()
        initiator.wait()


@pytest.mark.parametrize("blocks", ["4k", "4k-4m"])
def test_parallel_writers_find_what_they_wrote(lab: Lab, blocks: str) -> None:
    tgtd = lab.tgtd()
    one, other = lab.daemon(size="512M"), lab.daemon("raw", "512M", "other")
    urls = [tgtd.add(one.uri()), tgtd.add(one.uri()), tgtd.add(other.uri())]  # two targets of one image
    parts = ("0", "256M", "0")
    size = "32M" if blocks == "4k" else "256M"
    words = (
        "--iodepth=16",
        f"--bsrange={blocks}" if "-" in blocks else f"--bs={blocks}",
        f"--size={size}",
        "--blockalign=4k",
    )
    with_offsets = [[*words, f"--offset={part}"] for part in parts]
    threads = []
    failures: list[BaseException] = []
    for number, (url, own) in enumerate(zip(urls, with_offsets, strict=True)):
        directory = lab.directory / f"fio{number}"
        directory.mkdir()

        def run(own_lab: Lab, url: str, own: list[str]) -> None:
            try:
                fio(own_lab, [url], *own)
            except BaseException as error:
                failures.append(error)

        threads.append(threading.Thread(target=run, args=(Lab(directory, lab.library, lab.cleanup), url, own)))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures[0]


def test_nodes_that_come_and_go_above_the_image_disturb_nobody(lab: Lab) -> None:
    daemon = lab.daemon(size="256M")
    tgtd = lab.tgtd()
    url = tgtd.add(daemon.uri())
    over = threading.Event()
    done: list[str] = []

    def snapshot_and_commit() -> None:
        """Each step holds all requests up; the export gets another node twice."""
        while not over.is_set():
            name = f"top{len(done)}"
            snapshot = {"node-name": "vol", "snapshot-node-name": name, "format": "qcow2"}
            daemon.qmp(("blockdev-snapshot-sync", {**snapshot, "snapshot-file": f"{lab.directory}/{name}.qcow2"}))
            daemon.qmp(("block-commit", {"job-id": name, "device": name}), event="BLOCK_JOB_READY")
            daemon.qmp(("block-job-complete", {"device": name}), event="BLOCK_JOB_COMPLETED")
            done.append(name)

    thread = threading.Thread(target=snapshot_and_commit)
    thread.start()
    try:
        fio(lab, [url], "--iodepth=16", "--bsrange=4k-1m", "--size=128M", "--blockalign=4k", "--fsync=50")
    finally:
        over.set()
        thread.join()
    assert len(done) > 2
    assert "does not answer" not in tgtd.log()


def test_parallel_writers_do_not_notice_kills_of_a_daemon_that_keeps_nothing_in_memory(lab: Lab) -> None:
    daemon = lab.daemon("raw", "256M")
    tgtd = lab.tgtd()
    url = tgtd.add(daemon.uri("&unflushed=kept"))
    over = threading.Event()

    def kill_now_and_then() -> None:
        while not over.wait(0.2):
            daemon.stop(signal.SIGKILL)
            daemon.start()

    killer = threading.Thread(target=kill_now_and_then)
    killer.start()
    try:
        fio(lab, [url], "--iodepth=16", "--bsrange=4k-1m", "--size=256M", "--blockalign=4k", "--loops=2", "--fsync=50")
    finally:
        over.set()
        killer.join()
    assert tgtd.log().count("answers again") > 2


def test_scsi_conformance_is_that_of_tgtd_on_a_file(lab: Lab) -> None:
    def failing(url: str) -> set[str]:
        run = subprocess.run(
            ["iscsi-test-cu", "-d", "-n", "-t", "ALL", url],
            check=False,
            capture_output=True,
            text=True,
            errors="replace",
        )
        assert "asserts" in run.stdout, run.stdout + run.stderr
        return set(re.findall(r"Suite (\w+, Test \w+) had failures", run.stdout))

    plain = lab.directory / "plain"
    with plain.open("wb") as file:
        file.truncate(128 * MIB)
    on_file = failing(lab.tgtd(shim=False).add(plain))
    on_qcow2 = failing(lab.tgtd().add(lab.daemon(size="128M").uri()))
    assert on_file, "the reports are understood: some failures are tgtd's own"
    assert on_qcow2 <= on_file, on_qcow2 - on_file
