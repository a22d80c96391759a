"""Builds what the test guests boot: a kernel, an initramfs, and a disk image that boots from itself.

Everything comes from Debian packages that are downloaded and unpacked, never installed; nothing here needs root. What
was built is kept under ``build/guest``, keyed by the versions of the packages and by the sources beside this file, so
that only the first run takes time and later ones need no network. A build happens in a temporary directory that gets
its name when it is whole.

``python -m tests.guest.build`` builds and says where.
"""

import contextlib
import fcntl
import functools
import hashlib
import lzma
import os
import re
import shutil
import stat
import struct
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

SOURCES = Path(__file__).resolve().parent
CACHE = SOURCES.parent.parent / "build" / "guest"

MIB = 1 << 20
BOOT_DISK_BYTES = 64 * MIB
#: Where the part of the boot disk begins that no partition covers: the marker, then the workloads' data.
BOOT_DISK_AREA = 32 * MIB

# quiet: every line on the serial port costs an emulated guest milliseconds; errors are still shown.
# nokaslr, mitigations=off, no_timer_check: less to do before process 1.
COMMAND_LINE = "console=ttyS0 quiet panic=-1 mitigations=off nokaslr no_timer_check"

_KERNEL = "linux-image-cloud-amd64"
_TOOLS = ("syslinux", "syslinux-common", "mtools")
_MODULES = ("virtio_pci", "virtio_blk", "virtio_scsi", "sd_mod")

_SECTOR = 512
_PARTITION_START = MIB
_PARTITION_BYTES = 28 * MIB


class BuildFailed(Exception):
    """The images could not be made."""


class PackagesMissing(BuildFailed):
    """apt does not know or cannot fetch what they are made of."""


@dataclass(frozen=True)
class Images:
    """What a guest can boot. Nobody writes to these files: a boot disk is copied first."""

    directory: Path

    @property
    def kernel(self) -> Path:
        """For ``-kernel``."""
        return self.directory / "vmlinuz"

    @property
    def initramfs(self) -> Path:
        """For ``-initrd``."""
        return self.directory / "initramfs"

    @property
    def boot_disk(self) -> Path:
        """64 MiB, raw: boots from a BIOS by itself; beyond ``BOOT_DISK_AREA`` it is the workloads'."""
        return self.directory / "boot.raw"

    def new_boot_disk(self, target: Path, marker: str = "") -> Path:
        """A copy of the boot disk that prints ``marker`` when it boots without other orders."""
        subprocess.run(["cp", "--sparse=always", "--reflink=auto", self.boot_disk, target], check=True)
        with target.open("r+b") as file:
            file.seek(BOOT_DISK_AREA)
            file.write(marker.encode() + b"\n")
        return target


@functools.cache
def images() -> Images:
    """What is in the cache, built if need be."""
    CACHE.mkdir(parents=True, exist_ok=True)
    sources = hashlib.sha256(b"".join((SOURCES / name).read_bytes() for name in ("build.py", "init.c"))).hexdigest()[:8]
    try:
        try:
            return _made(sources, Apt())
        except PackagesMissing:
            return _made(sources, own_apt())
    except PackagesMissing:
        # Without a network: what an earlier version of the packages gave is as good.
        earlier = sorted(CACHE.glob(f"{sources}-*"), key=lambda path: path.stat().st_mtime)
        if not earlier:
            raise
        return Images(earlier[-1])


def _made(sources: str, apt: "Apt") -> Images:
    versions = apt.versions()
    wanted = CACHE / f"{sources}-{hashlib.sha256(repr(sorted(versions.items())).encode()).hexdigest()[:8]}"
    if not wanted.is_dir():
        with locked():
            if not wanted.is_dir():
                _build(apt, versions, wanted)
    return Images(wanted)


@contextlib.contextmanager
def locked() -> Iterator[None]:
    """One builder at a time; whatever an interrupted one left is nobody's then."""
    with (CACHE / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for leftover in CACHE.glob("tmp-*"):
            shutil.rmtree(leftover)
        yield


def run(*words: str | Path, env: Mapping[str, str] | None = None, cwd: Path | None = None) -> str:
    """A program's output; BuildFailed with what it said if it fails."""
    try:
        done = subprocess.run(
            words,
            check=False,
            capture_output=True,
            text=True,
            env={**os.environ, "LC_ALL": "C", **(env or {})},
            cwd=cwd,
        )
    except FileNotFoundError as error:
        raise BuildFailed(f"{words[0]} is not installed; run `make setup`") from error
    if done.returncode:
        raise BuildFailed(f"{' '.join(map(str, words))}: {done.returncode}\n{done.stdout[-1000:]}{done.stderr[-2000:]}")
    return done.stdout


# ---- packages ----


@dataclass(frozen=True)
class Apt:
    """apt with some options in front."""

    options: tuple[str, ...] = ()

    def _run(self, tool: str, *words: str, cwd: Path | None = None) -> str:
        try:
            return run(tool, *self.options, *words, cwd=cwd)
        except BuildFailed as error:
            raise PackagesMissing(str(error)) from error

    def versions(self, *more: str) -> dict[str, str]:
        """Every package that images are made of: the kernel that the meta-package stands for, the tools, ``more``."""
        found: dict[str, str] = {}
        name = ""
        wanted = (_KERNEL, *_TOOLS, *more)
        for line in self._run("apt-cache", "policy", *wanted).splitlines():
            if not line.startswith(" "):
                name = line.rstrip(":")
            elif (match := re.match(r" +Candidate: (\S+)", line)) and match[1] != "(none)":
                found[name] = match[1]
        if missing := set(wanted) - set(found):
            raise PackagesMissing(f"apt knows no package {', '.join(sorted(missing))}")
        record = self._run("apt-cache", "show", f"{_KERNEL}={found.pop(_KERNEL)}")
        match = re.search(r"^Depends:.*?(linux-image-\S+) \(= ([^)]+)\)", record, re.MULTILINE)
        if not match:
            raise PackagesMissing(f"{_KERNEL} depends on no kernel")
        return {**found, match[1]: match[2]}

    def update(self) -> None:
        """Fetch the lists of packages."""
        self._run("apt-get", "-q", "-o", "APT::Update::Error-Mode=any", "update")

    def download(self, packages: Sequence[str], into: Path) -> None:
        """Fetch packages, given as name=version."""
        # Its usual user _apt may not write to this directory; what is downloaded is checked and does not run.
        self._run("apt-get", "-q", "-o", "APT::Sandbox::User=root", "download", *packages, cwd=into)


def own_apt() -> Apt:
    """An apt with package lists of its own, fetched now: the machine's may be missing or too old to download from."""
    state = CACHE / "apt"
    for name in ("lists/partial", "cache/archives/partial"):
        (state / name).mkdir(parents=True, exist_ok=True)
    settings = (f"Dir::State::lists={state / 'lists'}", f"Dir::Cache={state / 'cache'}", "APT::Sandbox::User=root")
    apt = Apt(tuple(word for setting in settings for word in ("-o", setting)))
    apt.update()
    return apt


def package_files(apt: Apt, versions: Mapping[str, str]) -> list[Path]:
    """The packages as files, kept so that a change in the sources needs no network."""
    kept = CACHE / "packages"
    kept.mkdir(exist_ok=True)

    def find(name: str, version: str) -> Path | None:
        # As apt names them: no colon in a file's name.
        return next(kept.glob(f"{name}_{version.replace(':', '%3a')}_*.deb"), None)

    missing = [f"{name}={version}" for name, version in versions.items() if not find(name, version)]
    if missing:
        with tempfile.TemporaryDirectory(dir=CACHE, prefix="tmp-") as name:
            apt.download(missing, Path(name))
            for file in Path(name).glob("*.deb"):
                file.rename(kept / file.name)
    files = [find(name, version) for name, version in versions.items()]
    if None in files:
        raise PackagesMissing(f"apt did not download {', '.join(missing)}")
    return [file for file in files if file]


# ---- images ----


def _build(apt: Apt, versions: Mapping[str, str], target: Path) -> None:
    files = package_files(apt, versions)
    with tempfile.TemporaryDirectory(dir=CACHE, prefix="tmp-") as name:
        work = Path(name)
        unpacked, made = work / "unpacked", work / "made"
        made.mkdir()
        for file in files:
            run("dpkg-deb", "-x", file, unpacked)
        (kernel,) = (unpacked / "boot").glob("vmlinuz-*")
        shutil.copy(kernel, made / "vmlinuz")
        run("gcc", "-std=gnu11", "-O2", "-Wall", "-Werror", "-static", "-s", "-o", work / "init", SOURCES / "init.c")
        modules = modules_of(unpacked, kernel.name.removeprefix("vmlinuz-"))
        (made / "initramfs").write_bytes(initramfs((work / "init").read_bytes(), list(modules.values())))
        make_boot_disk(unpacked, made, f"{COMMAND_LINE} guest.base={BOOT_DISK_AREA}")
        (made / "versions").write_text("".join(f"{name} {version}\n" for name, version in sorted(versions.items())))
        made.rename(target)


def modules_of(unpacked: Path, release: str, names: Sequence[str] = _MODULES) -> dict[Path, bytes]:
    """The modules and what they depend on, by their paths in the tree of modules, each after what it needs."""
    files = {
        path.name.partition(".ko")[0].replace("-", "_"): path
        for tree in ("lib", "usr/lib")
        for path in (unpacked / tree / "modules" / release).rglob("*.ko*")
    }
    ordered: dict[Path, bytes] = {}
    seen: set[str] = set()

    def add(name: str) -> None:
        # One that is not there is built into the kernel.
        if name in seen or name not in files:
            return
        seen.add(name)
        content = files[name].read_bytes()
        if files[name].suffix == ".xz":
            content = lzma.decompress(content)
        # Each module tells its needs itself; the index that depmod makes is not in the package.
        needs = re.search(rb"\0depends=([^\0]*)\0", content)
        for needed in needs[1].decode().split(",") if needs and needs[1] else ():
            add(needed.replace("-", "_"))
        path = files[name]
        within = Path(*path.parts[path.parts.index(release) + 1 :])
        ordered[within.with_name(within.name.removesuffix(".xz"))] = content

    for name in names:
        add(name)
    return ordered


def initramfs(init: bytes, modules: Sequence[bytes], programs: Mapping[str, bytes] | None = None) -> bytes:
    """A cpio archive ("newc"), not compressed: a megabyte or two, and unpacking is emulated too.

    ``programs`` are others beside init.
    """
    entries: list[tuple[str, int, bytes, tuple[int, int]]] = [
        ("dev", stat.S_IFDIR | 0o755, b"", (0, 0)),
        ("dev/console", stat.S_IFCHR | 0o600, b"", (5, 1)),
        ("m", stat.S_IFDIR | 0o755, b"", (0, 0)),
        *((f"m/{number}", stat.S_IFREG | 0o644, module, (0, 0)) for number, module in enumerate(modules)),
        ("init", stat.S_IFREG | 0o755, init, (0, 0)),
        *((name, stat.S_IFREG | 0o755, program, (0, 0)) for name, program in (programs or {}).items()),
        ("TRAILER!!!", 0, b"", (0, 0)),
    ]
    archive = bytearray()
    for inode, (name, mode, content, device) in enumerate(entries, 1):
        path = name.encode() + b"\0"
        fields = (inode, mode, 0, 0, 1, 0, len(content), 0, 0, *device, len(path), 0)
        archive += b"070701" + b"".join(b"%08X" % field for field in fields) + path
        archive += b"\0" * (-len(archive) % 4)
        archive += content
        archive += b"\0" * (-len(archive) % 4)
    return bytes(archive)


def make_boot_disk(unpacked: Path, made: Path, command_line: str) -> None:
    """``boot.raw``: MBR, one FAT partition with SYSLINUX, ``vmlinuz`` and ``initramfs``, and free room behind it."""
    disk = made / "boot.raw"
    tools = unpacked / "usr" / "bin"
    env = {"PATH": f"{tools}:{os.environ['PATH']}", "MTOOLSRC": "/dev/null"}
    volume = f"{disk}@@{_PARTITION_START}"
    mbr = bytearray((unpacked / "usr/lib/syslinux/mbr/mbr.bin").read_bytes()[:440].ljust(_SECTOR, b"\0"))
    # Active, FAT16 by LBA; cylinders and heads out of reach, so that nobody uses them.
    start, sectors = _PARTITION_START // _SECTOR, _PARTITION_BYTES // _SECTOR
    mbr[446:462] = struct.pack("<B3sB3sII", 0x80, b"\xfe\xff\xff", 0x0E, b"\xfe\xff\xff", start, sectors)
    mbr[510:512] = b"\x55\xaa"
    with disk.open("wb") as file:
        file.write(mbr)
        file.truncate(BOOT_DISK_BYTES)
    # The boot sector finds its partition by the number of sectors hidden before it (-H).
    geometry = ("-T", str(sectors), "-h", "64", "-s", "32", "-H", str(start))
    run("mformat", "-i", volume, *geometry, "::", env=env)
    config = made / "syslinux.cfg"
    config.write_text(
        "SERIAL 0 115200\nPROMPT 0\nDEFAULT guest\nLABEL guest\n"
        f"KERNEL /vmlinuz\nINITRD /initramfs\nAPPEND {command_line}\n"
    )
    run("mcopy", "-i", volume, config, made / "vmlinuz", made / "initramfs", "::/", env=env)
    run("syslinux", "--install", "--offset", str(_PARTITION_START), disk, env=env)
    config.unlink()


if __name__ == "__main__":
    print(images().directory)
