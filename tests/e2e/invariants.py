"""What must hold after every crash, looked at from outside: through the API and with plain file tools."""

import subprocess
from pathlib import Path

from tests.live import LiveServer

PATTERN_BYTES = 65536


def assert_clean(server: LiveServer, location: str = "disk") -> None:
    """Nothing half made is left, nothing is locked, the totals are exact, and rescan has nothing to report."""
    path = server.root / location
    assert list((path / ".elemento" / "staging").iterdir()) == []
    leftovers = [
        item
        for volume in path.glob("vid.*.elimg")
        for item in volume.iterdir()
        if item.name.startswith(".") or item.name.endswith(".ignore")
    ]
    assert leftovers == []
    report = server.call("rescan")
    assert {key: report[key] for key in ("odd", "differences", "foreign_locks", "added", "removed", "changed")} == {
        "odd": [],
        "differences": [],
        "foreign_locks": [],
        "added": [],
        "removed": [],
        "changed": [],
    }
    directories = {item.name[4:-6] for item in path.glob("vid.*.elimg")}
    facts = {vid: server.info(vid) for vid in directories}
    assert not [volume for volume in facts.values() if "locked" in volume]
    (totals,) = [one for one in server.call("locations") if one["name"] == location]
    assert totals["volumes"] == len(directories)
    assert totals["virtual_bytes"] == sum(volume["size"] for volume in facts.values())
    for vid, volume in facts.items():
        data = [item.name for item in (path / f"vid.{vid}.elimg").glob("data.*")]
        assert data == [f"data.{'img' if volume['format'] == 'raw' else volume['format']}"]


def write_pattern(server: LiveServer, vid: str, seed: int, location: str = "disk") -> bytes:
    """Put bytes into a raw volume, as a guest would have before it was shut down; they are returned."""
    pattern = bytes((seed * 31 + position * 7) % 251 for position in range(256)) * (PATTERN_BYTES // 256)
    with (server.directory(vid, location) / "data.img").open("r+b") as image:
        image.seek(131072)
        image.write(pattern)
    return pattern


def read_pattern(server: LiveServer, vid: str, scratch: Path, location: str = "disk") -> bytes:
    """What a guest would read there, whatever the image format is."""
    (data,) = server.directory(vid, location).glob("data.*")
    raw = data
    if data.suffix == ".qcow2":
        raw = scratch / f"{vid}.raw"
        subprocess.run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", data, raw], check=True)
    with raw.open("rb") as image:
        image.seek(131072)
        return image.read(PATTERN_BYTES)
