"""A worker process of the real kind around the paced null engine.

python null_worker.py DATA TIMES [--database URL]
"""

from __future__ import annotations

import argparse
import os
import sys
from functools import partial
from pathlib import Path

from edits import PacedEngine
from kontextd_server import parts
from kontextd_server.settings import read_settings
from kontextd_server.worker import Notifier, WorkerParts, run_worker
from kontextd_server.worker.null_engine import load_null


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("times", type=Path)
    parser.add_argument("--database")
    options = parser.parse_args()
    database = {"database": options.database} if options.database else {}
    settings = read_settings({}, {"data": str(options.data), **database})
    files = parts.file_store(settings)
    with parts.job_store(settings) as store:
        worker = WorkerParts(
            worker_id="null",
            store=store,
            files=files,
            inputs=parts.fetcher(settings, files),
            scratch=parts.Places.of(settings).scratch,
            load=partial(load_null, PacedEngine(options.times)),
            policy=settings.worker_policy(settings.drain_s),
        )
        return run_worker(worker, Notifier.from_environment(os.environ))


if __name__ == "__main__":
    sys.exit(main())
