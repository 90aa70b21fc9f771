"""The command `kontextd` with an engine that does what its prompts say. Everything else in it is the real thing.

python scripted.py serve|worker|api …: as `kontextd`; the processes that `serve` starts are of the same kind.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Generator
from pathlib import Path

from kontextd_models import Done, EditRequest, Step
from kontextd_server import cli, cli_serve, worker
from kontextd_server.worker.null_engine import NullEngine, load_null

_LOOK_S = 0.02
_WALK_S = 0.05


class ScriptedEngine:
    """The null engine, but for prompts of these forms. GATE is the path of a file; GATE-ID, with the id of a worker,
    opens it for that one alone.

    die GATE       kills its process in the second step, as soon as the file is there
    hold GATE      stands still in the second step until the file is there
    hold-end GATE  the same after the last step, with the picture in hand
    walk GATE      takes its time for each step until the file is there
    """

    def __init__(self, worker_id: str) -> None:
        self._worker_id = worker_id

    def edit(self, request: EditRequest) -> Generator[Step | Done, None, None]:
        verb, _, gate = request.prompt.partition(" ")
        for event in NullEngine().edit(request):
            if isinstance(event, Step):
                self._in_step(event.index, verb, gate)
            elif verb == "hold-end":
                self._hold(gate)
            yield event

    def _in_step(self, index: int, verb: str, gate: str) -> None:
        if verb in ("die", "hold") and index == 2:
            self._hold(gate)
        if verb == "die" and index == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        if verb == "walk" and not self._is_open(gate):
            time.sleep(_WALK_S)

    def _hold(self, gate: str) -> None:
        while not self._is_open(gate):
            time.sleep(_LOOK_S)

    def _is_open(self, gate: str) -> bool:
        return Path(gate).exists() or Path(f"{gate}-{self._worker_id}").exists()


def main(arguments: list[str]) -> int:
    worker_id = arguments[arguments.index("--worker-id") + 1] if "--worker-id" in arguments else ""
    worker.load_kontext = lambda config, sums=None: load_null(ScriptedEngine(worker_id))
    cli_serve._command = lambda *words: [sys.executable, __file__, *words]
    return cli.main(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
