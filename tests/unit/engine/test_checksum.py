"""Checksums of disks: what they are by definition, and that holes cost nothing."""

import hashlib
import os
import random
import re
import time
from pathlib import Path
from typing import Any

import pytest

from elemento_storage.engine.checksum import BLOCK_BYTES, Algorithm, block_checksum, plain_checksum
from elemento_storage.engine.content import FileContent, OpenFile
from elemento_storage.errors import JobCancelled
from tests.unit.engine.test_content import MIB, sparse

GIB = 2**30


def of(path: Path, algorithm: Algorithm = Algorithm.SHA256) -> str:
    return block_checksum(FileContent(OpenFile(str(path))), algorithm, lambda _: None)


def by_definition(content: bytes, algorithm: Algorithm) -> str:
    def new(data: bytes) -> Any:
        return hashlib.sha256(data) if algorithm is Algorithm.SHA256 else hashlib.blake2b(data, digest_size=32)

    blocks = [content[start : start + BLOCK_BYTES] for start in range(0, len(content), BLOCK_BYTES)]
    return str(new(b"".join(new(block).digest() for block in blocks)).hexdigest())


@pytest.mark.parametrize("algorithm", Algorithm)
@pytest.mark.parametrize("size", [0, 512, BLOCK_BYTES, BLOCK_BYTES + 512, 5 * BLOCK_BYTES, 9 * BLOCK_BYTES + 4096])
def test_it_is_the_hash_of_the_hashes(tmp_path: Path, algorithm: Algorithm, size: int) -> None:
    some = random.Random(size)
    data = [(offset, some.randbytes(70_000)) for offset in range(0, max(size - 70_000, 0), 3_333_333)]
    path = sparse(tmp_path / "a", size, *data)
    assert of(path, algorithm) == by_definition(path.read_bytes(), algorithm)


def test_it_does_not_depend_on_what_is_allocated(tmp_path: Path) -> None:
    content = bytes(3 * BLOCK_BYTES) + os.urandom(BLOCK_BYTES) + bytes(2 * BLOCK_BYTES + 512)
    (tmp_path / "full").write_bytes(content)
    holes = sparse(tmp_path / "holes", len(content), (3 * BLOCK_BYTES, content[3 * BLOCK_BYTES : 4 * BLOCK_BYTES]))
    assert of(tmp_path / "full") == of(holes)


def test_holes_cost_nothing(tmp_path: Path) -> None:
    path = sparse(tmp_path / "a", 100 * GIB)
    started = time.monotonic()
    found = of(path)
    assert time.monotonic() - started < 1.0
    zero = hashlib.sha256(bytes(BLOCK_BYTES)).digest()
    assert found == hashlib.sha256(zero * (100 * GIB // BLOCK_BYTES)).hexdigest()


@pytest.mark.parametrize("algorithm", Algorithm)
def test_the_plain_one_is_that_of_all_bytes(tmp_path: Path, algorithm: Algorithm) -> None:
    path = sparse(tmp_path / "a", 3 * 2**20 + 512, (2**20 - 5, os.urandom(2**20)))
    heard: list[int] = []
    found = plain_checksum(FileContent(OpenFile(str(path))), algorithm, heard.append)
    expected = hashlib.sha256() if algorithm is Algorithm.SHA256 else hashlib.blake2b(digest_size=32)
    expected.update(path.read_bytes())
    assert found == expected.hexdigest()
    assert heard == sorted(heard)
    assert heard[-1] == path.stat().st_size


@pytest.mark.parametrize("kind", [block_checksum, plain_checksum])
def test_it_can_be_stopped(tmp_path: Path, kind: object) -> None:
    path = sparse(tmp_path / "a", 20 * BLOCK_BYTES, (0, os.urandom(5 * BLOCK_BYTES)))

    def stop(_: int) -> None:
        raise JobCancelled("enough")

    with pytest.raises(JobCancelled):
        kind(FileContent(OpenFile(str(path))), Algorithm.SHA256, stop)  # type: ignore[operator]


def test_what_the_documents_tell_clients_is_the_same(tmp_path: Path) -> None:
    page = (Path(__file__).parents[3] / "docs" / "api.md").read_text(encoding="utf-8")
    section = page.partition("### `volumes/<vid>/checksum`")[2].partition("\n## ")[0]
    told: dict[str, Any] = {}
    exec(section.partition("```python\n")[2].partition("```")[0], told)
    vectors = dict(re.findall(r"^\| ([^|]+) \| `([0-9a-f]{64})` \| `[0-9a-f]{64}` \|$", section, flags=re.MULTILINE))
    blake = dict(re.findall(r"^\| ([^|]+) \| `[0-9a-f]{64}` \| `([0-9a-f]{64})` \|$", section, flags=re.MULTILINE))
    contents = {
        "no bytes": b"",
        "512 zeros": bytes(512),
        "10 MiB of zeros": bytes(10 * MIB),
        "5 MiB of the byte `a`": b"a" * 5 * MIB,
    }
    assert vectors.keys() == contents.keys()
    path = tmp_path / "disk.img"
    for name, content in contents.items():
        path.write_bytes(content)
        assert told["checksum"](path) == of(path) == vectors[name]
        assert told["checksum"](path, "blake2b") == of(path, Algorithm.BLAKE2B) == blake[name]
