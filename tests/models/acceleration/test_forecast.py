"""The forecast of a velocity."""

from __future__ import annotations

import pytest
import torch
from kontextd_models.acceleration.forecast import Forecast


def test_a_straight_line_is_forecast_to_rounding() -> None:
    start, slope = torch.randn(1, 6, 4, dtype=torch.float64), torch.randn(1, 6, 4, dtype=torch.float64)
    forecast = Forecast(1)
    forecast.learn(1.0, start + slope)
    forecast.learn(0.8, start + 0.8 * slope)
    torch.testing.assert_close(forecast.at(0.3), start + 0.3 * slope)


def test_it_is_about_the_last_two_velocities() -> None:
    forecast = Forecast(1)
    for sigma, value in ((1.0, 50.0), (0.9, 2.0), (0.7, 4.0)):
        forecast.learn(sigma, torch.full((1, 1, 1), value))
    assert forecast.at(0.5).item() == pytest.approx(6.0)


def test_with_one_velocity_or_of_order_0_it_is_the_last_one() -> None:
    first, second = torch.randn(1, 3, 2), torch.randn(1, 3, 2)
    line, constant = Forecast(1), Forecast(0)
    line.learn(1.0, first)
    assert torch.equal(line.at(0.5), first)
    assert not line.is_ready
    constant.learn(1.0, first)
    assert constant.is_ready
    constant.learn(0.8, second)
    assert torch.equal(constant.at(0.5), second)


def test_before_the_first_velocity_there_is_none() -> None:
    forecast = Forecast(1)
    assert not forecast.is_ready
    with pytest.raises(RuntimeError, match="first step"):
        forecast.at(0.5)
