"""Images from outside for tests: small disks with known bytes, in every format, and hostile ones."""

import hashlib
import struct
import subprocess
from pathlib import Path

DISK_BYTES = 8 << 20
QEMU_NAMES = {"vhd": "vpc"}


def disk_bytes() -> bytes:
    """A small disk: data, a hole, data at the very end."""
    data = bytes((position * 7 + position // 256) % 251 for position in range(1 << 20))
    content = bytearray(DISK_BYTES)
    content[: 1 << 20] = data
    content[5 << 20 : (5 << 20) + 4096] = data[:4096]
    content[-512:] = data[:512]
    return bytes(content)


def make_image(directory: Path, name: str, image_format: str, *options: str, content: bytes | None = None) -> Path:
    """An image of ``content`` (``disk_bytes()`` if not said) by qemu-img."""
    raw = directory / f"{name}.source"
    raw.write_bytes(disk_bytes() if content is None else content)
    path = directory / name
    driver = QEMU_NAMES.get(image_format, image_format)
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", driver, *options, raw, path], check=True)
    raw.unlink()
    return path


def compressed(path: Path, program: str) -> Path:
    """The file, compressed by gzip, xz or zstd, beside it."""
    target = path.with_name(f"{path.name}.{program}")
    with target.open("wb") as file:
        subprocess.run([program, "-c", "-1", path], stdout=file, check=True)
    return target


def iso_bytes(sectors: int = 64) -> bytes:
    """What begins like an ISO 9660 image, and is as long as it says."""
    primary = bytearray(2048)
    primary[0:7] = b"\x01CD001\x01"
    struct.pack_into("<I", primary, 80, sectors)
    struct.pack_into("<H", primary, 128, 2048)
    terminator = b"\xffCD001\x01".ljust(2048, b"\0")
    return (bytes(32768) + bytes(primary) + terminator).ljust(sectors * 2048, b"i")


def sha256(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def patched(path: Path, offset: int, layout: str, *values: int) -> bytes:
    """The file's bytes with something else written into its header."""
    content = bytearray(path.read_bytes())
    struct.pack_into(layout, content, offset, *values)
    return bytes(content)
