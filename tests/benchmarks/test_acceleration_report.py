"""What counts as a miss in `benchmarks/presets.py`, on figures made up here."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("acceleration.report")


@pytest.fixture
def row(report: ModuleType) -> Any:  # a report.Row
    return report.Row("high", "red circle", "local", 25, 44.7, 33.1, 0.997, 24.4, -0.08, 0.16, 0.49)


def test_a_row_within_its_gates_misses_nothing(row: Any) -> None:
    assert row.misses() == []


@pytest.mark.parametrize(
    ("figures", "said"),
    [
        ({"to_none": 29.9}, "high, red circle: 29.9 dB to none, below 30"),
        ({"exact_loss": 1.01}, "high, red circle: loses 1.01 dB against the exact edit, more than 1"),
        (
            {"worst_untouched_loss": 0.51},
            "high, red circle: loses 0.51 dB in the untouched region of a photo, more than 0.5",
        ),
        (
            {"worst_untouched_loss": float("nan")},
            "high, red circle: loses nan dB in the untouched region of a photo, more than 0.5",
        ),
    ],
)
def test_each_gate_is_told_with_the_figure(row: Any, figures: dict[str, float], said: str) -> None:
    assert replace(row, **figures).misses() == [said]


def test_the_untouched_region_is_held_to_its_gate_on_every_photo_and_not_in_the_mean(row: Any) -> None:
    assert replace(row, untouched_loss=-0.1, worst_untouched_loss=0.6).misses() != []
    assert replace(row, untouched_loss=None, worst_untouched_loss=None).misses() == []


def test_regular_has_gates_of_its_own(row: Any) -> None:
    assert replace(row, preset="regular", to_none=34.9, exact_loss=0.51).misses() == [
        "regular, red circle: 34.9 dB to none, below 35",
        "regular, red circle: loses 0.51 dB against the exact edit, more than 0.5",
    ]


def test_speed_is_held_to_the_stock_pipeline_and_to_none(report: ModuleType) -> None:
    figures = {"none": {"stock_ratio": 1.03}, "regular": {"ratio": 1.8}, "high": {"ratio": 3.0}}
    assert report.speed_misses(figures) == []
    slower = {"none": {"stock_ratio": 1.029}, "regular": {"ratio": 1.79}, "high": {"ratio": 2.9}}
    assert report.speed_misses(slower) == [
        "none: stock_ratio 1.029, below 1.03",
        "regular: ratio 1.790, below 1.8",
        "high: ratio 2.900, below 3",
    ]
