"""Commands about exports, jobs, the server, the host; profiles, tokens, completion, speed."""

import json
import re
import shutil
import subprocess
import time
from pathlib import Path

import msgspec
import pytest

from elemento_storage.cli.main import COMMANDS
from elemento_storage.client import types
from tests.commands import Commands
from tests.live import ALICE, BINARY, BOB, LiveServer, free_port, live_server


@pytest.fixture
def alice(running: LiveServer, tmp_path: Path) -> Commands:
    return Commands(running, tmp_path)


def keys(kind: type[msgspec.Struct]) -> set[str]:
    return {field.encode_name for field in msgspec.structs.fields(kind)}


def test_exports_and_migration(shared: LiveServer, alice: Commands, tmp_path: Path) -> None:
    vid = alice.text("volume", "create", "out", "1M")
    exported = alice.json("export", "out", "--protocol", "nbd", "--limit", "iops=1000")
    assert set(exported) == keys(types.Exported)
    assert exported["limits"]["iops"] == 1000
    assert alice.text("export", "out", "--protocol", "nbd", "--uri").startswith("nbd://")
    assert alice.text("export", "out", "--protocol", "nbd", "--libvirt").startswith("<disk")
    assert "-blockdev" in alice.text("export", "out", "--protocol", "nbd")
    listed = alice.json("exports", "out")
    assert set(listed) == keys(types.Exports)
    assert set(listed["exports"][0]) == keys(types.Export)
    assert "healthy" in alice.text("exports")
    assert "unexport" in alice.run("volume", "destroy", "out", "--yes", check=6).stderr
    prepared = alice.json("migrate", "prepare", "out", "--from", ALICE, "--to", BOB)
    assert set(prepared) == keys(types.Migration)
    assert "--patience" in alice.run("volume", "update", "out", "--name", "x", check=7).stderr
    nobody = Commands(shared, tmp_path, None)
    assert prepared["migration"] in nobody.text("migrate", "list")
    assert "reverted" in alice.text("migrate", "revert", prepared["migration"])
    assert alice.text("unexport", "out") == vid
    assert "is no limit" in alice.run("export", "out", "--limit", "x=1", check=2).stderr


def test_jobs_locations_and_status(alice: Commands, running: LiveServer) -> None:
    alice.text("volume", "create", "worked", "1M")
    job = alice.text("volume", "checksum", "worked", "--no-wait")
    alice.text("job", "wait", job, "--timeout", "20")
    assert job in alice.text("job", "list")
    shown = alice.json("job", "show", job)
    assert set(shown) == keys(types.Job)
    assert "too late" in alice.run("job", "cancel", job, check=6).stderr
    assert set(alice.json("location", "list")[0]) == keys(types.Location)
    assert alice.text("location", "list").splitlines()[1].startswith("disk")
    status = alice.json("status")
    assert (set(status["version"]), set(status["health"])) == (keys(types.Version), keys(types.Health))
    assert re.search(r"^status +ok$", alice.text("status"), re.MULTILINE)


def test_events_come_line_by_line(alice: Commands, running: LiveServer) -> None:
    since = running.call("revisions", {"client_uid": ALICE})["revision"]
    vid = running.create("told")
    watching = alice.start("events", "--json", "--since", since)
    assert watching.stdout is not None
    seen = [json.loads(watching.stdout.readline()) for _ in range(2)]
    watching.terminate()
    watching.communicate()
    assert (seen[0]["kind"], seen[1]["kind"], seen[1]["subject"]) == ("hello", "volume.created", vid)


def test_a_server_that_is_not_there(tmp_path: Path) -> None:
    nobody = Commands(f"http://127.0.0.1:{free_port()}", tmp_path)
    nobody.environment["ELEMENTO_CLIENT"] = ""
    refused = nobody.run("volume", "list", check=9)
    assert "is the server running" in refused.stderr
    assert "say on whose behalf" in nobody.run("volume", "create", "x", "1M", check=2).stderr


def test_without_a_client_lists_are_of_everything(running: LiveServer, tmp_path: Path) -> None:
    vid = running.create("private", private=True, owner=BOB)
    nobody = Commands(running, tmp_path, None)
    assert nobody.text("volume", "list", "--name", "private", "--ids") == vid
    assert nobody.json("volume", "show", "private")["creatorID"] == BOB
    assert Commands(running, tmp_path).text("volume", "list", "--name", "private", "--ids") == ""


def test_profiles_name_servers_clients_and_tokens(tmp_path: Path) -> None:
    with live_server(tmp_path, "--auth", "tokens") as server:
        made = subprocess.run(
            [BINARY, "token", "create", ALICE, "--state-dir", server.state_dir],
            capture_output=True,
            text=True,
            check=True,
        )
        (tmp_path / "token").write_text(made.stdout)
        directory = tmp_path / ".config" / "elemento-storage"
        directory.mkdir(parents=True)
        file = directory / "config.toml"
        address = server.address.removesuffix("/api/v1.0/")
        file.write_text(f'profile = "lab"\n[profiles.lab]\nserver = "{address}"\ntoken-file = "{tmp_path}/token"\n')
        commands = Commands(server, tmp_path, None)
        del commands.environment["ELEMENTO_SERVER"]
        vid = commands.text("volume", "create", "mine", "1M")
        assert commands.json("volume", "show", vid)["creatorID"] == ALICE
        assert "no profile 'moon'" in commands.run("volume", "list", "--profile", "moon", check=3).stderr
        assert "cannot be read" in commands.run("volume", "list", "--token-file", "/none", check=3).stderr
        (tmp_path / "wrong").write_text("est_no_no\n")
        refused = commands.run("volume", "list", "--token-file", tmp_path / "wrong", check=5)
        assert "--token-file" in refused.stderr
        file.write_text(file.read_text() + 'token = "x"\n')
        file.chmod(0o644)
        assert "chmod 600" in commands.run("volume", "list", check=3).stderr
        file.write_text("[profiles.lab]\nservr = 1\n")
        assert "unknown keys servr" in commands.run("volume", "list", "--profile", "lab", check=3).stderr


def test_doctor_says_what_to_do(tmp_path: Path, running: LiveServer) -> None:
    root = tmp_path / "mnt"
    for name, settings in (("good", "{}"), ("broken", "nonsense"), ("away", '{"file-system": "unique"}')):
        (root / name).mkdir(parents=True)
        (root / name / "settings.json").write_text(settings)
    commands = Commands("http://127.0.0.1:1", tmp_path)
    flags = (
        "--root",
        root,
        "--state-dir",
        tmp_path / "state",
        "--run-dir",
        f"{running.run_dir}-doctor",  # short, as paths of sockets have to be
        "--listen",
        f"127.0.0.1:{free_port()}",
    )
    said = commands.run("doctor", *flags, "--json", check=1)
    findings = {(one["area"], one["what"]): one for one in json.loads(said.stdout)}
    assert set(next(iter(findings.values()))) == {"area", "what", "state", "found", "advice"}
    assert findings["programs", "qemu-img"]["state"] == "ok"
    assert findings["locations", "good"]["state"] == "ok"
    assert findings["locations", "broken"]["state"] == "problem"
    assert "mount it" in findings["locations", "away"]["advice"]
    old = tmp_path / "bin"
    old.mkdir()
    for name in ("qemu-img", "qemu-storage-daemon"):
        (old / name).write_text("#!/bin/sh\necho 'qemu-img version 7.2.9 (Debian)'\n")
        (old / name).chmod(0o755)
    shutil.rmtree(root / "broken")
    shutil.rmtree(root / "away")
    told = commands.run("doctor", *flags, check=1, env={"PATH": f"{old}:/usr/bin:/bin"}).stdout
    assert "7.2.9: loses data" in told
    assert "bookworm-backports" in told
    assert commands.run("doctor", "--listen", "nonsense", check=1).stdout.count("PROBLEM") == 1


def test_doctor_finds_nothing_wrong_where_the_server_runs(running: LiveServer, alice: Commands) -> None:
    flags = ("--root", running.root, "--state-dir", running.state_dir, "--run-dir", running.run_dir)
    said = alice.run("doctor", *flags, "--listen", f"127.0.0.1:{running.port}", "--json").stdout
    listen = next(one for one in json.loads(said) if one["what"] == "listen")
    assert listen["found"].endswith("the server runs")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell: str, tmp_path: Path) -> None:
    commands = Commands("http://127.0.0.1:1", tmp_path)
    assert "_ELEMENTO_STORAGE_COMPLETE" in commands.text("completion", shell)
    if shell == "bash":
        script = tmp_path / "completion"
        script.write_text(commands.text("completion", "bash"))
        assert subprocess.run(["bash", "-n", script], check=True).returncode == 0
        words = {"COMP_WORDS": "elemento-storage volume re", "COMP_CWORD": "2"}
        offered = commands.run(env={"_ELEMENTO_STORAGE_COMPLETE": "bash_complete", **words}).stdout
        assert {line.partition(",")[2] for line in offered.splitlines()} == {"resize", "reset", "restore"}


def test_help_comes_at_once(tmp_path: Path) -> None:
    commands = Commands("http://127.0.0.1:1", tmp_path)
    times = []
    for _ in range(5):
        started = time.monotonic()
        told = commands.text("--help")
        times.append(time.monotonic() - started)
    assert all(re.search(rf"^  {name}\s", told, re.MULTILINE) for name in COMMANDS)
    assert min(times) < 0.25, times
