"""``elemento-storage doctor``: is this host fit to run the server, and what is to be done?

It changes nothing. Each check says what it found, and where that is not well, what to do.
"""

import asyncio
import ctypes
import dataclasses
import json
import os
import platform
import re
import resource
import shutil
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

import click

from elemento_storage.cli.host import with_settings
from elemento_storage.cli.output import clean, size
from elemento_storage.cli.session import HELP
from elemento_storage.config import Settings, load
from elemento_storage.errors import StorageError

_QUICK_S: Final = 10.0
_OPEN_FILES: Final = 4096
_FULL: Final = 0.95


class State(StrEnum):
    """What a check came to."""

    OK = "ok"
    WARNING = "warning"  #: it works; something is lacking, or will be a problem
    PROBLEM = "problem"  #: it does not work like this, or may lose data


@dataclass(frozen=True)
class Finding:
    """What one check found, and what to do about it."""

    area: str
    what: str
    state: State
    found: str
    advice: str = ""


#: Programs: what they are needed for, and whether the server does without them.
_PROGRAMS: Final = (
    ("qemu-img", "qemu-utils", "images of every kind", True),
    ("qemu-storage-daemon", "qemu-utils", "exports", True),
    ("setpriv", "util-linux", "programs end with the server", True),
    ("prlimit", "util-linux", "limits of programs", True),
    ("setsid", "util-linux", "daemons that outlive the server", True),
    ("fusermount3", "fuse3", "iSCSI and SMB of images that are not raw", False),
    ("tgtd", "tgt", "iSCSI", False),
    ("smbd", "samba", "SMB", False),
    ("smbclient", "smbclient", "probing SMB", False),
    ("gzip", "gzip", "compressed images", False),
    ("xz", "xz-utils", "compressed images", False),
    ("zstd", "zstd", "compressed images", False),
    ("rsync", "rsync", "clones of volumes with alg rsync", False),
    ("rclone", "rclone", "clones of volumes with alg rclone", False),
)


@click.command(context_settings=HELP)
@click.option("--json", "as_json", is_flag=True, help="for programs")
@with_settings
def doctor(config_file: str | None, *, as_json: bool, **flags: object) -> None:
    """Check this host, and say what to do. Exits with 1 when there is a problem.

    Give it the settings that the server runs with, by --config, the environment or flags.
    """
    findings = [*look(config_file, flags)]
    if as_json:
        click.echo(json.dumps([dataclasses.asdict(one) for one in findings], indent=2))
    else:
        _tell(findings)
    if any(one.state is State.PROBLEM for one in findings):
        raise click.exceptions.Exit(1)


def look(config_file: str | None, flags: dict[str, Any]) -> Iterator[Finding]:
    """Every check, in the order of what depends on what."""
    yield from kernel()
    yield from programs()
    try:
        settings, _ = load(config_file, flags)
    except StorageError as error:
        yield Finding("settings", "settings", State.PROBLEM, error.message, "mend the settings, then look again")
        return
    yield Finding("settings", "settings", State.OK, f"root {settings.root}, state {settings.state_dir}")
    yield from directories(settings)
    yield from locations(settings)
    yield from ports(settings)


def _tell(findings: list[Finding]) -> None:
    marks = {State.OK: "ok     ", State.WARNING: "WARNING", State.PROBLEM: "PROBLEM"}
    width = max(len(one.what) for one in findings)
    area = ""
    for one in findings:
        if one.area != area:
            click.echo(f"{one.area}")
            area = one.area
        click.echo(f"  {marks[one.state]}  {one.what:<{width}}  {clean(one.found)}")
        if one.advice and one.state is not State.OK:
            click.echo(f"  {'':7}  {'':<{width}}  -> {clean(one.advice)}")
    problems = sum(one.state is State.PROBLEM for one in findings)
    warnings = sum(one.state is State.WARNING for one in findings)
    click.echo(f"\n{len(findings)} checks, {problems} problems, {warnings} warnings")


# -- the host ----------------------------------------------------------------------------------------------


def kernel() -> Iterator[Finding]:
    """Linux and what it has to offer; clock, limits, user."""
    release = platform.release()
    version = tuple(int(part) for part in re.findall(r"\d+", release)[:2])
    yield _of("host", "kernel", version >= (5, 10), f"Linux {release}", "5.10 or newer is what was tested")
    disabled = _line("/proc/sys/kernel/io_uring_disabled")
    yield _of(
        "host", "io_uring", disabled in (None, "0"), "available" if disabled in (None, "0") else "off",
        "sysctl kernel.io_uring_disabled=0: QEMU falls back to threads, which are slower", State.WARNING,
    )  # fmt: skip
    fuse = os.path.exists("/dev/fuse") and os.access("/dev/fuse", os.R_OK | os.W_OK)
    yield _of(
        "host", "FUSE", fuse, "/dev/fuse" if fuse else "no /dev/fuse that can be opened",
        "modprobe fuse; in a container pass /dev/fuse in. Without it SMB serves raw volumes only, and iSCSI of qcow2 "
        "needs the NBD library", State.WARNING,
    )  # fmt: skip
    root = os.geteuid() == 0
    yield _of(
        "host", "user", root, "root" if root else f"user {os.geteuid()}",
        "run as the user that the server runs as: what it may open decides", State.WARNING,
    )  # fmt: skip
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield _of(
        "host", "open files", hard == resource.RLIM_INFINITY or hard >= _OPEN_FILES, f"{soft}, at most {hard}",
        f"LimitNOFILE={_OPEN_FILES * 16} in the unit: every connection and every volume that is read takes one",
        State.WARNING,
    )  # fmt: skip
    yield clock()


def clock() -> Finding:
    """Whether the clock is kept right: leases between servers depend on it."""
    # struct timex begins with modes, and its status is an int after four longs and a padded int.
    buffer = ctypes.create_string_buffer(256)
    try:
        result = ctypes.CDLL(None, use_errno=True).adjtimex(buffer)
    except (OSError, AttributeError):
        return Finding("host", "clock", State.WARNING, "its state cannot be read")
    synchronised = result not in (-1, 5)  # TIME_ERROR: not synchronised
    return _of(
        "host", "clock", synchronised, "synchronised" if synchronised else "not synchronised",
        "install chrony or systemd-timesyncd: servers that share a root tell the dead from the living by their clocks",
        State.WARNING,
    )  # fmt: skip


def programs() -> Iterator[Finding]:
    """What is installed, and whether it is a version that is known to lose data."""
    for program, package, purpose, needed in _PROGRAMS:
        path = shutil.which(program) or shutil.which(program, path="/usr/sbin:/sbin")
        missing = State.PROBLEM if needed else State.WARNING
        if path is None:
            advice = f"apt install {package}; it is needed for {purpose}"
            yield Finding("programs", program, missing, "not installed", advice)
            continue
        if program in ("qemu-img", "qemu-storage-daemon"):
            yield _qemu(program, path)
            continue
        yield Finding("programs", program, State.OK, path)
    yield _native()
    yield _other_tgtd()


def _qemu(program: str, path: str) -> Finding:
    from elemento_storage.engine.storage_daemon import OLDEST_SAFE  # noqa: PLC0415  the other checks need not wait

    told = _output([path, "--version"]) or ""
    match = re.search(r"version (\d+)(?:\.\d+)+", told)
    version = match[0].removeprefix("version ") if match else "unknown"
    if match is None or int(match[1]) >= OLDEST_SAFE:
        return Finding("programs", program, State.OK if match else State.WARNING, f"{path}, {version}")
    return Finding(
        "programs", program, State.PROBLEM, f"{path}, {version}: loses data",
        f"before {OLDEST_SAFE}.0 it reports holes as punched and keeps the old bytes, and stalls over TCP; the server "
        "refuses to export with it. Debian 12: apt install -t bookworm-backports qemu-utils",
    )  # fmt: skip


def _native() -> Finding:
    from elemento_storage.exports.tgtd import LIBRARY  # noqa: PLC0415

    built = os.path.exists(LIBRARY)
    return _of(
        "programs", "NBD library of tgtd", built, "built" if built else "not built",
        "make -C native (gcc, libc6-dev): without it iSCSI of qcow2 volumes goes through FUSE, which is slower",
        State.WARNING,
    )  # fmt: skip


def _other_tgtd() -> Finding:
    enabled = (_output(["systemctl", "is-active", "tgt"]) or "").strip() == "active"
    return _of(
        "programs", "Debian's tgt service", not enabled, "off" if not enabled else "running: it has port 3260",
        "systemctl disable --now tgt: the server runs a tgtd of its own",
    )  # fmt: skip


# -- what the settings name --------------------------------------------------------------------------------


def directories(settings: Settings) -> Iterator[Finding]:
    """State and run directories."""
    for what, path in (("state-dir", settings.state_dir), ("run-dir", settings.run_dir)):
        existing = path
        while not os.path.exists(existing):
            existing = os.path.dirname(existing) or "/"
        writable = os.access(existing, os.W_OK | os.X_OK)
        found = path if existing == path else f"{path} is not there yet; it will be made in {existing}"
        yield _of(
            "directories", what, writable, found if writable else f"{existing} cannot be written to",
            f"give it to the server's user, or choose another --{what}",
        )  # fmt: skip
    readable = os.path.isdir(settings.root) and os.access(settings.root, os.R_OK | os.X_OK)
    yield _of(
        "directories", "root", readable, settings.root if readable else f"{settings.root} cannot be read",
        "make it, or choose another --root",
    )  # fmt: skip


def locations(settings: Settings) -> Iterator[Finding]:
    """Settings, mounts, room and quotas of every location."""
    from elemento_storage.catalog.discovery import find_locations  # noqa: PLC0415
    from elemento_storage.catalog.settings import BrokenSettings, FileSystemKind, read_settings  # noqa: PLC0415

    try:
        found = find_locations(settings.root, settings.search_depth)
    except OSError as error:
        yield Finding("locations", "locations", State.PROBLEM, f"{settings.root}: {error.strerror}", "see above")
        return
    if not found:
        yield Finding(
            "locations", "locations", State.WARNING, f"none below {settings.root}",
            f"mkdir {settings.root}/disk && echo '{{}}' > {settings.root}/disk/settings.json",
        )  # fmt: skip
    mounts = _mounts()
    for one in found:
        try:
            said = read_settings(one.path)
        except (BrokenSettings, OSError) as error:
            yield Finding(
                "locations", one.name, State.PROBLEM, str(error), "mend it: nothing is created there until then"
            )
            continue
        point = max((point for point in mounts if _is_below(one.path, point)), key=len, default="/")
        kind, options = mounts.get(point, ("unknown", set()))
        if said.file_system is FileSystemKind.UNIQUE and not os.path.ismount(one.path):
            yield Finding(
                "locations", one.name, State.PROBLEM, "unique, and not mounted",
                "mount it: nothing is created there until then",
            )  # fmt: skip
            continue
        yield _room(one.name, one.path, kind, options, said.max_total_bytes, said.max_volumes)


def _room(
    name: str, path: str, kind: str, options: set[str], max_total: int | None, max_volumes: int | None
) -> Finding:
    from elemento_storage.model import volume_id_of_directory  # noqa: PLC0415

    status = os.statvfs(path)
    free, total = status.f_bavail * status.f_frsize, status.f_blocks * status.f_frsize
    count = sum(volume_id_of_directory(entry.name) is not None for entry in os.scandir(path))
    limits = "" if max_total is None else f", quota {size(max_total)}"
    limits += "" if max_volumes is None else f" and {max_volumes} volumes"
    told = f"{kind}, {size(free)} of {size(total)} free, {count} volumes{limits}"
    if "ro" in options or not os.access(path, os.W_OK):
        return Finding("locations", name, State.PROBLEM, f"read-only; {told}", "mount -o remount,rw, or look at dmesg")
    if max_volumes is not None and count >= max_volumes:
        return Finding("locations", name, State.WARNING, told, "max-volumes is reached: raise it, or destroy volumes")
    if total and free / total < 1 - _FULL:
        return Finding("locations", name, State.WARNING, told, "it is almost full: guests get errors when it is")
    if max_total is not None and max_total > total:
        advice = "the quota is more than the file system has: only its free space limits"
        return Finding("locations", name, State.WARNING, told, advice)
    return Finding("locations", name, State.OK, told)


def ports(settings: Settings) -> Iterator[Finding]:
    """Whether addresses are this host's, and ports free or our own."""
    host, port = settings.listen_host, settings.listen_port
    if _is_free(host, port):
        yield Finding("ports", "listen", State.OK, f"{settings.listen} is free")
    else:
        runs = _is_our_server(settings)
        found = f"{settings.listen}: the server runs" if runs else f"{settings.listen} is taken by another program"
        yield _of("ports", "listen", runs, found, f"`ss -ltnp 'sport = :{port}'` says by which; or another --listen")
    address = settings.export_address
    yield _of(
        "ports", "export-address", _is_ours(address), address,
        "it is no address of this host: hypervisors could not reach what is exported",
    )  # fmt: skip
    ours = _run_directory_is_used(settings.run_dir)
    for what, number in (("iscsi-port", settings.iscsi_port), ("smb-port", settings.smb_port)):
        free = _is_free(address, number)
        yield _of(
            "ports", what, free or ours, f"{number} is {'free' if free else 'served by us' if ours else 'taken'}",
            f"`ss -ltnp 'sport = :{number}'` says by which program; end it, or choose another --{what}", State.WARNING,
        )  # fmt: skip
    numbers = settings.nbd_port_range
    if ours:
        return
    taken = [number for number in numbers[:: max(1, len(numbers) // 64)] if not _is_free(address, number)]
    yield _of(
        "ports", "nbd-ports", len(taken) < 8, f"{numbers[0]}-{numbers[-1]}, {len(taken)} of those tried are taken",
        "other programs use many of them: choose another range", State.WARNING,
    )  # fmt: skip


# -- small things ------------------------------------------------------------------------------------------


def _of(area: str, what: str, is_well: bool, found: str, advice: str, otherwise: State = State.PROBLEM) -> Finding:
    return Finding(area, what, State.OK if is_well else otherwise, found, "" if is_well else advice)


def _line(path: str) -> str | None:
    try:
        with open(path, encoding="ascii") as file:
            return file.readline().strip()
    except OSError:
        return None


def _output(command: list[str]) -> str | None:
    """What a quick program says; None when it is not there or hangs."""
    from elemento_storage import process  # noqa: PLC0415

    try:
        return asyncio.run(process.run(command, process.Limits(timeout_s=_QUICK_S))).stdout
    except (StorageError, OSError):
        return None


def _mounts() -> dict[str, tuple[str, set[str]]]:
    """Mount points with their file system and options."""
    found = {}
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        for row in file:
            fields = row.split(" ")
            rest = row.partition(" - ")[2].split(" ")
            point = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), fields[4])
            found[point] = (rest[0], {*fields[5].split(","), *rest[2].strip().split(",")})
    return found


def _is_below(path: str, point: str) -> bool:
    return path == point or path.startswith(point.rstrip("/") + "/")


def _is_free(host: str, port: int) -> bool:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def _is_ours(address: str) -> bool:
    return _is_free(address, 0)


def _is_our_server(settings: Settings) -> bool:
    from elemento_storage.client import Client, ClientError, Retries  # noqa: PLC0415

    host = settings.listen_host
    if host in ("0.0.0.0", "::"):  # noqa: S104  to connect, not to listen
        host = "127.0.0.1" if host == "0.0.0.0" else "::1"  # noqa: S104
    shown = f"[{host}]" if ":" in host else host
    if settings.tls_certificate:
        return True  # its name is not known here; something with TLS answers
    try:
        with Client(f"http://{shown}:{settings.listen_port}", retries=Retries(attempts=1), timeout_s=5) as client:
            client.server.version()
    except ClientError as error:
        return getattr(error, "status", 0) == 401
    return True


def _run_directory_is_used(run_dir: str) -> bool:
    return any(os.path.exists(os.path.join(run_dir, name)) for name in ("tgt", "v", "smb"))
