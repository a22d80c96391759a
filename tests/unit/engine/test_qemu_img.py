import asyncio
import os
import re
from pathlib import Path

import pytest

from elemento_storage.engine import qemu_img
from elemento_storage.errors import JobCancelled, ToolFailed, ToolMissing, ToolTimeout
from elemento_storage.model import Preallocation, VolumeFormat, round_up_to_sector
from tests.unit import support
from tests.unit.support import assert_same_content, assert_sound

RAW, QCOW2 = VolumeFormat.RAW, VolumeFormat.QCOW2


def random_image(path: Path, megabytes: int) -> Path:
    path.write_bytes(os.urandom(1 << 20) * megabytes)
    return path


async def convert(source: Path, source_format: VolumeFormat, target: Path, target_format: VolumeFormat) -> list[float]:
    fractions: list[float] = []
    await qemu_img.convert(
        str(source), source_format, str(target), target_format, on_fraction=fractions.append, timeout_s=60
    )
    return fractions


async def test_version_is_a_version() -> None:
    assert re.fullmatch(r"\d+\.\d+(\.\d+)*", await qemu_img.version())


async def test_a_missing_qemu_img_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ToolMissing, match="qemu-utils"):
        await qemu_img.version()


@pytest.mark.parametrize(
    ("image_format", "preallocation"),
    [(RAW, Preallocation.OFF), (RAW, Preallocation.FALLOC), (RAW, Preallocation.FULL)]
    + [(QCOW2, preallocation) for preallocation in Preallocation],
)
async def test_create(tmp_path: Path, image_format: VolumeFormat, preallocation: Preallocation) -> None:
    path = tmp_path / "image"
    await qemu_img.create(str(path), image_format, 4 << 20, preallocation=preallocation)
    assert_sound(path, image_format, 4 << 20)
    allocated = path.stat().st_blocks * 512
    if preallocation in (Preallocation.FALLOC, Preallocation.FULL):
        assert allocated >= 4 << 20
    else:
        assert allocated < 2 << 20


@pytest.mark.parametrize("name", ["a b", "a,b=c", "a:b", "-q", "ü", "json:{}", "%d"])
async def test_names_mean_nothing_to_qemu_img(tmp_path: Path, name: str) -> None:
    source, target = tmp_path / name, tmp_path / f"{name} copy"
    await qemu_img.create(str(source), QCOW2, 1 << 20)
    await qemu_img.grow(str(source), QCOW2, 2 << 20)
    await convert(source, QCOW2, target, RAW)
    assert target.stat().st_size == 2 << 20
    assert len(os.listdir(tmp_path)) == 2


@pytest.mark.parametrize("image_format", [RAW, QCOW2])
async def test_grow_keeps_the_content_and_adds_zeros(tmp_path: Path, image_format: VolumeFormat) -> None:
    path, original = tmp_path / "image", random_image(tmp_path / "original", 1)
    await convert(original, RAW, path, image_format)
    await qemu_img.grow(str(path), image_format, 3 << 20)
    assert_sound(path, image_format, 3 << 20)
    assert_same_content(original, RAW, path, image_format)


async def test_grow_never_shrinks(tmp_path: Path) -> None:
    path = tmp_path / "image"
    await qemu_img.create(str(path), QCOW2, 2 << 20)
    with pytest.raises(ToolFailed):
        await qemu_img.grow(str(path), QCOW2, 1 << 20)
    assert_sound(path, QCOW2, 2 << 20)


@pytest.mark.parametrize(("source_format", "target_format"), [(RAW, QCOW2), (QCOW2, RAW), (QCOW2, QCOW2), (RAW, RAW)])
async def test_convert_copies_what_a_guest_sees(
    tmp_path: Path, source_format: VolumeFormat, target_format: VolumeFormat
) -> None:
    original = random_image(tmp_path / "original", 2)
    os.truncate(original, 5 << 20)
    source, target = tmp_path / "source", tmp_path / "target"
    await convert(original, RAW, source, source_format)
    before = source.read_bytes()
    fractions = await convert(source, source_format, target, target_format)
    assert_same_content(original, RAW, target, target_format)
    assert_sound(target, target_format, 5 << 20)
    assert source.read_bytes() == before
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0
    assert all(0 <= fraction <= 1 for fraction in fractions)


async def test_a_raw_image_that_looks_like_qcow2_stays_what_it_is(tmp_path: Path) -> None:
    """A guest can write any header into its raw disk; believing it would let it name files of the host."""
    secret = tmp_path / "secret"
    secret.write_bytes(b"s" * (1 << 20))
    hostile = tmp_path / "hostile"
    support.qemu_img("create", "-q", "-f", "qcow2", "-F", "raw", "-b", str(secret), str(hostile))
    target = tmp_path / "target"
    await convert(hostile, RAW, target, QCOW2)
    assert_same_content(hostile, RAW, target, QCOW2)
    assert_sound(target, QCOW2, round_up_to_sector(hostile.stat().st_size))


async def test_garbage_is_a_failure_with_a_reason(tmp_path: Path) -> None:
    (tmp_path / "garbage").write_bytes(b"garbage" * 1000)
    with pytest.raises(ToolFailed) as caught:
        await convert(tmp_path / "garbage", QCOW2, tmp_path / "target", RAW)
    assert "qcow2" in caught.value.stderr


async def test_cancel_stops_a_conversion(tmp_path: Path) -> None:
    source = random_image(tmp_path / "source", 64)
    cancel = asyncio.Event()
    seen: list[float] = []

    def on_fraction(fraction: float) -> None:
        seen.append(fraction)
        cancel.set()

    with pytest.raises(JobCancelled):
        await qemu_img.convert(
            str(source), RAW, str(tmp_path / "target"), QCOW2, on_fraction=on_fraction, timeout_s=60, cancel=cancel
        )
    assert seen


async def test_a_conversion_that_takes_too_long_is_stopped(tmp_path: Path) -> None:
    source = random_image(tmp_path / "source", 8)
    with pytest.raises(ToolTimeout):
        await qemu_img.convert(
            str(source), RAW, str(tmp_path / "target"), QCOW2, on_fraction=lambda _: None, timeout_s=0.001
        )
