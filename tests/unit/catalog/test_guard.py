import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from elemento_storage.catalog import guard as guard_module
from elemento_storage.catalog.guard import Guard, placement_guard, volume_guard
from elemento_storage.errors import LocationUnavailable
from tests.unit.support import python_child

VOLUME = "a" * 32
OTHER = "b" * 32
HOLD = (
    "import sys\n"
    "from elemento_storage.catalog.guard import placement_guard, volume_guard\n"
    "path, volume = sys.argv[1:]\n"
    "guard = volume_guard(path, volume) if volume else placement_guard(path)\n"
    "print('held', flush=True)\n"
    "sys.stdin.readline()\n"
)


@pytest.fixture
def location(tmp_path: Path) -> str:
    (tmp_path / ".elemento").mkdir()
    return str(tmp_path)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard_module, "_WAIT_S", 0.1)


@pytest.mark.usefixtures("impatient")
def test_another_process_waits_for_the_placement_guard(location: str) -> None:
    with python_child(HOLD, location, "") as child:
        with pytest.raises(LocationUnavailable, match="another process"):
            placement_guard(location)
        child.kill()
        child.wait(5)
        placement_guard(location).release()  # the kernel dropped the lock of the dead


@pytest.mark.usefixtures("impatient")
def test_another_process_waits_for_the_same_volume_only(location: str) -> None:
    with python_child(HOLD, location, VOLUME):
        with pytest.raises(LocationUnavailable):
            volume_guard(location, VOLUME)
        with volume_guard(location, OTHER), placement_guard(location):
            pass


def test_who_waits_gets_it_as_soon_as_it_is_free(location: str) -> None:
    with python_child(HOLD, location, VOLUME) as child:
        assert child.stdin is not None
        got = threading.Event()

        def wait() -> None:
            with volume_guard(location, VOLUME):
                got.set()

        waiter = threading.Thread(target=wait)
        waiter.start()
        assert not got.wait(0.1)
        child.stdin.write("\n")
        child.stdin.flush()
        assert got.wait(5)
        waiter.join()


@pytest.mark.usefixtures("impatient")
def test_two_holders_in_one_process_exclude_each_other(location: str) -> None:
    with volume_guard(location, VOLUME):
        with pytest.raises(LocationUnavailable):
            volume_guard(location, VOLUME)
        with volume_guard(location, OTHER):
            pass
    with volume_guard(location, VOLUME):
        pass


@pytest.mark.usefixtures("impatient")
def test_letting_go_of_one_guard_keeps_the_others(location: str) -> None:
    """Classic POSIX locks would all be gone as soon as any descriptor of the file is closed."""
    with volume_guard(location, VOLUME):
        volume_guard(location, OTHER).release()
        with pytest.raises(LocationUnavailable):
            volume_guard(location, VOLUME)


def test_an_error_inside_lets_go(location: str) -> None:
    with pytest.raises(ValueError, match="inside"), volume_guard(location, VOLUME):
        raise ValueError("inside")
    started = time.monotonic()
    volume_guard(location, VOLUME).release()
    assert time.monotonic() - started < 1


def test_extreme_uids_have_a_guard(location: str) -> None:
    with volume_guard(location, "f" * 32), volume_guard(location, "0" * 32), placement_guard(location):
        pass


def test_no_update_is_lost_between_processes(location: str) -> None:
    counter = Path(location) / "counter"
    counter.write_text("0")
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from elemento_storage.catalog.guard import placement_guard\n"
        "counter = Path(sys.argv[1]) / 'counter'\n"
        "for _ in range(100):\n"
        "    with placement_guard(sys.argv[1]):\n"
        "        counter.write_text(str(int(counter.read_text()) + 1))\n"
    )
    children = [subprocess.Popen([sys.executable, "-c", code, location]) for _ in range(4)]
    assert [child.wait(30) for child in children] == [0] * 4
    assert counter.read_text() == "400"


def test_the_stamp_is_seen_by_other_processes(location: str) -> None:
    with placement_guard(location) as guard:
        assert guard.read_stamp() in (b"", bytes(16))
        guard.write_stamp(bytes(range(16)))
    code = (
        "import sys\n"
        "from elemento_storage.catalog.guard import placement_guard\n"
        "with placement_guard(sys.argv[1]) as guard:\n"
        "    print(guard.read_stamp().hex())\n"
    )
    run = subprocess.run([sys.executable, "-c", code, location], check=True, capture_output=True, text=True)
    assert run.stdout.strip() == bytes(range(16)).hex()


def test_a_link_in_place_of_the_guard_is_not_followed(location: str, tmp_path: Path) -> None:
    (tmp_path / ".elemento" / "guard").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic links"):
        Guard(location, 0)
    assert not (tmp_path / "elsewhere").exists()


def test_a_location_that_is_gone_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        placement_guard(str(tmp_path / "absent"))
