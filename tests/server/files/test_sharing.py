"""Several processes at one folder, and locks that outlive nobody."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from kontextd_server.files import FolderLimits, FolderStore, Label
from kontextd_server.files.ledger import Ledger, Snapshot
from kontextd_server.files.locks import LockTimeout, exclusive, exclusive_and_gone

WRITER = """
import sys
from pathlib import Path
from kontextd_server.files import FolderLimits, FolderStore, Label
from kontextd_server.files.errors import QuotaExceeded
store = FolderStore(Path(sys.argv[1]), FolderLimits(quota_bytes=int(sys.argv[3])))
for number in range(20):
    try:
        own = store.put([sys.argv[2].encode() * 100, b"%d" % number], Label())
        same = store.put([b"same in all processes"], Label())
    except QuotaExceeded:
        print("full")
        continue
    with store.open(same.key) as file:
        assert b"".join(file.chunks()) == b"same in all processes"
    store.delete(same.key)
    if number % 2:
        store.delete(own.key)
    if number % 5 == 0:
        store.sweep()
"""


def write(folder: Path, quota_bytes: int) -> list[str]:
    started = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(folder), name, str(quota_bytes)], stdout=subprocess.PIPE, text=True
        )
        for name in "abc"
    ]
    printed = [process.communicate(timeout=60)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0, 0]
    return printed


def test_processes_that_write_delete_and_sweep_at_once_lose_nothing(tmp_path: Path) -> None:
    assert write(tmp_path, 10**9) == ["", "", ""]
    store = FolderStore(tmp_path)
    kept = list(store.records.all())
    assert len(kept) == 3 * 10
    for file in kept:
        with store.open(file.key) as opened:
            assert b"".join(opened.chunks())[:100] in {name * 100 for name in (b"a", b"b", b"c")}
    store.sweep()
    assert store.usage().used_bytes == sum(file.size_bytes for file in kept)


def test_processes_share_one_quota(tmp_path: Path) -> None:
    printed = write(tmp_path, 1500)
    assert "full" in "".join(printed)
    assert FolderStore(tmp_path, FolderLimits(quota_bytes=1500)).usage().used_bytes <= 1500


def test_a_count_is_never_lost(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "usage")

    def count(size_bytes: int) -> None:
        with ledger.held() as held:
            held.total_bytes += size_bytes

    threads = [threading.Thread(target=lambda: [count(3) for _ in range(50)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ledger.snapshot() == Snapshot(600, 200)
    count(-601)
    assert ledger.snapshot() == Snapshot(0, 201)


def test_a_count_is_corrected_only_where_nobody_counted_meanwhile(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "usage")
    before = ledger.snapshot()

    def fail() -> None:
        with ledger.held() as held:
            held.total_bytes += 5
            raise KeyError

    with pytest.raises(KeyError):
        fail()  # it may have left something, so it counts as a change
    assert not ledger.correct(before, 7)
    assert ledger.correct(ledger.snapshot(), 7)
    assert ledger.snapshot() == Snapshot(7, 2)


def test_a_lock_keeps_out_threads_and_other_processes(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    code = f"""
from pathlib import Path
from kontextd_server.files.locks import LockTimeout, exclusive
try:
    with exclusive(Path({str(path)!r}), 0.1):
        print("taken")
except LockTimeout:
    print("held")
"""
    with exclusive(path, 1):
        ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True)
        assert ran.stdout == "held\n"
        with pytest.raises(LockTimeout, match="another process"), exclusive(path, 0.05):
            pass
    with exclusive(path, 0):
        pass


def test_the_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    code = f"""
import time
from pathlib import Path
from kontextd_server.files.locks import exclusive
with exclusive(Path({str(path)!r}), 1):
    print("held", flush=True)
    time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait(10)
        with exclusive(path, 5):
            pass


def test_waiting_for_a_lock_can_be_given_up(tmp_path: Path) -> None:
    def give_up() -> None:
        raise InterruptedError("the job was cancelled")

    with exclusive(tmp_path / "lock", 1), pytest.raises(InterruptedError), exclusive(tmp_path / "lock", 60, give_up):
        pass


def test_a_lock_that_goes_is_held_by_one_at_a_time_all_the_same(tmp_path: Path) -> None:
    path, inside, most = tmp_path / "lock", 0, 0

    def enter() -> None:
        nonlocal inside, most
        with exclusive_and_gone(path, 20):
            inside += 1
            most = max(most, inside)
            time.sleep(0.005)
            inside -= 1

    threads = [threading.Thread(target=enter) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    assert not path.exists()


def test_what_one_store_writes_another_reads(tmp_path: Path) -> None:
    one, other = FolderStore(tmp_path), FolderStore(tmp_path)
    key = one.put([b"x"], Label()).key
    with other.open(key) as file:
        assert b"".join(file.chunks()) == b"x"
    assert other.delete(key)
    assert not one.delete(key)
