"""Seconds of the presets side by side in one run, beside the stock pipeline. Knows clocks; knows no fidelity."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial

from acceleration.cases import STEPS
from kontextd_models import Acceleration, Done, EditRequest
from kontextd_models.engine import Engine
from kontextd_models.fingerprint import photo_at
from kontextd_models.stock import StockEdit, stock_picture

PROMPT = "make it black and white"
STOCK, NONE = "stock pipeline", Acceleration.NONE.value
Seconds = tuple[float, float]  # of the denoise stage, of the whole edit
Round = Mapping[str, Seconds]


def measure(engine: Engine, side: int, repeats: int) -> dict[str, dict[str, float]]:
    """At `side` × `side`, prompt and reference cached: medians of seconds, and of the ratios within each round.

    A round goes through all of them, each time beginning with another: other work on the machine slows all alike.
    `ratio` is that of the denoise stages of `none` and a preset; of the whole runs of the stock pipeline and `none`.
    """
    ways: dict[str, Callable[[], Seconds]] = {STOCK: partial(stock, engine, side)}
    ways |= {name.value: partial(own, engine, side, name) for name in Acceleration}
    for way in ways.values():
        way()
    rounds = [_round(ways, turn) for turn in range(repeats)]
    return {STOCK: _stock_figures(rounds), **{name.value: _figures(name.value, rounds) for name in Acceleration}}


def own(engine: Engine, side: int, name: Acceleration) -> Seconds:
    asked = EditRequest(photo_at((side, side)), PROMPT, STEPS, seed=1, acceleration=name, enable_safety_checker=False)
    *_, done = engine.edit(asked)
    assert isinstance(done, Done)
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


def _stock_figures(rounds: list[Round]) -> dict[str, float]:
    ratios = [each[STOCK][1] / each[NONE][1] for each in rounds]
    return {**_ratio(ratios), "whole_s": statistics.median(each[STOCK][1] for each in rounds)}


def _figures(name: str, rounds: list[Round]) -> dict[str, float]:
    return {
        **_ratio([each[NONE][0] / each[name][0] for each in rounds]),
        "whole_run_ratio": statistics.median(each[NONE][1] / each[name][1] for each in rounds),
        "denoise_s": statistics.median(each[name][0] for each in rounds),
        "whole_s": statistics.median(each[name][1] for each in rounds),
    }


def _ratio(ratios: list[float]) -> dict[str, float]:
    return {"ratio": statistics.median(ratios), "least_ratio": min(ratios), "greatest_ratio": max(ratios)}
