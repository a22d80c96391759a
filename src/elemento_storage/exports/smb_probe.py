"""Looks whether a share really serves: smbclient(1) logs in, opens the file and reads its last block.

The end and not the beginning, because smbclient has no command that reads a part of a file; but it goes on with a copy
that is not complete. So it finds one of which only the end is missing, and a wrong size is noticed as well.
"""

import contextlib
import os
from typing import Final

from elemento_storage import process
from elemento_storage.errors import ExportFailed, ToolTimeout

_BLOCK: Final = 512
_SENTENCES: Final = {
    "NT_STATUS_LOGON_FAILURE": "smbd does not know the user or the password",
    "NT_STATUS_ACCESS_DENIED": "smbd does not let its user open the share: can everybody pass the directories above "
    "run-dir (chmod o+x)?",
    "NT_STATUS_BAD_NETWORK_NAME": "smbd does not know the share",
    "NT_STATUS_OBJECT_NAME_NOT_FOUND": "the share does not show the volume",
    "NT_STATUS_CONNECTION_REFUSED": "nobody listens on the port of smbd",
    "NT_STATUS_IO_TIMEOUT": "smbd does not answer",
}
_ADDRESS_SPACE: Final = 2**30


async def probe_smb(
    host: str,
    port: int,
    *,
    share: str,
    file: str,
    user: str,
    secret: str,
    size_bytes: int,
    directory: str,
    timeout_s: float,
) -> float:
    """Log in, read the last block, log out; seconds that it took. ``directory`` is smbd's. Raises ExportFailed."""
    configuration, copy = f"{directory}/client.conf", f"{directory}/probe-{share}"
    try:
        _write(configuration, _configuration(directory))
        _write(copy, "", size_bytes=max(0, size_bytes - _BLOCK))
        finished = await process.run(
            [
                "smbclient",
                f"--configfile={configuration}",
                "--authentication-file=/dev/stdin",
                "--client-protection=encrypt",
                "--max-protocol=SMB3_11",
                f"--port={port}",
                f"//{host}/{share}",
                f"--command=reget {file} {copy}",
            ],
            process.Limits(timeout_s=timeout_s, address_space_bytes=_ADDRESS_SPACE),
            expected=frozenset({0, 1}),
            standard_input=f"username = {user}\npassword = {secret}\n".encode(),
        )
        found_bytes = os.stat(copy).st_size
    except ToolTimeout as error:
        raise ExportFailed(f"the share does not answer within {timeout_s:g} s") from error
    except OSError as error:
        raise ExportFailed(f"the share cannot be looked at: {error}") from error
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(copy)
    if (problem := reason(finished.stdout)) is not None:
        raise ExportFailed(problem)
    if finished.status or found_bytes != size_bytes:
        raise ExportFailed(f"the share shows less than the {size_bytes} bytes of the volume: was it grown?")
    return finished.seconds


def reason(output: str) -> str | None:
    """What went wrong, as smbclient tells it; None when it names no error."""
    _, found, rest = output.partition("NT_STATUS_")
    if not found:
        return None
    name = "NT_STATUS_" + "".join(rest.split()[:1]).rstrip(".)")
    return _SENTENCES.get(name, f"the share cannot be used: {name}")


def _write(path: str, text: str, *, size_bytes: int = 0) -> None:
    with open(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o600), "w", encoding="utf-8") as out:
        out.write(text)
        out.truncate(size_bytes or None)


def _configuration(directory: str) -> str:
    """Nothing outside of our directory: not the host's smb.conf, not its caches."""
    return (
        "[global]\n"
        f"private dir = {directory}/private\n"
        f"state directory = {directory}/state\n"
        f"cache directory = {directory}/cache\n"
        f"lock directory = {directory}/cache\n"
        f"winbindd socket directory = {directory}/winbindd\n"
        "netbios name = PROBE\n"
    )
