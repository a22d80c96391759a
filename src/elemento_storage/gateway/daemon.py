"""The gateway as a process: builds the parts, listens on loopback, serves until a signal."""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys

import uvicorn

from elemento_storage.api.connection import Connection
from elemento_storage.errors import ConfigurationError
from elemento_storage.gateway.app import GatewayApp
from elemento_storage.gateway.client_face import ClientFace
from elemento_storage.gateway.configuration import Configuration, split_address
from elemento_storage.gateway.fleet import Fleet
from elemento_storage.gateway.login_face import LoginFace
from elemento_storage.gateway.sessions import Sessions
from elemento_storage.serving import HttpServer, address_of, listen, log_to_stderr, new_loop, notify

log = logging.getLogger(__name__)

_STOP_GRACE_S = 10


def run(configuration: Configuration) -> None:
    """Serve until SIGTERM or SIGINT. Raises ConfigurationError."""
    log_to_stderr(configuration.log_level)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    os.umask(0o077)
    new_loop().run_until_complete(_serve(configuration))
    logging.shutdown()
    sys.stdout.flush()
    os._exit(0)  # without waiting for threads, as the server does


async def _serve(configuration: Configuration) -> None:
    client_listeners = _listen(configuration.listen_client)
    login_listeners = _listen(configuration.listen_login)
    sessions = Sessions(configuration.state_dir, configuration.session)
    sessions.open()
    fleet = Fleet(configuration)
    await fleet.start()
    app = GatewayApp(
        configuration,
        fleet,
        ClientFace(configuration, fleet),
        LoginFace(configuration.user, sessions),
        login_listeners[0].getsockname()[1],
    )
    config = uvicorn.Config(
        app,
        http=Connection,
        lifespan="off",
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=_STOP_GRACE_S,
    )
    http = HttpServer(config)

    def stop() -> None:
        http.should_exit = True

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    for server in fleet.servers():
        log.info("server %s at %s", server.name, server.url)
    log.info(
        "clients at http://%s, logins at http://%s", address_of(client_listeners[0]), address_of(login_listeners[0])
    )
    notify("READY=1")
    try:
        with contextlib.suppress(asyncio.CancelledError):
            await http.serve(sockets=[*client_listeners, *login_listeners])
    finally:
        notify("STOPPING=1")
        await fleet.close()
        log.info("stopped")


def _listen(address: str) -> list[socket.socket]:
    """The address, and of 127.0.0.1 its twin of IPv6 as well.

    Clients of ``localhost`` try ::1 first. If somebody else could listen there, they would tell it passwords.
    """
    host, port = split_address(address)
    listeners = [listen(host, port)]
    if host == "127.0.0.1" and _has_ipv6():
        try:
            listeners.append(listen("::1", listeners[0].getsockname()[1]))
        except ConfigurationError as error:
            raise ConfigurationError(
                f"{error.message}; somebody else listens there, and clients of localhost would talk to it"
            ) from None
    return listeners


def _has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True
