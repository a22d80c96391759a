"""The gateway's configuration: one TOML file, which holds tokens and so is nobody else's to read."""

import ipaddress
import os
import stat
import tomllib
from typing import Annotated, Any, Final
from urllib.parse import urlsplit

import msgspec

from elemento_storage.config import is_loopback, parse_networks
from elemento_storage.errors import ConfigurationError
from elemento_storage.gateway.passwords import is_hash
from elemento_storage.gateway.trust import parse_fingerprint
from elemento_storage.model import normalise_uid

CLIENT_PORT: Final = 27777
LOGIN_PORT: Final = 47777
SERVER_PORT: Final = 7772

Seconds = Annotated[float, msgspec.Meta(gt=0, le=86400 * 366)]


class _Table(msgspec.Struct, frozen=True, kw_only=True, rename="kebab", forbid_unknown_fields=True):
    """A table of the file."""


class ServerEntry(_Table, frozen=True, kw_only=True):
    """A server that is known by name: at ``url``, or wherever the certificate ``fingerprint`` is found."""

    name: str
    url: str = ""
    ca: str = ""
    fingerprint: str = ""


class DiscoveryEntry(_Table, frozen=True, kw_only=True):
    """Servers that announce themselves, and which of them to believe."""

    enabled: bool = False
    ca: str = ""
    allow_plain: str = ""
    interfaces: list[str] = []


class UserEntry(_Table, frozen=True, kw_only=True):
    """A user of the vendor's clients: who that is to the servers. ``tokens`` by the servers' names."""

    client: str
    password: str
    tokens: dict[str, str] = {}


class Configuration(_Table, frozen=True, kw_only=True):
    """The whole file. Times are seconds."""

    listen_client: str = f"127.0.0.1:{CLIENT_PORT}"
    listen_login: str = f"127.0.0.1:{LOGIN_PORT}"
    state_dir: str = ""
    patience: Seconds = 5.0
    work_patience: Seconds = 60.0
    session: Seconds = 7 * 86400.0
    origins: list[str] = []
    log_level: str = "info"
    server: list[ServerEntry] = []
    discovery: DiscoveryEntry = DiscoveryEntry()
    user: dict[str, UserEntry] = {}


def load(path: str) -> Configuration:
    """The configuration. Raises ConfigurationError with what to change."""
    try:
        with open(path, "rb") as file:
            readable_by = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            values = tomllib.load(file)
    except OSError as error:
        raise ConfigurationError(f"{path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path} is not TOML: {error}") from error
    if readable_by & 0o077:
        raise ConfigurationError(f"{path} holds tokens and others can read it: chmod 600 {path}")
    try:
        configuration = msgspec.convert(values, Configuration)
    except msgspec.ValidationError as error:
        raise ConfigurationError(f"{path}: {error}") from None
    return _checked(path, configuration)


def split_address(text: str) -> tuple[str, int]:
    """Host and port of HOST:PORT. Raises ValueError."""
    host, _, port = text.rpartition(":")
    if not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise ValueError
    return host.strip("[]"), int(port)


def _checked(path: str, one: Configuration) -> Configuration:
    def wrong(what: str) -> ConfigurationError:
        return ConfigurationError(f"{path}: {what}")

    for key, text in (("listen-client", one.listen_client), ("listen-login", one.listen_login)):
        try:
            host, _ = split_address(text)
        except ValueError:
            raise wrong(f"{key} is {text!r}, it has to be HOST:PORT") from None
        if not is_loopback(host) or host == "localhost":
            raise wrong(f"{key} is {text!r}: the gateway acts for who logged in on this machine, so it listens on a "
                        "loopback address and no other")  # fmt: skip
    if one.log_level not in ("debug", "info", "warning", "error"):
        raise wrong(f"log-level is {one.log_level!r}, it has to be debug, info, warning or error")
    names = [server.name for server in one.server]
    if "" in names or len(set(names)) < len(names):
        raise wrong("every server needs a name of its own")
    for server in one.server:
        _check_server(server, one, wrong)
    _check_discovery(one, wrong)
    if not one.server and not one.discovery.enabled:
        raise wrong("there is no server: add a [[server]], or turn discovery on")
    users = {name: _checked_user(name, user, one, wrong) for name, user in one.user.items()}
    if not users:
        raise wrong('there is no user: add a [user."NAME"]')
    return msgspec.structs.replace(one, user=users, state_dir=one.state_dir or _default_state_dir())


def _check_server(server: ServerEntry, one: Configuration, wrong: Any) -> None:
    about = f"server {server.name!r}"
    if server.fingerprint and parse_fingerprint(server.fingerprint) is None:
        raise wrong(f"{about}: a fingerprint is sha256: and 64 hex digits, as `elemento-storage gateway servers` shows")
    if server.ca and not os.path.isfile(server.ca):
        raise wrong(f"{about}: there is no file {server.ca}")
    if not server.url:
        if not server.fingerprint or not one.discovery.enabled:
            raise wrong(f"{about}: give its url, or its fingerprint and turn discovery on")
        return
    try:
        parts = urlsplit(server.url)
        host, _ = parts.hostname or "", parts.port
    except ValueError:
        host = ""
    if not host or parts.scheme not in ("http", "https") or parts.path not in ("", "/") or parts.query:
        raise wrong(f"{about}: url is {server.url!r}, it has to be http://HOST:PORT or https://HOST:PORT")
    if parts.scheme == "http":
        if server.ca or server.fingerprint:
            raise wrong(f"{about}: a certificate is of no use to a url with http, give https")
        holders = [name for name, user in one.user.items() if server.name in user.tokens]
        if holders and not is_loopback(host):
            raise wrong(f"{about}: over http the token of {holders[0]!r} would travel in the clear; use https")


def _check_discovery(one: Configuration, wrong: Any) -> None:
    found = one.discovery
    if found.ca and not os.path.isfile(found.ca):
        raise wrong(f"discovery: there is no file {found.ca}")
    try:
        parse_networks(found.allow_plain)
        for interface in found.interfaces:
            ipaddress.ip_address(interface)
    except ValueError as error:
        raise wrong(f"discovery: {error}") from None
    pinned = any(server.fingerprint and not server.url for server in one.server)
    if found.enabled and not (found.ca or found.allow_plain or pinned):
        raise wrong(
            "discovery finds whoever announces itself; say whom to believe: a ca, a [[server]] with a fingerprint, "
            "or allow-plain"
        )


def _checked_user(name: str, user: UserEntry, one: Configuration, wrong: Any) -> UserEntry:
    client = normalise_uid(user.client)
    if client is None:
        raise wrong(f"user {name!r}: client is named by 32 hex digits, or a UUID with dashes")
    if not is_hash(user.password):
        raise wrong(f"user {name!r}: password is no hash; `elemento-storage gateway password` makes one")
    known = {server.name for server in one.server}
    if not one.discovery.ca and (strangers := sorted(set(user.tokens) - known)):
        raise wrong(f"user {name!r}: there is a token for {strangers[0]!r}, and no server of that name")
    return msgspec.structs.replace(user, client=client)


def _default_state_dir() -> str:
    home = os.environ.get("STATE_DIRECTORY")  # what systemd made for the unit
    if home:
        return home
    base = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    return f"{base}/elemento-storage-gateway"
