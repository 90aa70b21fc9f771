"""The real databases for the tests of the store: a SQLite file for each, a PostgreSQL database made for the run."""

from __future__ import annotations

import itertools
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import uuid4

import pytest
import sqlalchemy as sa
from fal_clients import absent
from kontextd_server.store import Claim, NewJob, Policy, Queued, Store, migrate
from kontextd_server.store import sqlite_url as url_of
from kontextd_server.store.database import Database
from kontextd_server.store.store import assemble
from kontextd_server.store.tables import metadata

# A server on which databases can be made; TEST_POSTGRES_URL names another one.
POSTGRES = "postgresql+psycopg://root@127.0.0.1:5432/postgres"
START = 1_700_000_000.0


class FakeClock:
    """Time stands still until a test moves it."""

    def __init__(self) -> None:
        self.now = START

    def __call__(self) -> float:
        return self.now

    def pass_s(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture(scope="session")
def postgres_server() -> str:
    """The URL of a server that answers."""
    url = os.environ.get("TEST_POSTGRES_URL", POSTGRES)
    engine = sa.create_engine(url, connect_args={"connect_timeout": 3})
    try:
        engine.connect().close()
    except sa.exc.OperationalError as error:
        absent(f"no PostgreSQL server answers at {url}; name one in TEST_POSTGRES_URL ({error.orig})")
    finally:
        engine.dispose()
    return url


@pytest.fixture(scope="session")
def postgres_database(postgres_server: str) -> Iterator[Callable[..., str]]:
    """Makes empty databases, with what CREATE DATABASE is told beside their names, and drops them at the end."""
    engine = sa.create_engine(postgres_server, isolation_level="AUTOCOMMIT")
    made: list[str] = []

    def make(options: str = "") -> str:
        made.append(f"kontextd_test_{os.getpid()}_{uuid4().hex[:8]}")
        with engine.connect() as connection:
            connection.execute(sa.text(f"CREATE DATABASE {made[-1]} {options}"))
            connection.execute(sa.text(f"ALTER DATABASE {made[-1]} SET synchronous_commit = off"))
        return sa.make_url(postgres_server).set(database=made[-1]).render_as_string(hide_password=False)

    yield make
    with engine.connect() as connection:
        for name in made:
            connection.execute(sa.text(f"DROP DATABASE {name} WITH (FORCE)"))
    engine.dispose()


@pytest.fixture(scope="session")
def postgres_url(postgres_database: Callable[..., str]) -> str:
    url = postgres_database()
    migrate(url)
    return url


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("store") / "template.db"
    migrate(url_of(path))
    return path


@pytest.fixture(scope="session")
def sqlite_url(sqlite_template: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return url_of(shutil.copy(sqlite_template, tmp_path_factory.mktemp("store") / "shared.db"))


@pytest.fixture
def sqlite_file(sqlite_template: Path, tmp_path: Path) -> Path:
    """A store of a test's own."""
    return Path(shutil.copy(sqlite_template, tmp_path / "store.db"))


@pytest.fixture(scope="session")
def open_databases() -> Iterator[Callable[[str], Database]]:
    """Each database is opened once: SQLAlchemy keeps what it knows of statements with the connections."""
    opened: dict[str, Database] = {}

    def get(url: str) -> Database:
        return opened.setdefault(url, Database(url))

    yield get
    for database in opened.values():
        database.close()


@pytest.fixture(params=["sqlite", "postgres"])
def database(request: pytest.FixtureRequest, open_databases: Callable[[str], Database]) -> Database:
    """A database with empty tables, the same one for all tests."""
    url = request.getfixturevalue(f"{request.param}_url")
    empty(open_databases(url))
    return open_databases(url)


def empty(database: Database) -> None:
    with database.write() as connection:
        for table in reversed(metadata.sorted_tables):
            connection.execute(sa.delete(table))


@pytest.fixture
def database_url(database: Database) -> str:
    return database.url.render_as_string(hide_password=False)


@pytest.fixture
def break_connections_off(postgres_server: str, postgres_url: str) -> Callable[[], None]:
    """Does to the connections of the store what a restart of the server does."""
    name = sa.make_url(postgres_url).database

    def terminate() -> None:
        engine = sa.create_engine(postgres_server)
        with engine.connect() as connection:
            terminate_all = "SELECT pid, pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = :name"
            pids = [row.pid for row in connection.execute(sa.text(terminate_all), {"name": name})]
            while connection.execute(  # new ones may be there already
                sa.text("SELECT 1 FROM pg_stat_activity WHERE pid = ANY(:pids)"), {"pids": pids}
            ).all():
                time.sleep(0.01)
                connection.rollback()  # or it sees the activity of its own beginning for ever
        engine.dispose()

    return terminate


@pytest.fixture
def emptied(database: Database) -> Callable[[], None]:
    """Empties the store when called."""
    return lambda: empty(database)


@pytest.fixture
def opened(database: Database, clock: FakeClock) -> Callable[[Policy], Store]:
    """The store under a policy of the test's own."""
    return lambda policy: assemble(database, policy, clock)


@pytest.fixture
def store(opened: Callable[[Policy], Store]) -> Store:
    return opened(Policy())


@pytest.fixture
def submit(store: Store) -> Callable[..., str]:
    """Queues a job and gives its request id."""
    numbers = itertools.count()

    def make(**fields: object) -> str:
        payload = b'{"prompt": "job %d"}' % next(numbers)
        answer = store.jobs.enqueue(NewJob(**{"endpoint": "fal-ai/x", "owner": "anna", "payload": payload} | fields))
        assert isinstance(answer, Queued), answer
        return answer.request_id

    return make


@pytest.fixture
def claim(store: Store) -> Callable[..., Claim]:
    """Claims the next job, which must be there."""

    def take(worker: str = "w1", **fields: object) -> Claim:
        claimed = store.leases.claim(worker, **fields)
        assert claimed is not None
        return claimed

    return take
