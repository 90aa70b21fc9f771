"""A box for the tests of the API: real stores, a real server, and a worker double that does as it is told."""

from __future__ import annotations

import base64
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path

import httpx
import pytest
from kontextd_server.api import ApiConfig, ApiParts, ApiServer, Drain, Listening, create_app
from kontextd_server.fetch.errors import AddressDenied
from kontextd_server.files import FolderStore, GrantSigner, Label
from kontextd_server.lora_library import LoraLibrary
from kontextd_server.pictures import encode_png
from kontextd_server.store import (
    CANCELLED,
    Claim,
    LogLine,
    Policy,
    Progress,
    Scope,
    Standing,
    Store,
    Success,
    Worker,
    WorkerState,
    migrate,
    open_store,
    sqlite_url,
)
from kontextd_server.wire.outputs import StoredImage, StoredOutput
from kontextd_server.wire.progress_lines import progress_line
from kontextd_server.wire.tokens import TokenSigner
from kontextd_server.wire.webhooks import WebhookKey
from kontextd_server.worker.failures import failure_of
from PIL import Image
from starlette.types import ASGIApp

ENDPOINT = "fal-ai/flux-kontext-lora"
INPUT = {"image_url": "https://studio.example/cat.png", "prompt": "paint it red"}
PICTURE = encode_png(Image.new("RGB", (32, 24), (200, 30, 40)))
STEPS = 3


def preview() -> bytes:
    made = BytesIO()
    Image.new("RGB", (16, 12), (200, 30, 40)).save(made, "JPEG")
    return made.getvalue()


class WorkerDouble:
    """Claims and finishes by plain calls of the store. `fail_with` fails what it runs; `hold` keeps jobs running."""

    def __init__(self, store: Store, files: FolderStore) -> None:
        self.store, self.files = store, files
        self.fail_with: Exception | None = None
        self.held = threading.Event()  # set: steps go on
        self.held.set()
        self.cancelled: list[str] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self.held.set()
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while not self._stop.is_set():
            claim = self.store.leases.claim("double")
            if claim is None:
                self._stop.wait(0.005)
            else:
                self.work(claim)

    def work(self, claim: Claim) -> None:
        for done in range(1, STEPS + 1):
            line = LogLine(progress_line(done, STEPS, 0.1 * done), time.time())
            standing = self.store.leases.renew(
                claim.lease, logs=[line], progress=Progress(done, STEPS), preview=preview()
            )
            while standing is Standing.HELD and not self.held.wait(0.01):
                standing = self.store.leases.renew(claim.lease)
            if standing is Standing.CANCEL_REQUESTED:
                self.cancelled.append(claim.request_id)
                self.store.leases.finish(claim.lease, CANCELLED)
                return
        ending = failure_of(self.fail_with, claim.request_id) if self.fail_with else self._success(claim)
        self.store.leases.finish(claim.lease, ending)

    def _success(self, claim: Claim) -> Success:
        asked = json.loads(claim.payload)
        uri = f"data:image/png;base64,{base64.b64encode(PICTURE).decode()}" if claim.transient else None
        key = None if claim.transient else self.files.put([PICTURE], Label("red.png", "image/png")).key
        image = StoredImage(32, 24, "image/png", "red.png", len(PICTURE), key, uri)
        output = StoredOutput((image,), {"inference": 0.3}, asked["seed"], (False,), asked["prompt"], {"version": "v"})
        return Success(json.dumps(output.to_json()).encode(), inference_s=0.3)


def deny_private(url: str) -> None:
    """What checking a webhook's address may end with."""
    if "10.0.0.1" in url:
        raise AddressDenied("10.0.0.1 is private; allow it in KONTEXTD_FETCH_ALLOW_WEBHOOK.", setting="x")


@dataclass
class Box:
    """Everything one test talks to. `serve` starts the server, once the configuration is as the test wants it."""

    folder: Path
    store: Store
    files: FolderStore
    worker: WorkerDouble
    key: str
    other_key: str
    admin_key: str
    stack: ExitStack
    config: ApiConfig = field(default_factory=lambda: ApiConfig(poll_s=0.2, drain_s=0.3))
    drain: Drain = field(default_factory=lambda: Drain(0.3))
    signer: TokenSigner = field(default_factory=lambda: TokenSigner(b"t" * 32))
    port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def app(self, *, short: bool = True) -> ASGIApp:
        watcher = self.store.watch()
        self.stack.callback(watcher.close)
        parts = ApiParts(
            store=self.store,
            watcher=watcher,
            files=self.files,
            tokens=self.signer,
            grants=GrantSigner([b"g" * 32]),
            webhook_keys=(WebhookKey.from_file(self.folder / "webhook.pem"),),
            check_webhook=deny_private,
            drain=self.drain,
            library=LoraLibrary(self.folder / "loras"),
            lora_roots=("library", "studio"),
        )
        return create_app(self.config, parts, short=short)

    def serve(self, certificate: Path | None = None, key: Path | None = None) -> str:
        listening = Listening(port=0, tls_cert=certificate, tls_key=key)
        server = ApiServer(self.app(), listening, self.drain)
        self.port = self.stack.enter_context(running(server))
        return self.url

    def client(self, key: str | None = None, **headers: str) -> httpx.Client:
        """A client with this test's key, or another's, or none ("")."""
        own = self.key if key is None else key
        if own:
            headers = {"Authorization": f"Key {own}", **headers}
        return self.stack.enter_context(httpx.Client(base_url=self.url, headers=headers, timeout=60, trust_env=False))

    def configure(self, **changes: object) -> None:
        self.config = replace(self.config, **changes)

    def submit(self, client: httpx.Client, **fields: object) -> str:
        answer = client.post(f"/queue/{ENDPOINT}", json={**INPUT, **fields})
        assert answer.status_code == 200, answer.text
        return str(answer.json()["request_id"])

    def say_ready(self) -> None:
        self.store.workers.beat(Worker("double", "host", "cpu", 1, WorkerState.READY, "v1"))


@contextmanager
def in_thread(run: Callable[[], object]) -> Iterator[threading.Thread]:
    """A thread that is waited for at the end."""
    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield thread
    finally:
        thread.join()


@contextmanager
def running(server: ApiServer) -> Iterator[int]:
    with in_thread(server.run) as thread:
        try:
            while not server.started:
                assert thread.is_alive(), "the server did not start"
                time.sleep(0.005)
            yield server.servers[0].sockets[0].getsockname()[1]
        finally:
            server.should_exit = True


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("api") / "template.db"
    migrate(sqlite_url(path))
    return path


@pytest.fixture
def policy() -> Policy:
    """What a test file may override."""
    return Policy()


@pytest.fixture
def idle_box(tmp_path: Path, template: Path, policy: Policy) -> Iterator[Box]:
    """A box whose server and worker are not started yet."""
    path = tmp_path / "store.db"
    path.write_bytes(template.read_bytes())
    store, files = open_store(sqlite_url(path), policy), FolderStore(tmp_path / "files")
    worker = WorkerDouble(store, files)
    keys = [store.keys.create(name).plain for name in ("anna", "bert")]
    admin = store.keys.create("root", (Scope.ADMIN,)).plain
    with ExitStack() as stack:
        stack.callback(store.close)
        yield Box(tmp_path, store, files, worker, *keys, admin, stack)
        worker.stop()


@pytest.fixture
def box(idle_box: Box) -> Box:
    """A box that serves, with a worker that has not begun."""
    idle_box.serve()
    return idle_box


@pytest.fixture
def working_box(box: Box) -> Box:
    """A box that serves and works."""
    box.worker.start()
    return box


def eventually(holds: Callable[[], object], within_s: float = 120.0) -> None:
    """Wait until something holds."""
    until = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < until, "it did not come to hold"
        time.sleep(0.01)
