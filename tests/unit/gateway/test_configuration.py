from pathlib import Path

import pytest

from elemento_storage.errors import ConfigurationError
from elemento_storage.gateway.configuration import Configuration, load, split_address
from elemento_storage.gateway.trust import parse_fingerprint

HASH = "scrypt$16384$8$1$AAAA$" + "A" * 43 + "="
USER = f'[user.alice]\nclient = "AAAAAAAA-AAAA-AAAA-AAAA-AAAAAAAAAAAA"\npassword = "{HASH}"\n'
SERVER = '[[server]]\nname = "one"\nurl = "http://127.0.0.1:7772"\n'
PIN = "sha256:" + "ab" * 32
EXAMPLE = Path(__file__).parents[3] / "packaging" / "elemento-storage-gateway.toml"


def loaded(tmp_path: Path, text: str, mode: int = 0o600) -> Configuration:
    path = tmp_path / "gateway.toml"
    path.write_text(text)
    path.chmod(mode)
    return load(str(path))


def test_the_least_that_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STATE_DIRECTORY", raising=False)
    monkeypatch.setenv("XDG_STATE_HOME", "/x")
    one = loaded(tmp_path, SERVER + USER)
    assert (one.listen_client, one.listen_login, one.patience) == ("127.0.0.1:27777", "127.0.0.1:47777", 5.0)
    assert one.user["alice"].client == "a" * 32
    assert one.state_dir == "/x/elemento-storage-gateway"
    monkeypatch.setenv("STATE_DIRECTORY", "/var/lib/y")
    assert loaded(tmp_path, SERVER + USER).state_dir == "/var/lib/y"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[", "not TOML"),
        (USER, "no server"),
        (SERVER, "no user"),
        ("patience = 0\n" + SERVER + USER, "patience"),
        ('patience = "long"\n' + SERVER + USER, "patience"),
        ("surprise = 1\n" + SERVER + USER, "surprise"),
        ('listen-client = "0.0.0.0:27777"\n' + SERVER + USER, "loopback"),
        ('listen-login = "192.0.2.1:47777"\n' + SERVER + USER, "loopback"),
        ('listen-login = "127.0.0.1"\n' + SERVER + USER, "HOST:PORT"),
        ('listen-login = "localhost:1"\n' + SERVER + USER, "loopback"),
        ('log-level = "loud"\n' + SERVER + USER, "log-level"),
        (SERVER + SERVER + USER, "a name of its own"),
        ('[[server]]\nname = "x"\nurl = "ftp://x"\n' + USER, "http://HOST:PORT"),
        ('[[server]]\nname = "x"\nurl = "http://x:99999"\n' + USER, "http://HOST:PORT"),
        ('[[server]]\nname = "x"\nurl = "http://x/path"\n' + USER, "http://HOST:PORT"),
        ('[[server]]\nname = "x"\n' + USER, "give its url"),
        (f'[[server]]\nname = "x"\nfingerprint = "{PIN}"\n' + USER, "give its url"),
        ('[[server]]\nname = "x"\nurl = "https://x"\nfingerprint = "ab"\n' + USER, "sha256"),
        ('[[server]]\nname = "x"\nurl = "https://x"\nca = "/none"\n' + USER, "no file"),
        (f'[[server]]\nname = "x"\nurl = "http://x"\nfingerprint = "{PIN}"\n' + USER, "give https"),
        (
            '[[server]]\nname = "one"\nurl = "http://x"\n' + USER + '[user.alice.tokens]\none = "est_1_2"\n',
            "in the clear",
        ),
        (SERVER + USER + '[user.alice.tokens]\nother = "est_1_2"\n', "no server of that name"),
        (SERVER + USER.replace("AAAAAAAA-", "A-"), "32 hex digits"),
        (SERVER + USER.replace(HASH, "secret"), "is no hash"),
        (SERVER + USER + "[discovery]\nenabled = true\n", "whom to believe"),
        (SERVER + USER + '[discovery]\nenabled = true\nca = "/none"\n', "no file"),
        (SERVER + USER + '[discovery]\nenabled = true\nallow-plain = "10.0.0.0/99"\n', "discovery"),
        (SERVER + USER + '[discovery]\nenabled = true\nallow-plain = "10.0.0.0/8"\ninterfaces = ["x"]\n', "discovery"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigurationError, match=said) as raised:
        loaded(tmp_path, text)
    assert "est_1_2" not in raised.value.message
    assert HASH not in raised.value.message


def test_others_must_not_read_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="chmod 600"):
        loaded(tmp_path, SERVER + USER, 0o640)
    with pytest.raises(ConfigurationError, match="No such file"):
        load(str(tmp_path / "none"))


def test_a_pinned_server_needs_no_address(tmp_path: Path) -> None:
    text = f'[[server]]\nname = "x"\nfingerprint = "{PIN.upper()}"\n[discovery]\nenabled = true\n'
    assert loaded(tmp_path, text + USER).server[0].url == ""


def test_the_example_loads(tmp_path: Path) -> None:
    one = loaded(tmp_path, EXAMPLE.read_text())
    assert [server.name for server in one.server] == ["storage1", "storage2"]


def test_addresses() -> None:
    assert split_address("[::1]:5") == ("::1", 5)
    for text in ("", "x", "x:", ":5", "x:65536", "x:٣"):
        with pytest.raises(ValueError):
            split_address(text)


@pytest.mark.parametrize("text", [PIN, PIN.upper(), "SHA256:" + ":".join(["ab"] * 32), f"  {PIN} "])
def test_fingerprints(text: str) -> None:
    assert parse_fingerprint(text) == PIN


@pytest.mark.parametrize("text", ["", "ab" * 32, "sha1:" + "ab" * 20, PIN + "a", PIN[:-1]])
def test_what_is_no_fingerprint(text: str) -> None:
    assert parse_fingerprint(text) is None
