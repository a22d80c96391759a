import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elemento_storage.errors import ConfigurationError, NotFound
from elemento_storage.service.tokens import Role, TokenStore
from tests.unit.support import ALICE, BOB


def store(tmp_path: Path) -> TokenStore:
    return TokenStore(str(tmp_path / "state"))


def test_a_token_is_known_by_its_text(tmp_path: Path) -> None:
    tokens = store(tmp_path)
    made, text = tokens.create(ALICE, Role.USER, "laptop")
    found = tokens.verify(text)
    assert found == made
    assert (found.client, found.role, found.note) == (ALICE, Role.USER, "laptop")


def test_several_tokens_are_told_apart_and_listed_oldest_first(tmp_path: Path) -> None:
    tokens = store(tmp_path)
    alice, alice_text = tokens.create(ALICE, Role.USER, "")
    bob, bob_text = tokens.create(BOB, Role.ADMIN, "")
    assert tokens.verify(alice_text) == alice
    assert tokens.verify(bob_text) == bob
    assert tokens.tokens() == [alice, bob]
    assert store(tmp_path).tokens() == [alice, bob]


def test_only_a_hash_is_kept_and_only_for_us(tmp_path: Path) -> None:
    _, text = store(tmp_path).create(ALICE, Role.USER, "")
    path = tmp_path / "state" / "tokens.json"
    secret = text.split("_", 2)[2]
    assert len(secret) >= 43, "256 bits in base64"
    assert secret not in path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_the_same_client_gets_another_token_and_salt_each_time(tmp_path: Path) -> None:
    made = [store(tmp_path).create(ALICE, Role.USER, "") for _ in range(3)]
    assert len({text for _, text in made}) == len({token.salt for token, _ in made}) == 3


def test_a_wrong_secret_is_refused(tmp_path: Path) -> None:
    tokens = store(tmp_path)
    _, text = tokens.create(ALICE, Role.USER, "")
    other, other_text = tokens.create(ALICE, Role.USER, "")
    prefix, token_id, secret = text.split("_", 2)
    for wrong in (
        text[:-1],
        text + "x",
        text.upper(),
        f" {text}",
        f"{prefix}_{token_id}_",
        f"{prefix}_{token_id}",
        f"{prefix}_{other.token_id}_{secret}",
        f"x_{token_id}_{secret}",
        f"{token_id}_{secret}",
        f"{prefix}_{token_id}_{other_text.split('_', 2)[2]}",
        "",
        "_",
        "est__",
    ):
        assert tokens.verify(wrong) is None


def test_the_hash_itself_is_no_token(tmp_path: Path) -> None:
    tokens = store(tmp_path)
    made, _ = tokens.create(ALICE, Role.USER, "")
    assert tokens.verify(f"est_{made.token_id}_{made.hash}") is None


@given(st.text(st.characters(codec="latin-1"), max_size=60) | st.text("est_0123456789abcdef", max_size=60))
def test_any_header_is_refused_without_an_error(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    tokens = store(tmp_path_factory.getbasetemp() / "tokens")
    if not tokens.tokens():
        tokens.create(ALICE, Role.USER, "")
    (token,) = tokens.tokens()
    for candidate in (text, f"est_{text}", f"est_{token.token_id}_{text}"):
        assert tokens.verify(candidate) is None


def test_a_revoked_token_is_refused_at_once_everywhere(tmp_path: Path) -> None:
    server, command_line = store(tmp_path), store(tmp_path)
    made, text = server.create(ALICE, Role.USER, "")
    _, other = server.create(ALICE, Role.USER, "")
    assert command_line.verify(text) == made
    assert command_line.revoke(made.token_id) == made
    assert server.verify(text) is None
    assert server.verify(other) is not None
    with pytest.raises(NotFound):
        server.revoke(made.token_id)


def test_a_new_token_is_known_at_once_everywhere(tmp_path: Path) -> None:
    server, command_line = store(tmp_path), store(tmp_path)
    assert server.tokens() == []
    _, text = command_line.create(ALICE, Role.USER, "")
    assert server.verify(text) is not None
    (tmp_path / "state" / "tokens.json").unlink()
    assert server.verify(text) is None


def test_creating_keeps_what_another_process_created(tmp_path: Path) -> None:
    one, two = store(tmp_path), store(tmp_path)
    one.create(ALICE, Role.USER, "")
    two.create(BOB, Role.USER, "")
    one.create(ALICE, Role.ADMIN, "")
    assert len(two.tokens()) == 3


@pytest.mark.parametrize("content", [b"", b"{}", b"[5]", b"[", b"\xff", b'[{"id": "x"}]'])
def test_a_damaged_file_lets_nobody_in_and_says_so(tmp_path: Path, content: bytes) -> None:
    tokens = store(tmp_path)
    _, text = tokens.create(ALICE, Role.USER, "")
    (tmp_path / "state" / "tokens.json").write_bytes(content)
    for call in (lambda: tokens.verify(text), tokens.tokens, lambda: tokens.create(BOB, Role.USER, "")):
        with pytest.raises(ConfigurationError, match=r"tokens\.json"):
            call()
    assert (tmp_path / "state" / "tokens.json").read_bytes() == content, "never overwritten"
