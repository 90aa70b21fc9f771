"""The servers that are measured, each in processes of its own. Knows how they are started; knows no calls."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from kontextd_server.listening import listening_socket
from kontextd_server.store import migrate, open_store, sqlite_url

HERE = Path(__file__).parent
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_START_S = 60.0
_STOP_S = 30.0


@dataclass(frozen=True)
class Server:
    """`pid` is of the process that answers calls."""

    port: int
    pid: int
    headers: dict[str, str] = field(default_factory=dict)

    def cpu_s(self) -> float:
        """CPU time of all threads of that process."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICKS_PER_S

    def memory_mib(self) -> dict[str, float]:
        """Resident now, and at most since its start."""
        lines = dict(line.split(":", 1) for line in Path(f"/proc/{self.pid}/status").read_text().splitlines())
        return {
            name: round(int(lines[field].split()[0]) / 1024, 1) for name, field in (("now", "VmRSS"), ("peak", "VmHWM"))
        }


@dataclass(frozen=True)
class Kontextd:
    """An API process with a job store and files in `data`, and no worker yet."""

    server: Server
    data: Path
    times: Path
    database: str | None

    @contextmanager
    def worker(self) -> Iterator[None]:
        """A worker with the null engine, ready for its first job."""
        options = ["--database", self.database] if self.database else []
        with _process([str(HERE / "null_worker.py"), str(self.data), str(self.times), *options]):
            _wait_until_answered(self.server.port, "/ready")
            yield


@contextmanager
def kontextd(data: Path, database: str | None) -> Iterator[Kontextd]:
    """By the command that a supervisor starts: `kontextd api`."""
    url = database or sqlite_url(data / "jobs.sqlite")
    migrate(url)
    store = open_store(url)
    key = store.keys.create("bench").plain
    store.close()
    options = ["--data", str(data), *(["--database", database] if database else [])]
    with listening_socket("127.0.0.1", 0) as listener:
        port, descriptor = listener.getsockname()[1], listener.fileno()
        command = ["-m", "kontextd_server.cli", "api", "--descriptor", str(descriptor), *options]
        with _process(command, descriptor) as pid:
            _wait_until_answered(port, "/health")
            server = Server(port, pid, {"Authorization": f"Key {key}"})
            yield Kontextd(server, data, data / "times.jsonl", database)


@contextmanager
def script(name: str, health: str) -> Iterator[Server]:
    """A server of one script that is given its port."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with _process([str(HERE / name), str(port)]) as pid:
        _wait_until_answered(port, health)
        yield Server(port, pid)


@contextmanager
def _process(arguments: list[str], *descriptors: int) -> Iterator[int]:
    child = subprocess.Popen([sys.executable, *arguments], pass_fds=descriptors, start_new_session=True)
    try:
        yield child.pid
    finally:
        _end(child)


def _end(child: subprocess.Popen[bytes]) -> None:
    """With all that it has started itself."""
    child.terminate()
    with suppress(subprocess.TimeoutExpired):
        child.wait(_STOP_S)
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _wait_until_answered(port: int, path: str) -> None:
    until = time.monotonic() + _START_S
    while True:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=_START_S).close()
            return
        except (urllib.error.URLError, ConnectionError) as error:
            if time.monotonic() > until:
                raise SystemExit(f"port {port} did not answer {path} within {_START_S:g} s: {error}") from error
            time.sleep(0.05)
