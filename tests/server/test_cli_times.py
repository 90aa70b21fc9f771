"""Spans of time, as commands print them and as their options take them."""

from __future__ import annotations

import argparse

import pytest
from kontextd_server.cli_times import span, span_text


@pytest.mark.parametrize(
    ("seconds", "told"),
    [(-3, "0 s"), (59, "59 s"), (90, "1.5 min"), (3600, "1.0 h"), (86400 * 2.25, "2.2 d")],
)
def test_a_span_has_the_unit_that_fits(seconds: float, told: str) -> None:
    assert span_text(seconds) == told


@pytest.mark.parametrize(
    ("text", "seconds"), [("0s", 0), ("90 s", 90), ("1.5min", 90), ("12h", 43_200), ("30d", 2_592_000)]
)
def test_a_span_is_read_with_its_unit(text: str, seconds: float) -> None:
    assert span(text) == seconds


@pytest.mark.parametrize("text", ["", "30", "d", "-1d", "1w", "1e3d", "nan d", "1 d ", "9" * 10 + "d"])
def test_what_is_no_span_is_refused_with_the_remedy(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="use a number with s, min, h or d"):
        span(text)
