"""Seconds of the presets side by side in one run, beside the stock pipeline. Knows clocks; knows no fidelity."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial

from acceleration.cases import STEPS
from acceleration.ways import done_with
from kontextd_models import Acceleration, EditRequest
from kontextd_models.acceleration.preset import SHORTCUTS, Preset
from kontextd_models.engine import Engine
from kontextd_models.fingerprint import photo_at
from kontextd_models.stock import StockEdit, stock_picture

PROMPT = "make it black and white"
STOCK, NONE, NONE_WITH_SHORTCUTS = "stock pipeline", "none", "none with shortcuts"
Seconds = tuple[float, float]  # of the denoise stage, of the whole edit
Round = Mapping[str, Seconds]


def measure(engine: Engine, side: int, repeats: int) -> dict[str, dict[str, float]]:
    """At `side` × `side`, prompt and reference cached: medians of seconds, and of the ratios within each round.

    A round goes through all of them, each time beginning with another: other work on the machine slows all alike.
    `ratio` is that of the denoise stages of `none` and a preset, `stock_ratio` that of whole runs of the stock pipeline
    and a preset.
    """
    own_rows = engine.model.presets.rows
    rows = {NONE: own_rows[Acceleration.NONE], NONE_WITH_SHORTCUTS: SHORTCUTS}
    rows |= {name.value: own_rows[name] for name in (Acceleration.REGULAR, Acceleration.HIGH)}
    ways: dict[str, Callable[[], Seconds]] = {STOCK: partial(stock, engine, side)}
    ways |= {name: partial(own, engine, side, row) for name, row in rows.items()}
    for way in ways.values():
        way()
    rounds = [_round(ways, turn) for turn in range(repeats)]
    return {name: _figures(name, rounds) for name in ways}


def own(engine: Engine, side: int, row: Preset) -> Seconds:
    asked = EditRequest(photo_at((side, side)), PROMPT, STEPS, seed=1, enable_safety_checker=False)
    done = done_with(engine, asked, row)
    return done.timings["denoise"], done.timings["total"]


def stock(engine: Engine, side: int) -> Seconds:
    asked = StockEdit(photo_at((side, side)), PROMPT, side, side, STEPS, EditRequest.guidance_scale, seed=1)
    began = time.perf_counter()
    stock_picture(engine.model, asked)
    taken = time.perf_counter() - began
    return taken, taken


def _round(ways: Mapping[str, Callable[[], Seconds]], turn: int) -> Round:
    names = list(ways)
    first = turn % len(names)
    return {name: ways[name]() for name in names[first:] + names[:first]}


def _figures(name: str, rounds: list[Round]) -> dict[str, float]:
    seconds = {"whole_s": statistics.median(each[name][1] for each in rounds)}
    if name == STOCK:
        return seconds
    seconds["denoise_s"] = statistics.median(each[name][0] for each in rounds)
    return {
        **_spread("ratio", [each[NONE][0] / each[name][0] for each in rounds]),
        **_spread("whole_run_ratio", [each[NONE][1] / each[name][1] for each in rounds]),
        **_spread("stock_ratio", [each[STOCK][1] / each[name][1] for each in rounds]),
        **seconds,
    }


def _spread(name: str, ratios: list[float]) -> dict[str, float]:
    return {name: statistics.median(ratios), f"least_{name}": min(ratios), f"greatest_{name}": max(ratios)}
