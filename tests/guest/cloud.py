"""Builds a whole Debian with systemd and cloud-init, as cloud images are, that boots from its own disk.

The packages come from the mirror that apt uses. It takes a minute and root, once: what was built is kept under
``build/guest``, keyed by the recipe in this file and ``build.py``, and later runs need no network.

``python -m tests.guest.cloud`` builds and says where.
"""

import contextlib
import functools
import hashlib
import os
import re
import shutil
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.guest.build import (
    BOOT_DISK_AREA,
    CACHE,
    MIB,
    SOURCES,
    Apt,
    BuildFailed,
    PackagesMissing,
    initramfs,
    locked,
    make_boot_disk,
    modules_of,
    own_apt,
    package_files,
    run,
)

DISK_BYTES = 704 * MIB
#: Where the root file system is: the second partition.
ROOT_OFFSET = BOOT_DISK_AREA
_ROOT_BYTES = DISK_BYTES - ROOT_OFFSET - MIB
_SECTOR = 512

_PACKAGES = ("systemd-sysv", "udev", "kmod", "dbus", "iproute2", "cloud-init", "python3-cffi-backend")
_MODULES = (
    *("virtio_pci", "virtio_blk", "virtio_net", "virtio_scsi", "virtio_rng", "sr_mod", "sd_mod", "isofs"),
    *("ata_piix", "autofs4", "vfat", "nls_utf8", "nls_ascii", "nls_cp437"),
)
_NEEDED_TO_BOOT = ("virtio_pci", "virtio_blk")
_COMMAND_LINE = "root=/dev/vda2 ro console=ttyS0 quiet panic=-1 mitigations=off nokaslr no_timer_check"

_INIT = b"""#!/busybox sh
/busybox mkdir -p /proc /sys /newroot
/busybox mount -t devtmpfs dev /dev
n=0
while [ -e /m/$n ]; do /busybox insmod /m/$n; n=$((n + 1)); done
n=0
while [ ! -b /dev/vda2 ] && [ $n -lt 400 ]; do /busybox usleep 50000; n=$((n + 1)); done
/busybox mount -o ro -t ext4 /dev/vda2 /newroot || echo "no root file system"
/busybox mount --move /dev /newroot/dev
exec /busybox switch_root /newroot /sbin/init
"""

# The modules that tests look at, and no others: an emulated machine takes half a second for each.
_CLOUD_CONFIG = """\
datasource_list: [NoCloud, None]
system_info: {network: {renderers: [networkd]}}
cloud_init_modules: [write-files, set_hostname, update_hostname, update_etc_hosts]
cloud_config_modules: [runcmd]
cloud_final_modules: [scripts-user, final-message, power-state-change]
"""

# Nothing that waits for a network, looks for work, or asks for a login.
_MASKED = (
    *("apt-daily.timer", "apt-daily-upgrade.timer", "e2scrub_all.timer", "e2scrub_reap.service", "fstrim.timer"),
    *("dpkg-db-backup.timer", "systemd-networkd-wait-online.service", "systemd-pstore.service", "getty@tty1.service"),
    "serial-getty@ttyS0.service",
)


@functools.cache
def cloud_image() -> Path:
    """The image, qcow2. Nobody writes to it."""
    CACHE.mkdir(parents=True, exist_ok=True)
    recipe = b"".join((SOURCES / name).read_bytes() for name in ("build.py", "cloud.py"))
    wanted = CACHE / f"cloud-{hashlib.sha256(recipe).hexdigest()[:8]}"
    if not wanted.is_dir():
        with locked():
            if not wanted.is_dir():
                try:
                    _build(Apt(), wanted)
                except PackagesMissing:
                    _build(own_apt(), wanted)
    return wanted / "cloud.qcow2"


def _build(apt: Apt, target: Path) -> None:
    if os.geteuid() != 0:
        raise BuildFailed("building a Debian needs root")
    files = package_files(apt, apt.versions("busybox-static"))
    with tempfile.TemporaryDirectory(dir=CACHE, prefix="tmp-") as name:
        work = Path(name)
        unpacked, made = work / "unpacked", work / "made"
        made.mkdir()
        for file in files:
            run("dpkg-deb", "-x", file, unpacked)
        (kernel,) = (unpacked / "boot").glob("vmlinuz-*")
        release = kernel.name.removeprefix("vmlinuz-")
        shutil.copy(kernel, made / "vmlinuz")
        to_boot = list(modules_of(unpacked, release, _NEEDED_TO_BOOT).values())
        programs = {"busybox": (unpacked / "bin" / "busybox").read_bytes()}
        (made / "initramfs").write_bytes(initramfs(_INIT, to_boot, programs))
        make_boot_disk(unpacked, made, _COMMAND_LINE)
        with _memory(work / "root") as root:
            _debian(root)
            _modules(root, unpacked, release)
            _settings(root)
            run(
                "mke2fs",
                "-q",
                "-F",
                "-t",
                "ext4",
                "-L",
                "root",
                "-d",
                root,
                work / "root.ext4",
                f"{_ROOT_BYTES >> 10}K",
            )
        _add_root(made / "boot.raw", work / "root.ext4")
        run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", made / "boot.raw", made / "cloud.qcow2")
        for rest in ("boot.raw", "vmlinuz", "initramfs"):
            (made / rest).unlink()
        made.rename(target)


@contextlib.contextmanager
def _memory(point: Path) -> Iterator[Path]:
    """A directory in memory: dpkg syncs a thousand times, which takes half of the time on a disk."""
    point.mkdir()
    run("mount", "-t", "tmpfs", "-o", "size=2g,mode=755", "guest-root", point)
    try:
        yield point
    finally:
        run("umount", "-l", point)


def _debian(root: Path) -> None:
    told = dict(re.findall(r'^(\w+)="?([^"\n]*)', Path("/etc/os-release").read_text(), re.MULTILINE))
    policy = run("apt-cache", "policy", "base-files")
    # The mirror that apt already uses for the release itself.
    mirror = re.search(rf"(\S+) {told['VERSION_CODENAME']}/main ", policy)
    if not mirror:
        raise PackagesMissing("apt knows no mirror for this release")
    kept = CACHE / "debootstrap"
    kept.mkdir(exist_ok=True)
    run(
        *("debootstrap", "--variant=minbase", f"--cache-dir={kept}", f"--include={','.join(_PACKAGES)}"),
        *(told["VERSION_CODENAME"], root, mirror[1]),
    )
    for heavy in (
        "var/cache/apt",
        "var/lib/apt/lists",
        "usr/share/doc",
        "usr/share/man",
        "usr/share/locale",
        "var/log",
    ):
        shutil.rmtree(root / heavy)
        (root / heavy).mkdir()


def _modules(root: Path, unpacked: Path, release: str) -> None:
    tree = root / "usr/lib/modules" / release
    for path, content in modules_of(unpacked, release, _MODULES).items():
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        (tree / path).write_bytes(content)
    (source,) = unpacked.glob(f"**/modules/{release}/modules.builtin")
    for name in ("modules.builtin", "modules.builtin.modinfo", "modules.order"):
        shutil.copy(source.with_name(name), tree / name)
    run("chroot", root, "depmod", release)


def _settings(root: Path) -> None:
    for path, content in (
        ("etc/fstab", "LABEL=root / ext4 defaults,noatime 0 1\n"),
        ("etc/hosts", "127.0.0.1 localhost\n"),
        ("etc/machine-id", ""),
        ("etc/cloud/cloud.cfg.d/90-test.cfg", _CLOUD_CONFIG),
    ):
        (root / path).write_text(content)
    for name in ("etc/hostname", "etc/resolv.conf"):
        (root / name).unlink(missing_ok=True)
    units = root / "etc/systemd/system"
    for unit in _MASKED:
        (units / unit).unlink(missing_ok=True)
        (units / unit).symlink_to("/dev/null")
    wanted = units / "multi-user.target.wants"
    wanted.mkdir(exist_ok=True)
    (wanted / "systemd-networkd.service").symlink_to("/lib/systemd/system/systemd-networkd.service")


def _add_root(disk: Path, root: Path) -> None:
    """The second partition: the root file system."""
    with disk.open("r+b") as file:
        file.truncate(DISK_BYTES)
        file.seek(462)
        start, sectors = ROOT_OFFSET // _SECTOR, _ROOT_BYTES // _SECTOR
        file.write(struct.pack("<B3sB3sII", 0, b"\xfe\xff\xff", 0x83, b"\xfe\xff\xff", start, sectors))
    run("dd", f"if={root}", f"of={disk}", "bs=1M", f"seek={ROOT_OFFSET // MIB}", "conv=notrunc,sparse", "status=none")


if __name__ == "__main__":
    print(cloud_image())
