import asyncio
import base64
import json
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elemento_storage.errors import InvalidValue
from elemento_storage.model import IsoInfo, Volume, VolumeFormat
from elemento_storage.server import Server
from elemento_storage.service.access import INFRASTRUCTURE, Actor
from elemento_storage.service.listing import SORT_KEYS, Page, Query, list_volumes
from tests.live import make_location
from tests.unit.support import ALICE, BOB, age, make_volume, parts, uid

SORTS = [f"{sign}{key}" for key in SORT_KEYS for sign in ("", "-")]


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    location = make_location(tmp_path)
    make_volume(location, uid(1), name="web-1", size=2048)
    make_volume(location, uid(2), name="web-2", size=1024, private=True)
    make_volume(location, uid(3), name="db", size=4096, creatorID=BOB, private=True)
    make_volume(location, uid(4), name="db", size=1024, creatorID=BOB)
    make_volume(location, uid(5), name="Web*", size=1 << 20, image_format=VolumeFormat.QCOW2)
    locked = make_volume(location, uid(6), name="busy", size=512)
    (locked / f"elemento.convert.{uid(9)}.ignore").write_text("")
    for number in range(1, 7):
        age(location / f"vid.{uid(number)}.elimg", 1_000_000_000 - number)
    async with parts(tmp_path) as running:
        yield running


async def page(server: Server, actor: Actor = INFRASTRUCTURE, **query: Any) -> Page:
    return await list_volumes(server.services.core, actor, Query(**query))


async def listed(server: Server, actor: Actor = INFRASTRUCTURE, **query: Any) -> list[int]:
    return [int(volume.volume_id, 16) for volume in (await page(server, actor, **query)).volumes]


async def test_own_volumes_and_those_that_are_not_private(server: Server) -> None:
    assert await listed(server) == [1, 2, 3, 4, 5]
    assert await listed(server, Actor(ALICE)) == [1, 2, 4, 5]
    assert await listed(server, Actor(BOB)) == [1, 3, 4, 5]
    assert await listed(server, Actor("c" * 32)) == [1, 4, 5]


async def test_locked_volumes_only_when_asked_for(server: Server) -> None:
    assert 6 not in await listed(server)
    assert 6 in await listed(server, include_locked=True)


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("db", [3, 4]),
        ("web-*", [1, 2]),
        ("web-?", [1, 2]),
        ("*", [1, 2, 3, 4, 5]),
        ("Web*", [5]),
        ("web", []),
        ("", []),
        ("DB", []),
        ("[", []),
    ],
)
async def test_filter_by_name_or_pattern(server: Server, name: str, found: list[int]) -> None:
    assert await listed(server, name=name) == found


async def test_filter_by_what_isoinfo_says(server: Server) -> None:
    location = Path(server.settings.root) / "disk"
    for number, said in (
        (11, {"isotype": "os_generic", "os_family": "linux", "os_flavour": "debian", "os_version": "12.9"}),
        (12, {"isotype": "os_generic", "os_family": "linux", "os_flavour": "debian", "os_version": "13"}),
        (13, {"isotype": "tool", "os_family": "windows", "scope": "drivers", "version": "13"}),
    ):
        directory = make_volume(location, uid(number), image_format=VolumeFormat.ISO)
        (directory / "isoinfo.json").write_text(json.dumps(said))
    await server.catalog.look_around(max_age_s=0.0)

    async def found(**facts: str) -> list[int]:
        return await listed(server, iso=IsoInfo(**facts))

    assert await found(iso_type="os_generic") == [11, 12]
    assert await found(os_family="linux", os_version="13") == [12]
    assert await found(os_flavour="debian") == [11, 12]
    assert await found(tool_scope="drivers", tool_version="13") == [13]
    assert await found(os_flavour="deb*") == []
    assert 11 in await found()


async def test_filter_by_format(server: Server) -> None:
    assert await listed(server, format=VolumeFormat.QCOW2) == [5]
    assert await listed(server, format=VolumeFormat.RAW, name="db") == [3, 4]
    assert await listed(server, format=VolumeFormat.ISO) == []


@pytest.mark.parametrize(
    ("sort", "order"),
    [
        ("volumeID", [1, 2, 3, 4, 5]),
        ("-volumeID", [5, 4, 3, 2, 1]),
        ("size", [2, 4, 1, 3, 5]),
        ("-size", [5, 3, 1, 4, 2]),
        ("name", [5, 3, 4, 1, 2]),
        ("lastUpdated", [5, 4, 3, 2, 1]),
        ("-lastUpdated", [1, 2, 3, 4, 5]),
    ],
)
async def test_order_with_ties_by_id(server: Server, sort: str, order: list[int]) -> None:
    assert await listed(server, sort=sort) == order


async def test_pages_count_all_and_the_last_has_no_cursor(server: Server) -> None:
    first = await page(server, limit=3)
    assert (len(first.volumes), first.total) == (3, 5)
    assert first.next_cursor is not None
    last = await page(server, limit=3, cursor=first.next_cursor)
    assert (len(last.volumes), last.total, last.next_cursor) == (2, 5, None)
    assert (await page(server, limit=5)).next_cursor is None


async def test_a_cursor_is_good_for_a_query_string(server: Server) -> None:
    cursor = (await page(server, limit=1, sort="name")).next_cursor
    assert cursor is not None
    assert cursor.replace("-", "").replace("_", "").isalnum()


async def test_a_volume_that_goes_between_two_pages_disturbs_nobody(server: Server) -> None:
    first = await page(server, limit=2)
    (location,) = server.catalog.locations.answering()
    Path(location.volume_path(uid(2))).rename(Path(location.path) / "gone")
    await server.catalog.look_around(max_age_s=0)
    assert await listed(server, cursor=first.next_cursor) == [3, 4, 5]


@pytest.mark.parametrize("sort", ["", "-", "creatorID", "--size", "Size", "size,name", "__class__"])
async def test_a_sort_key_that_is_none(server: Server, sort: str) -> None:
    with pytest.raises(InvalidValue, match=r"'sort'.*lastUpdated") as caught:
        await page(server, sort=sort)
    assert caught.value.details["key"] == "sort"


async def test_a_cursor_of_another_order_is_refused(server: Server) -> None:
    cursor = (await page(server, limit=1, sort="size")).next_cursor
    for sort in ("-size", "name", "volumeID"):
        with pytest.raises(InvalidValue, match="another 'sort'"):
            await page(server, sort=sort, cursor=cursor)


def cursor_of(value: object) -> str:
    return base64.urlsafe_b64encode(json.dumps(value).encode()).decode()


@pytest.mark.parametrize(
    "cursor",
    [
        "",
        "x",
        "é",
        "!!!!",
        cursor_of({}),
        cursor_of([]),
        cursor_of(["volumeID"]),
        cursor_of(["volumeID", 5, uid(1)]),
        cursor_of(["volumeID", None, uid(1)]),
        cursor_of(["volumeID", ["a"], uid(1)]),
        cursor_of(["size", uid(1), uid(1)]),
    ],
)
async def test_a_cursor_that_is_not_ours_is_refused(server: Server, cursor: str) -> None:
    with pytest.raises(InvalidValue, match="'cursor'"):
        await page(server, cursor=cursor)


volumes = st.lists(st.tuples(st.sampled_from(["a", "b", "é", "", "A"]), st.integers(1, 3), st.booleans()), max_size=9)


@given(volumes, st.sampled_from(SORTS), st.integers(1, 4), st.booleans(), st.text(max_size=12))
@settings(max_examples=60, deadline=None)
def test_the_pages_together_are_the_whole_list_once_in_order(
    made: list[tuple[str, int, bool]], sort: str, limit: int, as_alice: bool, junk: str
) -> None:
    actor = Actor(ALICE) if as_alice else INFRASTRUCTURE

    async def check(root: Path) -> None:
        async with parts(root, state_dir=str(root / "state")) as server:
            whole = await page(server, actor, sort=sort)
            found: list[Volume] = []
            cursor = None
            while True:
                one = await page(server, actor, sort=sort, limit=limit, cursor=cursor)
                assert one.total == whole.total == len(whole.volumes)
                assert len(one.volumes) <= limit
                found += one.volumes
                if one.next_cursor is None:
                    break
                assert len(one.volumes) == limit
                cursor = one.next_cursor
            assert found == whole.volumes
            keys = [(SORT_KEYS[sort.lstrip("-")](volume), volume.volume_id) for volume in found]
            assert keys == sorted(keys, reverse=sort.startswith("-"))
            assert len(set(keys)) == len(keys)
            try:
                await page(server, actor, sort=sort, cursor=junk)
            except InvalidValue:
                pass
            else:
                raise AssertionError(f"{junk!r} passed for a cursor")

    with tempfile.TemporaryDirectory() as directory:
        location = make_location(Path(directory))
        for number, (name, sectors, private) in enumerate(made):
            make_volume(location, uid(number), name=name, size=512 * sectors, private=private, creatorID=BOB)
        asyncio.run(check(Path(directory)))
