"""Forms with files (RFC 7578), small ones, in memory."""

import hashlib
from collections.abc import Mapping
from typing import Any

import msgspec


def form(data: Mapping[str, Any], files: Mapping[str, bytes]) -> tuple[str, bytes]:
    """Content-Type and body: ``data`` as JSON in a field of that name, files as fields ``file``.

    The same form is always the same bytes, so that an Idempotency-Key fits it. Raises ValueError for file names that
    no header can have.
    """
    parts = [(b'name="data"', msgspec.json.encode(data))]
    for name, content in files.items():
        if not name.isascii() or any(one in name for one in '"\\\r\n'):
            raise ValueError(f"{name!r} cannot be a file's name here: use A-Z a-z 0-9 . _ -")
        parts.append((f'name="file"; filename="{name}"'.encode(), content))
    # No content has its own digest in it.
    boundary = hashlib.sha256(b"\0".join(content for _, content in parts)).hexdigest()[:40].encode()
    body = b"".join(
        b"--" + boundary + b"\r\nContent-Disposition: form-data; " + head + b"\r\n\r\n" + content + b"\r\n"
        for head, content in parts
    )
    return f"multipart/form-data; boundary={boundary.decode()}", body + b"--" + boundary + b"--\r\n"
