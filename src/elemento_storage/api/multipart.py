"""multipart/form-data as it streams in: fields, then one file that is never whole in memory.

The file's name is read by nobody: what it could say (``../../etc/passwd``) is no business of a storage server's.
"""

from collections import deque
from collections.abc import AsyncIterator
from typing import Final

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from elemento_storage.errors import InvalidValue

_MOST_FIELD_BYTES: Final = 64 * 1024  # all fields and headers together
_FILE_FIELD: Final = "file"


class Form:
    """One form. ``fields`` first, then ``file``. Both raise InvalidValue for what is no such form."""

    def __init__(self, content_type: str, source: AsyncIterator[bytes]) -> None:
        _, options = parse_options_header(content_type)
        boundary = options.get(b"boundary", b"")
        if not 0 < len(boundary) <= 70:
            raise InvalidValue("the Content-Type multipart/form-data has no boundary that can be used")
        self._source = source
        self._file: deque[bytes] = deque()
        self._fields: dict[str, str] = {}
        self._field_bytes = 0
        self._in_file = self._over = False
        self._headers: dict[bytes, bytes] = {}
        self._header = (bytearray(), bytearray())
        self._name: str = ""
        self._value = bytearray()
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._begin_part,
                "on_header_field": lambda data, start, end: self._take_header(0, data[start:end]),
                "on_header_value": lambda data, start, end: self._take_header(1, data[start:end]),
                "on_header_end": self._end_header,
                "on_headers_finished": self._end_headers,
                "on_part_data": lambda data, start, end: self._take_data(data[start:end]),
                "on_part_end": self._end_part,
                "on_end": self._end,
            },
        )

    async def fields(self) -> dict[str, str]:
        """Everything before the file."""
        while not self._in_file:
            if not await self._go_on():
                raise InvalidValue(f"the form has no file: send it as the field {_FILE_FIELD!r}", key=_FILE_FIELD)
        return self._fields

    async def file(self) -> AsyncIterator[bytes]:
        """The file's bytes as they come, to the end of the form."""
        while True:
            while self._file:
                yield self._file.popleft()
            if not await self._go_on():
                break
        if not self._over:
            raise InvalidValue("the form ends in the middle")

    async def _go_on(self) -> bool:
        piece = await anext(self._source, None)
        if piece is None:
            return False
        try:
            self._parser.write(piece)
        except FormParserError as error:
            raise InvalidValue(f"the form cannot be read: {error}") from None
        return True

    # -- what the parser finds -----------------------------------------------------------------------------

    def _begin_part(self) -> None:
        self._headers.clear()
        self._value.clear()

    def _take_header(self, part: int, data: bytes) -> None:
        self._count(len(data))
        self._header[part].extend(data)

    def _end_header(self) -> None:
        name, value = self._header
        self._headers[bytes(name).lower()] = bytes(value)
        name.clear()
        value.clear()

    def _end_headers(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition", b""))
        try:
            self._name = options.get(b"name", b"").decode()
        except UnicodeDecodeError:
            self._name = ""
        if self._in_file:
            raise InvalidValue(
                "something comes after the file: the fields have to come before it, and there is one file",
                key=self._name[:80],
            )
        self._in_file = b"filename" in options or self._name == _FILE_FIELD

    def _take_data(self, data: bytes) -> None:
        if self._in_file:
            self._file.append(data)
        else:
            self._count(len(data))
            self._value.extend(data)

    def _end_part(self) -> None:
        if not self._in_file:
            try:
                self._fields[self._name] = self._value.decode()
            except UnicodeDecodeError:
                raise InvalidValue(f"the field {self._name[:80]!r} is no text", key=self._name[:80]) from None

    def _end(self) -> None:
        self._over = True

    def _count(self, count: int) -> None:
        self._field_bytes += count
        if self._field_bytes > _MOST_FIELD_BYTES:
            raise InvalidValue(f"the form's fields have more than {_MOST_FIELD_BYTES} bytes")
