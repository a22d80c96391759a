import json
import os
from pathlib import Path
from typing import Any

import pytest

from elemento_storage.errors import ExportFailed
from elemento_storage.exports.nt_hash import md4, nt_hash
from elemento_storage.exports.smb_files import Account, Share, SmbFiles, hosts_pattern, parse_accounts, parse_sections
from elemento_storage.exports.smb_probe import reason
from elemento_storage.exports.smbd import parse_status
from tests.unit.support import uid

FIRST = 1_900_000_000


def share(number: int, *, volume: int = 1, **other: Any) -> Share:
    values: dict[str, Any] = {
        "name": uid(number),
        "volume_id": uid(volume),
        "directory": f"/run/v/{uid(volume)}/view-1",
        "user": f"v{number}",
        "nt_hash": nt_hash(f"secret {number}"),
        "readonly": False,
        "addresses": (),
    }
    return Share(**{**values, **other})


@pytest.fixture
def files(tmp_path: Path) -> SmbFiles:
    made = SmbFiles(str(tmp_path / "smb"), "127.0.0.1", 4450)
    made.make()
    return made


def written(files: SmbFiles) -> dict[str, int]:
    """Inodes: a file that was replaced has another one."""
    return {path: os.stat(path).st_ino for path in (files.conf, files.passwd, files.group, files.conf)}


@pytest.mark.parametrize(
    ("message", "digest"),
    [
        (b"", "31d6cfe0d16ae931b73c59d7e0c089c0"),
        (b"abc", "a448017aaf21d8525fc10ae87aa6729d"),
        (b"abcdefghijklmnopqrstuvwxyz", "d79e1c308aa5bbcdeea8ed63df412da9"),
        (b"1234567890" * 8, "e33b4ddc9c38f2199c3e7b164fcc0536"),
    ],
)
def test_md4_is_that_of_the_rfc(message: bytes, digest: str) -> None:
    assert md4(message).hex() == digest


def test_the_hash_is_that_of_every_windows() -> None:
    assert nt_hash("password") == "8846F7EAEE8FB117AD06BDD830B7586C"
    assert nt_hash("") == "31D6CFE0D16AE931B73C59D7E0C089C0"


def test_a_share_has_its_user_and_its_user_has_a_number(files: SmbFiles) -> None:
    put = files.put(share(1))
    assert put.account == Account(FIRST, FIRST + 1, uid(1))
    assert not put.was_other
    assert files.directories() == {uid(1): f"/run/v/{uid(1)}/view-1"}
    assert files.account_of(uid(1)) == put.account
    assert f"g{uid(1)}:x:{FIRST + 1}:\n" in Path(files.group).read_text()


def test_users_of_a_volume_share_a_group_and_no_number(files: SmbFiles) -> None:
    one, two, other = (files.put(share(n, volume=v)).account for n, v in ((1, 1), (2, 1), (3, 2)))
    assert one.gid == two.gid != other.gid
    assert len({one.uid, two.uid, other.uid, one.gid, other.gid}) == 5


def test_putting_the_same_again_writes_nothing(files: SmbFiles) -> None:
    first = files.put(share(1))
    before = written(files)
    assert files.put(share(1)) == first
    assert written(files) == before


@pytest.mark.parametrize(
    "other",
    [{"directory": "/run/v/view-2"}, {"nt_hash": "0" * 32}, {"readonly": True}, {"addresses": ("10.0.0.1",)}],
    ids=lambda other: str(*other),
)
def test_what_differs_is_replaced_and_told(files: SmbFiles, other: dict[str, Any]) -> None:
    first = files.put(share(1))
    files.put(share(2))
    assert files.would_change(share(1, **other))
    put = files.put(share(1, **other))
    assert put.was_other
    assert put.account == first.account
    assert not files.would_change(share(1, **other))
    assert not files.put(share(1, **other)).was_other
    assert not files.would_change(share(3))
    assert sorted(files.shares()) == [uid(1), uid(2)]


def test_what_somebody_else_did_to_the_files_is_mended(files: SmbFiles) -> None:
    files.put(share(1))
    good = {path: Path(path).read_text() for path in written(files)}
    Path(files.passwd).write_text("nonsense\n::::::\nv1:x:ten:20:::\n")
    put = files.put(share(1))
    assert put.was_other
    assert {path: Path(path).read_text() for path in written(files)} == good
    Path(files.conf).write_text("[global]\n    guest ok = yes\n")
    assert not files.is_current
    files.make()
    assert files.is_current


def test_a_share_that_goes_takes_its_user_and_hash_along(files: SmbFiles, tmp_path: Path) -> None:
    files.put(share(1))
    files.put(share(2, volume=2))
    files.remove(uid(1))
    files.remove(uid(1))
    assert list(files.shares()) == [uid(2)]
    assert list(files.accounts()) == ["v2"]
    assert uid(1) not in Path(files.group).read_text()
    assert [line.split(":")[0] for line in (tmp_path / "smb" / "smbpasswd").read_text().splitlines()] == ["v2"]
    assert files.account_of(uid(1)) is None


def test_secrets_are_for_root_alone(files: SmbFiles, tmp_path: Path) -> None:
    files.put(share(1))
    closed = {one.name for one in (tmp_path / "smb").iterdir() if one.is_file() and not one.stat().st_mode & 0o077}
    assert closed == {"smb.conf", "smbpasswd"}


def test_who_may_come_from_where(files: SmbFiles) -> None:
    files.put(share(1, addresses=("10.1.0.0/16", "2001:db8::/64", "192.0.2.7/32")))
    section = files.shares()[uid(1)]
    assert "hosts allow = 10.1.0.0/255.255.0.0 [2001:db8::]/ffff:ffff:ffff:ffff:: 192.0.2.7 127.0.0.1\n" in section
    assert "hosts deny = ALL\n" in section
    assert hosts_pattern("::1") == "::1"


def test_another_port_is_another_configuration(files: SmbFiles) -> None:
    other = SmbFiles(files.directory, "127.0.0.1", 4451)
    assert files.is_current
    assert not other.is_current


def test_a_directory_that_samba_would_misunderstand() -> None:
    assert SmbFiles("/run/elemento-storage/smb", "::1", 1).is_path_safe
    assert not SmbFiles("/run/100%U/smb", "::1", 1).is_path_safe
    assert not SmbFiles("/run/with space/smb", "::1", 1).is_path_safe


def test_files_that_are_not_there_say_nothing(tmp_path: Path) -> None:
    files = SmbFiles(str(tmp_path / "none"), "::1", 1)
    assert not files.shares()
    assert not files.accounts()
    assert not files.is_current
    assert parse_sections("") == parse_sections("no section\n") == {}
    assert parse_accounts("root:x:0:0::/:/bin/false\nbroken\n") == {}


STATUS = {
    "timestamp": "2026-01-01T00:00:00.000000+0000",
    "sessions": {
        "1": {"session_id": "1", "server_id": {"pid": "100", "task_id": "0"}, "uid": FIRST, "username": "x"},
        "2": {"session_id": "2", "server_id": {"pid": "200", "task_id": "0"}, "uid": FIRST + 2},
        "3": {"session_id": "3", "server_id": {"pid": "300", "task_id": "0"}, "uid": 4294967295},
    },
    "tcons": {
        "7": {"service": uid(1), "server_id": {"pid": "100"}, "machine": "127.0.0.1"},
        "8": {"service": uid(1), "server_id": {"pid": "200"}},
        "9": {"service": "IPC$", "server_id": {"pid": "200"}},
    },
    "open_files": {},
}


def test_who_is_connected() -> None:
    status = parse_status(json.dumps(STATUS))
    assert status.count() == {uid(1): 2, "IPC$": 1}
    assert status.pids(uid(1), None) == {100, 200}
    assert status.pids(uid(5), FIRST + 2) == {200}
    assert status.pids(uid(5), None) == set()


@pytest.mark.parametrize("text", ["", "smbstatus: unknown option --json", "{}", "[]"])
def test_a_status_that_is_not_understood(text: str) -> None:
    with pytest.raises(ExportFailed, match="older than"):
        parse_status(text)


def test_what_smbclient_says() -> None:
    assert reason("session setup failed: NT_STATUS_LOGON_FAILURE\n") == "smbd does not know the user or the password"
    assert reason("NT_STATUS_SHARING_VIOLATION opening remote file \\disk.img") == (
        "the share cannot be used: NT_STATUS_SHARING_VIOLATION"
    )
    assert reason("do_connect: Connection to ::1 failed (Error NT_STATUS_CONNECTION_REFUSED)") == (
        "nobody listens on the port of smbd"
    )
    assert reason("getting file \\disk.img of size 512 as x (1 KiloBytes/sec)") is None
