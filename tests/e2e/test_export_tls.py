"""NBD over TCP behind keys or certificates: who has the right one gets in, and nobody else."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.clients import Attach, ClientFailed, QemuIo
from tests.exporting import MIB, export, is_healthy, new_volume, unexport, wait_healthy
from tests.live import ALICE, BOB, LiveServer, live_server

_NO_TLS = {"tls-creds": None}


def make_pki(directory: Path) -> Path:
    """An authority, a server's certificate for 127.0.0.1, a client's, and a client's of another authority."""
    for authority, names in (("", ("server", "client")), ("other/", ("client",))):
        (directory / authority).mkdir(parents=True, exist_ok=True)
        openssl(directory / authority, "req -x509 -nodes -keyout ca-key.pem -out ca-cert.pem -subj /CN=authority")
        for name in names:
            (directory / authority / "extensions").write_text(
                f"subjectAltName=IP:127.0.0.1\nextendedKeyUsage={name}Auth\nkeyUsage=digitalSignature\n"
            )
            openssl(directory / authority, f"req -nodes -keyout {name}-key.pem -out {name}.csr -subj /CN={name}")
            subprocess.run(
                f"openssl x509 -req -in {name}.csr -CA ca-cert.pem -CAkey ca-key.pem -CAcreateserial "
                f"-out {name}-cert.pem -days 2 -extfile extensions".split(),
                cwd=directory / authority,
                check=True,
                capture_output=True,
            )
    return directory


def openssl(directory: Path, command: str) -> None:
    curve = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1"
    subprocess.run(f"openssl {command} {curve} -days 2".split(), cwd=directory, check=True, capture_output=True)


def attach(answer: dict[str, Any], pki: Path | None = None) -> Attach:
    """What the answer says, with the certificates of a directory in place of the hypervisor's own."""
    parts = Attach.of(answer["qemu"])
    objects = tuple(one.replace("/etc/pki/qemu", str(pki)) for one in parts.objects)
    return Attach(objects, parts.blockdev, parts.devices)


@contextmanager
def prepared(answer: dict[str, Any]) -> Iterator[None]:
    """With the commands run that the answer asks for."""
    [command] = answer["prepare"]
    subprocess.run(command, shell=True, check=True)
    try:
        yield
    finally:
        directory = Path(command.partition("mkdir -p ")[2].partition(" ")[0])
        (directory / "keys.psk").unlink()
        directory.rmdir()


def refused(parts: Attach) -> None:
    with pytest.raises(ClientFailed), QemuIo(parts) as client:
        client.reads(0, 512, 0)


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    with live_server(tmp_path_factory.mktemp("psk"), "--nbd-tls", "psk") as server:
        yield server


def test_a_key_opens_its_export_until_it_is_taken_away(keyed: LiveServer) -> None:
    vid = new_volume(keyed, format="qcow2", shareable=True)
    answers = {client: export(keyed, vid, client, protocol="nbd") for client in (ALICE, BOB)}
    local = export(keyed, vid, "c" * 32, protocol="local")
    assert answers[ALICE]["credentials"]["psk"] != answers[BOB]["credentials"]["psk"]
    with prepared(answers[ALICE]), prepared(answers[BOB]):
        with QemuIo(attach(answers[ALICE])) as alice, QemuIo(attach(answers[BOB])) as bob:
            alice.write(0, MIB, 7)
            assert bob.reads(0, MIB, 7)
        with QemuIo(local["qemu"]) as guest:
            assert guest.reads(0, MIB, 7)
        unexport(keyed, vid, ALICE)
        refused(attach(answers[ALICE]))
        with QemuIo(attach(answers[BOB])) as bob:
            assert bob.reads(0, MIB, 7)


def test_without_a_key_nobody_gets_in(keyed: LiveServer) -> None:
    vid = new_volume(keyed)
    answer = export(keyed, vid, protocol="nbd")
    plain = attach(answer).changed(**_NO_TLS)
    refused(Attach((), plain.blockdev, plain.devices))
    with prepared(answer):
        [command] = answer["prepare"]
        directory = command.partition("mkdir -p ")[2].partition(" ")[0]
        name, key = answer["credentials"]["identity"], answer["credentials"]["psk"]
        Path(directory, "keys.psk").write_text(f"{name}:{key[::-1]}\n")
        refused(attach(answer))


def test_an_encrypted_export_comes_back_with_its_key(keyed: LiveServer) -> None:
    vid = new_volume(keyed, format="qcow2")
    answer = export(keyed, vid, protocol="nbd")
    with prepared(answer):
        with QemuIo(attach(answer)) as client:
            client.write(0, MIB, 3)
        keyed.kill_daemons(f"/v/{vid}/")
        wait_healthy(keyed, vid)
        with QemuIo(attach(answer)) as client:
            assert client.reads(0, MIB, 3)


def test_certificates(tmp_path: Path) -> None:
    pki = make_pki(tmp_path / "pki")
    with live_server(tmp_path, "--nbd-tls", "x509", "--nbd-tls-dir", str(pki)) as server:
        vid = new_volume(server)
        answer = export(server, vid, protocol="nbd")
        assert "tls='yes'" in answer["libvirt"]
        with QemuIo(attach(answer, pki)) as client:
            client.write(0, MIB, 5)
            assert client.reads(0, MIB, 5)
        refused(attach(answer, pki / "other"))
        plain = attach(answer).changed(**_NO_TLS)
        refused(Attach((), plain.blockdev, plain.devices))
        assert is_healthy(server, vid)
