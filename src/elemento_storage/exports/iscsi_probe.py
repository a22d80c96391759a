"""An initiator that looks whether a target really serves: login with CHAP, and one block read (RFC 7143)."""

import asyncio
import contextlib
import hashlib
import struct
import time
from dataclasses import dataclass
from typing import Final

from elemento_storage.errors import ExportFailed

_HEADER: Final = 48
_LOGIN, _LOGIN_ANSWER = 0x43, 0x23
_COMMAND, _DATA_IN, _RESPONSE = 0x01, 0x25, 0x21
_LOGOUT, _LOGOUT_ANSWER = 0x46, 0x26
_SECURITY, _OPERATIONAL, _FULL_FEATURE = 0, 1, 3
_BLOCK: Final = 512
_ATTEMPTS: Final = 3  # a new session's first commands are told what happened before it (unit attention)
_LARGEST: Final = 1 << 20


@dataclass
class _Session:
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    command_number: int = 1
    status_number: int = 0

    async def exchange(self, header: bytes, data: bytes = b"") -> tuple[bytes, bytes]:
        """Send one PDU, read one."""
        padded = data + b"\0" * (-len(data) % 4)
        self.writer.write(header[:5] + len(data).to_bytes(3, "big") + header[8:] + padded)
        return await self.receive()

    async def receive(self) -> tuple[bytes, bytes]:
        header = await self.reader.readexactly(_HEADER)
        length = int.from_bytes(header[5:8], "big")
        if length > _LARGEST:
            raise ExportFailed("what listens there is no iSCSI target")
        data = await self.reader.readexactly(header[4] * 4 + length + -length % 4)
        self.status_number = int.from_bytes(header[24:28], "big") + 1
        return header, data[header[4] * 4 :][:length]

    async def login(self, stage: int, following: int | None, keys: dict[str, str]) -> dict[str, str]:
        flags = stage << 2 | (0x80 | following if following is not None else 0)
        header = struct.pack(
            ">BBBBI6sHIHHII16x",
            _LOGIN,
            flags,
            0,
            0,
            0,
            b"\x80ELEM\0",
            0,
            1,
            0,
            0,
            self.command_number,
            self.status_number,
        )
        text = "".join(f"{key}={value}\0" for key, value in keys.items())
        answer, data = await self.exchange(header, text.encode())
        if answer[0] & 0x3F != _LOGIN_ANSWER:
            raise ExportFailed("what listens there is no iSCSI target")
        if answer[36]:
            raise ExportFailed(f"the target refuses the login: status {answer[36]:02x}{answer[37]:02x}")
        pairs = (pair.partition("=") for pair in data.decode("utf-8", "replace").split("\0") if pair)
        return {key: value for key, _, value in pairs}

    async def read_block(self, lun: int) -> int:
        """READ(16) of the first block; the SCSI status."""
        command = struct.pack(">BBQIBB", 0x88, 0, 0, 1, 0, 0)
        header = struct.pack(
            ">BB2xI8sIIII16s",
            _COMMAND,
            0xC1,  # final, read, simple queueing
            0,
            bytes([0, lun, 0, 0, 0, 0, 0, 0]),
            1 + self.command_number,
            _BLOCK,
            self.command_number,
            self.status_number,
            command,
        )
        self.command_number += 1
        answer, data = await self.exchange(header)
        received = 0
        while answer[0] & 0x3F == _DATA_IN:
            received += len(data)
            if answer[1] & 0x01:  # the status comes with the last data
                break
            answer, data = await self.receive()
        status = answer[3]
        if status == 0 and received != _BLOCK:
            raise ExportFailed(f"the target sent {received} bytes of a block of {_BLOCK}")
        return status


async def probe_iscsi(
    host: str, port: int, *, target: str, lun: int, initiator: str, user: str, secret: str, timeout_s: float
) -> float:
    """Log in, read the first block, log out; seconds that the read took. Raises ExportFailed."""
    try:
        async with asyncio.timeout(timeout_s):
            session = _Session(*await asyncio.open_connection(host, port))
            try:
                await _log_in(session, target, initiator, user, secret)
                latency_s = await _timed_read(session, lun)
                with contextlib.suppress(OSError, EOFError):
                    await _log_out(session)
                return latency_s
            finally:
                session.writer.close()
    except TimeoutError as error:
        raise ExportFailed(f"the target does not answer within {timeout_s:g} s") from error
    except (OSError, EOFError) as error:
        raise ExportFailed(f"the portal {host}:{port} cannot be reached: {error}") from error


async def _log_in(session: _Session, target: str, initiator: str, user: str, secret: str) -> None:
    names = {"InitiatorName": initiator, "SessionType": "Normal", "TargetName": target, "AuthMethod": "CHAP"}
    offered = await session.login(_SECURITY, None, names)
    if offered.get("AuthMethod") != "CHAP":
        raise ExportFailed("the target does not ask for CHAP")
    challenge = await session.login(_SECURITY, None, {"CHAP_A": "5"})
    try:
        identifier = bytes([int(challenge["CHAP_I"], 0)])
        value = bytes.fromhex(challenge["CHAP_C"].removeprefix("0x"))
    except (KeyError, ValueError) as error:
        raise ExportFailed("the target's CHAP challenge is not understood") from error
    response = hashlib.md5(identifier + secret.encode() + value).hexdigest()  # noqa: S324
    await session.login(_SECURITY, _OPERATIONAL, {"CHAP_N": user, "CHAP_R": f"0x{response}"})
    parameters = {"HeaderDigest": "None", "DataDigest": "None", "MaxRecvDataSegmentLength": "65536"}
    await session.login(_OPERATIONAL, _FULL_FEATURE, parameters)


async def _timed_read(session: _Session, lun: int) -> float:
    status = 0
    for _ in range(_ATTEMPTS):
        started = time.monotonic()
        status = await session.read_block(lun)
        if status == 0:
            return time.monotonic() - started
    raise ExportFailed(f"the target cannot read its first block: SCSI status {status:#04x}")


async def _log_out(session: _Session) -> None:
    header = struct.pack(
        ">BB2xI8xIHHII16x", _LOGOUT, 0x80, 0, 0xFFFF, 0, 0, session.command_number, session.status_number
    )
    answer, _ = await session.exchange(header)
    while answer[0] & 0x3F != _LOGOUT_ANSWER:
        answer, _ = await session.receive()
