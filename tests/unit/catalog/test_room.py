import asyncio
import os
from pathlib import Path
from typing import Any

import pytest

from elemento_storage.catalog.bin import move_in
from elemento_storage.catalog.room import Demand, Reservation
from elemento_storage.errors import NoRoom
from tests.live import make_location
from tests.unit.support import make_volume, parts, small_file_system, uid

MB = 10**6


def staged(location: Path) -> list[str]:
    return os.listdir(location / ".elemento" / "staging")


async def test_a_reservation_is_a_staging_directory_in_the_location(tmp_path: Path) -> None:
    location = make_location(tmp_path, max_volumes=1)
    async with parts(tmp_path) as server:
        reservation = await server.catalog.room.reserve_new(Demand(uid(1), 1000))
        assert reservation.location.name == "disk"
        assert Path(reservation.path).is_dir()
        assert Path(reservation.path).parent == location / ".elemento" / "staging"
        with pytest.raises(NoRoom):
            await server.catalog.room.reserve_new(Demand(uid(2), 1000))
        for _ in range(2):
            await reservation.release()
        assert staged(location) == []
        await (await server.catalog.room.reserve_new(Demand(uid(2), 1000))).release()


async def test_who_is_alone_goes_on_in_the_same_thread_and_no_refused_one_does(tmp_path: Path) -> None:
    make_location(tmp_path, max_volumes=4)
    gone_on: list[Reservation] = []

    def go_on(reservation: Reservation) -> None:
        assert Path(reservation.path).is_dir()
        gone_on.append(reservation)

    async with parts(tmp_path) as server:
        room = server.catalog.room
        await (await room.reserve_new(Demand(uid(1), 1000))).release()  # the stamp is ours now
        alone = await room.reserve_new(Demand(uid(1), 1000), go_on)
        assert gone_on == [alone]
        await alone.release()
        gone_on.clear()
        several = await asyncio.gather(*(room.reserve_new(Demand(uid(n), 1000), go_on) for n in range(2, 6)))
        assert len(gone_on) < len(several), "those who came together are not made one after the other"
        gone_on.clear()
        with pytest.raises(NoRoom):
            await room.reserve_new(Demand(uid(9), 1000), go_on)
        assert gone_on == []


async def test_the_location_with_the_most_free_quota_is_taken_ties_by_name(tmp_path: Path) -> None:
    make_location(tmp_path, "a", max_total_size="5M")
    make_location(tmp_path, "b", max_total_size="7M")
    make_location(tmp_path, "c", max_total_size="7M")
    async with parts(tmp_path) as server:
        taken = [(await server.catalog.room.reserve_new(Demand(uid(n), 2 * MB))).location.name for n in range(6)]
        assert taken == ["b", "c", "a", "b", "c", "a"]


async def test_what_a_location_cannot_take_goes_elsewhere(tmp_path: Path) -> None:
    make_location(tmp_path, "large", max_total_size="100M", max_volume_size="1M")
    make_location(tmp_path, "small", max_total_size="10M")
    async with parts(tmp_path) as server:
        assert (await server.catalog.room.reserve_new(Demand(uid(1), 1 * MB))).location.name == "large"
        assert (await server.catalog.room.reserve_new(Demand(uid(2), 5 * MB))).location.name == "small"


async def test_no_room_gives_each_locations_reason(tmp_path: Path) -> None:
    make_location(tmp_path, "full", max_volumes=0)
    make_location(tmp_path, "small", max_volume_size=500)
    make_location(tmp_path, "tight", max_total_size=999)
    make_location(tmp_path, "unmounted", file_system="unique")
    make_location(tmp_path, "broken")
    (tmp_path / "broken" / "settings.json").write_text("{")
    async with parts(tmp_path) as server:
        with pytest.raises(NoRoom) as caught:
            await server.catalog.room.reserve_new(Demand(uid(1), 1000))
        reasons = caught.value.details["locations"]
        assert isinstance(reasons, dict)
        assert set(reasons) == {"full", "small", "tight", "unmounted", "broken"}
        for name, told in (
            ("full", "max-volumes"),
            ("small", "max-volume-size"),
            ("tight", "max-total-size"),
            ("unmounted", "not mounted"),
            ("broken", "not JSON"),
        ):
            assert told in reasons[name]
            assert told in caught.value.message


async def test_without_locations_the_reason_says_what_to_do(tmp_path: Path) -> None:
    root = tmp_path / "mnt"
    root.mkdir()
    async with parts(root) as server:
        with pytest.raises(NoRoom, match=r"settings\.json"):
            await server.catalog.room.reserve_new(Demand(uid(1), 1000))
    async with parts(tmp_path / "absent") as server:
        with pytest.raises(NoRoom, match="cannot be read"):
            await server.catalog.room.reserve_new(Demand(uid(1), 1000))


@pytest.mark.parametrize("limits", [{"max_volumes": 5}, {"max_total_size": 5 * MB + 1}])
async def test_parallel_reservations_never_pass_a_limit(tmp_path: Path, limits: dict[str, Any]) -> None:
    location = make_location(tmp_path, **limits)
    async with parts(tmp_path) as server:
        room = server.catalog.room
        results = await asyncio.gather(
            *(room.reserve_new(Demand(uid(n), MB)) for n in range(20)), return_exceptions=True
        )
        assert sum(isinstance(result, Reservation) for result in results) == 5
        assert sum(isinstance(result, NoRoom) for result in results) == 15
        assert len(staged(location)) == 5


async def test_two_servers_on_one_location_never_pass_a_limit_together(tmp_path: Path) -> None:
    location = make_location(tmp_path, max_volumes=6)
    make_volume(location, uid(100))
    async with (
        parts(tmp_path, state_dir=str(tmp_path / "one")) as one,
        parts(tmp_path, state_dir=str(tmp_path / "two")) as two,
    ):
        calls = [(one, two)[n % 2].catalog.room.reserve_new(Demand(uid(n), MB)) for n in range(12)]
        results = await asyncio.gather(*calls, return_exceptions=True)
        made = [result for result in results if isinstance(result, Reservation)]
        assert len(made) == 5
        assert {type(result) for result in results} == {Reservation, NoRoom}
        for reservation in made:
            await reservation.release()
        assert await two.catalog.room.reserve_new(Demand(uid(50), MB))


async def test_a_volume_made_behind_the_servers_back_counts_before_it_says_no(tmp_path: Path) -> None:
    location = make_location(tmp_path, max_volumes=1)
    made = make_volume(location, uid(1))
    async with parts(tmp_path) as server:
        with pytest.raises(NoRoom):
            await server.catalog.room.reserve_new(Demand(uid(2), 512))
        made.rename(tmp_path / "elsewhere")
        await (await server.catalog.room.reserve_new(Demand(uid(2), 512))).release()


async def test_growing_counts_only_what_is_added(tmp_path: Path) -> None:
    location = make_location(tmp_path, max_total_size=10 * MB, max_volume_size=8 * MB, max_volumes=1)
    make_volume(location, uid(1), size=4 * MB)
    async with parts(tmp_path) as server:
        (disk,) = server.catalog.locations.answering()
        room = server.catalog.room
        reservation = await room.reserve_in(disk, Demand(uid(1), 8 * MB, new_volume=False))
        assert disk.virtual_bytes == 8 * MB
        await reservation.release()
        assert disk.virtual_bytes == 4 * MB
        with pytest.raises(NoRoom, match="max-volume-size"):
            await room.reserve_in(disk, Demand(uid(1), 9 * MB, new_volume=False))
        with pytest.raises(NoRoom, match="max-volumes"):
            await room.reserve_in(disk, Demand(uid(2), 512, new_volume=True))
        assert staged(location) == []


async def test_real_free_space_counts_and_overcommit_stretches_it(tmp_path: Path) -> None:
    with small_file_system(tmp_path / "mnt" / "disk", 8):
        make_location(tmp_path / "mnt")
        async with parts(tmp_path / "mnt") as server:
            with pytest.raises(NoRoom, match="bytes free"):
                await server.catalog.room.reserve_new(Demand(uid(1), 9 << 20))
            assert await server.catalog.room.reserve_new(Demand(uid(1), 6 << 20))
        async with parts(tmp_path / "mnt", overcommit=2.0) as server:
            assert await server.catalog.room.reserve_new(Demand(uid(2), 15 << 20))
        async with parts(tmp_path / "mnt", overcommit=0.0) as server:
            assert await server.catalog.room.reserve_new(Demand(uid(3), 1 << 50))


async def test_the_bin_is_emptied_before_a_create_fails(tmp_path: Path) -> None:
    with small_file_system(tmp_path / "mnt" / "disk", 8) as location:
        make_location(tmp_path / "mnt")
        for number in range(2):
            make_volume(location, uid(number), data=b"x" * (3 << 20))
            move_in(str(location), uid(number))
        async with parts(tmp_path / "mnt") as server:
            await server.catalog.room.reserve_new(Demand(uid(9), 4 << 20))
            assert [entry.volume_id for _, entry in await server.catalog.bin.all()] == [uid(1)]


async def test_the_bin_stays_as_it_is_when_emptying_it_would_not_help(tmp_path: Path) -> None:
    with small_file_system(tmp_path / "mnt" / "disk", 8) as location:
        make_location(tmp_path / "mnt")
        make_volume(location, uid(1), data=b"x" * (3 << 20))
        move_in(str(location), uid(1))
        async with parts(tmp_path / "mnt") as server:
            with pytest.raises(NoRoom, match="bytes free"):
                await server.catalog.room.reserve_new(Demand(uid(9), 9 << 20))
            assert len(await server.catalog.bin.all()) == 1


async def test_what_is_being_allocated_is_no_longer_free(tmp_path: Path) -> None:
    """Two preallocations that begin at once would each find the same free space."""
    with small_file_system(tmp_path / "mnt" / "disk", 8):
        make_location(tmp_path / "mnt")
        async with parts(tmp_path / "mnt") as server:
            first = await server.catalog.room.reserve_new(Demand(uid(1), 5 << 20, allocated=True))
            with pytest.raises(NoRoom, match="bytes free"):
                await server.catalog.room.reserve_new(Demand(uid(2), 5 << 20, allocated=True))
            await first.release()
            await server.catalog.room.reserve_new(Demand(uid(2), 5 << 20, allocated=True))


async def test_quotas_are_no_reason_to_empty_the_bin(tmp_path: Path) -> None:
    location = make_location(tmp_path, max_volumes=0)
    make_volume(location, uid(1))
    move_in(str(location), uid(1))
    async with parts(tmp_path) as server:
        with pytest.raises(NoRoom, match="max-volumes"):
            await server.catalog.room.reserve_new(Demand(uid(9), 512))
        assert len(await server.catalog.bin.all()) == 1


async def test_a_mounted_unique_location_is_used(tmp_path: Path) -> None:
    with small_file_system(tmp_path / "mnt" / "disk", 8):
        make_location(tmp_path / "mnt", file_system="unique")
        async with parts(tmp_path / "mnt", overcommit=0.0) as server:
            assert (await server.catalog.room.reserve_new(Demand(uid(1), 5 << 20))).location.is_unique
            with pytest.raises(NoRoom, match="file system's size"):
                await server.catalog.room.reserve_new(Demand(uid(2), 5 << 20))


async def test_cancreate_agrees_with_create(tmp_path: Path) -> None:
    make_location(tmp_path, "a", max_total_size=5 * MB, max_volumes=2)
    make_location(tmp_path, "b", max_total_size=3 * MB)
    async with parts(tmp_path) as server:
        room = server.catalog.room
        for sizes, fits in (
            ([5 * MB], True),
            ([6 * MB], False),
            ([5 * MB, 3 * MB], True),
            ([3 * MB, 5 * MB], True),
            ([5 * MB, 4 * MB], False),
            ([2 * MB] * 3, True),
            ([MB] * 5, True),
            ([MB] * 6, False),
        ):
            assert (await room.can_take(sizes))[0] is fits, sizes
            made: list[Reservation] = []
            try:
                for size in sorted(sizes, reverse=True):
                    made.append(await room.reserve_new(Demand(uid(len(made)), size)))
            except NoRoom:
                assert not fits
            else:
                assert fits
            for reservation in made:
                await reservation.release()


async def test_cancreate_reserves_nothing_and_says_why_not(tmp_path: Path) -> None:
    location = make_location(tmp_path, max_volume_size=1 * MB)
    make_location(tmp_path, "broken")
    (tmp_path / "broken" / "settings.json").write_text("{")
    async with parts(tmp_path) as server:
        fits, reasons = await server.catalog.room.can_take([2 * MB])
        assert not fits
        assert "max-volume-size" in str(reasons["disk"])
        assert "not JSON" in str(reasons["broken"])
        assert (await server.catalog.room.can_take([MB]))[0]
        assert staged(location) == []


async def test_what_lasts_is_counted_by_everybody_and_survives_its_server(tmp_path: Path) -> None:
    location = make_location(tmp_path, max_volumes=2, max_total_size=4 * MB)
    async with parts(tmp_path) as first:
        lasting = await first.catalog.room.reserve_new(Demand(uid(1), 3 * MB, lasting=True))
        assert first.catalog.locations.by_name["disk"].volume_count == 1
        assert first.catalog.locations.by_name["disk"].virtual_bytes == 3 * MB
    assert staged(location) == [Path(lasting.path).name]
    async with parts(tmp_path) as second:
        with pytest.raises(NoRoom):
            await second.catalog.room.reserve_new(Demand(uid(2), 2 * MB))
        (found,) = await second.catalog.room.lasting()
        assert (found.volume_id, found.size_bytes, found.path) == (uid(1), 3 * MB, lasting.path)
        assert second.catalog.locations.by_name["disk"].volume_count == 1
        await found.release()
        assert second.catalog.locations.by_name["disk"].volume_count == 0
        await (await second.catalog.room.reserve_new(Demand(uid(2), 2 * MB))).release()
    assert staged(location) == []


@pytest.mark.parametrize("lasting", [False, True])
async def test_a_reservation_can_take_another_size_within_the_limits(tmp_path: Path, lasting: bool) -> None:
    location = make_location(tmp_path, max_total_size=4 * MB)
    async with parts(tmp_path) as server:
        room, disk = server.catalog.room, server.catalog.locations.by_name["disk"]
        reservation = await room.reserve_new(Demand(uid(1), MB, lasting=lasting))
        (Path(reservation.path) / "content").write_bytes(b"x")
        larger = await room.resize(reservation, 4 * MB)
        assert disk.virtual_bytes == 4 * MB
        with pytest.raises(NoRoom):
            await room.resize(larger, 5 * MB)
        assert disk.virtual_bytes == 4 * MB
        smaller = await room.resize(larger, 2 * MB)
        assert (Path(smaller.path) / "content").read_bytes() == b"x"
        assert disk.virtual_bytes == 2 * MB
        assert disk.volume_count == 1
        assert await room.resize(smaller, 2 * MB) is smaller
        await smaller.release()
        assert disk.virtual_bytes == 0
    assert staged(location) == []
