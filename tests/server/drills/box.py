"""A box as an operator sets it up: a data folder, `kontextd serve`, workers beside it. Knows commands and folders."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from kontextd_server.files import FolderLimits, FolderStore
from kontextd_server.store import Job, Store, WorkerState, open_store, sqlite_url

from .calls import Caller
from .processes import SCRIPTED, Running, free_port, until

# Receivers of the tests are on the loopback, and nobody waits for minutes here.
SETTINGS = {"fetch_allow_webhook": "127.0.0.0/8", "webhook_retry_delays_s": ",".join(["0.3"] * 600), "device": "cpu"}


@dataclass
class Box:
    """Commands get the same settings each time; the first `serve` chooses the port, later ones listen there again."""

    folder: Path
    settings: dict[str, str] = field(default_factory=dict)
    url: str = ""
    runs: list[Running] = field(default_factory=list)
    _stack: ExitStack = field(default_factory=ExitStack)

    @property
    def data(self) -> Path:
        return self.folder / "data"

    @property
    def database(self) -> str:
        return self.settings.get("database") or sqlite_url(self.data / "jobs.sqlite")

    @property
    def files(self) -> Path:
        return Path(self.settings.get("files") or self.data / "files")

    @cached_property
    def store(self) -> Store:
        """For looking at jobs from behind, and for keys."""
        store = open_store(self.database)
        self._stack.callback(store.close)
        return store

    def command(self, *arguments: str, program: Sequence[str] = SCRIPTED, **settings: str) -> Running:
        """Any command, with the settings of this box and these before them."""
        self.folder.mkdir(parents=True, exist_ok=True)
        told = {**SETTINGS, "data": str(self.data), **self.settings, **settings}
        self.runs.append(Running(program, arguments, told, self.folder / f"run-{len(self.runs)}"))
        return self.runs[-1]

    def serve(self, *options: str, workers: int = 0, program: Sequence[str] = SCRIPTED, **settings: str) -> Running:
        """Returns once it is ready."""
        port = self.url.rpartition(":")[2] or str(free_port())
        command = ("serve", "--port", port, "--workers", str(workers), *options)
        run = self.command(*command, program=program, **settings)
        ready = until(lambda: _line(run, "kontextd is ready at "), "the server")
        self.url = ready.removeprefix("kontextd is ready at ")
        return run

    def worker(self, worker_id: str, *, program: Sequence[str] = SCRIPTED, **settings: str) -> Running:
        """A worker that nobody supervises; returns once it is ready."""
        run = self.command("worker", "--worker-id", worker_id, program=program, **settings)
        until(lambda: self.state_of(worker_id, run) is WorkerState.READY, worker_id)
        return run

    def state_of(self, worker_id: str, run: Running) -> WorkerState | None:
        assert run.process.poll() is None, run.logged
        return next((one.state for one in self.store.workers.all() if one.id == worker_id), None)

    def caller(self, name: str = "anna") -> Caller:
        made = Caller(self.url, self.store.keys.create(name).plain)
        self._stack.callback(made.http.close)
        return made

    def job(self, request_id: str) -> Job:
        found = self.store.views.status(request_id)
        assert found is not None, request_id
        return found

    def in_step(self, request_id: str, attempt: int = 1) -> Job:
        """The job, once its run of this number is beyond its first step."""
        until(lambda: self._is_in_step(request_id, attempt), f"run {attempt} of {request_id}")
        return self.job(request_id)

    def pid_of_worker(self, worker_id: str | None) -> int:
        return next(one.pid for one in self.store.workers.all() if one.id == worker_id)

    def pictures_of(self, seed: int) -> int:
        """How many files of results have this seed."""
        return sum(one.file_name == f"kontext-{seed}.png" for one in FolderStore(self.files).records.all())

    def close(self) -> None:
        try:
            for run in reversed(self.runs):
                run.end()
        finally:
            self._stack.close()

    def _is_in_step(self, request_id: str, attempt: int) -> bool:
        job = self.job(request_id)
        return job.attempt == attempt and (job.steps_done or 0) >= 1


NewBox = Callable[..., Box]


def half_files(folder: Path) -> list[str]:
    """What in a file store is only there in part, or belongs to nothing."""
    blobs = [path for path in (folder / "blobs").glob("??/*") if _sha256(path) != path.name]
    parts = [*(folder / "tmp").glob("*"), *folder.rglob("*.part")]
    return sorted(str(path) for path in {*blobs, *parts, *FolderStore(folder).records.leftovers()})


def swept(folder: Path) -> list[str]:
    """The same after a sweep that spares nothing for being young."""
    FolderStore(folder, FolderLimits(grace_s=0.0)).sweep()
    return half_files(folder)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _line(run: Running, begin: str) -> str:
    assert run.process.poll() is None, run.logged
    return next((line for line in run.printed.splitlines() if line.startswith(begin)), "")
