"""The Ansible modules, run by ansible-playbook against a launched server: once, again, and in check mode."""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.live import ALICE, LiveServer

ROOT = Path(__file__).parents[2]
PROGRAMS = ROOT / ".venv" / "ansible" / "bin"

PLAY = """
- hosts: localhost
  gather_facts: false
  module_defaults:
    group/elemento.storage.all: {{server: "{server}", client: "{client}"}}
  tasks:
{tasks}
"""


class Ansible:
    """Plays, and what their tasks said."""

    def __init__(self, directory: Path, server: LiveServer) -> None:
        self._directory = directory
        self._server = f"http://127.0.0.1:{server.port}"
        collections = directory / "collections" / "ansible_collections" / "elemento"
        collections.mkdir(parents=True)
        (collections / "storage").symlink_to(ROOT / "ansible")
        self._environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("ANSIBLE_")},
            "ANSIBLE_COLLECTIONS_PATH": str(directory / "collections"),
            "ANSIBLE_HOME": str(directory / "home"),
            "ANSIBLE_LOCALHOST_WARNING": "false",
            "ANSIBLE_INVENTORY_UNPARSED_WARNING": "false",
            "ANSIBLE_FORKS": "1",
            "ANSIBLE_PIPELINING": "true",
            "ANSIBLE_PYTHON_INTERPRETER": str(PROGRAMS / "python"),
            "LC_ALL": "C.UTF-8",
        }

    def play(self, *tasks: tuple[str, dict[str, Any]], check: bool = False) -> list[dict[str, Any]]:
        """The results of tasks, each a module and its options; failures are results too."""
        lines = [
            f"    - {{elemento.storage.{name}: {json.dumps(how)}, ignore_errors: true, register: r{number}}}"
            for number, (name, how) in enumerate(tasks)
        ]
        told_in = self._directory / "results.json"
        results = ", ".join(f"r{number}" for number in range(len(tasks)))
        keep = {"content": f"{{{{ [{results}] | to_json }}}}", "dest": str(told_in)}
        lines.append(f"    - {{ansible.builtin.copy: {json.dumps(keep)}, check_mode: false, diff: false}}")
        book = self._directory / "play.yml"
        book.write_text(PLAY.format(server=self._server, client=ALICE, tasks="\n".join(lines)))
        flags = ("--check", "--diff") if check else ()
        told = subprocess.run(
            [PROGRAMS / "ansible-playbook", "-i", "localhost,", "-c", "local", book, *flags],
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
            env=self._environment,
            cwd=self._directory,
        )
        assert told.returncode == 0, told.stdout + told.stderr
        answers: list[dict[str, Any]] = json.loads(told_in.read_text())
        return answers


@pytest.fixture(scope="module")
def ansible(tmp_path_factory: pytest.TempPathFactory, running: LiveServer) -> Iterator[Ansible]:
    yield Ansible(tmp_path_factory.mktemp("ansible"), running)


DISK = {"name": "web-1", "size": 0.001, "format": "qcow2", "bootable": True, "private": True}


def test_volumes_and_exports_are_made_once(ansible: Ansible, running: LiveServer) -> None:
    [told] = ansible.play(("volume", DISK), check=True)
    assert (told["changed"], "volume" in told, running.listed()) == (True, False, {})

    first, again, larger = ansible.play(
        ("volume", DISK),
        ("volume", {"name": "web-1", "size": 0.001, "private": True}),
        ("volume", {"name": "web-1", "size": 0.002, "format": "raw", "bus": "scsi"}),
    )
    assert [one["changed"] for one in (first, again, larger)] == [True, False, True]
    vid = first["volume"]["volumeID"]
    there = running.info(vid)
    assert (there["size"], there["format"], there["bus"], there["bootable"]) == (2000384, "raw", "scsi", True)

    attach = {"volume": vid, "protocol": "nbd"}
    smaller, exported, same, other = ansible.play(
        ("volume", {"vid": vid, "size": 0.001}),
        ("export", attach),
        ("export", attach),
        ("export", {"volume": vid, "protocol": "local"}),
    )
    assert "never shrinks" in smaller["msg"]
    assert (exported["changed"], same["changed"]) == (True, False)
    assert exported["export"] == same["export"]
    assert exported["export"]["libvirt"].startswith("<disk")
    assert (other["failed"], other["code"]) == (True, "export-differs")

    would, kept = ansible.play(
        ("export", {"volume": vid, "state": "absent"}), ("volume", {"name": "web-1", "state": "absent"}), check=True
    )
    assert (would["changed"], kept["changed"]) == (True, True)
    assert running.info(vid)["exported"] is True

    busy, gone, still, destroyed, twice = ansible.play(
        ("volume", {"name": "web-1", "state": "absent"}),
        ("export", {"volume": vid, "state": "absent"}),
        ("export", {"volume": vid, "state": "absent"}),
        ("volume", {"name": "web-1", "state": "absent"}),
        ("volume", {"vid": vid, "state": "absent"}),
    )
    assert busy["code"] == "volume-exported"
    assert [one["changed"] for one in (gone, still, destroyed, twice)] == [True, False, True, False]
    assert running.listed() == {}


def test_what_is_wrong_is_said(ansible: Ansible, running: LiveServer) -> None:
    twins = [running.create("twin") for _ in range(2)]
    ambiguous, no_size, not_there, no_server = ansible.play(
        ("volume", {"name": "twin", "state": "absent"}),
        ("volume", {"name": "new"}),
        ("export", {"volume": "0" * 32}),
        ("volume", {"name": "x", "server": "http://127.0.0.1:1"}),
    )
    assert sorted(ambiguous["vids"]) == sorted(twins)
    assert "size is needed" in no_size["msg"]
    assert not_there["code"] == "volume-not-found"
    assert "does not answer" in no_server["msg"]


def test_the_documents_are_whole(ansible: Ansible) -> None:
    for name in ("volume", "export"):
        told = subprocess.run(
            [PROGRAMS / "ansible-doc", "--json", f"elemento.storage.{name}"],
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
            env=ansible._environment,
        )
        options = json.loads(told.stdout)[f"elemento.storage.{name}"]["doc"]["options"]
        assert {"server", "token", "client", "state"} <= set(options)
