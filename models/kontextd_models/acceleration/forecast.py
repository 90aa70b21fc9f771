"""A forecast of the velocity where the transformer does not run. Knows tensors and noise levels; knows no model."""

from __future__ import annotations

from torch import Tensor


class Forecast:
    """The Taylor expansion about the last velocity that was computed, in σ, of order 0 or 1.

    Order 1: v(σ) ≈ v₁ + (v₁ − v₀) · (σ − σ₁) / (σ₁ − σ₀), the idea of TaylorSeer (Liu et al. 2025, arXiv 2503.06923)
    with the difference between two computed steps for the derivative. With one velocity known it is of order 0.
    """

    def __init__(self, order: int) -> None:
        self._order = order
        self._last: tuple[float, Tensor] | None = None
        self._slope: Tensor | None = None  # of velocity over σ

    @property
    def is_ready(self) -> bool:
        """True once enough velocities are known for the order that was asked for."""
        return self._last is not None if self._order == 0 else self._slope is not None

    def learn(self, sigma: float, velocity: Tensor) -> None:
        """A velocity [1, N, C] that was computed at `sigma`."""
        if self._order and self._last is not None and self._last[0] != sigma:
            self._slope = (velocity - self._last[1]) / (sigma - self._last[0])
        self._last = (sigma, velocity)

    def at(self, sigma: float) -> Tensor:
        """The velocity [1, N, C] to be expected at `sigma`. Raises `RuntimeError` before anything was learned."""
        if self._last is None:
            raise RuntimeError("there is no velocity to forecast from yet; compute the first step.")
        known, velocity = self._last
        return velocity if self._slope is None else velocity + self._slope * (sigma - known)
