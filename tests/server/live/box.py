"""A box as an operator starts it: `kontextd serve`, a process of its own. Knows commands and logs; knows no client."""

from __future__ import annotations

import os
import re
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from kontextd_server.store import Store, open_store, sqlite_url

ENDPOINT = "fal-ai/flux-kontext-lora"
KONTEXTD = (sys.executable, "-m", "kontextd_server.cli")
PROXY = "/api/fal/proxy"
START_S = 300.0  # loading the model takes seconds on an idle machine, and a minute on one that is not
STOP_S = 120.0


@dataclass(frozen=True)
class Keys:
    """One for the tests, one that the operator lends to pages."""

    own: str = field(default_factory=lambda: f"anna:{secrets.token_hex(16)}")
    lent: str = field(default_factory=lambda: f"page:{secrets.token_hex(16)}")

    @property
    def setting(self) -> str:
        return f"anna={self.own},pages={self.lent}"


@dataclass(frozen=True)
class LiveBox:
    """A box that serves at `url`; what it says goes to `log`."""

    url: str
    data: Path
    log: Path
    keys: Keys
    process: subprocess.Popen[bytes]

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    @property
    def proxy_url(self) -> str:
        return f"{self.url}{PROXY}"

    @contextmanager
    def store(self) -> Iterator[Store]:
        """Its job store, to look at what became of a call."""
        store = open_store(sqlite_url(self.data / "jobs.sqlite"))
        try:
            yield store
        finally:
            store.close()

    def answers(self, call: str) -> list[str]:
        """The lines of its log for one kind of call, such as `POST run`."""
        return [line for line in self.log.read_text().splitlines() if f": {call} " in line]


@contextmanager
def serving(folder: Path, data: Path, keys: Keys, settings: Mapping[str, str], *options: str) -> Iterator[LiveBox]:
    """A box on a free port, ready to take jobs, until the context ends; then it has to end well."""
    said, log = folder / "stdout.txt", folder / "stderr.txt"
    environment = environment_of({"KONTEXTD_API_KEYS": keys.setting, **settings})
    command = (*KONTEXTD, "serve", "--port", "0", "--data", str(data), *options)
    with running(command, environment, said, log) as process:
        eventually(lambda: process.poll() is not None or "is ready at" in said.read_text(), START_S)
        ready = re.search(r"kontextd is ready at (\S+)", said.read_text())
        assert ready, f"kontextd serve did not start:\n{log.read_text()}"
        yield LiveBox(ready[1], data, log, keys, process)


@contextmanager
def running(
    command: Sequence[str], environment: Mapping[str, str], stdout: Path, stderr: Path
) -> Iterator[subprocess.Popen[bytes]]:
    with stdout.open("wb") as said, stderr.open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=said, stderr=log, stdin=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.terminate()
        try:
            code = process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
    # A process that only serves ends as uvicorn does: cleanly, and then by the signal once more.
    assert code in (0, -signal.SIGTERM), f"{' '.join(command)} ended with {code}:\n{stderr.read_text()}"


def environment_of(settings: Mapping[str, str]) -> dict[str, str]:
    """The environment of a command: ours without what would lead it elsewhere."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("KONTEXTD_", "FAL_"))}
    return {**ours, **settings}


def eventually(holds: Callable[[], object], within_s: float = 120.0, every_s: float = 0.02) -> None:
    """Wait until something holds."""
    until = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < until, f"it did not come to hold within {within_s:g} s"
        time.sleep(every_s)
