"""Commands about volumes, ISOs, seeds and snapshots, against one server."""

from pathlib import Path
from typing import Any

import msgspec
import pytest

from elemento_storage.client import types
from tests.commands import Commands
from tests.live import ALICE, BOB, LiveServer


@pytest.fixture
def alice(running: LiveServer, tmp_path: Path) -> Commands:
    return Commands(running, tmp_path)


def is_of(kind: Any, said: Any) -> None:
    """JSON has exactly the keys that its type has: programs may count on them."""
    for one in said if isinstance(said, list) else [said]:
        assert set(one) == {field.encode_name for field in msgspec.structs.fields(kind)}
        msgspec.convert(one, kind)


def test_a_volumes_life(alice: Commands, running: LiveServer) -> None:
    made = alice.json("volume", "create", "web", "10M", "--format", "qcow2", "--private", "--bus", "scsi")
    is_of(types.Created, made)
    vid = made["vid"]
    listed = alice.json("volume", "list")
    is_of(types.Volume, listed)
    assert [one["volumeID"] for one in listed] == [vid]
    row = alice.text("volume", "list").splitlines()[1].split()
    assert row[:3] == [vid, "web", "10M"]
    assert row[5:7] == ["me", "private"]
    shown = alice.json("volume", "show", "web")
    is_of(types.Volume, shown)
    assert (shown["size"], shown["bus"]) == (10_000_384, "scsi")
    assert "10M (10000384 bytes)" in alice.text("volume", "show", "web")
    is_of(types.Updated, alice.json("volume", "update", "web", "--name", "www", "--public"))
    is_of(types.Resized, alice.json("volume", "resize", "www", "20M"))
    alice.text("volume", "resize", "www", "+5M")
    assert running.info(vid)["size"] == 25_000_448
    is_of(types.Converted, alice.json("volume", "convert", "www", "raw"))
    clone = alice.text("volume", "clone", "www", "--name", "copy", "--private")
    assert running.info(clone)["private"] is True
    sums = [alice.text("volume", "checksum", one) for one in ("www", "copy")]
    assert sums[0] == sums[1]
    is_of(types.Owned, alice.json("volume", "compact", "copy"))
    is_of(types.Owned, alice.json("volume", "reset", "copy", "--yes"))
    assert alice.text("volume", "list", "--name", "c*", "--ids") == clone
    job = alice.json("volume", "convert", "copy", "qcow2", "--no-wait")
    is_of(types.Job, job)
    assert alice.text("job", "wait", job["job"]) == "done"
    is_of(types.Owned, alice.json("volume", "transfer", "copy", BOB))
    assert running.info(clone)["creatorID"] == BOB


def test_destroy_asks_and_restore_brings_back(alice: Commands, running: LiveServer) -> None:
    vid = alice.text("volume", "create", "gone", "1M")
    refused = alice.run("volume", "destroy", "gone", check=2)
    assert "--yes" in refused.stderr
    assert running.info(vid)["name"] == "gone"
    destroyed = alice.json("volume", "destroy", "gone", "--yes")
    is_of(types.Destroyed, destroyed)
    binned = alice.json("volume", "bin")
    is_of(types.Binned, binned)
    assert vid in alice.text("volume", "bin")
    is_of(types.Volume, alice.json("volume", "restore", vid))


def test_a_name_that_several_have_is_no_name(alice: Commands) -> None:
    ids = [alice.text("volume", "create", "twin", "1M") for _ in range(2)]
    refused = alice.run("volume", "destroy", "twin", "--yes", check=2)
    assert all(one in refused.stderr for one in ids)
    assert "is a pattern" in alice.run("volume", "destroy", "t*", "--yes", check=2).stderr
    assert "no volume is called" in alice.run("volume", "show", "nobody", check=2).stderr


def test_names_do_nothing_to_a_terminal(alice: Commands) -> None:
    alice.text("volume", "create", "evil\x1b[2J\nid", "1M")
    said = alice.text("volume", "list", "--name", "evil*")
    assert "\x1b" not in said
    assert len(said.splitlines()) == 2


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (("volume", "show", "1" * 32), 4, "volume list"),
        (("volume", "create", "x", "much"), 2, "is not a size"),
        (("volume", "create", "x", "0"), 2, "greater than 0"),
        (("volume", "create", "x"), 2, "how large"),
        (("volume", "create", "x", "1M", "--bootable", "--shareable"), 2, "bootable"),
        (("volume", "create", "x", "100000T"), 8, "location list"),
        (("volume", "update", "1" * 32), 2, "what to change"),
        (("volume", "transfer", "1" * 32, "bob"), 2, "no id"),
        (("nonsense",), 2, "No such command"),
    ],
)
def test_errors_say_what_to_try(alice: Commands, words: tuple[str, ...], code: int, told: str) -> None:
    refused = alice.run(*words, check=code)
    assert told in refused.stderr
    assert refused.stdout == ""
    assert "Traceback" not in refused.stderr


def test_states_and_owners_have_codes_of_their_own(alice: Commands, running: LiveServer, tmp_path: Path) -> None:
    alice.text("volume", "create", "grown", "2M")
    assert "only grows" in alice.run("volume", "resize", "grown", "1M", check=6).stderr
    bob = Commands(running, tmp_path, BOB)
    vid = alice.text("volume", "list", "--name", "grown", "--ids")
    assert "--client" in bob.run("volume", "destroy", vid, "--yes", check=5).stderr


def test_the_iso_library(alice: Commands, tmp_path: Path) -> None:
    iso = alice.json("iso", "create", "drivers", "--type", "tool", "--os-family", "windows", "--size", "1M")
    is_of(types.CreatedIso, iso)
    is_of(types.Volume, alice.json("iso", "list", "--type", "tool"))
    assert "waiting" in alice.text("iso", "list")
    assert "--file or --url" in alice.run("iso", "fill", "drivers", check=2).stderr
    (tmp_path / "no.iso").write_bytes(b"not an image" * 1000)
    assert alice.run("iso", "fill", "drivers", "--file", tmp_path / "no.iso", check=None).returncode in (2, 11)


def test_seeds(alice: Commands, tmp_path: Path) -> None:
    (tmp_path / "user-data").write_text("nonsense\n")
    made = alice.run("cloudinit", "seed", "seed", tmp_path / "user-data")
    assert "warning: " in made.stderr
    (tmp_path / "user-data").write_text("#cloud-config\n")
    said = alice.json("cloudinit", "add", made.stdout.strip(), tmp_path / "user-data")
    is_of(types.Metadata, said)
    assert (said["files"], said["warnings"]) == (["user-data"], [])


def test_snapshots(alice: Commands) -> None:
    alice.text("volume", "create", "kept", "1M", "--format", "qcow2")
    made = alice.json("snapshot", "create", "kept", "--name", "first", "--description", "before")
    is_of(types.Snapshot, made)
    listed = alice.json("snapshot", "list", "kept")
    is_of(types.Snapshot, listed)
    assert made["snapshot"] in alice.text("snapshot", "list", "kept")
    assert "1 snapshot" in alice.text("volume", "list", "--name", "kept")
    assert "--keep" in alice.run("snapshot", "restore", "kept", made["snapshot"], check=2).stderr
    is_of(types.SnapshotRestored, alice.json("snapshot", "restore", "kept", made["snapshot"], "--keep"))
    is_of(types.Created, alice.json("snapshot", "clone", "kept", made["snapshot"], "--name", "then", "--format", "raw"))
    is_of(types.SnapshotDeleted, alice.json("snapshot", "delete", "kept", made["snapshot"], "--yes"))


def test_a_thousand_volumes_are_listed_in_half_a_second(alice: Commands, running: LiveServer) -> None:
    body = [{"creatorID": ALICE, "name": f"many-{number}", "size": 0.001} for number in range(100)]
    for _ in range(10):
        running.call("create/multiple", {"volumes": body})
    assert len(alice.json("volume", "list", "--name", "many-*")) == 1000
    assert len(alice.text("volume", "list", "--name", "many-*").splitlines()) == 1001


def test_backups(alice: Commands) -> None:
    alice.text("volume", "create", "saved", "1M", "--format", "qcow2")
    made = alice.json("backup", "create", "saved", "--name", "first")
    is_of(types.Backup, made)
    assert made["backup"] in alice.text("backup", "list", "saved")
    assert alice.text("backup", "verify", made["backup"]) == f"{made['backup']} is whole"
    is_of(types.Volume, alice.json("backup", "restore", made["backup"], "--name", "again"))
    assert "--yes" in alice.run("backup", "restore", made["backup"], "--over", "saved", check=2).stderr
    is_of(types.Schedule, alice.json("backup", "schedule", "saved", "24h", "--at", "02:30", "--keep", "7"))
    assert "24h" in alice.text("backup", "schedules")
    alice.text("backup", "schedule", "saved", "off")
    is_of(types.BackupDeleted, alice.json("backup", "delete", made["backup"], "--yes"))
