import os
import socket
from pathlib import Path

import pytest

from elemento_storage.errors import Forbidden
from elemento_storage.gateway.callers import account_name, account_of

HEAD = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"


def row(mine: str, other: str, account: int, inode: int, state: str = "01") -> str:
    return f"   0: {mine} {other} {state} 00000000:00000000 00:00000000 00000000 {account:5d}        0 {inode} 1 0 20\n"


def test_the_account_of_a_real_connection() -> None:
    for host in ("127.0.0.1", "::1"):
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.create_server((host, 0), family=family) as listener:
            address = listener.getsockname()[:2]
            with socket.create_connection(address) as client:
                connection, _ = listener.accept()
                mine = client.getsockname()[:2]
                with connection:
                    assert account_of(mine, address) == os.geteuid()
            # The client has hung up: whoever it was, it is nobody now.
            with pytest.raises(Forbidden):
                account_of(mine, address)


def test_a_socket_of_ipv6_that_speaks_ipv4() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket(socket.AF_INET6) as client:
        port = listener.getsockname()[1]
        client.connect(("::ffff:127.0.0.1", port))
        connection, mine = listener.accept()
        with connection:
            assert account_of(mine, ("127.0.0.1", port)) == os.geteuid()


@pytest.mark.parametrize(
    ("rows", "account"),
    [
        (row("0100007F:1F90", "0100007F:6C81", 1000, 77), 1000),
        (row("0100007F:1F91", "0100007F:6C81", 7, 76) + row("0100007F:1F90", "0100007F:6C81", 1000, 77), 1000),
        (row("0100007F:1F90", "0100007F:6C81", 0, 0, "05"), None),
        (row("0100007F:1F90", "0100007F:6C81", 0, 0, "06"), None),
        (row("0100007F:6C81", "0100007F:1F90", 1000, 77), None),
        ("", None),
    ],
)
def test_rows_of_the_kernels_table(tmp_path: Path, rows: str, account: int | None) -> None:
    table = tmp_path / "tcp"
    table.write_text(HEAD + rows)
    client, server = ("127.0.0.1", 0x1F90), ("127.0.0.1", 27777)
    if account is None:
        with pytest.raises(Forbidden):
            account_of(client, server, [str(table)])
    else:
        assert account_of(client, server, [str(table)]) == account


def test_a_system_that_tells_nothing(tmp_path: Path) -> None:
    with pytest.raises(Forbidden, match="does not tell"):
        account_of(("127.0.0.1", 1), ("127.0.0.1", 2), [str(tmp_path / "none")])


def test_names_of_accounts() -> None:
    assert account_name(0) == "root"
    assert account_name(4_000_000_000) == "4000000000"
