"""Many volumes at once, for us and for libvirt: every other one sparse raw, every other one an empty qcow2 image."""

import os
import subprocess
import tempfile
from pathlib import Path

import msgspec

from bench.context import OWNER
from elemento_storage.model import GIGABYTE, VolumeFormat, VolumeMeta, new_uid, volume_directory_name

_PIECE = 4096


class _Images:
    """Writes empty images without a process for each."""

    def __init__(self, size_bytes: int) -> None:
        self._size_bytes = size_bytes
        with tempfile.TemporaryDirectory(prefix="bench-image-") as directory:
            path = Path(directory) / "image.qcow2"
            subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(path), str(size_bytes)], check=True)
            content = path.read_bytes()
        offsets = range(0, len(content), _PIECE)
        self._pieces = [(at, content[at : at + _PIECE]) for at in offsets if content[at : at + _PIECE].strip(b"\0")]
        self._qcow2_bytes = len(content)

    def write(self, path: str, image_format: VolumeFormat) -> None:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            if image_format is VolumeFormat.RAW:
                os.ftruncate(descriptor, self._size_bytes)
                return
            os.ftruncate(descriptor, self._qcow2_bytes)
            for offset, piece in self._pieces:
                os.pwrite(descriptor, piece, offset)
        finally:
            os.close(descriptor)


def make_volumes(location: Path, count: int) -> list[str]:
    """Volume directories as the server would write them; their ids."""
    images = _Images(GIGABYTE)
    ids = [new_uid() for _ in range(count)]
    for number, volume_id in enumerate(ids):
        image_format = _format_of(number)
        meta = VolumeMeta(
            volume_id=volume_id, creator_id=OWNER, size=GIGABYTE, name=f"disk-{number}", format=image_format
        )
        directory = f"{location}/{volume_directory_name(volume_id)}"
        os.mkdir(directory)
        with open(f"{directory}/meta.json", "wb") as file:
            file.write(msgspec.json.encode(meta))
        images.write(f"{directory}/{image_format.data_file}", image_format)
    return ids


def make_pool_files(pool: Path, count: int) -> None:
    """The same images, the way a libvirt directory pool holds them: plain files."""
    images = _Images(GIGABYTE)
    for number in range(count):
        image_format = _format_of(number)
        images.write(f"{pool}/{new_uid()}.{image_format.extension}", image_format)


def _format_of(number: int) -> VolumeFormat:
    return VolumeFormat.QCOW2 if number % 2 else VolumeFormat.RAW
