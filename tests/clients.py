"""Real clients of exports: what an operator would paste, run as programs of their own."""

import contextlib
import os
import select
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

_PROMPT = b"qemu-io> "
SLOW_S = 30.0  # what takes milliseconds may take seconds on a machine that others use too


class ClientFailed(Exception):
    """The client was told that it failed, or could not begin."""


class NoAnswer(Exception):
    """The client still waits."""


@dataclass(frozen=True)
class Attach:
    """The parts of the arguments for QEMU that an export answers with."""

    objects: tuple[str, ...]
    blockdev: str
    devices: tuple[str, ...]

    @classmethod
    def of(cls, arguments: Sequence[str]) -> Self:
        """From ``-object … -blockdev … -device …``."""
        pairs = list(zip(arguments[::2], arguments[1::2], strict=True))
        assert {name for name, _ in pairs} <= {"-object", "-blockdev", "-device"}
        [blockdev] = [value for name, value in pairs if name == "-blockdev"]
        return cls(
            objects=tuple(value for name, value in pairs if name == "-object"),
            blockdev=blockdev,
            devices=tuple(value for name, value in pairs if name == "-device"),
        )

    def changed(self, **options: object) -> "Attach":
        """The same with other values of the block device's options; dashes and dots as underscores are not known."""
        kept = [one for one in self.blockdev.split(",") if one.partition("=")[0] not in options]
        blockdev = ",".join([*kept, *(f"{key}={value}" for key, value in options.items() if value is not None)])
        return Attach(self.objects, blockdev, self.devices)


class QemuIo:
    """A guest's disk: an open qemu-io that is told what to do line by line."""

    def __init__(self, attach: Attach | Sequence[str], *, readonly: bool = False, timeout_s: float = SLOW_S) -> None:
        if not isinstance(attach, Attach):
            attach = Attach.of(attach)
        argv = ["qemu-io", *(["-r"] if readonly or "read-only=on" in attach.blockdev else [])]
        for one in attach.objects:
            argv += ["--object", one]
        self._start([*argv, "--image-opts", attach.blockdev], timeout_s)

    def _start(self, argv: Sequence[str], timeout_s: float) -> None:
        self._process = subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, bufsize=0
        )
        self._late = 0  # answers that nobody waited for
        try:
            self._answer(timeout_s)
        except BaseException:
            self.kill()
            raise

    @classmethod
    def on_file(cls, path: Path, image_format: str) -> Self:
        """On an image file, past the server."""
        self = cls.__new__(cls)
        self._start(["qemu-io", "-f", image_format, str(path)], SLOW_S)
        return self

    @classmethod
    def on_nbd(cls, uri: str) -> Self:
        """On an NBD export that may only be read."""
        self = cls.__new__(cls)
        self._start(["qemu-io", "-r", "-f", "raw", uri], SLOW_S)
        return self

    @property
    def pid(self) -> int:
        return self._process.pid

    def _answer(self, timeout_s: float) -> str:
        assert self._process.stdout is not None
        deadline = time.monotonic() + timeout_s
        said = b""
        while not said.endswith(_PROMPT):
            if not select.select([self._process.stdout], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise NoAnswer(said.decode(errors="replace"))
            piece = os.read(self._process.stdout.fileno(), 65536)
            if not piece:
                raise ClientFailed(said.decode(errors="replace"))
            said += piece
        return said.removesuffix(_PROMPT).decode(errors="replace")

    def ask(self, command: str, timeout_s: float = SLOW_S) -> str:
        """One command and what was said to it. Raises ClientFailed, NoAnswer."""
        self.send(command)
        return self._answer(timeout_s)

    def send(self, command: str) -> None:
        """One command, without waiting for what comes of it."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{command}\n".encode())
        except BrokenPipeError as error:
            raise ClientFailed("it has ended") from error

    def wait(self, timeout_s: float = SLOW_S) -> str:
        """What was said to the command that was sent. Raises ClientFailed, NoAnswer."""
        return self._answer(timeout_s)

    def write(self, offset: int, length: int, pattern: int, timeout_s: float = SLOW_S) -> None:
        """Write and flush, as a guest's file system would. Raises ClientFailed, NoAnswer."""
        self.succeed(f"write -P {pattern} {offset} {length}", f"wrote {length}/{length} bytes", timeout_s)
        self.flush(timeout_s)

    def flush(self, timeout_s: float = SLOW_S) -> None:
        """Have everything on the disk. Raises ClientFailed, NoAnswer."""
        self.succeed("flush", timeout_s=timeout_s)

    def succeed(self, command: str, said_then: str = "", timeout_s: float = SLOW_S) -> str:
        """One command that has to go well, and what it says then. Raises ClientFailed, NoAnswer."""
        said = self.ask(command, timeout_s)
        if said_then not in said or any(word in said for word in ("failed", "rror", "invalid", "not supported")):
            raise ClientFailed(f"{command}: {said}")
        return said

    def reads(self, offset: int, length: int, pattern: int, timeout_s: float = SLOW_S) -> bool:
        """Whether every byte of the range is this one."""
        said = self.ask(f"read -P {pattern} {offset} {length}", timeout_s)
        if f"read {length}/{length} bytes" not in said:
            raise ClientFailed(said)
        return "Pattern verification failed" not in said

    def length(self) -> int:
        """How large the disk is, as far as the client knows."""
        return parse_size(self.ask("length"))

    def kill(self) -> None:
        """SIGKILL: the guest's host loses its power."""
        self._process.kill()
        self._process.wait(10)
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


def parse_size(said: str) -> int:
    """``64 MiB`` as qemu-io prints it, when it is a whole number of the unit."""
    number, _, unit = said.strip().partition(" ")
    factor = {"bytes": 1, "B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}[unit]
    return round(float(number) * factor)


def cannot_write(client: QemuIo, offset: int, length: int, pattern: int, timeout_s: float = 3.0) -> bool:
    """Whether a write does not succeed: refused, or still trying to get back in."""
    try:
        client.write(offset, length, pattern, timeout_s)
    except (ClientFailed, NoAnswer):
        return True
    return False


def eventually(condition: Callable[[], Any], timeout_s: float = SLOW_S, every_s: float = 0.02) -> Any:
    """The first true value of ``condition``."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline, "it did not become true in time"
        time.sleep(every_s)
    return value


@contextlib.contextmanager
def as_nbd(attach: Attach | Sequence[str]) -> Iterator[str]:
    """The disk as an NBD URI on this machine, whatever the protocol: for programs that speak no other."""
    if not isinstance(attach, Attach):
        attach = Attach.of(attach)
    node = dict(one.split("=", 1) for one in attach.blockdev.split(","))["node-name"]
    with tempfile.TemporaryDirectory(prefix="es-client-") as directory:
        path = f"{directory}/nbd"
        argv = ["qemu-storage-daemon"]
        for one in attach.objects:
            argv += ["--object", one]
        argv += ["--blockdev", attach.blockdev, "--nbd-server", f"addr.type=unix,addr.path={path},max-connections=0"]
        argv += ["--export", f"type=nbd,id=disk,node-name={node},name=disk,writable=on"]
        daemon = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        try:
            eventually(lambda: _listens(path) or daemon.poll() is not None)
            assert daemon.poll() is None, daemon.communicate()[0]
            yield f"nbd+unix:///disk?socket={path}"
        finally:
            daemon.kill()
            daemon.communicate(timeout=10)


def _listens(path: str) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(path)
        except OSError:
            return False
    return True


def iscsi_url(answer: Mapping[str, Any], *, user: str | None = None, password: str | None = None) -> str:
    """The export as the programs of libiscsi want it; other credentials for tests of those."""
    credentials = answer["credentials"]
    user, password = user or credentials["user"], password or credentials["password"]
    endpoint = answer["endpoint"]
    return f"iscsi://{user}%{password}@{endpoint['portal']}/{endpoint['target']}/{endpoint['lun']}"


def discovered(portal: str, initiator: str) -> list[str]:
    """The targets that a portal shows to an initiator."""
    told = subprocess.run(
        ["iscsi-ls", "-i", initiator, f"iscsi://{portal}"], capture_output=True, text=True, check=False, timeout=SLOW_S
    )
    assert told.returncode == 0, told
    return [line.split()[0].removeprefix("Target:") for line in told.stdout.splitlines() if line.startswith("Target:")]
