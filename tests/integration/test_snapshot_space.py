"""A real storage daemon with a live copy-before-write snapshot, and no room for what clients overwrite."""

import asyncio
import os
import random
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from elemento_storage.disk import Disk
from elemento_storage.engine import live_snapshots
from elemento_storage.engine.block_node import file_node
from elemento_storage.engine.volume_engine import NbdExport, Source, Transport, VolumeEngine
from elemento_storage.errors import NoRoom
from elemento_storage.model import VolumeFormat, new_uid
from elemento_storage.progress import Progress
from tests.prefix import Nbd
from tests.unit.support import small_file_system

MIB = 1 << 20
SIZE = 192 * MIB


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[tuple[VolumeEngine, Disk, Path]]:
    """A raw image full of data that one client has over NBD."""
    image, volume_id = tmp_path / "data.img", new_uid()
    image.write_bytes(random.Random(7).randbytes(MIB) * (SIZE // MIB))
    disk = Disk("test")
    source = Source(
        volume_id=volume_id,
        directory=str(tmp_path),
        node=file_node(str(image), VolumeFormat.RAW, read_only=False),
        plain_file=str(image),
        size_bytes=SIZE,
        disk=disk,
    )
    with tempfile.TemporaryDirectory(prefix="es-") as run_directory:  # short, as the names of sockets are
        engine = VolumeEngine(f"{run_directory}/v", volume_id)
        try:
            await engine.serve_nbd(source, [NbdExport("e", "disk", writable=True, transport=Transport.UNIX)])
            yield engine, disk, image
        finally:
            await engine.stop()


async def test_no_write_fails_because_a_block_cannot_be_put_aside(
    served: tuple[VolumeEngine, Disk, Path], tmp_path: Path
) -> None:
    """The copy is given up and says so; the clients' writes are on disk, all of them and nothing else."""
    engine, disk, image = served
    expected = bytearray(image.read_bytes())
    content = random.Random(8).randbytes(MIB)

    def overwrite() -> None:
        guest = Nbd(f"nbd+unix:///disk?socket={engine.socket_path}")
        try:
            for offset in range(SIZE - 8 * MIB, SIZE, MIB):
                guest.write(offset, content)
                expected[offset : offset + MIB] = content
            guest.flush()
            assert guest.read(SIZE - MIB, MIB) == content
        finally:
            guest.close()

    with small_file_system(tmp_path / "small", 1) as small:
        for number in range(2):  # the daemon is none the worse for it
            await live_snapshots.begin_copy(engine, disk, str(tmp_path / f"copy{number}"), f"{small}/aside{number}")
            speed = {"device": "copy", "speed": MIB}  # so that the end is not copied before it is overwritten
            await engine.daemon.execute("block-job-set-speed", speed)
            await asyncio.to_thread(overwrite)
            # No longer slow: what it meets is that the moment is lost, and not the end of somebody's patience.
            await engine.daemon.execute("block-job-set-speed", {"device": "copy", "speed": 0})
            with pytest.raises(NoRoom, match="no snapshot was made"):
                await live_snapshots.wait_for_copy(engine, Progress(), up_to=1.0)
            await live_snapshots.end_copy(engine)
            os.unlink(f"{small}/aside{number}")
            await asyncio.to_thread(overwrite)
    await engine.stop()
    assert image.read_bytes() == expected
