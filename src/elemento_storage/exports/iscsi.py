"""iSCSI by our private tgtd: one target per export, one-way CHAP always, LUN 1.

Why tgtd's ``rdwr`` backing store and no flags: it writes by pwrite through the page cache and does fdatasync for a
flush and for FUA; its ``aio`` ignores SYNCHRONIZE CACHE, and direct writes over FUSE mix up concurrent requests.
"""

import asyncio
import logging
from collections.abc import Awaitable, Mapping
from typing import Final

from elemento_storage.engine.volume_engine import VolumeEngine
from elemento_storage.errors import ExportFailed
from elemento_storage.exports.attach import GuestDisk, attribute, libvirt_disk, qemu_arguments
from elemento_storage.exports.base import Attachment, Endpoint, Presence, Probe
from elemento_storage.exports.iscsi_probe import probe_iscsi
from elemento_storage.exports.record import ExportRecord, Protocol
from elemento_storage.exports.tgtd import Mode, Op, Problem, Refused, Target, Tgtd
from elemento_storage.faultpoints import reached
from elemento_storage.model import TARGET_PREFIX

log = logging.getLogger(__name__)

LUN: Final = 1
_PROBE_S: Final = 5.0
_END_S: Final = 10.0
_EVERYBODY: Final = "ALL"
_NAMES: Final = ("iqn.", "eui.", "naa.")


class IscsiExporter:
    """One target per export."""

    protocol = Protocol.ISCSI

    def __init__(self, tgtd: Tgtd, host: str, port: int, probe_initiator: str) -> None:
        self.tgtd = tgtd
        self._host = host
        self._port = port
        # tgtd lets in who matches an address *or* a name. Our own name for looking is known to nobody else, and does
        # not let anybody past CHAP.
        self._probe_initiator = probe_initiator
        self._numbering = asyncio.Lock()

    @property
    def pids(self) -> tuple[int, ...]:
        """See Exporter.pids."""
        pid = self.tgtd.pid
        return () if pid is None else (pid,)

    # -- making and taking targets -------------------------------------------------------------------------

    async def publish(self, record: ExportRecord, attachment: Attachment) -> None:
        """See Exporter.publish."""
        path = attachment.paths[record.export_id]
        await self.tgtd.start()
        target = await self._find(record.target_name)
        if target is None:
            target = await self._new_target(record)
        if target.path is None:
            await self._new_lun(target, record, path, thin=not attachment.is_viewed)
        elif target.path != path or not target.online:
            await self._reopen(target, path)
        await self._set_acl(target, record)
        reached("export.target-made")

    async def _new_target(self, record: ExportRecord) -> Target:
        # Nobody can log in before an address or a name is bound, which comes last.
        name = record.target_name
        async with self._numbering:
            tid = max((target.tid for target in (await self.tgtd.targets()).values()), default=0) + 1
            await self.tgtd.execute(Mode.TARGET, Op.NEW, f"targetname={name}", tid=tid)
        return Target(tid, name)

    async def _new_lun(self, target: Target, record: ExportRecord, path: str, *, thin: bool) -> None:
        # An account of the same name may be left of a target that was not taken away completely.
        await self._drop_account(record.user)
        await self.tgtd.execute(Mode.ACCOUNT, Op.NEW, f"user={record.user},password={record.secret}")
        await self.tgtd.execute(Mode.ACCOUNT, Op.BIND, f"user={record.user}", tid=target.tid)
        target.accounts = [record.user]
        # The LUN is the last thing that is made: a target that has one has all the rest.
        parameters = f"path={path},bstype=rdwr"
        await self.tgtd.execute(Mode.LOGICAL_UNIT, Op.NEW, parameters, tid=target.tid, lun=LUN)
        # The same identity on every target of a volume: a guest that moves finds the same disk.
        identity = {
            "vendor_id": "ELEMENTO",
            "product_id": "VOLUME",
            "scsi_id": record.volume_id,
            "scsi_sn": record.volume_id,
            "readonly": int(record.readonly),
            # Over FUSE, QEMU refuses to punch holes that are no whole clusters, and tgtd makes a hardware error of it.
            "thin_provisioning": int(thin),
        }
        text = ",".join(f"{key}={value}" for key, value in identity.items())
        await self.tgtd.execute(Mode.LOGICAL_UNIT, Op.UPDATE, f"targetOps {text},", tid=target.tid, lun=LUN)
        target.path, target.online = path, True

    async def _reopen(self, target: Target, path: str) -> None:
        """Another file, or another size of it; sessions go on."""
        for change in ("online=0", f"path={path}", "online=1"):
            await self.tgtd.execute(Mode.LOGICAL_UNIT, Op.UPDATE, f"targetOps {change},", tid=target.tid, lun=LUN)

    async def _set_acl(self, target: Target, record: ExportRecord) -> None:
        wanted = {f"initiator-address={one}": one for one in record.addresses}
        if record.initiator is not None:
            wanted[f"initiator-name={record.initiator}"] = record.initiator
        if not wanted:
            wanted = {f"initiator-address={_EVERYBODY}": _EVERYBODY}
        else:
            wanted[f"initiator-name={self._probe_initiator}"] = self._probe_initiator
        for stale in set(target.acl) - set(wanted.values()):
            await self._let_out(target, stale)
        for parameter, value in wanted.items():
            if value not in target.acl:
                await self.tgtd.execute(Mode.TARGET, Op.BIND, parameter, tid=target.tid)

    async def withdraw(self, export_id: str, engine: VolumeEngine | None) -> None:
        """See Exporter.withdraw."""
        if self.tgtd.pid is None:
            return
        target = await self._find(export_id if export_id.startswith(_NAMES) else TARGET_PREFIX + export_id)
        if target is not None:
            await self._end_sessions(target)
            for account in target.accounts:
                await self._drop_account(account)

    async def _end_sessions(self, target: Target) -> None:
        """Let nobody in any more, close every connection, wait for what is under way, and take the target away.

        Not by force: tgtd refuses that while a request is under way, and ends itself when a session outlives it.
        """
        for one in target.acl:
            await self._let_out(target, one)
        deadline = asyncio.get_running_loop().time() + _END_S
        while True:
            for session, connection in await self.tgtd.connections(target.tid):
                await self._tolerating(
                    self.tgtd.execute(
                        Mode.CONNECTION, Op.DELETE, tid=target.tid, session=session, connection=connection
                    ),
                    Problem.NO_SESSION,
                    Problem.NO_CONNECTION,
                )
            if await self._tolerating(
                self.tgtd.execute(Mode.TARGET, Op.DELETE, tid=target.tid),
                Problem.TARGET_ACTIVE,
                Problem.LOGICAL_UNIT_ACTIVE,
            ):
                return
            if asyncio.get_running_loop().time() > deadline:
                raise ExportFailed("a target does not close: a request in it hangs in the file system")
            await asyncio.sleep(0.002)

    async def _let_out(self, target: Target, who: str) -> None:
        kind = "initiator-name" if who.startswith(("iqn.", "eui.", "naa.")) else "initiator-address"
        await self.tgtd.execute(Mode.TARGET, Op.UNBIND, f"{kind}={who}", tid=target.tid)

    async def _tolerating(self, work: Awaitable[object], *problems: Problem) -> bool:
        try:
            await work
        except Refused as error:
            if error.problem not in problems:
                raise
            return False
        return True

    async def _drop_account(self, user: str) -> None:
        await self._tolerating(self.tgtd.execute(Mode.ACCOUNT, Op.DELETE, f"user={user}"), Problem.NO_ACCOUNT)

    # -- looking -------------------------------------------------------------------------------------------

    async def _find(self, name: str) -> Target | None:
        return (await self.tgtd.targets()).get(name)

    async def published(self) -> Mapping[str, Presence]:
        """See Exporter.published."""
        if self.tgtd.pid is None:
            return {}
        found = {}
        for name, target in (await self.tgtd.targets()).items():
            if target.path is None or not target.acl:
                continue  # half made
            sessions = [name for _, name in target.initiators if name != self._probe_initiator]
            traffic = await self.tgtd.traffic(target.tid) if sessions else {"read": 0, "written": 0}
            found[name.removeprefix(TARGET_PREFIX)] = Presence(
                path=target.path if target.online else None,
                sessions=len(sessions),
                read_bytes=traffic["read"],
                written_bytes=traffic["written"],
            )
        return found

    async def probe(self, record: ExportRecord, attachment: Attachment) -> Probe:
        """See Exporter.probe."""
        latency_s = await probe_iscsi(
            self._host,
            self._port,
            target=record.target_name,
            lun=LUN,
            initiator=self._probe_initiator,
            user=record.user,
            secret=record.secret,
            timeout_s=_PROBE_S,
        )
        return Probe(latency_s)

    def endpoint(self, record: ExportRecord, engine: VolumeEngine, disk: GuestDisk) -> Endpoint:
        """See Exporter.endpoint."""
        portal, target = self.tgtd.portal, record.target_name
        initiator = record.initiator or f"iqn.2004-10.cloud.elemento:client:{record.client}"
        secret_id = f"secret-{record.export_id[:20]}"
        blockdev = {
            "driver": "iscsi",
            "transport": "tcp",
            "portal": portal,
            "target": target,
            "lun": LUN,
            "user": record.user,
            "password-secret": secret_id,
            "initiator-name": initiator,
        }
        usage = f"elemento-{record.export_id}"
        source = (
            f"  <source protocol='iscsi' name={attribute(f'{target}/{LUN}')}>\n"
            f"    <host name={attribute(self._host)} port='{self._port}'/>\n"
            f"    <auth username={attribute(record.user)}><secret type='iscsi' usage={attribute(usage)}/></auth>\n"
            f"    <initiator><iqn name={attribute(initiator)}/></initiator>\n"
            "  </source>"
        )
        secret_xml = (
            f"<secret ephemeral='yes' private='yes'><usage type='iscsi'><target>{usage}</target></usage></secret>"
        )
        return Endpoint(
            address={
                "portal": portal,
                "target": target,
                "lun": LUN,
                "initiator": initiator,
                "uri": f"iscsi://{portal}/{target}/{LUN}",
            },
            credentials={"user": record.user, "password": record.secret},
            qemu=qemu_arguments(disk, blockdev, ({"qom-type": "secret", "id": secret_id, "data": record.secret},)),
            libvirt=libvirt_disk(disk, source),
            prepare=(
                f"virsh -q secret-list | grep -q '{usage}' || "
                f'{{ echo "{secret_xml}" >secret.xml && virsh secret-define secret.xml; }}; virsh secret-set-value '
                f"--secret $(virsh -q secret-list | awk '/{usage}/ {{print $1}}') --base64 "
                f"$(printf %s '{record.secret}' | base64)",
            ),
        )
