"""A real job store, a real file store, and workers around a null engine, in threads and in processes of their own."""

from __future__ import annotations

import base64
import io
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from multiprocessing.context import ForkServerContext
from pathlib import Path
from uuid import uuid4

import pytest
import sqlalchemy as sa
from fal_clients import absent
from kontextd_server.files import FileStore, FolderStore
from kontextd_server.store import Job, JobState, NewJob, Queued, Store, migrate, open_store, sqlite_url
from kontextd_server.store.tables import metadata
from kontextd_server.worker import LoadedEngine, Notifier, WorkerParts
from kontextd_server.worker.null_engine import load_null
from kontextd_server.worker.process import WorkerProcess
from kontextd_server.worker.signals import SignalPipe
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))  # processes import null_worker by name

import null_worker

POSTGRES = "postgresql+psycopg://root@127.0.0.1:5432/postgres"
WAIT_S = 120.0  # a test never waits longer for anything: a busy machine takes ten times as long


def until(condition: Callable[[], object], what: str = "") -> None:
    """Wait for it."""
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain {what}"
        time.sleep(0.01)


def picture_uri(width: int = 16, height: int = 16, kind: str = "png") -> str:
    buffer = io.BytesIO()
    Image.effect_noise((width, height), 50).convert("RGB").save(buffer, kind)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("worker") / "template.db"
    migrate(sqlite_url(path))
    return path


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    """A database of its own for the run."""
    server = os.environ.get("TEST_POSTGRES_URL", POSTGRES)
    engine = sa.create_engine(server, isolation_level="AUTOCOMMIT", connect_args={"connect_timeout": 3})
    name = f"kontextd_test_{os.getpid()}_{uuid4().hex[:8]}"
    try:
        with engine.connect() as connection:
            connection.execute(sa.text(f"CREATE DATABASE {name}"))
            connection.execute(sa.text(f"ALTER DATABASE {name} SET synchronous_commit = off"))
    except sa.exc.OperationalError as error:
        absent(f"no PostgreSQL server answers at {server}; name one in TEST_POSTGRES_URL ({error.orig})")
    url = sa.make_url(server).set(database=name).render_as_string(hide_password=False)
    migrate(url)
    yield url
    with engine.connect() as connection:
        connection.execute(sa.text(f"DROP DATABASE {name} WITH (FORCE)"))
    engine.dispose()


@pytest.fixture
def database_url(request: pytest.FixtureRequest, sqlite_template: Path, tmp_path: Path) -> str:
    """An empty SQLite file; for tests with `@on_both_databases` a PostgreSQL database too."""
    if getattr(request, "param", "sqlite") == "postgresql":
        url: str = request.getfixturevalue("postgres_url")
        empty(url)
        return url
    return sqlite_url(Path(shutil.copy(sqlite_template, tmp_path / "store.db")))


def empty(url: str) -> None:
    engine = sa.create_engine(url)
    with engine.begin() as connection:
        for table in reversed(metadata.sorted_tables):
            connection.execute(sa.delete(table))
    engine.dispose()


@pytest.fixture
def store(database_url: str) -> Iterator[Store]:
    opened = open_store(database_url)
    yield opened
    opened.close()


@pytest.fixture
def files(tmp_path: Path) -> FolderStore:
    return FolderStore(tmp_path / "files")


@pytest.fixture
def submit(store: Store) -> Callable[..., str]:
    """Queues a job; words that are fields of `NewJob` go there, all others into the request's body."""
    own = set(NewJob.__dataclass_fields__)

    def make(prompt: str = "nothing", **words: object) -> str:
        body = {"image_url": picture_uri(), "prompt": prompt, "num_inference_steps": 4}
        body |= {name: value for name, value in words.items() if name not in own}
        fields = {"endpoint": "fal-ai/flux-kontext-lora", "owner": "anna", "payload": json.dumps(body).encode()}
        answer = store.jobs.enqueue(NewJob(**fields | {n: v for n, v in words.items() if n in own}))
        assert isinstance(answer, Queued), answer
        return answer.request_id

    return make


@pytest.fixture
def look_at(store: Store) -> Callable[[str], Job]:
    def look(request_id: str) -> Job:
        found = store.views.status(request_id)
        assert found is not None
        return found

    return look


@pytest.fixture
def completed(look_at: Callable[[str], Job]) -> Callable[[str], Job]:
    """Waits for the end of a job."""

    def wait(request_id: str) -> Job:
        until(lambda: look_at(request_id).state is JobState.COMPLETED, f"for {request_id}")
        return look_at(request_id)

    return wait


@dataclass
class WorkerThread:
    """A whole worker in threads of the test, which ends as at a SIGTERM."""

    process: WorkerProcess
    signals: SignalPipe
    codes: list[int]
    thread: threading.Thread = field(init=False)

    def __post_init__(self) -> None:
        self.thread = threading.Thread(target=lambda: self.codes.append(self.process.run()))
        self.thread.start()

    def terminate(self) -> None:
        self.signals.wake(signal.SIGTERM)

    def end(self) -> int:
        """Returns the exit code."""
        if self.thread.is_alive():
            self.terminate()
            self.thread.join(WAIT_S)
            assert not self.thread.is_alive()
        self.signals.close()
        return self.codes[-1]


@pytest.fixture
def start(store: Store, files: FileStore, tmp_path: Path) -> Iterator[Callable[..., WorkerThread]]:
    """Starts a worker in this process. Words are fields of `WorkerPolicy`."""
    numbers = itertools.count(1)
    started: list[WorkerThread] = []

    def begin(
        load: Callable[[], LoadedEngine] = load_null,
        *,
        store: Store = store,
        files: FileStore = files,
        notifier: Notifier | None = None,
        **policy: object,
    ) -> WorkerThread:
        parts = WorkerParts(
            worker_id=f"w{next(numbers)}",
            store=store,
            files=files,
            inputs=null_worker.fetcher(tmp_path / "files", files),
            scratch=tmp_path / "scratch",
            load=load,
            policy=replace(null_worker.POLICY, **policy),
        )
        signals, codes = SignalPipe(), []
        process = WorkerProcess(parts, notifier or Notifier(None), signals, end_process=codes.append)
        started.append(WorkerThread(process, signals, codes))
        return started[-1]

    yield begin
    for worker in started:
        worker.end()


Spawn = Callable[..., multiprocessing.Process]


@pytest.fixture(scope="session")
def forkserver() -> ForkServerContext:
    """Forks processes from one that has imported everything: starting each anew takes seconds on a busy machine."""
    context = multiprocessing.get_context("forkserver")
    # Not null_worker itself: the server of Python 3.11 does not know our path, and says nothing of what it cannot find.
    context.set_forkserver_preload(["kontextd_server.worker", "kontextd_server.worker.null_engine"])
    return context


@pytest.fixture
def spawn(forkserver: ForkServerContext, database_url: str, tmp_path: Path) -> Iterator[Spawn]:
    """Starts a worker in a process of its own; see null_worker.py for the settings."""
    processes: list[multiprocessing.Process] = []

    def begin(worker_id: str = "p1", **settings: object) -> multiprocessing.Process:
        told = {"worker_id": worker_id, "database": database_url, "files": str(tmp_path / "files"), **settings}
        processes.append(forkserver.Process(target=null_worker.run, args=(told,)))
        processes[-1].start()
        return processes[-1]

    yield begin
    for process in processes:
        process.kill()
        process.join(WAIT_S)
