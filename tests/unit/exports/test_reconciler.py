"""What the reconciler may take for a run directory that nobody needs."""

import asyncio
from pathlib import Path

import msgspec

from elemento_storage.exports.publisher import ServedVolume
from elemento_storage.exports.record import Protocol
from elemento_storage.model import new_uid
from tests.unit.support import parts


async def test_a_run_directory_that_is_just_being_made_stays(tmp_path: Path) -> None:
    """An export makes the directory first and then writes into it; a look may see it in between."""
    run_directory = tmp_path / "run"
    async with parts(tmp_path / "root", run_dir=str(run_directory)) as server:
        await server.reconciler.look()
        volume_id = new_uid()
        made = run_directory / "v" / volume_id
        async with server.services.exporting.changing(volume_id):
            (made / "bridge").mkdir(parents=True)
            look = asyncio.create_task(server.reconciler.look())
            await asyncio.wait({look}, timeout=0.5)
            assert made.is_dir(), "it was taken from under the export that makes it"
            state = ServedVolume(
                volume_id=volume_id, directory=str(tmp_path / "elsewhere"), exports={new_uid(): Protocol.NBD}
            )
            (made / "engine.json").write_bytes(msgspec.json.encode(state))
        await look
        assert made.is_dir()


async def test_a_run_directory_that_says_nothing_goes(tmp_path: Path) -> None:
    run_directory = tmp_path / "run"
    async with parts(tmp_path / "root", run_dir=str(run_directory)) as server:
        await server.reconciler.look()
        made = run_directory / "v" / new_uid()
        (made / "bridge").mkdir(parents=True)
        await server.reconciler.look()
        assert not made.exists()
