"""From the bytes that arrived to a volume: what a transport may rely on."""

import asyncio
import hashlib
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from elemento_storage.errors import (
    ChecksumMismatch,
    Conflict,
    FormatUnsupported,
    ImageDamaged,
    ImageRefused,
    ImageTooLarge,
    JobCancelled,
    NoRoom,
    NotAnIso,
    NotOwner,
    VolumeNotFound,
)
from elemento_storage.images.incoming import ImageFormat, Incoming
from elemento_storage.model import IsoInfo, IsoType, VolumeFormat
from elemento_storage.progress import Progress
from elemento_storage.server import Server
from elemento_storage.service.access import Actor
from elemento_storage.service.intake import Arrival
from elemento_storage.service.iso_library import NewIso
from tests.images import DISK_BYTES, compressed, disk_bytes, iso_bytes, make_image, sha256
from tests.unit.support import ALICE, BOB, parts, uid

VID = uid(7)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    location = tmp_path / "mnt" / "disk"
    location.mkdir(parents=True)
    (location / "settings.json").write_text('{"max-volume-size": "100M"}')
    return tmp_path / "mnt"


@pytest.fixture
async def server(root: Path) -> AsyncIterator[Server]:
    async with parts(root) as running:
        yield running


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compressed(make_image(tmp_path_factory.mktemp("images"), "disk.qcow2", "qcow2"), "xz")


def an_image(**more: object) -> Incoming:
    return Incoming(volume_id=VID, creator_id=ALICE, name="in", **more)  # type: ignore[arg-type]


async def arrive(server: Server, incoming: Incoming, content: bytes) -> Arrival:
    arrival = await server.services.intake.reserve(incoming, len(content))
    Path(arrival.content).write_bytes(content)
    return arrival


def staged(root: Path) -> list[str]:
    return os.listdir(root / "disk" / ".elemento" / "staging")


def test_it_is_kept_as_json() -> None:
    incoming = an_image(checksum=sha256(b""), size_bytes=5, image_format=ImageFormat.VDI, files={"isoinfo.json": "{}"})
    assert msgspec.json.decode(msgspec.json.encode(incoming), type=Incoming) == incoming


async def test_the_room_follows_what_becomes_known(server: Server, root: Path, packed: Path) -> None:
    location = server.catalog.locations.by_name["disk"]
    content = packed.read_bytes()
    arrival = await arrive(server, an_image(size_bytes=9 << 20), content)
    assert (location.virtual_bytes, location.volume_count) == (9 << 20, 1)
    volume = await server.services.intake.finish(arrival, an_image(), Progress())
    assert volume.size_bytes == location.virtual_bytes == DISK_BYTES
    assert (location.volume_count, staged(root)) == (1, [])
    assert not location.foreign_reservations


async def test_the_header_is_looked_at_as_soon_as_it_is_there(server: Server, root: Path, tmp_path: Path) -> None:
    intake = server.services.intake
    head = make_image(tmp_path, "disk.qcow2", "qcow2").read_bytes()[:65536]
    arrival = await intake.reserve(an_image(), None)
    assert arrival.reservation.size_bytes == 0
    await intake.foresee(arrival, an_image(), head)
    assert arrival.reservation.size_bytes == DISK_BYTES
    huge = head[:24] + (200_000_000).to_bytes(8, "big") + head[32:]
    with pytest.raises(NoRoom):
        await intake.foresee(arrival, an_image(), huge)
    backed = head[:8] + (512).to_bytes(8, "big") + head[16:]
    with pytest.raises(ImageRefused):
        await intake.foresee(arrival, an_image(), backed)
    await intake.foresee(arrival, an_image(image_format=ImageFormat.RAW), backed)
    with pytest.raises(NotAnIso):
        await intake.foresee(arrival, an_image(format=VolumeFormat.ISO), head.ljust(65536, b"\0"))
    await arrival.release()
    await arrival.release()
    assert staged(root) == []


async def test_what_cannot_be_reserved(server: Server, root: Path) -> None:
    intake = server.services.intake
    with pytest.raises(NoRoom):
        await intake.reserve(an_image(), 200_000_000)
    with pytest.raises(FormatUnsupported):
        await intake.reserve(an_image(format=VolumeFormat.RBD), 1)
    with pytest.raises(FormatUnsupported):
        await intake.reserve(an_image(format=VolumeFormat.ISO, image_format=ImageFormat.QCOW2), 1)
    with pytest.raises(VolumeNotFound):
        await intake.reserve(an_image(format=VolumeFormat.ISO, fills=True), 1)
    assert staged(root) == []


async def test_the_largest_image_is_a_setting(root: Path) -> None:
    async with parts(root, image_max_size=1_000_000) as server:
        intake = server.services.intake
        for incoming, length in ((an_image(), 1_000_001), (an_image(size_bytes=1_000_001), 1)):
            with pytest.raises(ImageTooLarge):
                await intake.reserve(incoming, length)
        arrival = await arrive(server, an_image(), b"x" * 900_000)
        with pytest.raises(ImageTooLarge):
            await arrival.make_room(1_000_001)
        await arrival.make_room(950_000)
        assert 950_000 <= arrival.reservation.size_bytes <= 1_000_000
        assert (await intake.finish(arrival, an_image(), Progress())).size_bytes == 900_096


async def test_a_checksum_is_of_what_arrived(server: Server, root: Path, packed: Path) -> None:
    intake, content = server.services.intake, packed.read_bytes()
    wrong = an_image(checksum=f"sha512:{'0' * 128}")
    arrival = await arrive(server, wrong, content)
    for digest in (None, hashlib.sha512(content).hexdigest()):
        with pytest.raises(ChecksumMismatch):
            await intake.finish(arrival, wrong, Progress(), digest=digest)
    right = an_image(checksum=f"sha512:{hashlib.sha512(content).hexdigest()}")
    assert (await intake.finish(arrival, right, Progress())).size_bytes == DISK_BYTES
    assert sorted(os.listdir(root / "disk" / f"vid.{VID}.elimg")) == ["data.img", "meta.json"]


class _Impatient(Progress):
    """Is cancelled as soon as a phase begins."""

    def __init__(self, unwanted: str) -> None:
        super().__init__()
        self._unwanted = unwanted
        self.seen: list[str] = []

    def advance(self, fraction: float, phase: str | None = None) -> None:
        super().advance(fraction, phase)
        self.seen.append(self.phase)
        if self.phase == self._unwanted:
            self.cancelled.set()


@pytest.mark.parametrize("phase", ["verifying", "unpacking", "inspecting", "converting", "syncing"])
async def test_cancelled_in_each_phase_and_gone_on_with(server: Server, root: Path, packed: Path, phase: str) -> None:
    content = packed.read_bytes()
    incoming = an_image(checksum=sha256(content))
    arrival = await arrive(server, incoming, content)
    progress = _Impatient(phase)
    with pytest.raises(JobCancelled):
        await server.services.intake.finish(arrival, incoming, progress)
    assert phase in progress.seen
    assert server.catalog.locations.by_name["disk"].entries == {}
    volume = await server.services.intake.finish(arrival, incoming, Progress())
    assert (root / "disk" / f"vid.{VID}.elimg" / "data.img").read_bytes() == disk_bytes()
    assert volume.size_bytes == DISK_BYTES
    assert staged(root) == []


STEPS = (
    "intake.verified",
    "intake.unpacked",
    "intake.inspected",
    "intake.sized",
    "intake.converted",
    "intake.adopted",
    "intake.grown",
    "create.staged",
    "create.renamed",
)

CRASHES = """
import asyncio, os, sys
from pathlib import Path
import msgspec
from elemento_storage.images.incoming import Incoming
from elemento_storage.progress import Progress
from tests.unit.support import parts

async def main(root, content, incoming):
    incoming = msgspec.json.decode(incoming, type=Incoming)
    async with parts(Path(root)) as server:
        found = [one for one in await server.catalog.room.lasting() if one.volume_id == incoming.volume_id]
        intake = server.services.intake
        arrival = intake.arrival(found[0]) if found else await intake.reserve(incoming, None)
        if not found:
            Path(arrival.directory, ".elemento-tmp-upload.json").write_bytes(b"{}")
        if not found or os.path.getsize(arrival.content) == 0:
            Path(arrival.content).write_bytes(Path(content).read_bytes())
        await intake.finish(arrival, incoming, Progress())

asyncio.run(main(*sys.argv[1:]))
"""


async def test_killed_at_each_step_and_gone_on_with(root: Path, packed: Path) -> None:
    """One upload, whose server dies at one step after the other, and each time the next one goes on with it."""
    incoming = an_image(checksum=sha256(packed.read_bytes()), size_bytes=9 << 20)
    argv = [sys.executable, "-c", CRASHES, str(root), str(packed), msgspec.json.encode(incoming).decode()]
    directory = root / "disk" / f"vid.{VID}.elimg"
    for step in STEPS:
        assert not directory.exists(), step
        env = {**os.environ, "ELEMENTO_STORAGE_FAULTPOINT": f"kill:{step}", "PYTHONPATH": os.getcwd()}
        ran = await asyncio.to_thread(subprocess.run, argv, env=env, capture_output=True, text=True)
        assert ran.returncode == -9, (step, ran.stderr[-2000:])
    assert directory.exists()
    async with parts(root) as server:
        volume = server.catalog.locations.by_name["disk"].entries[VID].volume
        assert volume.size_bytes == 9 << 20
        assert staged(root) == []
        assert sorted(os.listdir(directory)) == ["data.img", "meta.json"]
        content = (directory / "data.img").read_bytes()
        assert content[:DISK_BYTES] == disk_bytes()
        assert not any(content[DISK_BYTES:])


async def waiting(server: Server) -> str:
    new = NewIso(
        creator_id=ALICE, name="waits", iso_type=IsoType.TOOL, info=IsoInfo(iso_type="tool"), size_bytes=1 << 20
    )
    return (await server.services.isos.create(new, Progress())).volume_id


async def test_content_for_a_volume_that_waits(server: Server, root: Path) -> None:
    intake, vid = server.services.intake, await waiting(server)
    location = server.catalog.locations.by_name["disk"]
    fill = Incoming(volume_id=vid, creator_id=ALICE, fills=True, format=VolumeFormat.ISO)
    with pytest.raises(NotOwner):
        await intake.reserve(msgspec.structs.replace(fill, creator_id=BOB), 1)
    arrival = await arrive(server, fill, iso_bytes(1000))
    assert (location.volume_count, location.virtual_bytes) == (1, 1000 * 2048), "it is counted twice"
    with pytest.raises(Conflict):
        await intake.reserve(fill, 1)
    volume = await intake.finish(arrival, fill, Progress())
    assert (volume.size_bytes, volume.waiting, location.virtual_bytes) == (1000 * 2048, False, 1000 * 2048)
    assert staged(root) == []
    with pytest.raises(Conflict):
        await intake.reserve(fill, 1)


async def test_a_volume_that_goes_while_its_content_arrives(server: Server, root: Path) -> None:
    intake, vid = server.services.intake, await waiting(server)
    fill = Incoming(volume_id=vid, creator_id="", fills=True, format=VolumeFormat.ISO)
    arrival = await arrive(server, fill, b"no disc".ljust(100_000, b"\0"))
    with pytest.raises(NotAnIso):
        await intake.finish(arrival, fill, Progress())
    Path(arrival.content).write_bytes(iso_bytes())
    await server.services.volumes.destroy(Actor(ALICE), vid)
    with pytest.raises(VolumeNotFound):
        await intake.finish(arrival, fill, Progress())
    await arrival.release()
    assert staged(root) == []


async def test_a_name_says_nothing(server: Server) -> None:
    """An image that is declared to be what it is not is damaged, whatever else it is."""
    arrival = await arrive(server, an_image(), disk_bytes())
    for image_format in (ImageFormat.QCOW2, ImageFormat.VMDK, ImageFormat.VDI, ImageFormat.VHD, ImageFormat.VHDX):
        with pytest.raises((ImageDamaged, ImageRefused)):
            await server.services.intake.finish(arrival, an_image(image_format=image_format), Progress())
    await arrival.release()
