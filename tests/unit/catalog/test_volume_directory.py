import json
import os
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elemento_storage.catalog.volume_directory import (
    Entry,
    OddDirectory,
    VolumeVanished,
    finish_staging,
    image_size,
    publish,
    read_entry,
    read_format,
    read_image_size,
    refresh_entry,
    rewrite_meta,
    take_back,
)
from elemento_storage.model import Bus, CloneAlgorithm, IsoInfo, VolumeFormat, VolumeMeta, marker_name
from tests.unit.support import ALICE, BOB, age, make_volume, qemu_img, uid

VID = uid(7)
LEASE_S = 30.0


def read(location: Path, volume_id: str = VID) -> Entry:
    return read_entry(str(location), "disk", volume_id, lease_s=LEASE_S)


def refresh(entry: Entry, location: Path) -> Entry:
    return refresh_entry(entry, str(location), lease_s=LEASE_S)


def meta_of(directory: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((directory / "meta.json").read_text())
    return values


# -- reading -----------------------------------------------------------------------------------------------


def test_a_volume_as_the_documents_server_wrote_it(tmp_path: Path) -> None:
    make_volume(
        tmp_path, VID, size=4096, name="test", private=True, bootable=True, readonly=True, shareable=False,
        clonable=False, alg="no", bus="sata", cloudinit=True, ceph=False,
    )  # fmt: skip
    volume = read(tmp_path).volume
    assert (volume.volume_id, volume.location, volume.size_bytes) == (VID, "disk", 4096)
    meta = volume.meta
    assert (meta.volume_id, meta.creator_id, meta.name, meta.size) == (VID, ALICE, "test", 4096)
    assert (meta.private, meta.bootable, meta.readonly, meta.shareable) == (True, True, True, False)
    assert (meta.clonable, meta.alg, meta.bus) == (False, CloneAlgorithm.NO, Bus.SATA)
    assert (meta.cloudinit, meta.ceph, volume.exported) == (True, False, False)


def test_missing_keys_take_the_defaults_of_the_contract(tmp_path: Path) -> None:
    directory = make_volume(tmp_path, VID, size=1024)
    (directory / "meta.json").write_text("{}")
    entry = read(tmp_path)
    meta = entry.volume.meta
    assert meta.format is VolumeFormat.RAW
    flags = (meta.private, meta.bootable, meta.readonly, meta.shareable, meta.clonable, meta.cloudinit, meta.ceph)
    assert flags == (False, False, False, False, True, False, False)
    assert (meta.alg, meta.bus, meta.name, meta.creator_id) == (CloneAlgorithm.CP, Bus.VIRTIO, "", "")
    assert entry.volume.size_bytes == 1024
    assert (entry.claimed_bytes, entry.claimed_id) == (None, "")


@pytest.mark.parametrize("image_format", [VolumeFormat.RAW, VolumeFormat.QCOW2, VolumeFormat.ISO])
def test_the_size_is_what_the_image_says(tmp_path: Path, image_format: VolumeFormat) -> None:
    directory = make_volume(tmp_path, VID, size=1 << 20, image_format=image_format)
    rewrite_meta(str(directory), {"size": 5})
    entry = read(tmp_path)
    assert entry.volume.size_bytes == 1 << 20
    assert entry.claimed_bytes == 5


def test_rbd_is_also_spelt_rdb_and_has_no_image_to_ask(tmp_path: Path) -> None:
    make_volume(tmp_path, VID, size=5000, image_format=VolumeFormat.RBD, data=b"", format="rdb")
    volume = read(tmp_path).volume
    assert (volume.meta.format, volume.size_bytes) == (VolumeFormat.RBD, 5000)


def test_an_owner_in_another_spelling_is_the_same_owner(tmp_path: Path) -> None:
    make_volume(tmp_path, VID, creatorID="AAAAAAAA-AAAA-AAAA-AAAA-AAAAAAAAAAAA")
    assert read(tmp_path).volume.meta.creator_id == ALICE
    make_volume(tmp_path, uid(8), creatorID="not a uid")
    assert read(tmp_path, uid(8)).volume.meta.creator_id == "not a uid"


def test_size_on_disk_is_what_is_really_occupied(tmp_path: Path) -> None:
    sparse = make_volume(tmp_path, VID, size=1 << 20)
    assert read(tmp_path).volume.allocated_bytes == 0
    with (sparse / "data.img").open("r+b") as file:
        file.write(b"x" * 8192)
        file.flush()
        os.fsync(file.fileno())
    assert read(tmp_path).volume.allocated_bytes == 8192
    make_volume(tmp_path, uid(8), data=b"x" * 100)
    assert read(tmp_path, uid(8)).volume.allocated_bytes == 100, "never more than the file's length"


def test_last_updated_is_the_images_mtime(tmp_path: Path) -> None:
    directory = make_volume(tmp_path, VID)
    os.utime(directory / "data.img", ns=(0, 1_234_567_890_123_456_789))
    assert read(tmp_path).volume.modified_ns == 1_234_567_890_123_456_789


def test_locks_markers_and_leftovers_are_seen(tmp_path: Path) -> None:
    directory = make_volume(tmp_path, VID)
    entry = read(tmp_path)
    assert (entry.volume.locks, entry.volume.markers, entry.leftovers) == ((), (), False)
    marker = marker_name(ALICE, VID)
    for name in (f"elemento.resize.{uid(2)}.ignore", f"elemento.convert.{uid(1)}.ignore", marker, ".elemento-tmp-1"):
        (directory / name).write_text("")
    (directory / "user-file").write_text("")
    entry = read(tmp_path)
    assert entry.volume.locks == (f"elemento.convert.{uid(1)}.ignore", f"elemento.resize.{uid(2)}.ignore")
    assert entry.volume.markers == (marker,)
    assert entry.leftovers


def test_exported_means_a_marker_that_is_not_stale(tmp_path: Path) -> None:
    directory = make_volume(tmp_path, VID)
    first, second = directory / marker_name(ALICE, VID), directory / marker_name(BOB, VID)
    first.write_text("{}")
    assert read(tmp_path).volume.exported
    age(first)
    assert not read(tmp_path).volume.exported
    second.write_text("{}")
    assert read(tmp_path).volume.exported


def test_what_an_iso_is(tmp_path: Path) -> None:
    directory = make_volume(tmp_path, VID, image_format=VolumeFormat.ISO)
    assert read(tmp_path).volume.iso is None
    (directory / "isoinfo.json").write_text('{"isotype": "os_generic", "os_family": "linux", "os_version": 12.9}')
    assert read(tmp_path).volume.iso == IsoInfo(iso_type="os_generic", os_family="linux", os_version="12.9")
    (directory / "isoinfo.json").write_text('{"isotype": 5}')
    assert read(tmp_path).volume.iso == IsoInfo(iso_type="5")
    for odd in ("[]", "{", "null", "[" * 10_000, "\xff"):
        (directory / "isoinfo.json").write_text(odd, encoding="latin-1")
        assert read(tmp_path).volume.iso is None


@pytest.mark.parametrize("first", ['{"isotype": "tool"}', "broken"])
def test_an_isoinfo_that_is_edited_in_place_is_read_again(tmp_path: Path, first: str) -> None:
    directory = make_volume(tmp_path, VID, image_format=VolumeFormat.ISO)
    (directory / "isoinfo.json").write_text(first)
    age(directory)
    entry = read(tmp_path)
    assert refresh(entry, tmp_path) is entry
    (directory / "isoinfo.json").write_text('{"isotype": "tool", "scope": "drivers"}')
    os.utime(directory / "isoinfo.json", (1_000_000_000, 1_000_000_000))  # as a copying tool may do
    os.utime(directory, (1_000_000_000, 1_000_000_000))
    assert refresh(entry, tmp_path).volume.iso == IsoInfo(iso_type="tool", tool_scope="drivers")


def test_an_isoinfo_of_another_kind_of_volume_is_not_looked_at(tmp_path: Path) -> None:
    directory = make_volume(tmp_path, VID)
    (directory / "isoinfo.json").write_text('{"isotype": "tool"}')
    entry = read(tmp_path)
    assert entry.volume.iso is None
    assert entry.iso_identity is None


def test_an_iso_without_content_waits(tmp_path: Path) -> None:
    directory = make_volume(tmp_path, VID, image_format=VolumeFormat.ISO, size=1 << 30)
    assert read(tmp_path).volume.waiting
    (directory / "data.iso").write_bytes(b"x" * 40_000)
    assert not read(tmp_path).volume.waiting
    make_volume(tmp_path, uid(8), size=1 << 30)
    assert not read(tmp_path, uid(8)).volume.waiting


def test_the_digest_changes_with_meta_json_and_with_nothing_else(tmp_path: Path) -> None:
    directory = make_volume(tmp_path, VID, name="one")
    digest = read(tmp_path).volume.meta_digest
    (directory / "data.img").write_bytes(b"x" * 512)
    (directory / "elemento.a.b.ignore").write_text("")
    assert read(tmp_path).volume.meta_digest == digest
    rewrite_meta(str(directory), {"name": "two"})
    assert read(tmp_path).volume.meta_digest != digest


# -- what is not a volume ----------------------------------------------------------------------------------


def test_no_directory_at_all_has_vanished(tmp_path: Path) -> None:
    with pytest.raises(VolumeVanished):
        read(tmp_path)


def test_what_looks_like_a_volume_and_is_not(tmp_path: Path) -> None:
    path = tmp_path / f"vid.{VID}.elimg"
    path.write_text("a file")
    with pytest.raises(OddDirectory, match="not a directory"):
        read(tmp_path)
    path.unlink()
    make_volume(tmp_path / "elsewhere", VID)
    path.symlink_to(tmp_path / "elsewhere" / path.name)
    with pytest.raises(OddDirectory, match="not a directory"):
        read(tmp_path)
    path.unlink()
    path.mkdir()
    with pytest.raises(OddDirectory, match=r"meta\.json is missing"):
        read(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xff",
        b'{"format": "vmdk"}',
        b'{"private": "yes"}',
        b'{"name": 5}',
        b'{"alg": "magic"}',
        b'{"size": "1G"}',
        b"[" * 100_000,
        b'{"x": ' + b"[" * 100_000,
    ],
    ids=lambda content: repr(content[:24]),
)
def test_meta_json_that_cannot_be_believed(tmp_path: Path, content: bytes) -> None:
    directory = make_volume(tmp_path, VID)
    (directory / "meta.json").write_bytes(content)
    with pytest.raises(OddDirectory, match=r"meta\.json"):
        read(tmp_path)
    assert (directory / "meta.json").read_bytes() == content


def test_meta_json_that_is_no_small_regular_file(tmp_path: Path) -> None:
    directory = make_volume(tmp_path, VID)
    meta = directory / "meta.json"
    meta.rename(directory / "real.json")
    meta.symlink_to("real.json")
    with pytest.raises(OddDirectory, match="cannot be opened"):
        read(tmp_path)
    meta.unlink()
    os.mkfifo(meta)
    with pytest.raises(OddDirectory, match="not a regular file"):
        read(tmp_path)
    meta.unlink()
    with meta.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(OddDirectory, match="bytes"):
        read(tmp_path)


def test_data_that_is_missing_or_no_file(tmp_path: Path) -> None:
    directory = make_volume(tmp_path, VID)
    (directory / "data.img").rename(directory / "data.qcow2")
    with pytest.raises(OddDirectory, match=r"data\.img is missing"):
        read(tmp_path)
    (directory / "data.img").symlink_to("data.qcow2")
    with pytest.raises(OddDirectory, match=r"data\.img is not a regular file"):
        read(tmp_path)
    (directory / "data.img").unlink()
    os.mkfifo(directory / "data.img")
    with pytest.raises(OddDirectory, match=r"data\.img is not a regular file"):
        read(tmp_path)


def test_a_qcow2_that_is_none_or_needs_another_file(tmp_path: Path) -> None:
    directory = make_volume(tmp_path, VID, image_format=VolumeFormat.QCOW2, data=b"raw bytes" * 100)
    with pytest.raises(OddDirectory, match="does not start like a qcow2"):
        read(tmp_path)
    (directory / "data.qcow2").unlink()
    base = tmp_path / "base"
    base.write_bytes(b"\0" * 512)
    qemu_img("create", "-q", "-f", "qcow2", "-F", "raw", "-b", str(base), str(directory / "data.qcow2"))
    with pytest.raises(OddDirectory, match="backing file"):
        read(tmp_path)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=3,
)
meta_keys = ["volumeID", "creatorID", "size", "name", "format", "private", "clonable", "alg", "bus", "ceph", "other"]


@given(st.binary(max_size=60) | st.dictionaries(st.sampled_from(meta_keys), json_values).map(
    lambda values: json.dumps(values).encode()))  # fmt: skip
def test_any_meta_json_is_a_volume_or_odd(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    location = tmp_path_factory.getbasetemp() / "metas"
    directory = location / f"vid.{VID}.elimg"
    if not directory.exists():
        make_volume(location, VID)
    (directory / "meta.json").write_bytes(content)
    try:
        assert read(location).volume.size_bytes == 512
    except OddDirectory as error:
        assert "meta.json" in str(error) or "data." in str(error)


# -- refreshing --------------------------------------------------------------------------------------------


def settled(location: Path, **meta: Any) -> Entry:
    """A volume that nobody has touched for long."""
    age(make_volume(location, VID, **meta))
    return read(location)


def test_nothing_changed_gives_the_entry_itself(tmp_path: Path) -> None:
    entry = settled(tmp_path)
    assert refresh(entry, tmp_path) is entry


def test_what_is_young_is_read_again_because_its_mtime_proves_nothing(tmp_path: Path) -> None:
    """Two changes within one tick of the file system's clock leave the same mtime."""
    directory = make_volume(tmp_path, VID, name="one")
    entry = read(tmp_path)
    identity = (directory / "meta.json").stat()
    (directory / "meta.json").write_text((directory / "meta.json").read_text().replace("one", "two"))
    os.utime(directory / "meta.json", ns=(identity.st_atime_ns, identity.st_mtime_ns))
    assert refresh(entry, tmp_path).volume.meta.name == "two"


def test_a_changed_meta_json_is_noticed(tmp_path: Path) -> None:
    entry = settled(tmp_path)
    rewrite_meta(str(tmp_path / f"vid.{VID}.elimg"), {"name": "new", "private": True})
    volume = refresh(entry, tmp_path).volume
    assert (volume.meta.name, volume.meta.private) == ("new", True)
    assert volume.meta_digest != entry.volume.meta_digest


def test_a_new_lock_or_marker_is_noticed(tmp_path: Path) -> None:
    entry = settled(tmp_path)
    directory = tmp_path / f"vid.{VID}.elimg"
    (directory / "elemento.a.b.ignore").write_text("")
    (directory / marker_name(ALICE, VID)).write_text("")
    volume = refresh(entry, tmp_path).volume
    assert volume.locks == ("elemento.a.b.ignore",)
    assert volume.exported


def test_an_image_that_grew_or_was_written_is_noticed(tmp_path: Path) -> None:
    entry = settled(tmp_path, size=1 << 20)
    data = tmp_path / f"vid.{VID}.elimg" / "data.img"
    with data.open("r+b") as file:
        file.write(b"x" * 4096)
        file.flush()
        os.fsync(file.fileno())
        file.truncate(2 << 20)
    volume = refresh(entry, tmp_path).volume
    assert (volume.size_bytes, volume.allocated_bytes) == (2 << 20, 4096)
    assert volume.modified_ns > entry.volume.modified_ns


def test_an_export_that_goes_stale_or_alive_is_noticed_without_any_change(tmp_path: Path) -> None:
    directory = make_volume(tmp_path, VID)
    marker = directory / marker_name(ALICE, VID)
    marker.write_text("")
    age(directory)
    os.utime(marker)
    entry = read(tmp_path)
    assert entry.volume.exported
    age(marker)
    entry = refresh(entry, tmp_path)
    assert not entry.volume.exported
    os.utime(marker)
    assert refresh(entry, tmp_path).volume.exported


def test_what_became_of_a_volume_that_is_none_any_more(tmp_path: Path) -> None:
    entry = settled(tmp_path)
    directory = tmp_path / f"vid.{VID}.elimg"
    (directory / "data.img").unlink()
    with pytest.raises(OddDirectory, match=r"data\.img"):
        refresh(entry, tmp_path)
    (directory / "meta.json").unlink()
    with pytest.raises(OddDirectory, match=r"meta\.json"):
        refresh(entry, tmp_path)
    directory.rmdir()
    with pytest.raises(VolumeVanished):
        refresh(entry, tmp_path)


def test_refresh_says_what_a_fresh_read_says(tmp_path: Path) -> None:
    entry = settled(tmp_path)
    directory = tmp_path / f"vid.{VID}.elimg"
    rewrite_meta(str(directory), {"name": "b"})
    (directory / "elemento.x.y.ignore").write_text("")
    assert refresh(entry, tmp_path).volume == read(tmp_path).volume


# -- writing -----------------------------------------------------------------------------------------------


def test_rewrite_keeps_keys_that_are_not_ours(tmp_path: Path) -> None:
    others: dict[str, Any] = {"vendor": {"deep": [1, 2.5, None, True]}, "größe": "\u2028 ü", "big": 2**80, "": "empty"}
    directory = make_volume(tmp_path, VID, **others)
    before = meta_of(directory)
    rewrite_meta(str(directory), {"name": "new", "bus": Bus.IDE})
    assert meta_of(directory) == {**before, "name": "new", "bus": "ide"}
    assert meta_of(directory)["big"] == 2**80


@pytest.mark.parametrize("text", ["1e400", "0.1000000000000000055511151231257827", "1" * 5000, "1.10", "-0"])
def test_rewrite_keeps_numbers_that_no_type_can_hold(tmp_path: Path, text: str) -> None:
    directory = make_volume(tmp_path, VID)
    meta = directory / "meta.json"
    meta.write_text(meta.read_text().replace("}", f', "x": {text}}}'))
    rewrite_meta(str(directory), {"name": "new"})
    assert read(tmp_path).volume.meta.name == "new"
    assert f'"x":{text}' in meta.read_text()


def test_rewrite_keeps_mode_and_owner(tmp_path: Path) -> None:
    directory = make_volume(tmp_path, VID)
    (directory / "meta.json").chmod(0o640)
    os.chown(directory / "meta.json", 1234, 5678)
    rewrite_meta(str(directory), {"name": "new"})
    status = (directory / "meta.json").stat()
    assert (status.st_mode & 0o777, status.st_uid, status.st_gid) == (0o640, 1234, 5678)


def test_rewrite_is_one_line_and_leaves_no_other_file(tmp_path: Path) -> None:
    directory = make_volume(tmp_path, VID)
    rewrite_meta(str(directory), {"name": "a\nb"})
    assert "\n" not in (directory / "meta.json").read_text()
    assert sorted(os.listdir(directory)) == ["data.img", "meta.json"]
    assert read(tmp_path).volume.meta.name == "a\nb"


def test_publish_makes_a_whole_volume(tmp_path: Path) -> None:
    staging = tmp_path / "staging"
    staging.mkdir()
    (staging / "data.img").write_bytes(b"\0" * 1024)
    meta = VolumeMeta(volume_id=VID, creator_id=ALICE, size=1024, name="é", private=True, bus=Bus.SCSI)
    expected = finish_staging(str(staging), "disk", meta)
    assert sorted(os.listdir(tmp_path)) == ["staging"], "nobody sees it yet"
    publish(str(staging), str(tmp_path), VID)
    assert not staging.exists()
    assert read(tmp_path) == expected, "nothing has to be read back"
    assert expected.volume.meta == meta
    told = meta_of(tmp_path / f"vid.{VID}.elimg")
    assert set(told) == {
        "volumeID", "creatorID", "size", "name", "format", "private", "bootable", "readonly", "shareable", "clonable",
        "alg", "bus", "cloudinit", "ceph",
    }  # fmt: skip
    assert "\n" not in (tmp_path / f"vid.{VID}.elimg" / "meta.json").read_text()


def test_publish_never_replaces_a_volume(tmp_path: Path) -> None:
    make_volume(tmp_path, VID, name="precious")
    staging = tmp_path / "staging"
    staging.mkdir()
    with pytest.raises(OSError, match="not empty"):
        publish(str(staging), str(tmp_path), VID)
    assert read(tmp_path).volume.meta.name == "precious"


def test_what_was_published_can_be_taken_back(tmp_path: Path) -> None:
    staging = tmp_path / "staging"
    staging.mkdir()
    (staging / "data.img").write_bytes(b"\0" * 512)
    finish_staging(str(staging), "disk", VolumeMeta(volume_id=VID))
    publish(str(staging), str(tmp_path), VID)
    take_back(str(staging), str(tmp_path), VID)
    assert os.listdir(tmp_path) == ["staging"]
    publish(str(staging), str(tmp_path), VID)
    assert read(tmp_path).volume.size_bytes == 512


def test_format_and_size_straight_from_the_disk(tmp_path: Path) -> None:
    directory = make_volume(tmp_path, VID, size=1 << 20, image_format=VolumeFormat.QCOW2)
    assert read_format(str(directory)) is VolumeFormat.QCOW2
    assert read_image_size(str(directory)) == image_size(str(directory), VolumeFormat.QCOW2) == 1 << 20
    (directory / "meta.json").write_text("{")
    with pytest.raises(OddDirectory):
        read_format(str(directory))


def test_a_volume_read_from_another_directory_name(tmp_path: Path) -> None:
    directory = make_volume(tmp_path, VID, name="binned")
    (tmp_path / "elemento-bin").mkdir()
    directory.rename(tmp_path / "elemento-bin" / "somewhere")
    entry = read_entry(str(tmp_path), "disk", VID, lease_s=LEASE_S, directory_name="elemento-bin/somewhere")
    assert (entry.volume.meta.name, entry.volume.volume_id) == ("binned", VID)


def test_meta_survives_its_own_json() -> None:
    meta = VolumeMeta(volume_id=VID, size=512, alg=CloneAlgorithm.NO, clonable=False, format=VolumeFormat.ISO)
    assert msgspec.json.decode(msgspec.json.encode(meta), type=VolumeMeta) == meta
