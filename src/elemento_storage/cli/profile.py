"""Which server a command talks to, and as whom: flags, environment, profile, defaults; the first that says it."""

import os
import stat
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from elemento_storage.errors import ConfigurationError

DEFAULT_SERVER: Final = "http://127.0.0.1:7772"
_KEYS: Final = {"server", "client", "token", "token-file", "ca"}


@dataclass(frozen=True)
class Profile:
    """What a connection needs."""

    server: str
    client: str | None
    token: str | None
    ca: str | None


def config_path(environment: Mapping[str, str]) -> str:
    """The file of profiles."""
    home = environment.get("XDG_CONFIG_HOME") or os.path.join(environment.get("HOME", "/"), ".config")
    return environment.get("ELEMENTO_CONFIG") or os.path.join(home, "elemento-storage", "config.toml")


def state_directory(environment: Mapping[str, str]) -> str:
    """Where uploads that are under way are noted."""
    home = environment.get("XDG_STATE_HOME") or os.path.join(environment.get("HOME", "/"), ".local", "state")
    return os.path.join(home, "elemento-storage")


def load(flags: Mapping[str, str | None], environment: Mapping[str, str] | None = None) -> Profile:
    """The effective profile. Raises ConfigurationError with what to change."""
    environment = os.environ if environment is None else environment
    said = _from_file(config_path(environment), flags.get("profile") or environment.get("ELEMENTO_PROFILE"))

    def first(key: str) -> str | None:
        variable = f"ELEMENTO_{key.upper().replace('-', '_')}"
        value = flags.get(key) or environment.get(variable) or said.get(key)
        return None if value is None else str(value)

    # A file that was named on the command line counts more than a token in the environment.
    token = None
    if flags.get("token-file") is None:
        token = environment.get("ELEMENTO_TOKEN")
    if token is None and (token_file := first("token-file")) is not None:
        token = _token_of(token_file)
    if token is None and "token" in said:
        token = str(said["token"])
    return Profile(first("server") or DEFAULT_SERVER, first("client"), token, first("ca"))


def _from_file(path: str, name: str | None) -> Mapping[str, Any]:
    try:
        with open(path, "rb") as file:
            content = tomllib.load(file)
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
    except FileNotFoundError:
        if name is not None:
            raise ConfigurationError(f"there is no profile {name!r}: {path} does not exist") from None
        return {}
    except OSError as error:
        raise ConfigurationError(f"{path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path} is not TOML: {error}") from error
    profiles = content.get("profiles", {})
    name = name or content.get("profile")
    if name is None:
        return {}
    if not isinstance(profiles, dict) or not isinstance(profiles.get(name), dict):
        known = ", ".join(profiles) if isinstance(profiles, dict) and profiles else "none"
        raise ConfigurationError(f"{path} has no profile {name!r}; it has {known}")
    said: Mapping[str, Any] = profiles[name]
    if unknown := sorted(set(said) - _KEYS):
        raise ConfigurationError(f"{path}: unknown keys {', '.join(unknown)} in profile {name!r}")
    if "token" in said and mode & 0o077:
        raise ConfigurationError(f"{path} holds a token and others may read it: chmod 600 {path}")
    return said


def _token_of(path: str) -> str:
    expanded = os.path.expanduser(path)
    try:
        with open(expanded, encoding="ascii") as file:
            text = file.read(4096).strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"the token file {expanded} cannot be read: {error}") from error
    if not text:
        raise ConfigurationError(f"the token file {expanded} is empty")
    return text
