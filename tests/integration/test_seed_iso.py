"""The seed as other people's tools read it."""

import subprocess
from pathlib import Path

import pytest

from elemento_storage.engine.seed_iso import build_seed
from elemento_storage.service.seed_files import seed_files

SENT = {
    "user-data": b"#cloud-config\nhostname: one\n",
    "network-data": b"version: 2\n",
    "Setup_script-" + "x" * 48 + ".sh": b"#!/bin/sh\nexit 0\n",
    "empty": b"",
    "large": bytes(range(256)) * 5000,
}


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("seed") / "seed.iso"
    path.write_bytes(build_seed(seed_files("7" * 32, SENT)[0]))
    return path


def xorriso(*words: str | Path) -> str:
    done = subprocess.run(["xorriso", *words], check=True, capture_output=True, text=True, timeout=60)
    return done.stdout + done.stderr


@pytest.mark.parametrize("names", ["rock ridge", "joliet"])
def test_xorriso_reads_every_file(image: Path, tmp_path: Path, names: str) -> None:
    reading = ("-read_fs", "norock") if names == "joliet" else ()
    xorriso(*reading, "-osirrox", "on", "-indev", image, "-extract", "/", tmp_path / "out")
    found = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    network = SENT["network-data"]
    wanted = {**SENT, "network-config": network, "meta-data": f"instance-id: {'7' * 32}\n".encode()}
    del wanted["network-data"]
    assert found == wanted


def test_the_label_and_what_blkid_makes_of_it(image: Path) -> None:
    assert "Volume id    : 'cidata'" in xorriso("-indev", image, "-pvd_info")
    told = subprocess.run(
        ["blkid", "-p", "-o", "export", image], check=True, capture_output=True, text=True, timeout=60
    ).stdout
    assert "LABEL=cidata\n" in told
    assert "TYPE=iso9660\n" in told


def test_scripts_can_be_run_and_other_files_not(image: Path, tmp_path: Path) -> None:
    xorriso("-osirrox", "on", "-indev", image, "-extract", "/", tmp_path / "out")
    modes = {path.name: path.stat().st_mode & 0o111 for path in (tmp_path / "out").iterdir()}
    assert modes["user-data"] == 0
    assert modes["Setup_script-" + "x" * 48 + ".sh"] != 0
