import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elemento_storage.service.seed_files import check_file, seed_files

VID = "7" * 32
CONFIG = b"#cloud-config\nhostname: one\n"


def test_network_data_gets_the_name_that_nocloud_looks_for() -> None:
    seed, warnings = seed_files(VID, {"user-data": CONFIG, "network-data": b"version: 2\n", "setup.sh": b"#!/bin/sh\n"})
    assert seed == {
        "user-data": CONFIG,
        "network-config": b"version: 2\n",
        "setup.sh": b"#!/bin/sh\n",
        "meta-data": f"instance-id: {VID}\n".encode(),
    }
    assert warnings == []


def test_meta_data_that_was_sent_stays() -> None:
    assert seed_files(VID, {"user-data": CONFIG, "meta-data": b"instance-id: i-1\n"})[0]["meta-data"] == (
        b"instance-id: i-1\n"
    )


def test_a_network_config_goes_before_network_data() -> None:
    seed, warnings = seed_files(VID, {"user-data": CONFIG, "network-data": b"a", "network-config": b"b"})
    assert seed["network-config"] == b"b"
    assert "network-data" not in seed
    assert "left out" in warnings[0]


def test_without_user_data_the_seed_would_be_ignored() -> None:
    seed, warnings = seed_files(VID, {"network-data": b"version: 2\n"})
    assert seed["user-data"].startswith(b"#cloud-config\n")
    assert "no user-data was sent" in warnings[0]


@pytest.mark.parametrize(
    "content",
    [
        CONFIG,
        b"#cloud-config",
        b"#Cloud-Config # of the first host\n{}\n",
        b"\n#cloud-config\nruncmd: [[ls, -l]]\n",
        b"#!/bin/sh\n[[[\n",
        b"#include\nhttps://example.org/\n",
        b"#cloud-config-archive\n- content: x\n",
        b"#cloud-boothook\n",
        b"## template: jinja\n#cloud-config\nhostname: {{ name }}\n",
        b"Content-Type: multipart/mixed; boundary=x\n\n--x\n",
        b"MIME-Version: 1.0\n",
        b"\x1f\x8b\x08\x00",
        b"",
    ],
)
def test_what_cloud_init_takes_gives_no_warning(content: bytes) -> None:
    assert check_file("user-data", content) == []


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("user-data", b"hostname: one\n", "does not begin with #cloud-config"),
        ("user-data", b"#cloud-config\nruncmd: [ls\n", "user-data is not YAML: "),
        ("user-data", b"#cloud-config\na: 1\n b: 2\n", "in line "),
        ("user-data", b"#cloud-config\n- a\n", "no mapping of keys to values"),
        ("user-data", b"#cloud-config\na: 1\n---\nb: 2\n", "more than one YAML document"),
        ("user-data", b"#cloud-config\n\xff\xfe\n", "user-data is not YAML: "),
        ("user-data", b"#cloud-config\n" + b"[" * 100_000, "user-data is not YAML: "),
        ("meta-data", b"instance-id\n", "no mapping of keys to values"),
        ("meta-data", b"local-hostname: one\n", "no instance-id"),
        ("network-data", b"version: [2\n", "network-data is not YAML: "),
        ("network-config", b"just a text", "no mapping of keys to values"),
    ],
)
def test_what_cloud_init_would_not_take_is_a_warning(name: str, content: bytes, told: str) -> None:
    warnings = check_file(name, content)
    assert any(told in warning for warning in warnings), warnings


def test_scripts_and_json_are_fine() -> None:
    assert check_file("setup.sh", b"[[[") == []
    assert check_file("meta-data", b'{"instance-id": "i-1"}') == []
    assert check_file("network-data", b"") == []


def test_aliases_that_would_fill_the_memory_cost_nothing() -> None:
    levels = [b"a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    levels += [b"a%d: &a%d [%s]" % (n, n, b", ".join([b"*a%d" % (n - 1)] * 10)) for n in range(1, 30)]
    assert check_file("user-data", b"#cloud-config\n" + b"\n".join(levels)) == []


def test_a_long_text_is_not_looked_through() -> None:
    started = time.monotonic()
    assert check_file("user-data", b"#cloud-config\n" + b"[" * 4_000_000) == []
    assert time.monotonic() - started < 1


@given(st.sampled_from(["user-data", "meta-data", "network-data"]), st.binary(max_size=200) | st.text().map(str.encode))
def test_nothing_is_refused(name: str, content: bytes) -> None:
    assert all(warning.isprintable() for warning in check_file(name, content))
