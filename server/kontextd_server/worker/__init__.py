"""Workers and what keeps them running. Knows jobs, engine door, files and processes; knows no HTTP of ours.

    run_worker(WorkerParts(…), notifier)      the whole life of a worker process
    supervise(specs, companions, …)           the whole life of the process that keeps workers and the API running
    Housekeeping, OldJobs, OldFiles, Deliverer
                                              what runs beside: `run(stop)` is a thread's loop

One job: claim (loop.py) → fetch inputs (inputs.py) → engine, step by step (edit.py) → encode and store beside the next
job (results.py, saver.py) → record the ending. Leases are renewed by keeper.py; stages.py and pulse.py notice a process
that hangs; notify.py carries that to whoever started it.
"""

from kontextd_server.worker.children import ChildSpec
from kontextd_server.worker.deliver import Deliverer, DeliveryPolicy
from kontextd_server.worker.housekeeping import Housekeeping, OldFiles, OldJobs
from kontextd_server.worker.inputs import Inputs
from kontextd_server.worker.loaded import EngineDoor, LoadedEngine, load_kontext
from kontextd_server.worker.notify import Notifier
from kontextd_server.worker.policy import (
    Backoff,
    HousekeepingPolicy,
    StageDeadlines,
    SupervisorPolicy,
    WorkerPolicy,
)
from kontextd_server.worker.process import EXIT_FAILED, EXIT_MISTAKE, WorkerParts, run_worker
from kontextd_server.worker.pulse import EXIT_HUNG
from kontextd_server.worker.supervisor import Companion, supervise

__all__ = [
    "EXIT_FAILED",
    "EXIT_HUNG",
    "EXIT_MISTAKE",
    "Backoff",
    "ChildSpec",
    "Companion",
    "Deliverer",
    "DeliveryPolicy",
    "EngineDoor",
    "Housekeeping",
    "HousekeepingPolicy",
    "Inputs",
    "LoadedEngine",
    "Notifier",
    "OldFiles",
    "OldJobs",
    "StageDeadlines",
    "SupervisorPolicy",
    "WorkerParts",
    "WorkerPolicy",
    "load_kontext",
    "run_worker",
    "supervise",
]
