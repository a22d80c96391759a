import pytest

from elemento_storage.gateway.passwords import hash_password, is_hash, verify


def test_a_hash_knows_its_password_and_no_other() -> None:
    kept = hash_password("correct horse")
    assert is_hash(kept)
    assert verify("correct horse", kept)
    assert not verify("correct hors", kept)
    assert not verify("", kept)
    assert hash_password("correct horse") != kept
    assert "horse" not in kept


def test_no_hash_is_no_way_in() -> None:
    assert not verify("", None)
    assert not verify("x", "x")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "correct horse",
        "scrypt$16384$8$1$AAAA",
        "scrypt$16384$8$1$AAAA$AAAA",
        "bcrypt$16384$8$1$AAAA$" + "A" * 43 + "=",
        "scrypt$1000000000$8$1$AAAA$" + "A" * 43 + "=",
        "scrypt$16385$8$1$AAAA$" + "A" * 43 + "=",
        "scrypt$16384$8$1$$" + "A" * 43 + "=",
        "scrypt$16384$8$1$A*AA$" + "A" * 43 + "=",
        "scrypt$-2$8$1$AAAA$" + "A" * 43 + "=",
    ],
)
def test_what_is_no_hash(text: str) -> None:
    assert not is_hash(text)


def test_the_shape_of_the_parameterised_cases_is_right() -> None:
    assert is_hash("scrypt$16384$8$1$AAAA$" + "A" * 43 + "=")
