import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elemento_storage.catalog import locks
from elemento_storage.catalog.locks import (
    LockRecord,
    is_orphaned,
    new_lock,
    read_lock,
    remove_lock,
    rewrite_lock,
    write_lock,
)
from elemento_storage.catalog.presence import Presence
from tests.unit.support import ALICE, age, python_child, uid

HERE = uid(1)
THERE = uid(2)
OPERATION = uid(3)


def lock(server: str = HERE, journal: dict[str, str | int] | None = None) -> LockRecord:
    return new_lock("convert", OPERATION, server, ALICE, journal or {})


@pytest.fixture
def presence(tmp_path: Path) -> Iterator[Presence]:
    sign = Presence(str(tmp_path), HERE)
    yield sign
    sign.leave()


def orphaned(location: Path, record: LockRecord, *active: str, lease_s: float = 30) -> bool:
    return is_orphaned(str(location), record, HERE, set(active), lease_s=lease_s)


# -- files -------------------------------------------------------------------------------------------------


def test_the_file_has_the_name_of_the_document(tmp_path: Path) -> None:
    write_lock(str(tmp_path), lock())
    assert os.listdir(tmp_path) == [f"elemento.convert.{OPERATION}.ignore"]


def test_the_file_is_one_line_of_json_with_all_that_recovery_needs(tmp_path: Path) -> None:
    record = lock(journal={"from": "raw", "size": 5})
    write_lock(str(tmp_path), record)
    text = (tmp_path / record.file_name).read_text()
    assert text.count("\n") == 1
    told = json.loads(text)
    assert told["journal"] == {"from": "raw", "size": 5}
    assert (told["server"], told["client"], told["pid"]) == (HERE, ALICE, os.getpid())
    assert told["host"]
    assert told["started"].endswith("Z")


def test_read_gives_what_was_written(tmp_path: Path) -> None:
    record = lock(journal={"a": "b", "n": 1})
    write_lock(str(tmp_path), record)
    assert read_lock(str(tmp_path), record.file_name) == record


def test_a_new_content_replaces_the_old_one(tmp_path: Path) -> None:
    write_lock(str(tmp_path), lock(journal={"phase": "one"}))
    rewritten = lock(journal={"phase": "two"})
    rewrite_lock(str(tmp_path), rewritten)
    assert read_lock(str(tmp_path), rewritten.file_name) == rewritten


def test_a_lock_that_cannot_be_rewritten_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says what is under way: without it nobody would finish that, and others would begin."""

    def full(*_: object) -> NoReturn:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    record = lock(journal={"phase": "one"})
    write_lock(str(tmp_path), record)
    monkeypatch.setattr(locks, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        rewrite_lock(str(tmp_path), lock(journal={"phase": "two"}))
    assert read_lock(str(tmp_path), record.file_name) == record


def test_remove_is_idempotent_and_touches_no_other_lock(tmp_path: Path) -> None:
    other = new_lock("resize", uid(9), HERE, None, {})
    write_lock(str(tmp_path), lock())
    write_lock(str(tmp_path), other)
    for _ in range(2):
        remove_lock(str(tmp_path), lock())
    assert os.listdir(tmp_path) == [other.file_name]


def test_a_lock_that_is_gone_reads_as_none(tmp_path: Path) -> None:
    assert read_lock(str(tmp_path), lock().file_name) is None


@pytest.mark.parametrize(
    "content", [b"", b"\n", b"not json", b"\xff\xfe", b"[]", b"5", b"{", b'{"purpose": 1}', b"[" * 60_000],
    ids=lambda content: repr(content[:8]),
)  # fmt: skip
def test_what_another_product_wrote_is_known_by_its_name_alone(tmp_path: Path, content: bytes) -> None:
    name = f"elemento.backup.{OPERATION}.ignore"
    (tmp_path / name).write_bytes(content)
    record = read_lock(str(tmp_path), name)
    assert record == LockRecord(purpose="backup", operation=OPERATION)
    assert record.server == ""


@given(st.binary(max_size=80))
def test_no_content_makes_reading_fail(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    directory = tmp_path_factory.getbasetemp() / "locks"
    directory.mkdir(exist_ok=True)
    (directory / "elemento.x.y.ignore").write_bytes(content)
    record = read_lock(str(directory), "elemento.x.y.ignore")
    assert record is not None
    assert record.file_name == "elemento.x.y.ignore"


@pytest.mark.parametrize(
    "changes",
    [{"purpose": "resize"}, {"operation": uid(9)}, {"server": "../../x"}, {"server": "a\0b"}, {"server": "."}],
)
def test_a_content_that_cannot_be_ours_is_not_believed(tmp_path: Path, changes: dict[str, Any]) -> None:
    told = {"purpose": "convert", "operation": OPERATION, "server": THERE, **changes}
    (tmp_path / lock().file_name).write_text(json.dumps(told))
    record = read_lock(str(tmp_path), lock().file_name)
    assert record == LockRecord(purpose="convert", operation=OPERATION)


@pytest.mark.parametrize("name", ["elemento.ignore", "elemento..ignore", "elemento.a.b.c.ignore", "elemento.x.ignore"])
def test_odd_names_still_are_locks(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("")
    record = read_lock(str(tmp_path), name)
    assert record is not None
    assert record.server == ""


def test_a_lock_that_is_no_file_still_is_a_lock(tmp_path: Path) -> None:
    (tmp_path / "elemento.a.b.ignore").mkdir()
    (tmp_path / "elemento.c.d.ignore").symlink_to("/etc/passwd")
    os.mkfifo(tmp_path / "elemento.e.f.ignore")
    for name in os.listdir(tmp_path):
        record = read_lock(str(tmp_path), name)
        assert record is not None
        assert record.server == ""


# -- whose it is -------------------------------------------------------------------------------------------


def test_our_own_lock_is_orphaned_once_its_operation_is_over(tmp_path: Path) -> None:
    assert not orphaned(tmp_path, lock(), OPERATION)
    assert orphaned(tmp_path, lock(), uid(9))


def test_a_dead_servers_lock_is_orphaned(tmp_path: Path) -> None:
    with python_child(
        "import sys\n"
        "from elemento_storage.catalog.presence import Presence\n"
        "presence = Presence(*sys.argv[1:])\n"
        "print('here', flush=True)\n"
        "sys.stdin.readline()\n",
        str(tmp_path),
        THERE,
    ) as child:
        assert not orphaned(tmp_path, lock(THERE), lease_s=0)
        child.kill()
        child.wait(5)
        assert orphaned(tmp_path, lock(THERE))
    assert orphaned(tmp_path, lock(uid(8))), "a server that left no file at all"


@pytest.mark.usefixtures("presence")
def test_our_active_operations_say_nothing_about_other_servers(tmp_path: Path) -> None:
    assert orphaned(tmp_path, lock(THERE), OPERATION)


def test_another_products_lock_is_never_orphaned(tmp_path: Path) -> None:
    record = LockRecord(purpose="convert", operation=OPERATION)
    (tmp_path / record.file_name).write_text("")
    age(tmp_path / record.file_name)
    assert not orphaned(tmp_path, record, lease_s=0)
