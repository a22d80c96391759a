"""The commands, as a person runs them."""

import json
import os
import socket
import subprocess
from pathlib import Path

from tests.live import BINARY, LiveServer, free_port, make_location


def run(*words: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [BINARY, *words], capture_output=True, text=True, check=False, timeout=30, env={**os.environ, **env}
    )


def test_config_shows_where_each_setting_came_from(tmp_path: Path) -> None:
    file = tmp_path / "storage.toml"
    file.write_text('root = "/srv"\nlease = 60\nbin-retention = 10\n')
    shown = run(
        "config", "--json", "--config", file, "--lease", "90", "--root", "/flag", ELEMENTO_STORAGE_LEASE="70",
        ELEMENTO_STORAGE_BIN_RETENTION="20",
    )  # fmt: skip
    settings = json.loads(shown.stdout)
    assert settings["root"] == {"value": "/flag", "source": "--root"}
    assert settings["lease"] == {"value": 90.0, "source": "--lease"}
    assert settings["bin-retention"] == {"value": 20.0, "source": "ELEMENTO_STORAGE_BIN_RETENTION"}
    assert settings["listen"] == {"value": "127.0.0.1:7772", "source": "default"}
    assert "ELEMENTO_STORAGE_LEASE" in run("config", ELEMENTO_STORAGE_LEASE="70").stdout


def test_wrong_settings_say_what_to_do(tmp_path: Path) -> None:
    file = tmp_path / "storage.toml"
    for content, told in (
        ("rot = 1", "unknown settings rot"),
        ("not toml", "is not TOML"),
        ("lease = 'soon'", "it has to be a number"),
        ("listen = '7772'", "it has to be HOST:PORT"),
        ("auth = 'none'", "trusted-loopback"),
        ("heartbeat = 20", "three times"),
    ):
        file.write_text(content)
        refused = run("config", "--config", file)
        assert (refused.returncode, told in refused.stderr) == (3, True), refused.stderr
    assert run("config", "--config", tmp_path / "missing").returncode == 3
    assert run("config", ELEMENTO_STORAGE_ROOTS="x").returncode == 3
    assert run("nonsense").returncode == 2


def test_a_port_in_use_is_said_at_once(tmp_path: Path) -> None:
    make_location(tmp_path / "mnt")
    with socket.create_server(("127.0.0.1", free_port())) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        refused = run("serve", "--root", tmp_path / "mnt", "--state-dir", tmp_path / "s", "--listen", address)
    assert refused.returncode == 3
    assert f"cannot listen on {address}" in refused.stderr


def test_a_state_directory_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refused = run("serve", "--root", tmp_path, "--state-dir", tmp_path / "file", "--listen", f"127.0.0.1:{free_port()}")
    assert refused.returncode == 3
    assert "--state-dir" in refused.stderr


def test_systemd_is_told_when_the_server_is_ready(tmp_path: Path) -> None:
    make_location(tmp_path / "mnt")
    address = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.bind(str(address))
        notify.settimeout(20)
        server = LiveServer(tmp_path / "mnt", tmp_path / "state")
        server.start({"NOTIFY_SOCKET": str(address)}, wait=False)
        assert notify.recv(100) == b"READY=1"
        assert server.http.get("version").status_code == 200, "ready means ready"
        assert server.stop() == 0
        assert notify.recv(100) == b"STOPPING=1"
        server.http.close()


def test_help_and_version() -> None:
    assert run("--version").stdout.startswith("elemento-storage, version 0.")
    told = run("serve", "--help").stdout
    for name in ("--root", "--listen", "--config", "--auth", "--bin-retention"):
        assert name in told
