"""Backups of a launched server, and what they have to hold."""

import subprocess
from pathlib import Path
from typing import Any

from elemento_storage.catalog import backup_directory as store
from tests.clients import QemuIo, eventually
from tests.exporting import MIB, client_of, export, new_volume, unexport
from tests.live import ALICE, LiveServer

KIB = 1 << 10


class Guest:
    """A volume, and what its guest believes it holds."""

    def __init__(self, server: LiveServer, mebibytes: int = 8, owner: str = ALICE, **more: Any) -> None:
        self.server = server
        self.owner = owner
        self.vid = new_volume(server, mebibytes, owner=owner, **more)
        self.believes = bytearray(mebibytes * MIB)
        self._client: QemuIo | None = None

    @classmethod
    def of(cls, made: dict[str, Any], source: "Guest") -> "Guest":
        """A volume that was made of another one, as its maker answered."""
        self = cls.__new__(cls)
        self.server, self.owner, self.vid = source.server, source.owner, str(made["vid"])
        self.believes = bytearray(source.believes)
        self._client = None
        return self

    def power_on(self, protocol: str = "local") -> "Guest":
        """Export and attach."""
        self._client = client_of(export(self.server, self.vid, self.owner, protocol=protocol))
        return self

    def power_off(self) -> "Guest":
        self.let_go()
        unexport(self.server, self.vid, self.owner)
        return self

    def let_go(self) -> None:
        """The client's program ends; the export stays."""
        if self._client is not None:
            self._client.kill()
            self._client = None

    @property
    def client(self) -> QemuIo:
        assert self._client is not None
        return self._client

    def write(self, offset: int, length: int, pattern: int) -> "Guest":
        """As a guest does that is on, and on the image itself otherwise."""
        if self._client is not None:
            self._client.write(offset, length, pattern)
        else:
            path = next(self.server.directory(self.vid).glob("data.*"))
            argv = ["qemu-io", "-f", "raw" if path.suffix == ".img" else "qcow2"]
            command = f"write -P {pattern} {offset} {length}"
            subprocess.run([*argv, "-c", command, str(path)], check=True, capture_output=True)
        self.believes[offset : offset + length] = bytes([pattern]) * length
        return self

    def discard(self, offset: int, length: int) -> "Guest":
        """What the guest does not need any more; it reads zeros then, on all formats that are used here."""
        self.client.succeed(f"write -z -u {offset} {length}")
        self.client.flush()
        self.believes[offset : offset + length] = bytes(length)
        return self

    def back_up(self, mode: str = "auto", **more: Any) -> "Copy":
        """A backup, and what it has to hold."""
        body = {"vid": self.vid, "creatorID": self.owner, "mode": mode, **more}
        return Copy(self, self.server.call("backups/create", body), bytes(self.believes))


class Copy:
    """A backup, and what it has to hold."""

    def __init__(self, guest: Guest, answer: dict[str, Any], holds: bytes) -> None:
        self.guest = guest
        self.answer = answer
        self.holds = holds

    @property
    def uid(self) -> str:
        return str(self.answer["backup"])

    @property
    def directory(self) -> Path:
        server = self.guest.server
        path = server.root / str(self.answer["location"]) / store.BACKUP_DIRECTORY / self.guest.vid / self.uid
        assert path.is_dir(), path
        return path

    @property
    def image(self) -> Path:
        return self.directory / store.DATA_FILE

    def assert_holds(self, scratch: Path) -> None:
        """The first half of ``assert_right``."""
        assert content(self.image, scratch) == self.holds

    def assert_right(self, scratch: Path) -> None:
        """What it holds, read from the image and from a volume that is made of it."""
        self.assert_holds(scratch)
        server = self.guest.server
        restored = server.call("backups/restore", {"backup": self.uid, "creatorID": self.guest.owner})
        try:
            assert volume_content(server, restored["volumeID"], scratch, restored["location"]) == self.holds
        finally:
            server.call("destroy", {"volume_id": restored["volumeID"]})


def assert_right(copies: list[Copy], scratch: Path) -> None:
    """Each image, and the volume that is made of the last one."""
    for copy in copies:
        copy.assert_holds(scratch)
    copies[-1].assert_right(scratch)


def content(image: Path, scratch: Path) -> bytes:
    """What a guest would see in a qcow2 image."""
    raw = scratch / "content.raw"
    argv = ["qemu-img", "convert", "-U", "-f", "qcow2", "-O", "raw", str(image), str(raw)]
    subprocess.run(argv, check=True, capture_output=True)
    found = raw.read_bytes()
    raw.unlink()
    return found


def volume_content(server: LiveServer, vid: str, scratch: Path, location: str = "disk") -> bytes:
    """The same of a volume that nobody has open."""
    [data] = server.directory(vid, location).glob("data.*")
    return data.read_bytes() if data.suffix == ".img" else content(data, scratch)


def backups_of(server: LiveServer, vid: str, owner: str = ALICE) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = server.call("backups", {"client_uid": owner, "vid": vid})
    return found


def bitmaps(server: LiveServer, vid: str) -> list[str]:
    """Names of the bitmaps in an image that nobody has open."""
    import json  # noqa: PLC0415

    path = server.directory(vid) / "data.qcow2"
    said = subprocess.run(["qemu-img", "info", "--output=json", str(path)], check=True, capture_output=True)
    data = json.loads(said.stdout)["format-specific"]["data"]
    return [one["name"] for one in data.get("bitmaps", [])]


def store_of(server: LiveServer, vid: str, location: str = "disk") -> Path:
    return Path(store.store_path(str(server.root / location), vid))


def assert_nothing_left(server: LiveServer, vid: str) -> None:
    """Of a backup that came to nothing, or is over."""
    eventually(lambda: "locked" not in server.info(vid))
    directory = server.directory(vid)
    assert [one.name for one in directory.iterdir() if one.name.startswith(".")] == []
    directories = [one for one in server.root.glob(f"*/{store.BACKUP_DIRECTORY}/{vid}/*") if one.is_dir()]
    eventually(lambda: all((one / store.RECORD_FILE).exists() for one in directories if one.exists()))
