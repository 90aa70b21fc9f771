"""A throwaway PostgreSQL cluster that may be restarted the hard way. Knows initdb and pg_ctl."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fal_clients import absent

from .processes import free_port

# What a restart of the server must not lose, a crash of the whole machine may: here only the first is drilled.
_QUICK = {"fsync": "off", "full_page_writes": "off", "shared_buffers": "'16MB'", "max_connections": "60"}
_INIT = ("-U", "drill", "--auth=trust", "--no-sync", "--encoding=UTF8", "--locale=C")
_LOCAL = {"listen_addresses": "'127.0.0.1'", "unix_socket_directories": "''"}


@dataclass(frozen=True)
class Cluster:
    """One that runs."""

    folder: Path
    binaries: Path
    port: int
    user: str | None  # the server refuses to run as root

    @property
    def url(self) -> str:
        return f"postgresql+psycopg://drill@127.0.0.1:{self.port}/postgres"

    def control(self, *command: str) -> None:
        self.run("pg_ctl", "-D", str(self.folder / "data"), "-w", "-t", "120", "-l", str(self.folder / "log"), *command)

    def run(self, program: str, *arguments: str) -> None:
        ran = subprocess.run(
            [str(self.binaries / program), *arguments],
            user=self.user,
            cwd=self.folder,
            stdout=subprocess.DEVNULL,  # a pipe would be kept open by the server
            stderr=subprocess.DEVNULL,
        )
        assert ran.returncode == 0, f"{program} {arguments}: {(self.folder / 'log').read_text()[-2000:]}"


@contextmanager
def cluster() -> Iterator[Cluster]:
    """Skips where PostgreSQL is not installed."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/pg_ctl"), key=lambda path: int(path.parts[-3]))
    binaries = found[-1].parent if found else Path(shutil.which("pg_ctl") or "/absent/pg_ctl").parent
    if not (binaries / "initdb").exists():
        absent("no initdb and pg_ctl below /usr/lib/postgresql; install PostgreSQL for this drill")
    folder = Path(tempfile.mkdtemp(prefix="kontextd-drill-"))  # pytest's own folders are closed to other users
    made = Cluster(folder, binaries, free_port(), _plain_user(folder))
    try:
        (folder / "log").touch()
        if made.user:
            shutil.chown(folder / "log", made.user)
        made.run("initdb", "-D", str(folder / "data"), *_INIT)
        lines = {**_QUICK, **_LOCAL, "port": str(made.port)}
        with (folder / "data" / "postgresql.conf").open("a") as file:
            file.writelines(f"{name} = {value}\n" for name, value in lines.items())
        made.control("start")
        yield made
        made.control("stop", "-m", "immediate")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _plain_user(folder: Path) -> str | None:
    """Whom the cluster belongs to, where we are root."""
    if os.geteuid() != 0:
        return None
    known = {entry.pw_name for entry in pwd.getpwall()}
    user = next(name for name in ("postgres", "nobody") if name in known)
    shutil.chown(folder, user)
    return user
