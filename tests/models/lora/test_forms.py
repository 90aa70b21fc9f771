"""ΔW of every form against peft's in float64, and against the formula."""

from __future__ import annotations

import pytest
import torch
from hand_made import KINDS, Factors, exact_delta
from kontextd_models.lora.adapter import Delta, Full, LoHa, LoKr, LowRank
from kontextd_models.lora.forms import delta
from torch import Tensor

# Of float32: a product of r terms rounds each, and a sum of squares over a row or a column as well.
TOLERANCE = 1e-6
SHAPES = [(96, 64), (37, 32), (64, 7), (1, 24), (24, 1)]


def base_of(out: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(out, columns, generator=torch.Generator().manual_seed(seed)).mul_(0.05).bfloat16()


def apart(found: Tensor, exact: Tensor) -> float:
    assert found.shape == exact.shape
    return float((found.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_delta_is_what_peft_makes_of_it_in_float64(kind: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    base = base_of(*shape)
    one = Factors(3, dtype).delta(kind, base, rank=min(4, *shape))
    found = delta(one, base)
    assert found.dtype is torch.float32
    exact = exact_delta(one, base)
    # DoRA's delta is the small difference of two weights: its error is one of those.
    assert apart(base + found, base.double() + exact) < TOLERANCE
    if one.magnitude is None:
        assert apart(found, exact) < TOLERANCE


def test_peft_s_products_are_those_of_the_papers() -> None:
    """Independent of peft: it is both what we call and what we are measured by."""
    factors, base = Factors(5), base_of(96, 64)
    kron, hada = factors.form("LoKr", 96, 64, 4), factors.form("LoHa", 96, 64, 4)
    products = factors.form("LoKr of products", 96, 64, 4)
    assert isinstance(kron, LoKr)
    assert isinstance(products, LoKr)
    assert isinstance(hada, LoHa)
    exact = kron.factor * torch.kron(kron.w1.double(), kron.w2.double())
    assert apart(delta(Delta(kron, 0, 96), base), exact) < TOLERANCE
    w1, w2 = ((a.double() @ b.double()) for a, b in (products.w1, products.w2))
    assert apart(delta(Delta(products, 0, 96), base), products.factor * torch.kron(w1, w2)) < TOLERANCE
    w1, w2 = ((a.double() @ b.double()) for a, b in (hada.w1, hada.w2))
    assert apart(delta(Delta(hada, 0, 96), base), hada.factor * w1 * w2) < TOLERANCE


@pytest.mark.parametrize("kind", ["LoKr", "LoHa"])
def test_parts_of_a_matrix_are_its_rows(kind: str) -> None:
    """As of a file that has q, k and v in one matrix."""
    whole, base = Factors(3).form(kind, 96, 64, 4), base_of(96, 64)
    rows = [delta(Delta(whole, start, start + 32), base[start : start + 32]) for start in (0, 32, 64)]
    assert torch.equal(torch.cat(rows), delta(Delta(whole, 0, 96), base))


def test_a_difference_of_a_bias_is_itself() -> None:
    diff = torch.randn(5).half()
    assert torch.equal(delta(Delta(Full(diff), 0, 5), torch.zeros(5)), diff.float())


def test_magnitudes_of_columns_are_normed_over_columns() -> None:
    base, factors = base_of(48, 32), Factors(4)
    magnitude = base.float().norm(dim=0, keepdim=True) * 1.1  # [1, in]
    one = Delta(factors.form("low-rank", 48, 32, 4), 0, 48, magnitude=magnitude)
    merged = base.float() + delta(one, base)
    assert apart(merged.norm(dim=0, keepdim=True), magnitude.double()) < TOLERANCE
    assert apart(merged, base.double() + exact_delta(one, base)) < TOLERANCE
    of_rows = Delta(one.form, 0, 48, magnitude=base.float().norm(dim=1, keepdim=True))
    assert apart(base.float() + delta(of_rows, base), base.double() + exact_delta(one, base)) > 0.01


def test_a_row_of_zeros_stays_one_and_is_no_nan() -> None:
    base = base_of(8, 4)
    base[2] = 0
    form = LowRank(torch.zeros(8, 1), torch.ones(1, 4), 1.0)
    found = delta(Delta(form, 0, 8, magnitude=torch.ones(8, 1)), base)
    assert torch.equal(found[2], torch.zeros(4))
    assert found.isfinite().all()


def test_a_delta_draws_no_random_numbers_and_leaves_its_factors_alone() -> None:
    base = base_of(96, 64)
    for kind in KINDS:
        one, same = (Factors(3).delta(kind, base) for _ in range(2))
        before = torch.random.get_rng_state()
        assert torch.equal(delta(one, base), delta(one, base))
        assert torch.equal(torch.random.get_rng_state(), before)
        assert torch.equal(delta(one, base), delta(same, base))
