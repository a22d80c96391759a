"""A client of SMB for tests: a disk as a hypervisor would have it open, with everything a hostile one might try."""

import contextlib
import socket
import struct
import threading
import uuid
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any
from unittest import mock

from smbprotocol.connection import Connection
from smbprotocol.file_info import FileEndOfFileInformation, FileInformationClass, InfoType
from smbprotocol.ioctl import IOCTLFlags, SMB2IOCTLRequest, SMB2IOCTLResponse
from smbprotocol.open import (
    CreateDisposition,
    CreateOptions,
    FileAttributes,
    FilePipePrinterAccessMask,
    ImpersonationLevel,
    Open,
    ShareAccess,
    SMB2QueryInfoRequest,
    SMB2QueryInfoResponse,
    SMB2SetInfoRequest,
)
from smbprotocol.session import Session
from smbprotocol.tree import TreeConnect

FILE = "disk.img"
_READ_WRITE = FilePipePrinterAccessMask.GENERIC_READ | FilePipePrinterAccessMask.GENERIC_WRITE
_ALL = ShareAccess.FILE_SHARE_READ | ShareAccess.FILE_SHARE_WRITE | ShareAccess.FILE_SHARE_DELETE
_ALLOCATION_INFORMATION = 19
_DISPOSITION_INFORMATION = 13
_RENAME_INFORMATION = 10


_connecting = threading.Lock()


@contextlib.contextmanager
def _from(source: str) -> Iterator[None]:
    """Connect from an address of ours; the library cannot be told."""
    with (
        _connecting,
        mock.patch("socket.create_connection", partial(socket.create_connection, source_address=(source, 0))),
    ):
        yield


class SmbClient:
    """One TCP connection with one session, and one share of it."""

    def __init__(self, export: Mapping[str, Any], *, encrypt: bool = True, source: str = "127.0.0.1", **other: str):
        endpoint, credentials = export["endpoint"], {**export["credentials"], **other}
        self.connection: Any = Connection(uuid.uuid4(), endpoint["server"], endpoint["port"])
        with _from(source):
            try:
                self.connection.connect(timeout=10)
            except ValueError as error:  # what the library makes of a refused connection
                raise ConnectionError(str(error)) from error
        try:
            user, password = credentials["user"], credentials["password"]
            self.session: Any = Session(
                self.connection, user, password, require_encryption=encrypt, auth_protocol="ntlm"
            )
            self.session.connect()
            share = credentials.get("share", endpoint["share"])
            self.tree: Any = TreeConnect(self.session, rf"\\{endpoint['server']}\{share}")
            self.tree.connect(require_secure_negotiate=False)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Hang up."""
        with contextlib.suppress(Exception):
            self.connection.disconnect(close=False, timeout=2)

    def open(
        self,
        name: str = FILE,
        *,
        access: int = _READ_WRITE,
        disposition: int = CreateDisposition.FILE_OPEN,
        options: int = CreateOptions.FILE_NON_DIRECTORY_FILE,
    ) -> "SmbFile":
        """Open something."""
        handle = Open(self.tree, name)
        handle.create(
            ImpersonationLevel.Impersonation,
            access,
            FileAttributes.FILE_ATTRIBUTE_NORMAL,
            _ALL,
            disposition,
            options,
        )
        return SmbFile(handle)

    def names(self) -> list[str]:
        """What the share shows."""
        directory = Open(self.tree, "")
        directory.create(
            ImpersonationLevel.Impersonation,
            FilePipePrinterAccessMask.GENERIC_READ,
            FileAttributes.FILE_ATTRIBUTE_DIRECTORY,
            _ALL,
            CreateDisposition.FILE_OPEN,
            CreateOptions.FILE_DIRECTORY_FILE,
        )
        entries = directory.query_directory("*", FileInformationClass.FILE_NAMES_INFORMATION)
        names = [entry["file_name"].get_value().decode("utf-16-le") for entry in entries]
        return sorted(set(names) - {".", ".."})


class SmbFile:
    """An open file."""

    def __init__(self, handle: Any) -> None:
        self.handle = handle

    def read(self, offset: int, length: int) -> bytes:
        return bytes(self.handle.read(offset, length))

    def write(self, offset: int, data: bytes) -> None:
        assert self.handle.write(data, offset) == len(data)

    def flush(self) -> None:
        self.handle.flush()

    def close(self) -> None:
        self.handle.close()

    def size(self) -> int:
        """As the server has it now (FileStandardInformation: allocation, end of file …)."""
        request = SMB2QueryInfoRequest()
        request["info_type"] = InfoType.SMB2_0_INFO_FILE
        request["file_info_class"] = FileInformationClass.FILE_STANDARD_INFORMATION
        request["output_buffer_length"] = 24
        request["file_id"] = self.handle.file_id
        answer = SMB2QueryInfoResponse()
        answer.unpack(self._exchange(request))
        return int(struct.unpack("<QQ", answer["buffer"].get_value()[:16])[1])

    def truncate(self, size: int) -> None:
        information = FileEndOfFileInformation()
        information["end_of_file"] = size
        self._set(FileInformationClass.FILE_END_OF_FILE_INFORMATION, information.pack())

    def allocate(self, size: int) -> None:
        self._set(_ALLOCATION_INFORMATION, struct.pack("<Q", size))

    def delete(self) -> None:
        self._set(_DISPOSITION_INFORMATION, b"\x01")

    def rename(self, name: str) -> None:
        encoded = name.encode("utf-16-le")
        self._set(_RENAME_INFORMATION, struct.pack("<B7xQI", 1, 0, len(encoded)) + encoded)

    def set_sparse(self) -> None:
        self.control(0x000900C4, b"")

    def zero(self, offset: int, length: int) -> None:
        """FSCTL_SET_ZERO_DATA, which is what fallocate(PUNCH_HOLE) becomes on the way."""
        self.control(0x000980C8, struct.pack("<QQ", offset, offset + length))

    def control(self, code: int, data: bytes, answer_length: int = 0) -> bytes:
        """A file system control code."""
        request = SMB2IOCTLRequest()
        request["ctl_code"] = code
        request["file_id"] = self.handle.file_id
        request["buffer"] = data
        request["max_output_response"] = answer_length
        request["flags"] = IOCTLFlags.SMB2_0_IOCTL_IS_FSCTL
        answer = SMB2IOCTLResponse()
        answer.unpack(self._exchange(request))
        return bytes(answer["buffer"].get_value())

    def _set(self, information_class: int, data: bytes) -> None:
        request = SMB2SetInfoRequest()
        request["info_type"] = InfoType.SMB2_0_INFO_FILE
        request["file_info_class"] = information_class
        request["file_id"] = self.handle.file_id
        request["buffer"] = data
        self._exchange(request)

    def _exchange(self, request: Any) -> bytes:
        connection, tree = self.handle.connection, self.handle.tree_connect
        sent = connection.send(request, tree.session.session_id, tree.tree_connect_id)
        return bytes(connection.receive(sent)["data"].get_value())


@contextlib.contextmanager
def smb_client(export: Mapping[str, Any], **how: Any) -> Iterator[SmbClient]:
    """A client that hangs up at the end."""
    client = SmbClient(export, **how)
    try:
        yield client
    finally:
        client.close()
