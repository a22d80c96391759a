"""Which addresses a download may connect to."""

import socket

import pytest

from elemento_storage.config import parse_networks
from elemento_storage.errors import DownloadFailed, UrlRefused
from elemento_storage.fetch.addresses import AddressRules, resolve
from elemento_storage.fetch.connection import parse_url

REFUSED = [
    "127.0.0.1",
    "127.255.255.254",
    "0.0.0.0",
    "0.1.2.3",
    "169.254.169.254",
    "224.0.0.1",
    "240.0.0.1",
    "255.255.255.255",
    "::",
    "::1",
    "fe80::1",
    "fe80::1%eth0",
    "fec0::1",
    "ff02::1",
    "fd00:ec2::254",
    "::ffff:127.0.0.1",
    "::ffff:169.254.169.254",
    "::127.0.0.1",
    "64:ff9b::127.0.0.1",
    "64:ff9b::a9fe:a9fe",
    "2002:7f00:1::1",
    "2001:0:7f00:1::",
]
PERMITTED = ["192.0.2.1", "10.1.2.3", "192.168.1.1", "2001:db8::1", "fd12::1", "::ffff:192.0.2.1", "64:ff9b::c000:201"]


@pytest.mark.parametrize("address", REFUSED)
def test_special_addresses_are_refused(address: str) -> None:
    assert not AddressRules().permits(address)


@pytest.mark.parametrize("address", PERMITTED)
def test_others_are_permitted(address: str) -> None:
    assert AddressRules().permits(address)


def own_address() -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))
        return str(probe.getsockname()[0])


def test_our_own_address_is_refused() -> None:
    assert not AddressRules().permits(own_address())
    assert AddressRules(allowed=parse_networks(own_address())).permits(own_address())


def test_settings_allow_and_deny_and_denial_wins() -> None:
    rules = AddressRules(parse_networks("127.0.0.0/8, ::1"), parse_networks("127.0.0.2 192.168.0.0/16,fd00::/8"))
    assert rules.permits("127.0.0.1")
    assert rules.permits("::1")
    assert rules.permits("::ffff:127.0.0.1")
    for denied in ("127.0.0.2", "192.168.7.7", "::ffff:192.168.7.7", "fd00::1", "64:ff9b::c0a8:707"):
        assert not rules.permits(denied)


def test_a_name_is_resolved_and_checked() -> None:
    with pytest.raises(UrlRefused):
        resolve("localhost", 80, AddressRules())
    (target, *_) = resolve("127.0.0.1", 80, AddressRules(allowed=parse_networks("127.0.0.1")))
    assert target.address[:2] == ("127.0.0.1", 80)
    for odd in ("0x7f000001", "2130706433", "0177.0.0.1", "127.1"):  # forms that the resolver takes for addresses
        with pytest.raises((UrlRefused, DownloadFailed)):
            resolve(odd, 80, AddressRules())


@pytest.mark.parametrize(
    "url",
    [
        "",
        "file:///etc/shadow",
        "ftp://example.org/x",
        "gopher://127.0.0.1:6379/_x",
        "http://",
        "http:///x",
        "http://user:secret@example.org/",
        "http://user@example.org/",
        "http://example.org:99999/",
        "http://example.org/a b",
        "http://example.org/\r\nHost: other",
        "http://[::1",
        "http://example.org/" + "x" * 9000,
        "http://exa\x00mple.org/",
        "http://" + "x" * 300 + "ü/",
    ],
)
def test_urls_that_are_refused(url: str) -> None:
    with pytest.raises(UrlRefused):
        parse_url(url)


def test_urls_that_are_taken() -> None:
    url = parse_url("HTTPS://Example.ORG:8443/a/b%20c?q=ü&x=1#part")
    assert (url.is_tls, url.host, url.port) == (True, "example.org", 8443)
    assert url.target == "/a/b%20c?q=%C3%BC&x=1"
    assert url.site == "https://example.org"
    assert parse_url("http://[2001:db8::1]/").host == "2001:db8::1"
    assert parse_url("http://müller.example/").host == "xn--mller-kva.example"
    assert parse_url("http://example.org").target == "/"
