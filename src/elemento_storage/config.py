"""Settings: built-in defaults, then a TOML file, then environment variables, then flags; the later wins.

A setting ``bin-retention`` is ``bin-retention = …`` in the file, ``ELEMENTO_STORAGE_BIN_RETENTION`` in the environment
and ``--bin-retention`` on the command line. Durations are seconds.
"""

import ipaddress
import math
import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import Any

from elemento_storage.errors import ConfigurationError

_LONGEST_RUN_DIR = 60  # v/<32 hex digits>/bridge/qmp follows
ENVIRONMENT_PREFIX = "ELEMENTO_STORAGE_"
_NOT_SETTINGS = {ENVIRONMENT_PREFIX + name for name in ("FAULTPOINT", "CONFIG_FILE", "GATEWAY_CONFIG_FILE")}


class Auth(StrEnum):
    """Who may call."""

    LOOPBACK = "trusted-loopback"
    NETWORK = "trusted-network"
    TOKENS = "tokens"


class IscsiBacking(StrEnum):
    """How tgtd reaches an image that is not raw."""

    VHOST = "vhost"
    FUSE = "fuse"


class NbdTls(StrEnum):
    """How NBD over TCP is protected."""

    OFF = "off"
    PSK = "psk"
    X509 = "x509"


def _setting(default: object, doc: str) -> Any:
    return field(default=default, metadata={"doc": doc})


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The effective settings of one server. ``metadata["doc"]`` of each field is its documentation."""

    root: str = _setting("/mnt", "the directory under which locations are looked for")
    search_depth: int = _setting(2, "how many levels below the root may hold a settings.json")
    state_dir: str = _setting("/var/lib/elemento-storage", "where this server keeps tokens and idempotency keys")
    listen: str = _setting("127.0.0.1:7772", "HOST:PORT to listen on; [::1]:7772 for IPv6")
    auth: Auth = _setting(
        Auth.LOOPBACK,
        "trusted-loopback: everybody on this machine is trusted; tokens: every call needs a token; "
        "trusted-network: everybody who reaches the address is trusted",
    )
    tls_certificate: str = _setting("", "PEM file of the certificate chain; with tls-key turns HTTPS on")
    tls_key: str = _setting("", "PEM file of the certificate's private key")
    announce: str = _setting(
        "",
        "the name, such as the certificate's, under which the server announces itself on the network of `listen` by "
        "multicast DNS; none: it does not",
    )
    run_dir: str = _setting(
        "/run/elemento-storage",
        "where the daemons that serve exports keep their sockets; a short path, emptied by a boot",
    )
    export_address: str = _setting(
        "127.0.0.1", "the address of this machine at which exports are offered to hypervisors"
    )
    iscsi_port: int = _setting(3260, "the TCP port of the iSCSI portal")
    iscsi_backing: IscsiBacking = _setting(
        IscsiBacking.VHOST,
        "how iSCSI reaches images that only QEMU can read: vhost, where the library for it was built; fuse: never so",
    )
    nbd_ports: str = _setting("10809-12808", "the TCP ports for NBD, FIRST-LAST; every exported volume takes one")
    nbd_tls: NbdTls = _setting(
        NbdTls.OFF, "off; psk: every NBD export over TCP has a key of its own; x509: clients show a certificate"
    )
    nbd_tls_dir: str = _setting(
        "", "with nbd-tls x509: the directory of ca-cert.pem, server-cert.pem and server-key.pem"
    )
    smb_port: int = _setting(4450, "the TCP port of the SMB server")
    overcommit: float = _setting(
        1.0, "a new volume may be this many times as large as the file system's free space; 0: any size"
    )
    bin_retention: float = _setting(86400.0, "how long a destroyed volume can be restored; 0: not at all")
    max_snapshots: int = _setting(64, "how many snapshots a volume may have; 0: none can be made")
    backup_location: str = _setting(
        "", "the location that takes all backups; empty: another one than the volume's, on another file system if any"
    )
    backups_at_once: int = _setting(2, "how many backups of schedules may run at once")
    lease: float = _setting(30.0, "after this long without a sign of life a server or an export is dead")
    heartbeat: float = _setting(5.0, "how often this server gives a sign of life in each location")
    sweep_interval: float = _setting(5.0, "how often locations are looked at for changes made behind the server's back")
    disk_timeout: float = _setting(30.0, "how long a location may take to answer before the call fails")
    job_timeout: float = _setting(86400.0, "how long a conversion or preallocation may take")
    image_max_size: int = _setting(
        0,
        "bytes that an image from outside may have, as it arrives and as a guest sees it; 0: as many as there is room",
    )
    download_allow: str = _setting(
        "", "networks to fetch from although downloads otherwise refuse them: 127.0.0.0/8, a link-local one, our own"
    )
    download_deny: str = _setting("", "networks never to fetch from, such as 10.0.0.0/8")
    download_stall: float = _setting(30.0, "a connection that brings nothing for so long is given up for another")
    longest_chain: int = _setting(8, "how many volumes a linked clone may stand on, each on the next")
    reader_stall: float = _setting(
        60.0, "a client that takes less than 1 MiB of a download while the server waits this long is hung up on"
    )
    reader_grace: float = _setting(
        60.0, "how long those who read another client's volume go on when somebody wants to change it"
    )
    upload_expiry: float = _setting(86400.0, "how long an upload may rest before what arrived is removed")
    upload_stall: float = _setting(30.0, "how long the client of an upload may send nothing before it counts as gone")
    max_body: int = _setting(1_048_576, "bytes of a JSON request body at the most")
    log_level: str = _setting("info", "debug, info, warning or error")

    @property
    def listen_host(self) -> str:
        """The host part of ``listen``, without the brackets of IPv6."""
        return self.listen.rpartition(":")[0].strip("[]")

    @property
    def nbd_port_range(self) -> range:
        """The ports of ``nbd_ports``."""
        first, _, last = self.nbd_ports.partition("-")
        return range(int(first), int(last or first) + 1)

    @property
    def listen_port(self) -> int:
        """The port part of ``listen``."""
        return int(self.listen.rpartition(":")[2])


@dataclass(frozen=True)
class Origin:
    """A setting's value and where it came from."""

    name: str
    value: str | int | float
    source: str
    doc: str


def setting_names() -> list[str]:
    """Every setting's name as files and flags write it."""
    return [spec.name.replace("_", "-") for spec in fields(Settings)]


def load(
    config_file: str | None, flags: Mapping[str, object], environment: Mapping[str, str] | None = None
) -> tuple[Settings, list[Origin]]:
    """The effective settings and each one's origin. Raises ConfigurationError with what to change."""
    environment = os.environ if environment is None else environment
    from_file = _read_file(config_file) if config_file else {}
    known = set(setting_names())
    if unknown := sorted(set(from_file) - known):
        raise ConfigurationError(f"{config_file}: unknown settings {', '.join(unknown)}")
    ours = {name for name in environment if name.startswith(ENVIRONMENT_PREFIX) and name not in _NOT_SETTINGS}
    if unknown := sorted(ours - {_variable(name) for name in known}):
        raise ConfigurationError(f"unknown settings in the environment: {', '.join(unknown)}")

    values: dict[str, Any] = {}
    origins = []
    for spec in fields(Settings):
        name = spec.name.replace("_", "-")
        raw: object = spec.default
        source = "default"
        if name in from_file:
            raw, source = from_file[name], str(config_file)
        if _variable(name) in environment:
            raw, source = environment[_variable(name)], _variable(name)
        if flags.get(spec.name) is not None:
            raw, source = flags[spec.name], f"--{name}"
        values[spec.name] = _convert(name, raw, type(spec.default), source)
        origins.append(Origin(name, values[spec.name], source, spec.metadata["doc"]))
    settings = Settings(**values)
    _validate(settings)
    return settings, origins


def _variable(name: str) -> str:
    return ENVIRONMENT_PREFIX + name.upper().replace("-", "_")


def _read_file(path: str) -> dict[str, object]:
    try:
        with open(path, "rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise ConfigurationError(f"{path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path} is not TOML: {error}") from error


def _convert(name: str, raw: object, kind: type, source: str) -> object:
    if kind is str and isinstance(raw, str):
        return raw
    if isinstance(raw, kind) and not isinstance(raw, bool):
        return raw
    if kind is float and isinstance(raw, int) and not isinstance(raw, bool):
        return float(raw)
    if isinstance(raw, str):
        try:
            return kind(raw)
        except ValueError:
            pass
    wanted = (
        " or ".join(kind)
        if issubclass(kind, StrEnum)
        else {"int": "a whole number", "float": "a number"}.get(kind.__name__, "text")
    )
    raise ConfigurationError(f"{name} from {source} is {raw!r}, it has to be {wanted}")


def _validate(settings: Settings) -> None:
    host, colon, port = settings.listen.rpartition(":")
    if not colon or not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise ConfigurationError(f"listen is {settings.listen!r}, it has to be HOST:PORT")
    if bool(settings.tls_certificate) != bool(settings.tls_key):
        raise ConfigurationError("tls-certificate and tls-key go together: give both or neither")
    if settings.announce and not re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?", settings.announce):
        raise ConfigurationError(f"announce is {settings.announce!r}, it has to be a host name, or nothing")
    for spec in fields(Settings):
        value = getattr(settings, spec.name)
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigurationError(f"{spec.name.replace('_', '-')} has to be a finite number")
    not_negative = ("search_depth", "overcommit", "bin_retention", "max_snapshots", "image_max_size", "reader_grace")
    for name in not_negative:
        if not getattr(settings, name) >= 0:
            raise ConfigurationError(f"{name.replace('_', '-')} cannot be negative")
    stalls = ("download_stall", "reader_stall")
    for name in (
        *("lease", "heartbeat", "sweep_interval", "disk_timeout", "job_timeout", *stalls, "max_body"),
        "backups_at_once",
    ):
        if not getattr(settings, name) > 0:
            raise ConfigurationError(f"{name.replace('_', '-')} has to be greater than 0")
    if settings.heartbeat * 3 > settings.lease:
        raise ConfigurationError("lease has to be at least three times heartbeat, or a busy moment looks like death")
    for name in ("download_allow", "download_deny"):
        try:
            parse_networks(getattr(settings, name))
        except ValueError as error:
            raise ConfigurationError(
                f"{name.replace('_', '-')} has to be networks such as 10.0.0.0/8, 192.0.2.1: {error}"
            ) from error
    _validate_exports(settings)
    if settings.log_level not in {"debug", "info", "warning", "error"}:
        raise ConfigurationError("log-level has to be debug, info, warning or error")
    if settings.auth is Auth.LOOPBACK and not is_loopback(settings.listen_host):
        raise ConfigurationError(
            f"refusing to listen on {settings.listen}: anybody who reaches it could read and destroy every volume. "
            "Create tokens and say --auth tokens, or say --auth trusted-network if the network is yours alone"
        )


def _validate_exports(settings: Settings) -> None:
    if not os.path.isabs(settings.run_dir) or len(os.fsencode(settings.run_dir)) > _LONGEST_RUN_DIR:
        raise ConfigurationError(
            f"run-dir is {settings.run_dir!r}, it has to be an absolute path of at most {_LONGEST_RUN_DIR} bytes: "
            "the name of a Unix socket has room for 107"
        )
    if not re.fullmatch(r"[A-Za-z0-9/._-]+", settings.run_dir, re.ASCII):
        raise ConfigurationError(
            f"run-dir is {settings.run_dir!r}, it has to be of letters, digits and ._-/: tgtd takes no other path"
        )
    try:
        address = ipaddress.ip_address(settings.export_address)
    except ValueError:
        raise ConfigurationError(f"export-address is {settings.export_address!r}, it has to be an IP address") from None
    if address.is_unspecified:
        raise ConfigurationError(
            f"export-address is {settings.export_address}, which is no address a hypervisor could connect to: "
            "give the one of this machine's network"
        )
    if settings.nbd_tls is NbdTls.X509:
        for name in ("ca-cert.pem", "server-cert.pem", "server-key.pem"):
            if not os.path.isfile(os.path.join(settings.nbd_tls_dir, name)):
                raise ConfigurationError(f"nbd-tls is x509, and nbd-tls-dir {settings.nbd_tls_dir!r} has no {name}")
    if not re.fullmatch(r"\d{1,5}(-\d{1,5})?", settings.nbd_ports, re.ASCII) or not settings.nbd_port_range:
        raise ConfigurationError(f"nbd-ports is {settings.nbd_ports!r}, it has to be FIRST-LAST")
    for port in (settings.iscsi_port, settings.smb_port, settings.nbd_port_range[0], settings.nbd_port_range[-1]):
        if not 0 < port < 65536:
            raise ConfigurationError(f"{port} is no TCP port: look at iscsi-port, smb-port and nbd-ports")


def parse_networks(text: str) -> tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...]:
    """Networks separated by commas or blanks. Raises ValueError."""
    return tuple(ipaddress.ip_network(part) for part in text.replace(",", " ").split())


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address. A name other than localhost is not believed."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
