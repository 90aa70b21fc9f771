"""Servers on the loopback that behave as told, and a fetcher that may reach them: for tests of fetching."""

from __future__ import annotations

import contextlib
import json
import socket
import socketserver
import ssl
import struct
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from ipaddress import ip_address
from pathlib import Path

from kontextd_server.fetch import AllowList, FetchConfig, Fetcher, Purpose, PurposeRules, Web
from kontextd_server.fetch.addresses import Address
from kontextd_server.fetch.roots import LoraRoots
from kontextd_server.files import FolderStore
from kontextd_server.mirror import Mirror

LOOPBACK = AllowList.parse(["127.0.0.0/8"])


def weights(size: int = 5000) -> bytes:
    """A safetensors file of so many bytes of data."""
    head = json.dumps({"a": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    return struct.pack("<Q", len(head)) + head + bytes(index * 7 % 256 for index in range(size))


@dataclass(frozen=True)
class Asked:
    method: str
    path: str
    headers: dict[str, str]


class Exchange:
    """One request as a route sees it."""

    for_ever_s = 600.0  # a pause that ends with its server

    def __init__(self, asked: Asked, handler: socketserver.StreamRequestHandler, stopped: threading.Event) -> None:
        self.asked = asked
        self.handler = handler
        self.stopped = stopped

    def send(self, *parts: bytes) -> None:
        for part in parts:
            self.handler.wfile.write(part)
        self.handler.wfile.flush()

    def answer(self, body: bytes, status: str = "200 OK", **headers: str) -> None:
        fields = {"Content-Length": str(len(body)), **{name.replace("_", "-"): text for name, text in headers.items()}}
        lines = "".join(f"{name}: {text}\r\n" for name, text in fields.items())
        self.send(f"HTTP/1.1 {status}\r\n{lines}\r\n".encode(), body)

    def tunnel(self, port: int) -> None:
        """What a proxy does after CONNECT: carry bytes both ways until one side ends."""
        with socket.create_connection(("127.0.0.1", port), timeout=10) as other:
            self.send(b"HTTP/1.1 200 Connected\r\n\r\n")
            client = self.handler.request
            back = threading.Thread(target=_carry, args=(other, client), daemon=True)
            back.start()
            _carry(client, other)
            back.join(10)

    def pause(self, seconds: float) -> None:
        self.stopped.wait(seconds)


Route = Callable[[Exchange], None]


def _carry(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)


@dataclass
class Origin:
    """A server that answers each path by its route, and remembers what it was asked."""

    tls: ssl.SSLContext | None = None
    routes: dict[str, Route] = field(default_factory=dict)
    asked: list[Asked] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.stopped = threading.Event()
        origin = self

        class Handler(socketserver.StreamRequestHandler):
            def setup(self) -> None:
                self.request.settimeout(60)
                super().setup()

            def handle(self) -> None:
                origin.serve(self)

        class Server(socketserver.ThreadingTCPServer):
            allow_reuse_address = True
            daemon_threads = True
            block_on_close = False

            def get_request(self) -> tuple[socket.socket, object]:
                client, address = super().get_request()
                if origin.tls is not None:  # the handshake is left to the first read, in the handler's thread
                    client = origin.tls.wrap_socket(client, server_side=True, do_handshake_on_connect=False)
                return client, address

            def handle_error(self, *_: object) -> None:
                """Clients go away in most tests here; what they get is what is tested."""

        self.server = Server(("127.0.0.1", 0), Handler)
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def serve(self, handler: socketserver.StreamRequestHandler) -> None:
        method, path, *_ = handler.rfile.readline(65536).decode("latin-1").split(" ")
        headers = {}
        while line := handler.rfile.readline(65536).decode("latin-1").strip():
            name, _, value = line.partition(":")
            headers[name.lower()] = value.strip()
        asked = Asked(method, path, headers)
        self.asked.append(asked)
        self.routes.get(path.partition("?")[0], not_found)(Exchange(asked, handler, self.stopped))

    def url(self, path: str, host: str = "127.0.0.1") -> str:
        return f"{'https' if self.tls else 'http'}://{host}:{self.port}{path}"

    def close(self) -> None:
        self.stopped.set()
        self.server.shutdown()
        self.server.server_close()


def not_found(exchange: Exchange) -> None:
    exchange.answer(b"no such page", "404 Not Found")


class Names:
    """A resolver that knows what it is told; each name has a list of answers, the last of which is repeated."""

    def __init__(self) -> None:
        self.answers: dict[str, list[Sequence[str]]] = {"studio.test": [["127.0.0.1"]]}
        self.asked: list[str] = []

    def __call__(self, host: str, port: int) -> Sequence[Address]:
        self.asked.append(host)
        answers = self.answers.get(host)
        if not answers:
            raise OSError(-2, "Name or service not known")
        return [ip_address(text) for text in (answers.pop(0) if len(answers) > 1 else answers[0])]


@dataclass
class Bench:
    """Everything that a fetcher needs, each part to be replaced by a test before it is used."""

    folder: Path
    names: Names
    config: FetchConfig
    rules: PurposeRules = field(
        default_factory=lambda: PurposeRules(
            allow=LOOPBACK, max_bytes=2**20, total_s=60.0, idle_s=30.0, connect_s=20.0, attempts=1
        )
    )

    roots: LoraRoots = field(default_factory=LoraRoots)

    @property
    def files(self) -> FolderStore:
        return FolderStore(self.folder / "files")

    @property
    def mirror(self) -> Mirror:
        return Mirror(self.folder / "files")

    def set(self, **values: object) -> None:
        """Change the rules, of all purposes."""
        self.rules = replace(self.rules, **values)

    def fetcher(self) -> Fetcher:
        config = replace(self.config, image=self.rules, lora=self.rules, webhook=self.rules)
        return Fetcher(Web(config, self.names), self.files, own_key, self.mirror, self.roots)

    def into(self) -> Path:
        """A path that nothing has used yet."""
        taken = sum(path.name.startswith("into-") for path in self.folder.iterdir())
        return self.folder / f"into-{taken}-{threading.get_ident()}"

    def image(self, url: str) -> bytes:
        return self.fetcher().fetch(url, Purpose.IMAGE, self.into()).path.read_bytes()

    def lora(self, url: str) -> bytes:
        return self.fetcher().fetch(url, Purpose.LORA, self.into()).path.read_bytes()

    def leftovers(self) -> list[str]:
        """What lies about in the cache besides whole downloads."""
        return [path.name for path in (self.folder / "cache").glob("*/parts/*")]


def own_key(url: str) -> str | None:
    """Files of "this server" are at http://ours.test/files/KEY."""
    base = "http://ours.test/files/"
    return url[len(base) :] if url.startswith(base) else None
