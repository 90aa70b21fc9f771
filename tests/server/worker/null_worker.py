"""Worker processes for the tests: the real worker around an engine that does what its prompts say.

python null_worker.py '{"database": …, "files": …, "worker_id": …, …}'
"""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
import sys
import time
from collections.abc import Generator
from dataclasses import dataclass, field
from pathlib import Path

from kontextd_models import Done, EditRequest, Step
from kontextd_models.errors import OutOfMemory
from kontextd_server.fetch import FetchConfig, Fetcher, Web
from kontextd_server.fetch.roots import LoraRoots
from kontextd_server.files import FileStore, FolderStore
from kontextd_server.mirror import Mirror
from kontextd_server.store import Policy, open_store
from kontextd_server.wire.addresses import possible_file_key
from kontextd_server.worker import (
    Backoff,
    LoadedEngine,
    Notifier,
    StageDeadlines,
    WorkerParts,
    WorkerPolicy,
    run_worker,
)
from kontextd_server.worker.null_engine import NullEngine, load_null
from kontextd_server.worker.scratch import scratch

POLICY = WorkerPolicy(
    poll_s=0.5,
    retry=Backoff(0.02, 0.2),
    drain_s=5.0,
    hand_back_s=2.0,
    save_rest_s=2.0,
    pulse_s=0.1,
    hung_exit_s=30.0,
)


@dataclass
class ScriptedEngine:
    """The null engine, but for prompts that name a mishap; it happens in the second step."""

    step_s: float = 0.0
    is_broken: bool = False
    steps: list[tuple[str, int]] = field(default_factory=list)  # prompt and step, of all edits

    def edit(self, request: EditRequest) -> Generator[Step | Done, None, None]:
        for event in NullEngine(self.step_s).edit(request):
            if isinstance(event, Step):
                self.steps.append((request.prompt, event.index))
                if event.index == 2:
                    self._mishap(request.prompt)
            if self.is_broken:
                raise RuntimeError("CUDA error: an illegal memory access was encountered")
            yield event

    def _mishap(self, prompt: str) -> None:
        match prompt:
            case "die":
                os.kill(os.getpid(), signal.SIGKILL)
            case "hang":
                time.sleep(60)
            case "run out of memory":
                raise OutOfMemory("the device ran out of memory. Ask for a smaller size.")
            case "hit a bug":
                raise RuntimeError("secret of the house")
            case "break the engine":
                self.is_broken = True


def fetcher(folder: Path, files: FileStore) -> Fetcher:
    """The real one, on a box without a network, with the LoRA root studio beside the folder of files."""
    web, roots = Web(FetchConfig(folder / "cache", offline=True)), LoraRoots({"studio": folder.parent / "studio"})
    return Fetcher(web, files, possible_file_key, Mirror(folder), roots)


def main(settings: dict[str, object]) -> int:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whoever runs the tests may ignore it
    if "stderr" in settings:
        os.dup2(os.open(str(settings["stderr"]), os.O_WRONLY | os.O_CREAT, 0o600), 2)
    logging.basicConfig(level="INFO", format="%(threadName)s %(levelname)s %(message)s", stream=sys.stderr, force=True)
    if "max_file_bytes" in settings:
        resource.setrlimit(resource.RLIMIT_FSIZE, (settings["max_file_bytes"], settings["max_file_bytes"]))
    folder = Path(str(settings["files"]))
    files = FolderStore(folder)
    deadlines = StageDeadlines(**settings.get("deadlines", {}))

    def load() -> LoadedEngine:
        if settings.get("fails_to_load"):
            raise RuntimeError("no engine today")
        return load_null(ScriptedEngine(float(settings.get("step_s", 0))))

    parts = WorkerParts(
        worker_id=str(settings["worker_id"]),
        store=open_store(str(settings["database"]), Policy(lease_s=float(settings.get("lease_s", 30)))),
        files=files,
        inputs=fetcher(folder, files),
        scratch=folder / "scratch",
        load=load,
        policy=WorkerPolicy(**{**vars(POLICY), "deadlines": deadlines, **settings.get("policy", {})}),
    )
    return run_worker(parts, Notifier.from_environment(os.environ))


def hold_scratch(root: Path) -> None:
    """As the target of a process: a job's input, held until the process is killed."""
    with scratch(root, "killed") as own, own.job() as folder:
        (folder / "image").write_bytes(b"private")
        time.sleep(60)


def run(settings: dict[str, object]) -> None:
    """As the target of a process."""
    sys.exit(main(settings))


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
