"""Runs parts in processes of their own, each within its time. Knows processes and clocks; knows no torch.

A process that hangs or dies takes one part with it: it is killed, and a new one goes on with the next part. Whatever
happens, every part has a result, measured or with what kept it from being measured, and the deadline is kept.
"""

from __future__ import annotations

import importlib
import multiprocessing
import time
from collections.abc import Iterator, Sequence
from itertools import groupby
from multiprocessing.connection import Connection
from typing import Any, TypeAlias

from gpu_parts.parts import DEADLINE_S, START_BUDGET_S, Options, Part

Result: TypeAlias = dict[str, Any]  # JSON. Any: each kind of part has figures of its own
_LEAST_S = 5.0  # with less than this left, nothing more is begun
_SLOWER_ON_A_CPU = 4.0


def measure(
    parts: Sequence[Part], options: Options, worker: str = "gpu_parts.worker", deadline_s: float = DEADLINE_S
) -> Iterator[tuple[str, Result]]:
    """Name and result of each part as it comes, and of each start of a process.

    `worker`: a module whose `work` sends a result for its start and then one for each part; imported in new processes.
    """
    until = time.monotonic() + deadline_s
    for group, members in groupby(parts, key=lambda part: part.group):
        waiting, starts = list(members), 0
        while waiting:
            if until - time.monotonic() < _LEAST_S:
                yield from ((part.name, _not_run("the deadline had come")) for part in waiting)
                break
            starts += 1
            start = f"start of the process: {group}" + (f", again ({starts})" if starts > 1 else "")
            for name, result, done in _one_process(start, waiting, options, worker, until):
                yield name, result
                waiting = waiting[done:]


def _one_process(
    start: str, waiting: Sequence[Part], options: Options, worker: str, until: float
) -> Iterator[tuple[str, Result, int]]:
    """Name, result, and how many parts are done with it. Ends after the last part, or with the first that breaks it."""
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(worker, theirs, options, tuple(waiting)))
    process.start()
    theirs.close()
    try:
        found = _next(ours, _limit(START_BUDGET_S, options, until))
        yield start, found, 0
        if "error" in found:
            yield from ((part.name, _not_run("its process did not start"), 1) for part in waiting)
            return
        for part in waiting:
            found = _next(ours, _limit(part.budget_s, options, until))
            yield part.name, found, 1
            if found.get("ends_process"):
                return
    finally:
        process.kill()
        process.join()
        ours.close()


def _work(worker: str, results: Connection, options: Options, parts: Sequence[Part]) -> None:
    importlib.import_module(worker).work(results, options, parts)


def _limit(budget_s: float, options: Options, until: float) -> float:
    budget_s *= _SLOWER_ON_A_CPU if options.device == "cpu" else 1.0
    return max(0.0, min(budget_s, until - time.monotonic()))


def _next(ours: Connection, limit_s: float) -> Result:
    began = time.monotonic()
    if not ours.poll(limit_s):
        return _broken(f"stopped after {time.monotonic() - began:.0f} s: its time was over")
    try:
        found: Result = ours.recv()
    except EOFError:
        return _broken("its process died; what it said is above, on stderr")
    return {"part_s": time.monotonic() - began, **found}


def _broken(error: str) -> Result:
    return {"error": error, "ends_process": True}


def _not_run(why: str) -> Result:
    return {"error": f"not run: {why}"}
