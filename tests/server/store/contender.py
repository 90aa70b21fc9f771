"""A worker process for the race tests: runs every job it can claim and says on stdout what it did.

    python contender.py URL NAME RUN_S

It begins at a line on stdin, works RUN_S seconds on each job, and ends when all jobs have come to their end.
"""

from __future__ import annotations

import sys
import time

from kontextd_server.store import JobState, Success, open_store


def main(url: str, name: str, run_s: float) -> None:
    store = open_store(url)
    print("ready", flush=True)
    sys.stdin.readline()
    while any(job.state is not JobState.COMPLETED for job in store.views.jobs()):
        claimed = store.leases.claim(name)
        if claimed is None:
            time.sleep(0.01)
            continue
        print("claimed", claimed.request_id, flush=True)
        time.sleep(run_s)
        print(store.leases.finish(claimed.lease, Success(name.encode())).value, claimed.request_id, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], float(sys.argv[3]))
