from pathlib import Path

import pytest

from elemento_storage.errors import ConfigurationError
from elemento_storage.gateway.sessions import Sessions


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def opened(path: Path, clock: Clock) -> Sessions:
    sessions = Sessions(str(path / "state"), 100.0, clock)
    sessions.open()
    return sessions


def test_a_session_is_of_one_account_and_ends(tmp_path: Path) -> None:
    clock = Clock()
    sessions = opened(tmp_path, clock)
    sessions.begin(1000, "alice")
    sessions.begin(0, "root-user")
    assert [sessions.username(one) for one in (1000, 0, 1001)] == ["alice", "root-user", None]
    again = opened(tmp_path, clock)
    assert again.username(1000) == "alice"
    again.end(1000)
    again.end(1000)
    assert [again.username(one) for one in (1000, 0)] == [None, "root-user"]
    assert opened(tmp_path, clock).username(1000) is None
    assert (tmp_path / "state" / "sessions.json").stat().st_mode & 0o777 == 0o600


def test_time_ends_a_session(tmp_path: Path) -> None:
    clock = Clock()
    sessions = opened(tmp_path, clock)
    sessions.begin(1000, "alice")
    clock.now += 99
    assert sessions.username(1000) == "alice"
    clock.now += 1
    assert sessions.username(1000) is None
    clock.now -= 200  # a clock that was set back
    assert sessions.username(1000) is None


def test_a_damaged_file_logs_everybody_out(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "sessions.json").write_text('{"1000": ')
    sessions = opened(tmp_path, Clock())
    assert sessions.username(1000) is None
    sessions.begin(1000, "alice")
    assert opened(tmp_path, Clock()).username(1000) == "alice"


def test_a_state_directory_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("")
    with pytest.raises(ConfigurationError, match="state-dir"):
        opened(tmp_path, Clock())
