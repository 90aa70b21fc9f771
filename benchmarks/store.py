"""Figures of the job store with a full past: polls, submits and a job's way through it, in milliseconds.

    python benchmarks/store.py [--postgres URL] [--finished 100000] [--queued 1000] [--repeats 500] [--out FILE]

Measures SQLite in a temporary folder, or a database of its own on the PostgreSQL server at URL, dropped at the end.
Wall time is what a caller waits; the CPU time of this process beside it tells the store from a busy machine. Writes
JSON into benchmarks/results/ and prints a table.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sqlite3
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from uuid import uuid4

import sqlalchemy as sa
from kontextd_server.store import (
    CancelAnswer,
    Claim,
    JobFilter,
    JobState,
    LogLine,
    NewJob,
    Progress,
    Queued,
    Store,
    Success,
    migrate,
    open_store,
    sqlite_url,
    topics,
)
from kontextd_server.store.tables import bodies, events, jobs

RESULTS = Path(__file__).parent / "results"
LOG_LINES = 30  # of a finished job: one a step
PAYLOAD = json.dumps(
    {"prompt": "make it black and white", "image_url": "https://box.example/files/" + "a" * 40}
).encode()
Figures = Mapping[str, Mapping[str, float]]


def main() -> None:
    options = parse()
    with database(options.postgres) as url:
        migrate(url)
        store = open_store(url)
        fill(store, options.finished, options.queued)
        figures = {**single_calls(store, options.repeats), **way_through(store, options.repeats), **wake_up(store)}
        backend = "sqlite" if store.database.is_sqlite else "postgresql"
        report = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": " ".join(["python", *sys.argv]),
            "database": f"{backend} {server_version(store)}",
            "python": platform.python_version(),
            "sqlalchemy": version("sqlalchemy"),
            "cores": os.cpu_count(),
            "load_average": os.getloadavg()[0],
            "finished_jobs": options.finished,
            "queued_jobs": options.queued,
            "figures_ms": figures,
        }
        store.close()
    write(report, options.out or RESULTS / f"store-{backend}.json")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--postgres", metavar="URL", help="a server on which databases can be made")
    parser.add_argument("--finished", type=int, default=100_000)
    parser.add_argument("--queued", type=int, default=1_000)
    parser.add_argument("--repeats", type=int, default=500)
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


@contextmanager
def database(postgres: str | None) -> Iterator[str]:
    if postgres is None:
        with tempfile.TemporaryDirectory() as folder:
            yield sqlite_url(Path(folder) / "store.db")
        return
    server = sa.make_url(postgres).set(drivername="postgresql+psycopg")
    engine = sa.create_engine(server, isolation_level="AUTOCOMMIT")
    name = f"kontextd_bench_{uuid4().hex[:8]}"
    with engine.connect() as connection:
        connection.exec_driver_sql(f"CREATE DATABASE {name}")
    try:
        yield server.set(database=name).render_as_string(hide_password=False)
    finally:
        with engine.connect() as connection:
            connection.exec_driver_sql(f"DROP DATABASE {name} WITH (FORCE)")
        engine.dispose()


def server_version(store: Store) -> str:
    if store.database.is_sqlite:
        return sqlite3.sqlite_version
    with store.database.read() as connection:
        return str(connection.exec_driver_sql("SHOW server_version").scalar())


def fill(store: Store, finished: int, queued: int) -> None:
    """Finished jobs with result and log, written past the store's methods, then queued ones through them."""
    first = NewJob("fal-ai/flux-kontext-lora", "studio", PAYLOAD)
    store.jobs.enqueue(first)
    store.leases.finish(claimed(store).lease, Success(b"{}"))
    with store.database.write() as connection:
        pattern = connection.execute(sa.select(jobs)).one()._asdict()
        for start in range(2, finished + 1, 5000):
            numbers = range(start, min(start + 5000, finished + 1))
            connection.execute(sa.insert(jobs), [pattern | {"id": n, "request_id": f"old-{n}"} for n in numbers])
            for kind in ("input", "result"):
                rows = [{"job_id": n, "kind": kind, "number": 0, "body": PAYLOAD} for n in numbers]
                connection.execute(sa.insert(bodies), rows)
        lines = [
            {"job_id": finished, "timestamp": 0, "level": "INFO", "source": "USER", "message": "x" * 60}
        ] * LOG_LINES
        connection.execute(sa.insert(events), lines)
        if not store.database.is_sqlite:
            connection.exec_driver_sql(f"SELECT setval(pg_get_serial_sequence('jobs', 'id'), {finished})")
    for n in range(queued):
        submit(store, owner=f"studio {n % 10}", lora_key=f"set {n % 7}")
    if not store.database.is_sqlite:
        with store.database.read() as connection:
            connection.exec_driver_sql("VACUUM ANALYZE")  # as autovacuum does after a minute


def submit(store: Store, **fields: str) -> str:
    answer = store.jobs.enqueue(
        NewJob(**{"endpoint": "fal-ai/flux-kontext-lora", "owner": "studio"} | fields, payload=PAYLOAD)
    )
    assert isinstance(answer, Queued)
    return answer.request_id


def claimed(store: Store) -> Claim:
    job = store.leases.claim("bench", warm_lora_key="set 3")
    assert job is not None
    return job


def single_calls(store: Store, repeats: int) -> Figures:
    last = store.views.jobs(JobFilter(state=JobState.IN_QUEUE), limit=1)[0].request_id
    old = store.views.jobs(JobFilter(state=JobState.COMPLETED), limit=1)[0].request_id
    assert len(store.views.logs(old)) == LOG_LINES
    key = store.keys.create("studio").plain
    calls: dict[str, Callable[[], object]] = {
        "status of the last in the queue": lambda: store.views.status(last),
        "status of a finished job": lambda: store.views.status(old),
        f"log of {LOG_LINES} lines": lambda: store.views.logs(old),
        "result": lambda: store.views.result(old),
        "key look-up": lambda: store.keys.find(key),
        "gauges": store.views.gauges,
        "list of 100 jobs": store.views.jobs,
        "list of an owner with a long past": lambda: store.views.jobs(JobFilter(owner="studio")),
        "jobs finished lately": lambda: store.views.jobs(
            JobFilter(state=JobState.COMPLETED, finished_after=time.time())
        ),
        "sweep that finds nothing": store.leases.sweep,
        "submit, then cancel": lambda: cancel(store, submit(store)),
    }
    return {name: timed(call, repeats) for name, call in calls.items()}


def cancel(store: Store, request_id: str) -> None:
    assert store.jobs.request_cancel(request_id) is CancelAnswer.ACCEPTED


def way_through(store: Store, repeats: int) -> Figures:
    """Each call on jobs that go through the whole store, the queue being kept at its length."""
    taken: list[Claim] = []

    def next_job() -> None:
        taken.append(claimed(store))

    def step() -> None:
        store.leases.renew(taken[-1].lease, logs=[LogLine("x" * 60, time.time())], progress=Progress(1, 30))

    def finish() -> None:
        store.leases.finish(taken[-1].lease, Success(PAYLOAD))

    calls = {"submit": lambda: submit(store), "claim": next_job, "renewal with a log line": step, "finish": finish}
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            samples[name].append(sample(call))
    whole = [tuple(map(sum, zip(*rows, strict=True))) for rows in zip(*samples.values(), strict=True)]
    return {name: summary(rows) for name, rows in {**samples, "all four": whole}.items()}


def wake_up(store: Store, repeats: int = 50) -> Figures:
    """From the call of `enqueue` in one thread to the wake-up of another that waits for a job."""
    watcher = store.watch()
    latencies = []
    with watcher.subscribe(topics.QUEUE) as subscription, ThreadPoolExecutor(1) as another:
        for _ in range(repeats):
            while subscription.wait(0.05):
                pass
            began = another.submit(submit_a_moment_later, store)
            assert subscription.wait(10)
            woken = time.perf_counter()
            latencies.append((woken - began.result(), 0.0))
    watcher.close()
    return {"submit to wake-up": summary(latencies)}


def submit_a_moment_later(store: Store) -> float:
    time.sleep(0.02)
    began = time.perf_counter()
    submit(store)
    return began


def timed(call: Callable[[], object], repeats: int) -> Mapping[str, float]:
    for _ in range(5):
        call()
    return summary([sample(call) for _ in range(repeats)])


def sample(call: Callable[[], object]) -> tuple[float, float]:
    """Wall and CPU seconds of one call."""
    cpu, wall = time.process_time(), time.perf_counter()
    call()
    return time.perf_counter() - wall, time.process_time() - cpu


def summary(samples: list[tuple[float, float]]) -> Mapping[str, float]:
    walls = sorted(wall for wall, _ in samples)
    figures = {
        "p50": statistics.median(walls),
        "p99": walls[min(len(walls) - 1, len(walls) * 99 // 100)],
        "cpu": statistics.mean(cpu for _, cpu in samples),
    }
    return {name: round(seconds * 1000, 3) for name, seconds in figures.items()}


def write(report: Mapping[str, object], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    figures = report["figures_ms"]
    assert isinstance(figures, Mapping)
    print(f"{report['database']}, {report['finished_jobs']} finished and {report['queued_jobs']} queued jobs, ms")
    print(f"{'':34}{'p50':>9}{'p99':>9}{'cpu':>9}")
    for name, row in figures.items():
        print(f"{name:34}{row['p50']:9.2f}{row['p99']:9.2f}{row['cpu']:9.2f}")
    print(f"written: {path}")


if __name__ == "__main__":
    main()
