"""Which storage servers are believed, as TLS contexts.

A token is sent only over a connection whose other end has proved who it is: by a certificate that an authority signed
for its name, or by exactly the certificate whose fingerprint the configuration has. The proof comes before the first
byte of a request.
"""

import asyncio
import hashlib
import re
import ssl
from typing import Final

from elemento_storage.errors import Unavailable

_FINGERPRINT: Final = re.compile(r"sha256:([0-9a-f]{64})")


def parse_fingerprint(text: str) -> str | None:
    """``sha256:`` and 64 digits, from any case and with or without colons between the bytes; None if it is not one."""
    scheme, _, digits = text.strip().lower().partition(":")
    match = _FINGERPRINT.fullmatch(f"{scheme}:{digits.replace(':', '')}")
    return match[0] if match else None


def fingerprint_of(certificate: bytes) -> str:
    """Of a certificate in DER."""
    return f"sha256:{hashlib.sha256(certificate).hexdigest()}"


def by_authority(path: str) -> ssl.SSLContext:
    """Believes whom the authority in this PEM file, or else the system's, vouches for, under the name it is called by.

    Raises OSError, ssl.SSLError.
    """
    return ssl.create_default_context(cafile=path or None)


def by_certificate(certificate: bytes) -> ssl.SSLContext:
    """Believes who has this certificate (DER) and its key, whatever its names and wherever it is."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # it may be no authority's: it is the anchor itself
    context.load_verify_locations(cadata=certificate)
    return context


async def certificate_at(host: str, port: int, patience_s: float) -> bytes:
    """The certificate (DER) that a server shows. Nothing is sent and nothing believed. Raises Unavailable."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    try:
        async with asyncio.timeout(patience_s):
            _, writer = await asyncio.open_connection(host, port, ssl=context)
            shown = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
            writer.transport.abort()
    except TimeoutError:
        raise Unavailable(f"no answer within {patience_s:g} s") from None
    except (OSError, ssl.SSLError) as error:
        raise Unavailable(f"no TLS connection: {error}") from None
    if not shown:
        raise Unavailable("it shows no certificate")
    return bytes(shown)


async def by_fingerprint(host: str, port: int, wanted: str, patience_s: float) -> ssl.SSLContext:
    """Believes who has the certificate with this fingerprint, if it is what the server shows. Raises Unavailable."""
    certificate = await certificate_at(host, port, patience_s)
    shown = fingerprint_of(certificate)
    if shown != wanted:
        raise Unavailable(f"its certificate is {shown} and not the one in the configuration")
    return by_certificate(certificate)
