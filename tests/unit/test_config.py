from dataclasses import fields
from pathlib import Path

import pytest

from elemento_storage.config import Auth, Settings, is_loopback, load, setting_names
from elemento_storage.errors import ConfigurationError


def loaded(file: str | None = None, flags: dict[str, object] | None = None, **environment: str) -> Settings:
    names = {f"ELEMENTO_STORAGE_{name.upper()}": value for name, value in environment.items()}
    return load(file, flags or {}, names)[0]


def write(tmp_path: Path, text: str) -> str:
    path = tmp_path / "server.toml"
    path.write_text(text)
    return str(path)


def test_defaults_are_those_of_the_contract() -> None:
    settings = loaded()
    assert settings == Settings()
    assert (settings.root, settings.search_depth, settings.listen_port) == ("/mnt", 2, 7772)
    assert (settings.lease, settings.bin_retention) == (30, 86400)
    assert settings.auth is Auth.LOOPBACK
    assert is_loopback(settings.listen_host)


def test_the_later_source_wins(tmp_path: Path) -> None:
    file = write(tmp_path, 'root = "/file"\nstate-dir = "/file"\nlog-level = "error"\n')
    flags: dict[str, object] = {"root": "/flag", "state_dir": None}
    settings, origins = load(
        file, flags, {"ELEMENTO_STORAGE_ROOT": "/env", "ELEMENTO_STORAGE_STATE_DIR": "/env", "HOME": "/root"}
    )
    assert (settings.root, settings.state_dir, settings.log_level) == ("/flag", "/env", "error")
    sources = {origin.name: origin.source for origin in origins}
    assert sources["root"] == "--root"
    assert sources["state-dir"] == "ELEMENTO_STORAGE_STATE_DIR"
    assert sources["log-level"] == file
    assert sources["listen"] == "default"


def test_every_setting_has_an_origin_and_a_description() -> None:
    _, origins = load(None, {}, {})
    assert [origin.name for origin in origins] == setting_names()
    assert all(origin.doc for origin in origins)
    assert len(setting_names()) == len(fields(Settings))


def test_the_real_environment_is_used_when_none_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ELEMENTO_STORAGE_ROOT", "/from/the/environment")
    assert load(None, {})[0].root == "/from/the/environment"


def test_texts_become_numbers(tmp_path: Path) -> None:
    settings = loaded(lease="60", search_depth="3", overcommit="2.5")
    assert (settings.lease, settings.search_depth, settings.overcommit) == (60.0, 3, 2.5)
    settings = loaded(write(tmp_path, "lease = 60\nmax-body = 5\n"))
    assert (settings.lease, settings.max_body) == (60.0, 5)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ('lease = "soon"', "lease.*a number"),
        ("search-depth = 1.5", "search-depth.*a whole number"),
        ("search-depth = true", "search-depth.*a whole number"),
        ("overcommit = false", "overcommit.*a number"),
        ("root = 5", "root.*text"),
        ("root = ['a']", "root.*text"),
        ('auth = "nobody"', "auth.*trusted-loopback or trusted-network or tokens"),
        ("auth = 1", "auth"),
        ("search-depth = -1", "search-depth cannot be negative"),
        ("overcommit = -0.1", "overcommit cannot be negative"),
        ("overcommit = nan", "overcommit has to be a finite number"),
        ("bin-retention = inf", "bin-retention has to be a finite number"),
        ("bin-retention = -1", "bin-retention cannot be negative"),
        ("lease = 0", "lease has to be greater than 0"),
        ("heartbeat = 0", "heartbeat has to be greater than 0"),
        ("heartbeat = nan", "heartbeat has to be a finite number"),
        ("sweep-interval = 0", "sweep-interval has to be greater"),
        ("disk-timeout = -1", "disk-timeout has to be greater"),
        ("job-timeout = 0", "job-timeout has to be greater"),
        ("max-body = 0", "max-body has to be greater"),
        ("heartbeat = 11\nlease = 30", "three times"),
        ('log-level = "loud"', "log-level"),
        ('tls-key = "/key.pem"', "tls-certificate and tls-key"),
        ('tls-certificate = "/cert.pem"', "tls-certificate and tls-key"),
        ('listen = "7772"', "HOST:PORT"),
        ('listen = ":7772"', "HOST:PORT"),
        ('listen = "127.0.0.1:"', "HOST:PORT"),
        ('listen = "127.0.0.1:http"', "HOST:PORT"),
        ('listen = "127.0.0.1:65536"', "HOST:PORT"),
        ('listen = "127.0.0.1:-1"', "HOST:PORT"),
        ('listen = "127.0.0.1:\u0661"', "HOST:PORT"),
        ("nonsense = 1", "unknown settings nonsense"),
        ("state_dir = '/x'", "unknown settings state_dir"),
        ("root = ", "not TOML"),
    ],
)
def test_wrong_settings_are_refused_in_words(tmp_path: Path, line: str, told: str) -> None:
    with pytest.raises(ConfigurationError, match=told):
        loaded(write(tmp_path, line))


def test_a_missing_or_binary_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"absent\.toml: No such file"):
        loaded(str(tmp_path / "absent.toml"))
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b'root = "\xff"')
    with pytest.raises(ConfigurationError, match="not TOML"):
        loaded(str(binary))


def test_a_misspelt_variable_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="ELEMENTO_STORAGE_ROOTS"):
        loaded(roots="/x")


def test_variables_that_are_no_settings_are_left_alone() -> None:
    assert loaded(faultpoint="trace:/x", config_file="/x") == Settings()


@pytest.mark.parametrize(
    ("listen", "host", "port"),
    [("127.0.0.1:80", "127.0.0.1", 80), ("[::1]:7772", "::1", 7772), ("localhost:0", "localhost", 0)],
)
def test_listen_address(listen: str, host: str, port: int) -> None:
    settings = loaded(listen=listen)
    assert (settings.listen_host, settings.listen_port) == (host, port)


@pytest.mark.parametrize("listen", ["0.0.0.0:7772", "[::]:7772", "192.0.2.1:7772", "storage.example:7772"])
def test_trust_in_everybody_has_to_be_said_in_words(listen: str) -> None:
    with pytest.raises(ConfigurationError, match="--auth trusted-network"):
        loaded(listen=listen)
    assert loaded(listen=listen, auth="trusted-network").auth is Auth.NETWORK
    assert loaded(listen=listen, auth="tokens").auth is Auth.TOKENS


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_addresses_of_this_machine_only(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "localhost.example", "127.0.0.1.example", ""])
def test_addresses_others_can_reach(host: str) -> None:
    assert not is_loopback(host)


@pytest.mark.parametrize(
    "run_dir", ["run", "", f"/{'x' * 60}", "/run/a,b", "/run/a b", "/run/é", "/run/a\n", "/run/a%b"]
)
def test_a_run_directory_that_would_not_work(run_dir: str) -> None:
    with pytest.raises(ConfigurationError, match="run-dir"):
        loaded(run_dir=run_dir)


@pytest.mark.parametrize("address", ["", "localhost", "10.0.0", "0.0.0.0", "::", "10.0.0.1/32", "10.0.0.1:3260"])
def test_an_address_that_no_hypervisor_can_use(address: str) -> None:
    with pytest.raises(ConfigurationError, match="export-address"):
        loaded(export_address=address)


@pytest.mark.parametrize(
    ("text", "ports"), [("10809-10811", [10809, 10810, 10811]), ("5000", [5000]), ("65535-65535", [65535])]
)
def test_ports_for_nbd(text: str, ports: list[int]) -> None:
    assert list(loaded(nbd_ports=text).nbd_port_range) == ports


@pytest.mark.parametrize(
    "text", ["", "-", "2-1", "1-", "-5", "0-5", "5-65536", "99999", "1-2-3", "a-b", "1 - 2", "\u0661"]
)
def test_what_is_no_range_of_ports(text: str) -> None:
    with pytest.raises(ConfigurationError, match="nbd-ports"):
        loaded(nbd_ports=text)


@pytest.mark.parametrize("port", ["0", "-1", "65536", "x"])
def test_what_is_no_port(port: str) -> None:
    with pytest.raises(ConfigurationError, match="iscsi-port"):
        loaded(iscsi_port=port)
    with pytest.raises(ConfigurationError, match="smb-port"):
        loaded(smb_port=port)
