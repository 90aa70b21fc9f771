"""The API process: its socket, its certificate, its parts, its life. Knows no routes and no workers."""

from __future__ import annotations

import os
import signal
import socket
import ssl
from contextlib import closing
from functools import partial
from pathlib import Path
from types import FrameType

from kontextd_models.probe import versions

from kontextd_server import parts
from kontextd_server.api import ApiParts, ApiServer, Drain, Listening, create_app
from kontextd_server.api.descriptors import raise_limit
from kontextd_server.fetch.webhooks import check_webhook
from kontextd_server.settings import SettingError, Settings
from kontextd_server.worker.notify import ALIVE, READY, STOPPING, Notifier

_BACKLOG = 2048
_TICKS_A_BEAT = 10
_KEEPALIVE = (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 15), ("TCP_KEEPCNT", 4))  # seconds, seconds, times


def listening_socket(host: str, port: int) -> socket.socket:
    """A socket that listens already, so that nobody is refused while the API starts. Raises `SettingError`."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.create_server(
            address[:2], family=family, backlog=_BACKLOG, dualstack_ipv6=host == "::" and socket.has_dualstack_ipv6()
        )
    except (OSError, UnicodeError) as error:  # UnicodeError: a name that DNS could not have
        why = getattr(error, "strerror", None) or str(error)
        told = f"{host} port {port}: {why.partition(' (while')[0]}"  # there Python repeats the address
        raise SettingError(f"cannot listen at {told}. Choose others with --host and --port.") from error
    _notice_lost_clients(listener)
    return listener


def check_certificate(certificate: Path | None, key: Path | None) -> None:
    """Raises `SettingError` unless both can be used, or neither is set."""
    if certificate is None and key is None:
        return
    if certificate is None or key is None:
        given, missing = ("--tls-cert", "--tls-key") if key is None else ("--tls-key", "--tls-cert")
        raise SettingError(f"{given} needs {missing} beside it; kontextd certs makes both.")
    try:
        # With a password of ours nobody is asked for one on a terminal.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password="")
    except OSError as error:  # an SSLError too
        told = f"the certificate {certificate} with the key {key} cannot be used: {error.strerror or error}"
        raise SettingError(f"{told}. Both are PEM files, the key one without a passphrase.") from error


def check_lending(settings: Settings) -> None:
    """Raises `SettingError` for a key that is lent to nobody, or origins without one."""
    if bool(settings.proxy_key) != bool(settings.proxy_origins):
        raise SettingError("KONTEXTD_PROXY_KEY and KONTEXTD_PROXY_ORIGINS need each other: set both, or neither.")


def serve_api(settings: Settings, listener: socket.socket) -> int:
    """Serve until SIGTERM or SIGINT, from the main thread; returns the exit code."""
    raise_limit()
    config = settings.api_config(versions()["kontextd"], settings.max_lora_scale)
    signing, drain = parts.Secrets.of(parts.Places.of(settings)), Drain(settings.drain_s)
    with parts.job_store(settings) as store, closing(store.watch()) as watcher:
        api = ApiParts(
            store=store,
            watcher=watcher,
            files=parts.file_store(settings),
            tokens=signing.tokens,
            grants=signing.grants,
            webhook_keys=(signing.webhooks,),
            check_webhook=partial(check_webhook, parts.web(settings)),
            library=parts.lora_library(settings),
            lora_roots=parts.lora_roots(settings).names,
            drain=drain,
        )
        listening = Listening(tls_cert=settings.tls_cert, tls_key=settings.tls_key)
        server = _Server(create_app(config, api), listening, drain)
        server.notifier = Notifier.from_environment(os.environ)
        server.run(sockets=[listener])
    return 0 if server.started else 1


def _notice_lost_clients(listener: socket.socket) -> None:
    """What it accepts inherits this: a client that is gone without a word is noticed after two minutes."""
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE:
        if hasattr(socket, name):
            listener.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


class _Server(ApiServer):
    """Says when it serves, that it lives, and when it ends."""

    notifier: Notifier

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self.notifier.tell(READY)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """uvicorn's own would raise the signal again at the end, and what stands after `run` would not be reached."""
        self.force_exit = self.force_exit or (self.should_exit and sig == signal.SIGINT)
        self.should_exit = True

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second, by the loop that answers: a loop that hangs falls silent."""
        if counter % _TICKS_A_BEAT == 0:
            self.notifier.tell(ALIVE)
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.notifier.tell(STOPPING)
        await super().shutdown(sockets)
