"""What smbd reads: its configuration and its accounts, four text files that are ours alone.

    smb.conf         smb.conf(5): what is the same for all, and one section per share
    smbpasswd        smbpasswd(5): the hash of each user's password
    passwd, group    passwd(5), group(5): users and groups that nobody but our smbd knows, by way of nss_wrapper

They are the only record of what is shared: looked at to tell what is, compared to tell what has to be mended, replaced
by a rename. Every connection and every login of smbd reads them afresh (samba 4.17, source3/auth/auth_generic.c), so a
change counts for whoever logs in after it, and nobody has to be told.
"""

import contextlib
import ipaddress
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Final, TypeVar, cast

T = TypeVar("T")

# Above what systemd, containers and useradd give away, and small enough for the number that samba makes of it (twice
# as large, in 32 bits).
_FIRST_ID: Final = 1_900_000_000
_GUEST: Final = "nobody"
_FIXED_USERS: Final = f"root:x:0:0::/:/bin/false\n{_GUEST}:x:65534:65534::/:/bin/false\n"
_FIXED_GROUPS: Final = "root:x:0:\nnogroup:x:65534:\n"
_SECTION: Final = re.compile(r"^\[([^]]+)\]\n", re.MULTILINE)
_SAFE_PATH: Final = re.compile(r"[A-Za-z0-9/._+-]+", re.ASCII)

_GLOBAL_SECTION: Final = "global"
_GLOBAL: Final = """\
    server role = standalone server
    netbios name = ELEMENTO
    workgroup = STORAGE
    server string = Elemento
    disable netbios = yes
    smb ports = {port}
    interfaces = {address}
    bind interfaces only = yes

    # Nothing outside our own directory.
    private dir = {directory}/private
    state directory = {directory}/state
    cache directory = {directory}/cache
    lock directory = {directory}/lock
    pid directory = {directory}/run
    ncalrpc dir = {directory}/ncalrpc
    winbindd socket directory = {directory}/winbindd
    passdb backend = smbpasswd:{directory}/smbpasswd
    logging = file
    log file = {directory}/log/smbd
    max log size = 1000
    log level = 1

    # Who gets in: our users, over encrypted SMB 3.1.1. No pipes: nobody can list shares or users, not even a user.
    server min protocol = SMB3_11
    server smb encrypt = required
    ntlm auth = ntlmv2-only
    map to guest = never
    guest account = nobody
    restrict anonymous = 2
    rpc start on demand helpers = no
    usershare max shares = 0
    host msdfs = no
    load printers = no
    printing = bsd
    printcap name = /dev/null
    disable spoolss = yes
    max smbd processes = 2000
    # A hypervisor that has vanished is noticed after a minute, not after two hours.
    socket options = TCP_NODELAY SO_KEEPALIVE TCP_KEEPIDLE=30 TCP_KEEPINTVL=10 TCP_KEEPCNT=3
    # A process serves one TCP connection and no other, so that ending it ends what its client may do.
    server multi channel support = no

    # No client keeps data of its own: it would not see what is written over iSCSI or by another client.
    oplocks = no
    level2 oplocks = no
    kernel oplocks = no
    smb2 leases = no
    csc policy = disable
    # No handle outlives its connection.
    durable handles = no
    # Reads and writes one after the other in the process of their connection, buffered, never from threads: QEMU 10.0
    # mixes up asynchronous writes to its FUSE export. Threads were not faster (docs/decisions/0010-smb.md).
    aio read size = 0
    aio write size = 0
    use sendfile = no
    # A client's flush is an fsync.
    strict sync = yes
    sync always = no
    # QEMU's locks on the first bytes of an image would become mandatory ones, and its own writes be refused. They still
    # exclude each other.
    strict locking = no
    posix locking = no
    kernel share modes = no

    # One file of a fixed size: no attributes, no streams, no links, no access lists.
    strict allocate = no
    follow symlinks = no
    wide links = no
    allow insecure wide links = no
    ea support = no
    nt acl support = no
    store dos attributes = no
    map archive = no
    map readonly = no
    browseable = no
    guest ok = no
"""


@dataclass(frozen=True)
class Share:
    """One export: a directory with one file, and the one user who may use it."""

    name: str
    volume_id: str
    directory: str
    user: str
    nt_hash: str
    readonly: bool
    addresses: tuple[str, ...]


@dataclass(frozen=True)
class Account:
    """A user of smbd, and the group of all who may open the volume."""

    uid: int
    gid: int
    volume_id: str


@dataclass(frozen=True)
class Put:
    """What came of putting a share into the files."""

    account: Account
    was_other: bool  #: it was there before, and different: whoever uses it uses what it was


class SmbFiles:
    """The files of one smbd, in one directory."""

    def __init__(self, directory: str, address: str, port: int) -> None:
        self.directory = directory
        self.address = address
        self.conf = f"{directory}/smb.conf"
        self.passwd = f"{directory}/passwd"
        self.group = f"{directory}/group"
        self._hashes = f"{directory}/smbpasswd"
        self._global = _GLOBAL.format(directory=directory, address=address, port=port)
        # What was read and what it means, by path; good for as long as the file is the same.
        self._read: dict[str, tuple[tuple[int, int, int], object]] = {}

    @property
    def is_path_safe(self) -> bool:
        """Whether the directory's name means nothing special in smb.conf (``%`` and ``;`` do)."""
        return _SAFE_PATH.fullmatch(self.directory) is not None

    @property
    def is_current(self) -> bool:
        """Whether what is the same for all shares is as it shall be."""
        return self._sections().get(_GLOBAL_SECTION) == self._global

    def make(self) -> None:
        """Make the directories, and files with what is there already."""
        for name in ("private", "run", "ncalrpc", "winbindd", "log"):
            os.makedirs(f"{self.directory}/{name}", mode=0o700, exist_ok=True)
        # To be passed by the users smbd works as. They look users up; and a process that cannot see the lock file of
        # another takes that for dead and takes its locks: under two writers smbd then crashed within a second.
        for path in (self.directory, *(f"{self.directory}/{name}" for name in ("lock", "state", "cache"))):
            os.makedirs(path, exist_ok=True)
            os.chmod(path, 0o711)  # noqa: S103
        self._write(self.shares(), self.accounts(), self._hash_lines())

    # -- looking -------------------------------------------------------------------------------------------

    def shares(self) -> Mapping[str, str]:
        """The section of each share."""
        return {name: text for name, text in self._sections().items() if name != _GLOBAL_SECTION}

    def _sections(self) -> Mapping[str, str]:
        return self._parsed(self.conf, parse_sections)

    def directories(self) -> dict[str, str]:
        """What each share shows."""
        return {name: _value(text, "path") for name, text in self.shares().items()}

    def accounts(self) -> Mapping[str, Account]:
        """Our users by name."""
        return self._parsed(self.passwd, parse_accounts)

    def account_of(self, share: str) -> Account | None:
        """The user of a share."""
        return self.accounts().get(_value(self.shares().get(share, ""), "valid users"))

    def _hash_lines(self) -> Mapping[str, str]:
        return self._parsed(self._hashes, lambda text: {line.partition(":")[0]: line for line in text.splitlines()})

    # -- changing ------------------------------------------------------------------------------------------

    def put(self, share: Share) -> Put:
        """Have the share, its user and the user's password as they shall be."""
        shares, accounts, hashes = self.shares(), self.accounts(), self._hash_lines()
        account, section, line = self._wanted(share)
        if (shares.get(share.name), accounts.get(share.user), hashes.get(share.user)) == (section, account, line):
            return Put(account, was_other=False)
        self._write({**shares, share.name: section}, {**accounts, share.user: account}, {**hashes, share.user: line})
        return Put(account, was_other=share.name in shares)

    def would_change(self, share: Share) -> bool:
        """Whether the share is there, and different."""
        shares, accounts, hashes = self.shares(), self.accounts(), self._hash_lines()
        account, section, line = self._wanted(share)
        present = (shares.get(share.name), accounts.get(share.user), hashes.get(share.user))
        return share.name in shares and present != (section, account, line)

    def _wanted(self, share: Share) -> tuple[Account, str, str]:
        accounts = self.accounts()
        account = accounts.get(share.user)
        if account is None or account.volume_id != share.volume_id:
            account = _new_account(accounts.values(), share.volume_id)
        line = f"{share.user}:{account.uid}:{'X' * 32}:{share.nt_hash}:[U          ]:LCT-00000001:"
        return account, self._section(share), line

    @property
    def are_there(self) -> bool:
        """Whether anything was ever shared from this run directory."""
        return os.path.isdir(self.directory)

    def remove(self, name: str) -> None:
        """Have no such share, and nobody who was let in for it."""
        shares = {one: text for one, text in self.shares().items() if one != name}
        self._write(shares, self.accounts(), self._hash_lines())

    def _section(self, share: Share) -> str:
        lines = [
            f"    path = {share.directory}",
            f"    valid users = {share.user}",
            f"    read only = {'yes' if share.readonly else 'no'}",
        ]
        if share.addresses:
            # smbd lets this host in unless it is denied; we look at the share from our own address.
            allowed = dict.fromkeys([*map(hosts_pattern, share.addresses), self.address])
            lines += [f"    hosts allow = {' '.join(allowed)}", "    hosts deny = ALL"]
        return "\n".join(lines) + "\n"

    def _write(self, shares: Mapping[str, str], accounts: Mapping[str, Account], hashes: Mapping[str, str]) -> None:
        users = {_value(text, "valid users") for text in shares.values()}
        accounts = {user: one for user, one in accounts.items() if user in users}
        groups = {one.gid: one.volume_id for one in accounts.values()}
        texts = {
            self.group: _FIXED_GROUPS + "".join(f"g{volume}:x:{gid}:\n" for gid, volume in groups.items()),
            self.passwd: _FIXED_USERS
            + "".join(f"{user}:x:{a.uid}:{a.gid}:{a.volume_id}:/:/bin/false\n" for user, a in accounts.items()),
            self._hashes: "".join(f"{line}\n" for user, line in hashes.items() if user in accounts),
            self.conf: "".join(f"[{name}]\n{text}" for name, text in {_GLOBAL_SECTION: self._global, **shares}.items()),
        }
        # A share comes after its user, and goes before.
        order = [self.group, self.passwd, self._hashes, self.conf]
        if len(shares) < len(self.shares()):
            order.reverse()
        for path in order:
            if texts[path] != _content(path) or not os.path.exists(path):
                # No secrets in these two, and they are read as the user who is logged in.
                mode = 0o644 if path in (self.passwd, self.group) else 0o600
                _replace(path, texts[path], mode)

    def _parsed(self, path: str, parse: Callable[[str], Mapping[str, T]]) -> Mapping[str, T]:
        try:
            status = os.stat(path)
        except FileNotFoundError:
            return {}
        signature = (status.st_ino, status.st_mtime_ns, status.st_size)
        known = self._read.get(path)
        if known is None or known[0] != signature:
            known = self._read[path] = (signature, parse(_content(path)))
        return cast(Mapping[str, T], known[1])


def parse_sections(text: str) -> dict[str, str]:
    """The sections of a configuration of ours."""
    parts = _SECTION.split(text)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def parse_accounts(text: str) -> dict[str, Account]:
    """The users in passwd(5) that are ours."""
    found = {}
    for line in text.splitlines():
        fields = line.split(":")
        if len(fields) == 7 and fields[2].isdecimal() and fields[3].isdecimal() and int(fields[2]) >= _FIRST_ID:
            found[fields[0]] = Account(int(fields[2]), int(fields[3]), fields[4])
    return found


def hosts_pattern(address: str) -> str:
    """An address or network as hosts_access(5) of samba takes it: masks are written out, IPv6 in brackets.

    samba takes what follows the slash for an address if it is longer than two characters, so /128 would match nothing.
    """
    network = ipaddress.ip_network(address)
    if network.num_addresses == 1:
        return str(network.network_address)
    shown = f"[{network.network_address}]" if network.version == 6 else str(network.network_address)
    return f"{shown}/{network.netmask}"


def _new_account(accounts: Iterable[Account], volume_id: str) -> Account:
    """A user with a number of its own: samba knows users by their numbers, and would take two with one for the same.

    All users of a volume are of one group, and that group may open the volume's file: whoever talks smbd into showing
    another volume is stopped by the kernel.
    """
    accounts = list(accounts)
    uid = 1 + max((number for one in accounts for number in (one.uid, one.gid)), default=_FIRST_ID - 1)
    gid = next((one.gid for one in accounts if one.volume_id == volume_id), uid + 1)
    return Account(uid, gid, volume_id)


def _value(section: str, key: str) -> str:
    match = re.search(rf"^\s*{key} = (.*)$", section, re.MULTILINE)
    return match[1] if match else ""


def _content(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except FileNotFoundError:
        return ""


def _replace(path: str, text: str, mode: int) -> None:
    new = f"{path}.new"
    with contextlib.suppress(FileNotFoundError):
        os.unlink(new)
    with open(os.open(new, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, mode), "w", encoding="utf-8") as file:
        os.fchmod(file.fileno(), mode)
        file.write(text)
    os.rename(new, path)
