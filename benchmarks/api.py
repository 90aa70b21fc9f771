"""Figures of the API process: polls, throughput, and what the whole path adds to an engine's own time.

    python benchmarks/api.py [--postgres URL] [--seconds 10] [--repeats 200] [--out FILE]

Starts a real API process and a real worker process, whose engine computes nothing; this process makes the calls. The
same null engine behind plain FastAPI with a queue in memory, and behind LitServe where that is installed, is measured
beside it. Writes JSON into benchmarks/results/ and prints a table.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import sys
import tempfile
from collections.abc import Coroutine, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar
from uuid import uuid4

import sqlalchemy as sa
import uvloop

sys.path.insert(0, str(Path(__file__).parent / "load"))
import edits
import scenarios
import servers

RESULTS = Path(__file__).parent / "results"
POLLERS, POLL_EVERY_S = 200, 0.1  # Python's client asks every 100 ms
CLIENTS = 50
T = TypeVar("T")
Rows = Mapping[str, Mapping[str, float]]


def main() -> None:
    options = parse()
    measured = {"kontextd": kontextd(options), "plain FastAPI": plain_fastapi(options)}
    if importlib.util.find_spec("litserve") is None:
        print(
            "LitServe is not installed and left out. For it: pip install litserve==0.2.19 (it brings libzmq, MPL-2.0)"
        )
    else:
        measured["LitServe"] = lit_serve(options)
    report = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python", *sys.argv]),
        "database": "postgresql" if options.postgres else "sqlite",
        "python": platform.python_version(),
        "uvicorn": version("uvicorn"),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "pollers": POLLERS,
        "poll_every_s": POLL_EVERY_S,
        "clients": CLIENTS,
        "picture": f"{edits.SIDE}x{edits.SIDE} px",
        "figures": measured,
    }
    write(report, options.out or RESULTS / ("api-postgresql.json" if options.postgres else "api.json"))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--postgres", metavar="URL", help="a server on which databases can be made")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each measurement under load")
    parser.add_argument("--repeats", type=int, default=200, help="of each single call")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def kontextd(options: argparse.Namespace) -> Rows:
    with (
        tempfile.TemporaryDirectory() as folder,
        database(options.postgres) as url,
        servers.kontextd(Path(folder), url) as box,
    ):
        rows = {"status polls": run(scenarios.polling(box.server, POLLERS, POLL_EVERY_S, options.seconds))}
        with box.worker():
            run(scenarios.drained(box.server))
            rows["submit, status, result"] = run(
                scenarios.throughput(box.server, CLIENTS, POLL_EVERY_S, options.seconds)
            )
            rows |= run(scenarios.overhead(box.server, box.times, options.repeats))
            rows["sync run"] = run(scenarios.sync_runs(box.server, scenarios.APP, options.repeats))
            rows["sync runs together"] = run(
                scenarios.sync_throughput(box.server, scenarios.APP, CLIENTS, options.seconds)
            )
        rows["memory, MiB"] = box.server.memory_mib()
    return rows


def plain_fastapi(options: argparse.Namespace) -> Rows:
    with servers.script("plain_fastapi.py", "/health") as server:
        rows = {"status polls": run(scenarios.polling(server, POLLERS, POLL_EVERY_S, options.seconds))}
        run(scenarios.go(server))
        run(scenarios.drained(server))
        rows["submit, status, result"] = run(scenarios.throughput(server, CLIENTS, POLL_EVERY_S, options.seconds))
        rows["sync run"] = run(scenarios.sync_runs(server, scenarios.APP, options.repeats))
        rows["sync runs together"] = run(scenarios.sync_throughput(server, scenarios.APP, CLIENTS, options.seconds))
        rows["memory, MiB"] = server.memory_mib()
    return rows


def lit_serve(options: argparse.Namespace) -> Rows:
    """It has sync runs only. Its memory is left out: it is that of several processes."""
    with servers.script("lit_serve.py", "/health") as server:
        return {
            "sync run": run(scenarios.sync_runs(server, "/predict", options.repeats)),
            "sync runs together": run(scenarios.sync_throughput(server, "/predict", CLIENTS, options.seconds)),
        }


@contextmanager
def database(postgres: str | None) -> Iterator[str | None]:
    """None: the SQLite file of the data folder."""
    if postgres is None:
        yield None
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


def run(measuring: Coroutine[object, object, T]) -> T:
    return uvloop.run(measuring)


def write(report: Mapping[str, object], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    figures = report["figures"]
    assert isinstance(figures, Mapping)
    for name, rows in figures.items():
        print(f"{name}, ms unless said otherwise")
        for row, numbers in rows.items():
            print(f"  {row:34}" + "  ".join(f"{column} {number:g}" for column, number in numbers.items()))
    print(f"written: {path}")


if __name__ == "__main__":
    main()
