import asyncio
from pathlib import Path

import pytest

from elemento_storage.engine.templates import Qcow2Templates
from elemento_storage.errors import ToolFailed, ToolMissing
from elemento_storage.model import VolumeFormat
from tests.unit.support import assert_sound, qemu_img


@pytest.mark.parametrize("size", [512, 1 << 20, (1 << 20) + 512, 1_000_000_000 // 512 * 512, 100 << 30, 8 << 40])
async def test_the_bytes_are_those_that_qemu_img_writes(tmp_path: Path, size: int) -> None:
    template = await Qcow2Templates().get(size)
    assert template is not None
    template.write(str(tmp_path / "ours"))
    qemu_img("create", "-q", "-f", "qcow2", str(tmp_path / "theirs"), str(size))
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert_sound(tmp_path / "ours", VolumeFormat.QCOW2, size)


async def test_an_image_from_a_template_takes_hardly_any_room(tmp_path: Path) -> None:
    template = await Qcow2Templates().get(8 << 40)
    assert template is not None
    template.write(str(tmp_path / "image"))
    assert (tmp_path / "image").stat().st_blocks * 512 < 64 * 1024


async def test_every_size_gets_its_own_also_from_a_warm_cache(tmp_path: Path) -> None:
    templates = Qcow2Templates()
    sizes = [1 << 20, 2 << 20, 1 << 20, 3 << 20, 2 << 20]
    for number, size in enumerate(sizes):
        template = await templates.get(size)
        assert template is not None
        template.write(str(tmp_path / str(number)))
        assert_sound(tmp_path / str(number), VolumeFormat.QCOW2, size)


async def test_a_known_size_needs_no_qemu_img(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    templates = Qcow2Templates()
    first = await templates.get(1 << 20)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert await templates.get(1 << 20) == first
    with pytest.raises(ToolMissing):
        await templates.get(2 << 20)


async def test_two_who_ask_at_once_get_the_same() -> None:
    templates = Qcow2Templates()
    assert len(set(await asyncio.gather(*(templates.get(1 << 20) for _ in range(4))))) == 1


async def test_more_sizes_than_are_kept_all_work() -> None:
    templates = Qcow2Templates()
    sizes = [(1 << 20) + number * 512 for number in range(70)]
    found = await asyncio.gather(*(templates.get(size) for size in sizes))
    assert None not in found
    assert await templates.get(sizes[0]) == found[0]


async def test_an_image_too_large_to_keep_is_left_to_qemu_img() -> None:
    assert await Qcow2Templates().get(2 << 50) is None


async def test_a_size_that_qemu_img_refuses_is_its_failure() -> None:
    with pytest.raises(ToolFailed):
        await Qcow2Templates().get(1 << 62)


async def test_nothing_that_is_there_is_overwritten(tmp_path: Path) -> None:
    template = await Qcow2Templates().get(1 << 20)
    assert template is not None
    (tmp_path / "image").write_bytes(b"precious")
    with pytest.raises(FileExistsError):
        template.write(str(tmp_path / "image"))
    assert (tmp_path / "image").read_bytes() == b"precious"
