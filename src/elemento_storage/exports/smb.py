"""SMB by our private smbd: one share per export, with one user and one file.

The file is what the volume's storage daemon shows over FUSE, in a directory that belongs to root and can be read by the
volume's users: they can open what is there and nothing else, and what is there cannot be removed, renamed or cut short
(it is a mount point, and its size is fixed).
"""

import os
import stat
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from elemento_storage.disk import Disk, within
from elemento_storage.engine.volume_engine import VIEWED_FILE, VolumeEngine
from elemento_storage.errors import ExportFailed
from elemento_storage.exports.attach import GuestDisk, attribute, libvirt_disk, qemu_arguments
from elemento_storage.exports.base import Attachment, Endpoint, Presence, Probe
from elemento_storage.exports.nt_hash import nt_hash
from elemento_storage.exports.record import ExportRecord, Protocol
from elemento_storage.exports.smb_files import Share
from elemento_storage.exports.smb_probe import probe_smb
from elemento_storage.exports.smbd import Smbd
from elemento_storage.faultpoints import reached

_PROBE_S: Final = 10.0
# A look takes 40 ms of processor time and a marker is fresh for 30 s: not every 5 s, as with what we can ask ourselves.
_PROBE_AGE_S: Final = 15.0
_FILE_S: Final = 5.0
_MOUNT: Final = "/mnt/elemento"


@dataclass(frozen=True)
class _Seen:
    """A look that went well, and at what."""

    at: float
    what: tuple[object, ...]
    latency_s: float


class SmbExporter:
    """One share per export."""

    protocol = Protocol.SMB

    def __init__(self, smbd: Smbd) -> None:
        self.smbd = smbd
        self._seen: dict[str, _Seen] = {}

    @property
    def pids(self) -> tuple[int, ...]:
        """See Exporter.pids."""
        pid = self.smbd.pid
        return () if pid is None else (pid,)

    async def publish(self, record: ExportRecord, attachment: Attachment) -> None:
        """See Exporter.publish. When nothing differs it costs a few stat calls."""
        path = attachment.paths[record.export_id]
        await self.smbd.start()
        directory = os.path.dirname(os.readlink(path))
        share = Share(
            name=record.export_id,
            volume_id=record.volume_id,
            directory=directory,
            user=record.user,
            nt_hash=nt_hash(record.secret),
            readonly=record.readonly,
            addresses=record.addresses,
        )
        # When the daemon behind the file is another one, so is the share: clients are disconnected, because handles of
        # the old one are dead, and open the file again by themselves. Then they have to be let in already.
        known = self.smbd.files.accounts().get(record.user)
        if known is not None:
            await _let_in(attachment.source.disk, directory, known.gid)
        account = await self.smbd.put(share)
        if account != known:
            await _let_in(attachment.source.disk, directory, account.gid)
        reached("export.target-made")

    async def withdraw(self, export_id: str, engine: VolumeEngine | None) -> None:
        """See Exporter.withdraw."""
        self._seen.pop(export_id, None)
        await self.smbd.remove(export_id)

    async def published(self) -> Mapping[str, Presence]:
        """See Exporter.published."""
        if self.smbd.pid is None:
            return {}
        directories = self.smbd.files.directories()
        if not directories:
            return {}
        sessions = (await self.smbd.status()).count()
        return {
            name: Presence(path=f"{directory}/{VIEWED_FILE}", sessions=sessions.get(name, 0))
            for name, directory in directories.items()
        }

    async def probe(self, record: ExportRecord, attachment: Attachment) -> Probe:
        """See Exporter.probe. What went well a moment ago, with the same processes and settings, is believed."""
        name = record.export_id
        section = self.smbd.files.shares().get(name)
        what = (self.smbd.pid, section, record.secret, attachment.paths[record.export_id], attachment.source.size_bytes)
        seen = self._seen.get(name)
        if seen is not None and seen.what == what and time.monotonic() - seen.at < _PROBE_AGE_S:
            return Probe(seen.latency_s)
        latency_s = await probe_smb(
            self.smbd.host,
            self.smbd.port,
            share=name,
            file=VIEWED_FILE,
            user=record.user,
            secret=record.secret,
            size_bytes=attachment.source.size_bytes,
            directory=self.smbd.directory,
            timeout_s=_PROBE_S,
        )
        self._seen[name] = _Seen(time.monotonic(), what, latency_s)
        return Probe(latency_s)

    def endpoint(self, record: ExportRecord, engine: VolumeEngine, disk: GuestDisk) -> Endpoint:
        """See Exporter.endpoint. QEMU speaks no SMB: the client mounts the share and opens the file."""
        share, host, port = record.export_id, self.smbd.host, self.smbd.port
        mount_point, credentials = f"{_MOUNT}/{share}", f"/etc/elemento-{share}.credentials"
        path = f"{mount_point}/{VIEWED_FILE}"
        return Endpoint(
            address={
                "server": host,
                "port": port,
                "share": share,
                "file": VIEWED_FILE,
                "unc": f"\\\\{host}\\{share}",
                "uri": f"smb://{f'[{host}]' if ':' in host else host}:{port}/{share}/{VIEWED_FILE}",
            },
            credentials={"user": record.user, "password": record.secret},
            qemu=qemu_arguments(disk, {"driver": "file", "filename": path}),
            libvirt=libvirt_disk(disk, f"  <source file={attribute(path)}/>", network=False),
            prepare=(
                f"mkdir -p {mount_point}",
                f"(umask 077 && printf 'username=%s\\npassword=%s\\n' {record.user} {record.secret} >{credentials})",
                f"mount -t cifs //{host}/{share} {mount_point} -o {','.join(_options(credentials, port, disk))}",
            ),
        )


def _options(credentials: str, port: int, disk: GuestDisk) -> list[str]:
    """Options of mount.cifs(8).

    ``cache=none``: reads and writes go to the server, as live migration and a second client need it. ``nobrl``: QEMU's
    locks stay on the client, where they do not get in its own way. ``nosharesock``: a TCP connection, and with it a
    process of smbd, of its own. ``gid=kvm``: guests that libvirt starts are in that group.
    """
    options = [f"credentials={credentials}", f"port={port}", "vers=3.1.1", "seal", "cache=none", "nobrl", "nosharesock"]
    options += ["hard", "gid=kvm", "file_mode=0660", "dir_mode=0750"]
    return [*options, "ro"] if disk.readonly else options


async def _let_in(disk: Disk, directory: str, gid: int) -> None:
    """Open the directory and its file to a group, and the way there to everybody. Raises ExportFailed."""
    try:
        await within(_FILE_S, disk.run(_set_modes, directory, gid))
    except (OSError, TimeoutError) as error:
        raise ExportFailed(f"smbd cannot be let into the volume: {str(error) or 'no answer in time'}") from error


def _set_modes(directory: str, gid: int) -> None:
    file = f"{directory}/{VIEWED_FILE}"
    writable = os.stat(file).st_mode & stat.S_IWUSR
    for path, mode in ((directory, 0o750), (file, 0o660 if writable else 0o440)):
        present = os.stat(path)
        if present.st_gid != gid:
            os.chown(path, -1, gid)
        if stat.S_IMODE(present.st_mode) != mode:
            os.chmod(path, mode)
    # Run directory, "v", the volume's directory: to be passed, not to be listed. What else is in them stays closed.
    volume_directory = os.path.dirname(directory)
    volumes = os.path.dirname(volume_directory)
    above = os.path.dirname(volumes)
    for path in (volume_directory, volumes, above):
        mode = stat.S_IMODE(os.stat(path).st_mode)
        if not mode & stat.S_IXOTH:
            os.chmod(path, mode | stat.S_IXGRP | stat.S_IXOTH)  # noqa: S103
    while above != "/":
        above = os.path.dirname(above)
        if not os.stat(above).st_mode & stat.S_IXOTH:
            raise ExportFailed(f"clients of SMB have to pass {above}, which is closed to them: chmod o+x {above}")
