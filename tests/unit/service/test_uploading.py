"""Uploads without HTTP: whose turn it is, what is kept, how they end, and that nothing is left."""

import asyncio
import contextlib
import hashlib
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from elemento_storage.errors import (
    Forbidden,
    InvalidValue,
    NoRoom,
    OffsetMismatch,
    StorageError,
    Unavailable,
    UploadBusy,
    UploadEnded,
    UploadFailed,
    UploadNotFound,
    VolumeNotFound,
)
from elemento_storage.images.incoming import ImageFormat, Incoming
from elemento_storage.jobs import Job, JobState
from elemento_storage.model import VolumeFormat, new_uid
from elemento_storage.progress import Progress
from elemento_storage.server import Server
from elemento_storage.service.access import INFRASTRUCTURE, Actor
from elemento_storage.service.upload_store import Upload
from elemento_storage.service.uploading import Chunk, NewUpload
from elemento_storage.uploads.record import Phase
from tests.images import DISK_BYTES, compressed, make_image, sha256
from tests.unit.support import ALICE, BOB, parts

OWNER = Actor(ALICE)
MIB = 1 << 20


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
def packed(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A qcow2 image within xz."""
    return compressed(make_image(tmp_path_factory.mktemp("images"), "disk.qcow2", "qcow2"), "xz").read_bytes()


async def begun(server: Server, length: int | None, **more: object) -> Upload:
    incoming = Incoming(volume_id=new_uid(), creator_id=ALICE, name="in", **more)  # type: ignore[arg-type]
    return await server.services.uploading.begin(NewUpload(owner=ALICE, incoming=incoming, length=length))


async def send(server: Server, upload: Upload, offset: int, data: bytes, **more: object) -> tuple[int, Job | None]:
    chunk = Chunk(offset=offset, **more)  # type: ignore[arg-type]
    async with server.services.uploading.going_on(OWNER, upload.upload_id, chunk) as going:
        await going.receiving.feed([data])
        return await going.finish()


async def nothing_left(server: Server, root: Path) -> None:
    location = server.catalog.locations.by_name["disk"]
    assert os.listdir(root / "disk" / ".elemento" / "staging") == []
    assert not location.foreign_reservations
    assert not location.own_reservations


async def found(server: Server, upload: Upload) -> Upload:
    return await server.services.uploading.store.find(INFRASTRUCTURE, upload.upload_id)


async def test_from_the_first_byte_to_the_volume(server: Server, root: Path) -> None:
    upload = await begun(server, MIB)
    data = os.urandom(MIB)
    assert await send(server, upload, 0, data[:1000]) == (1000, None)
    assert (await found(server, upload)).offset == 1000
    offset, job = await send(server, upload, 1000, data[1000:])
    assert offset == MIB
    assert job is not None
    await job.finished.wait()
    assert (job.state, job.result) == (JobState.DONE, {"vid": upload.upload_id})
    assert (root / "disk" / f"vid.{upload.upload_id}.elimg" / "data.img").read_bytes() == data
    assert (await found(server, upload)).record.phase is Phase.DONE
    await nothing_left(server, root)


async def test_it_goes_on_where_it_stands_and_nowhere_else(server: Server) -> None:
    upload = await begun(server, MIB)
    await send(server, upload, 0, b"x" * 10)
    for offset in (0, 9, 11, MIB):
        with pytest.raises(OffsetMismatch) as refused:
            await send(server, upload, offset, b"y")
        assert refused.value.details["offset"] == 10
    assert (await found(server, upload)).offset == 10


async def test_one_writes_at_a_time(server: Server) -> None:
    upload = await begun(server, MIB)
    async with server.services.uploading.going_on(OWNER, upload.upload_id, Chunk(offset=0)) as going:
        await going.receiving.feed([b"x" * 100])
        with pytest.raises(UploadBusy):
            await send(server, upload, 0, b"y")
    assert (await found(server, upload)).offset == 100, "what broke off is kept"


async def test_others_do_not_see_it(server: Server) -> None:
    upload = await begun(server, MIB)
    uploading = server.services.uploading
    with pytest.raises(UploadNotFound):
        async with uploading.going_on(Actor(BOB), upload.upload_id, Chunk(offset=0)):
            pass
    with pytest.raises(UploadNotFound):
        await uploading.terminate(Actor(BOB), upload.upload_id)
    with pytest.raises(UploadNotFound):
        await uploading.finished(Actor(BOB), upload.upload_id)
    assert await uploading.store.all(Actor(BOB)) == []
    assert [one.upload_id for one in await uploading.store.all(OWNER)] == [upload.upload_id]


async def test_a_length_is_told_once(server: Server) -> None:
    upload = await begun(server, None)
    await send(server, upload, 0, b"x" * 100)
    with pytest.raises(InvalidValue):
        await send(server, upload, 100, b"", sparse=True)
    with pytest.raises(InvalidValue):
        await send(server, upload, 100, b"", length=99)
    with pytest.raises(NoRoom):
        await send(server, upload, 100, b"", length=200_000_000)
    await send(server, upload, 100, b"", length=1000)
    with pytest.raises(InvalidValue):
        await send(server, upload, 100, b"", length=2000)
    assert (await found(server, upload)).record.length == 1000


async def test_what_goes_over_the_end_is_refused_and_what_was_before_is_kept(server: Server) -> None:
    upload = await begun(server, 100)
    with pytest.raises(StorageError, match="beyond the end"):
        await send(server, upload, 0, b"x" * 101)
    assert (await found(server, upload)).offset == 0


async def test_the_room_of_what_is_ended_is_free(server: Server, root: Path) -> None:
    upload = await begun(server, 90_000_000)
    location = server.catalog.locations.by_name["disk"]
    assert location.virtual_bytes >= 90_000_000
    await server.services.uploading.terminate(OWNER, upload.upload_id)
    await nothing_left(server, root)
    assert location.virtual_bytes == 0
    with pytest.raises(UploadNotFound):
        await found(server, upload)


async def test_ending_it_stops_who_sends(server: Server, root: Path) -> None:
    upload = await begun(server, MIB)
    uploading = server.services.uploading
    begins = asyncio.Event()

    async def sends() -> None:
        async with uploading.going_on(OWNER, upload.upload_id, Chunk(offset=0)) as going:
            await going.receiving.feed([b"x" * 100])
            begins.set()
            await going.receiving.stop.wait()

    sending = asyncio.ensure_future(sends())
    await begins.wait()
    await uploading.terminate(OWNER, upload.upload_id)
    await sending
    await nothing_left(server, root)


@pytest.mark.parametrize("phase", ["", "verifying", "unpacking", "inspecting", "converting", "syncing"])
async def test_the_job_that_finishes_it_can_be_cancelled(server: Server, root: Path, packed: bytes, phase: str) -> None:
    upload = await begun(server, len(packed), checksum=sha256(packed))
    half = len(packed) // 2
    await send(server, upload, 0, packed[:half])
    _, job = await send(server, upload, half, packed[half:])
    assert job is not None
    jobs = server.services.core.jobs
    seen = []

    def changed() -> None:
        if job.progress.phase not in seen:
            seen.append(job.progress.phase)
            if job.progress.phase == phase:
                jobs.cancel(job)

    if phase:
        job.progress._changed = changed
    else:
        jobs.cancel(job)
    await asyncio.wait_for(job.finished.wait(), 30)
    assert job.state is JobState.CANCELLED, (job.state, seen)
    ended = await found(server, upload)
    assert ended.record.phase is Phase.FAILED
    assert ended.record.problem is not None
    assert ended.record.problem.code == "job-cancelled"
    await nothing_left(server, root)
    with pytest.raises(VolumeNotFound):
        await server.catalog.find(upload.upload_id, OWNER.require_see)
    with pytest.raises((UploadFailed, UploadEnded)):
        await send(server, upload, len(packed), b"")


async def test_what_its_beginning_forbids_ends_it_at_once(server: Server, root: Path, tmp_path: Path) -> None:
    image = make_image(tmp_path, "disk.qcow2", "qcow2").read_bytes()
    backed = image[:8] + (1024).to_bytes(8, "big") + (11).to_bytes(4, "big") + image[20:]
    upload = await begun(server, len(backed))
    await send(server, upload, 0, backed[:65535])
    assert (await found(server, upload)).record.phase is Phase.RECEIVING
    with pytest.raises(UploadFailed) as refused:
        await send(server, upload, 65535, backed[65535:80000])
    assert refused.value.details["reason"] == "image-refused"
    await nothing_left(server, root)


async def test_room_for_what_it_becomes_is_foreseen(server: Server, tmp_path: Path) -> None:
    image = make_image(tmp_path, "disk.qcow2", "qcow2").read_bytes()
    upload = await begun(server, len(image))
    await send(server, upload, 0, image[:70000])
    location = server.catalog.locations.by_name["disk"]
    assert location.virtual_bytes == DISK_BYTES
    huge = image[:24] + (200_000_000).to_bytes(8, "big") + image[32:]
    other = await begun(server, len(huge))
    with pytest.raises(NoRoom):
        await send(server, other, 0, huge[:70000])
    assert (await found(server, other)).offset == 70000
    with pytest.raises(NoRoom):
        await send(server, other, 70000, huge[70000:])


async def test_what_is_declared_raw_may_begin_with_anything(server: Server, tmp_path: Path) -> None:
    image = make_image(tmp_path, "disk.qcow2", "qcow2").read_bytes()
    upload = await begun(server, len(image), image_format=ImageFormat.RAW)
    _, job = await send(server, upload, 0, image)
    assert job is not None
    await job.finished.wait()
    assert job.state is JobState.DONE


async def test_parts_are_no_volumes_and_a_whole_takes_no_more(server: Server, root: Path) -> None:
    uploading = server.services.uploading
    parts_ = [
        await uploading.begin(NewUpload(owner=ALICE, incoming=None, length=4096, concat="partial")) for _ in range(2)
    ]
    for number, part in enumerate(parts_):
        assert await send(server, part, 0, bytes([number + 1]) * 4096) == (4096, None)
    incoming = Incoming(volume_id=new_uid(), creator_id=ALICE, name="in")
    new = NewUpload(owner=ALICE, incoming=incoming, length=None, concat="final;")
    unfinished = await uploading.begin(NewUpload(owner=ALICE, incoming=None, length=1, concat="partial"))
    with pytest.raises(InvalidValue):
        await uploading.concatenate(OWNER, new, [parts_[0].upload_id, unfinished.upload_id])
    await uploading.terminate(OWNER, unfinished.upload_id)
    whole, job = await uploading.concatenate(OWNER, new, [part.upload_id for part in reversed(parts_)])
    await job.finished.wait()
    image = root / "disk" / f"vid.{whole.upload_id}.elimg" / "data.img"
    assert image.read_bytes() == b"\2" * 4096 + b"\1" * 4096
    with pytest.raises((Forbidden, UploadEnded)):
        await send(server, whole, 8192, b"")
    await nothing_left(server, root)


async def test_the_whole_at_once(server: Server, root: Path) -> None:
    uploading = server.services.uploading
    data = os.urandom(MIB)
    incoming = Incoming(volume_id=new_uid(), creator_id=ALICE, name="in", checksum=sha256(data))
    hasher = hashlib.sha256()
    whole = await uploading.whole(incoming, len(data), hasher)
    assert uploading.under_way == 1
    await whole.receiving.feed([data])
    volume = await whole.finish(Progress())
    assert volume.meta.format is VolumeFormat.RAW
    assert hasher.hexdigest() == hashlib.sha256(data).hexdigest()
    empty = await uploading.whole(Incoming(volume_id=new_uid(), creator_id=ALICE, name="in"), None)
    with pytest.raises(InvalidValue, match="empty"):
        await empty.finish(Progress())
    dropped = await uploading.whole(Incoming(volume_id=new_uid(), creator_id=ALICE, name="in"), None)
    await dropped.receiving.feed([data])
    await dropped.drop()
    await dropped.drop()
    assert uploading.under_way == 0
    await nothing_left(server, root)


async def test_a_server_that_stops_keeps_what_arrived_and_lets_nobody_in(server: Server) -> None:
    upload = await begun(server, MIB)
    uploading = server.services.uploading
    with contextlib.suppress(StorageError):
        async with uploading.going_on(OWNER, upload.upload_id, Chunk(offset=0)) as going:
            await going.receiving.feed([b"x" * 100])
            uploading.break_off()
            assert going.receiving.stop.is_set()
    assert (await found(server, upload)).offset == 100
    with pytest.raises(Unavailable):
        await send(server, upload, 100, b"y")
