"""Engines that a test steers step by step, and stores that fail on demand."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from dataclasses import dataclass, field, replace

from kontextd_models import Done, EditRequest, Step
from kontextd_server.files import FileStore, Label, StoredFile
from kontextd_server.store import StoreUnavailable
from kontextd_server.worker import LoadedEngine
from kontextd_server.worker.null_engine import NullEngine, load_null

PATIENCE_S = 120.0  # for the test, before what waits for it gives up


@dataclass
class GatedEngine:
    """Makes a step when the test lets it. `made` counts the steps of all edits but the short one at the start."""

    made: int = 0
    closed: int = 0
    allowed: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    threads: set[str] = field(default_factory=set)

    def edit(self, request: EditRequest) -> Generator[Step | Done, None, None]:
        self.threads.add(threading.current_thread().name)
        if not request.prompt:
            yield from NullEngine().edit(request)
            return
        try:
            for event in NullEngine().edit(request):
                if isinstance(event, Step):
                    assert self.allowed.acquire(timeout=PATIENCE_S)
                    self.made += 1
                yield event
        except GeneratorExit:
            self.closed += 1
            raise

    def let(self, steps: int) -> None:
        self.allowed.release(steps)

    def loaded(self) -> LoadedEngine:
        return load_null(self)


@dataclass
class CachingEngine:
    """Finds the prompt in its cache from the second job on, for which it merges LoRAs as well."""

    made: int = -1  # but for the short edit

    def edit(self, request: EditRequest) -> Generator[Step | Done, None, None]:
        for event in NullEngine().edit(request):
            if isinstance(event, Done):
                self.made += 1
                again = self.made > 1
                hits, merge_s = {"prompt": again, "reference": False}, 0.25 if again else 0.0
                event = replace(event, cache_hits=hits, timings={**event.timings, "merge": merge_s})
            yield event


class Unwilling:
    """Stands before an object; `fail_next` makes calls of a method raise, before or after they are carried out."""

    def __init__(self, behind: object) -> None:
        self._behind = behind
        self._failing: dict[str, tuple[int, Exception, bool]] = {}
        self.calls: dict[str, int] = {}

    def fail_next(self, method: str, error: Exception, times: int = 1, *, after: bool = False) -> None:
        self._failing[method] = (times, error, after)

    def __getattr__(self, name: str) -> Callable[..., object]:
        behind = getattr(self._behind, name)

        def call(*arguments: object, **words: object) -> object:
            self.calls[name] = self.calls.get(name, 0) + 1
            times, error, after = self._failing.get(name, (0, StoreUnavailable(), False))
            if times == 0:
                return behind(*arguments, **words)
            self._failing[name] = (times - 1, error, after)
            if after:
                behind(*arguments, **words)
            raise error

        return call


class SlowFiles:
    """A file store whose `put` waits for the test."""

    def __init__(self, files: FileStore) -> None:
        self._files = files
        self.entered = threading.Event()
        self.go_on = threading.Event()
        self.done = threading.Event()

    def put(self, chunks: list[bytes], label: Label) -> StoredFile:
        self.entered.set()
        assert self.go_on.wait(PATIENCE_S)
        stored = self._files.put(chunks, label)
        self.done.set()
        return stored

    def __getattr__(self, name: str) -> object:
        return getattr(self._files, name)
