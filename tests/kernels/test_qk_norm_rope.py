"""qk_norm_rope through its door on the CPU, against fp64, in poisoned memory, compiled; and what the door refuses."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from kontextd_kernels.op import Case, Op
from kontextd_kernels.qk_norm_rope import normed_rotated, pair_normed_rotated
from kontextd_kernels.qk_norm_rope.reference import turned
from kontextd_kernels.qk_norm_rope.rows import NORMED_ROTATED, PAIR_NORMED_ROTATED, alone, pair
from poison import poisoned, untouched
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

CPU = torch.device("cpu")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
BOTH = (NORMED_ROTATED, PAIR_NORMED_ROTATED)
CASES = [pytest.param(op, case, id=f"{op.name} {case.name}") for op in BOTH for case in (*op.awkward, *op.ours["cpu"])]
each_op = pytest.mark.parametrize("op", BOTH, ids=lambda op: op.name)


def made(op: Op, text_tokens: int, image_tokens: int, dtype: torch.dtype = BF16, width: int = 16) -> tuple[Tensor, ...]:
    return (pair if op is PAIR_NORMED_ROTATED else alone)((text_tokens, image_tokens, 3, width), (dtype, dtype), CPU)


@pytest.mark.parametrize(("op", "case"), CASES)
def test_the_result_is_that_in_fp64_within_half_a_unit_of_its_dtype(op: Op, case: Case) -> None:
    inputs = tuple(poisoned(tensor) for tensor in case.inputs(CPU))
    assert op.excess(inputs, op.launcher(*inputs)) <= 1
    assert all(untouched(tensor) for tensor in inputs)


@each_op
def test_two_units_too_much_or_a_nan_anywhere_are_more_than_is_allowed(op: Op) -> None:
    inputs = made(op, 5, 8)
    result = op.launcher(*inputs)
    at = 7, 2, int(result[7, 2].abs().argmax())
    result.view(torch.int16)[at] += 2
    assert op.excess(inputs, result) > 1
    result[at] = float("nan")
    assert not op.excess(inputs, result) <= 1


def test_it_is_torch_s_norm_and_a_product_with_a_complex_number_of_size_one() -> None:
    """Pairs are complex numbers, as the paper has them (arXiv:2104.09864, 3.2.1)."""
    heads, weight, cosine, sine = made(NORMED_ROTATED, 0, 40, FP32, width=128)
    pairs = torch.view_as_complex(functional.rms_norm(heads, (128,), weight, 1e-6).unflatten(-1, (-1, 2)))
    expected = torch.view_as_real(pairs * torch.complex(cosine, sine)[:, None, ::2]).flatten(-2)
    torch.testing.assert_close(normed_rotated(heads, weight, cosine, sine), expected, rtol=1e-5, atol=1e-5)
    loose = functional.rms_norm(heads, (128,), weight, 0.5)
    unturned = normed_rotated(heads, weight, torch.ones_like(cosine), torch.zeros_like(sine), eps=0.5)
    torch.testing.assert_close(unturned, loose, rtol=1e-5, atol=1e-5)


def halves_turned(heads: Tensor, weight: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    normed = turned(heads, weight, torch.ones_like(cosine), torch.zeros_like(sine))
    low, high = normed.chunk(2, dim=-1)
    return normed * cosine[:, None] + torch.cat([-high, low], dim=-1) * sine[:, None]


Formula = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
WRONG: dict[str, Formula] = {
    "masked lanes counted": lambda x, w, c, s: turned(functional.pad(x, (0, 2)), *(_wider(t) for t in (w, c, s)))[
        ..., :-2
    ],
    "larger eps": lambda x, w, c, s: turned(x, w, c, s, 1e-5),
    "mean of all heads": lambda x, w, c, s: turned(x.flatten(1)[:, None], w.repeat(3), _thrice(c), _thrice(s)).view_as(
        x
    ),
    "angle of a neighbour": lambda x, w, c, s: turned(x, w, c.roll(1, 0), s.roll(1, 0)),
    "weight of a neighbour": lambda x, w, c, s: turned(x, w.roll(1), c, s),
    "head of a neighbour": lambda x, w, c, s: turned(x.roll(1, 1), w, c, s),
    "turned the other way": lambda x, w, c, s: turned(x, w, c, -s),
    "halves instead of pairs": halves_turned,
    "turned before it is weighted": lambda x, w, c, s: turned(x, torch.ones_like(w), c, s) * w,
}


def _wider(tensor: Tensor) -> Tensor:
    return functional.pad(tensor, (0, 2))


def _thrice(angles: Tensor) -> Tensor:
    return angles.repeat(1, 3)


@pytest.mark.parametrize("wrong", WRONG)
def test_another_formula_is_more_than_is_allowed_even_in_bf16(wrong: str) -> None:
    heads, weight, cosine, sine = made(NORMED_ROTATED, 0, 60)
    spoilt = WRONG[wrong](heads.float(), weight.float(), cosine, sine).bfloat16()
    assert NORMED_ROTATED.excess((heads, weight, cosine, sine), spoilt) > 1


def test_the_text_s_weight_for_the_image_or_the_image_first_are_more_than_is_allowed() -> None:
    inputs = made(PAIR_NORMED_ROTATED, 6, 6)
    text, image, of_text, of_image, *angles = inputs
    for spoilt in ((text, image, of_image, of_text), (text, image, of_text, of_text), (image, text, of_image, of_text)):
        assert PAIR_NORMED_ROTATED.excess(inputs, pair_normed_rotated(*spoilt, *angles)) > 1


@each_op
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_the_error_is_that_of_rounding_once_and_no_more(op: Op, dtype: torch.dtype) -> None:
    inputs = made(op, 50, 80, dtype, width=128)
    exact = op.exact(*(tensor.double() for tensor in inputs))
    floor = (exact.to(dtype).double() - exact).norm()
    assert (op.launcher(*inputs).double() - exact).norm() <= 1.0001 * floor


@pytest.mark.parametrize(("text_tokens", "image_tokens"), [(5, 7), (0, 7), (5, 0), (0, 0)])
def test_a_pair_is_its_parts_one_behind_the_other_of_which_either_may_be_empty(
    text_tokens: int, image_tokens: int
) -> None:
    text, image, of_text, of_image, cosine, sine = made(PAIR_NORMED_ROTATED, text_tokens, image_tokens)
    joined = pair_normed_rotated(text, image, of_text, of_image, cosine, sine)
    assert torch.equal(joined[:text_tokens], normed_rotated(text, of_text, cosine[:text_tokens], sine[:text_tokens]))
    assert torch.equal(joined[text_tokens:], normed_rotated(image, of_image, cosine[text_tokens:], sine[text_tokens:]))
    assert joined.shape == (text_tokens + image_tokens, 3, 16)


@each_op
def test_heads_may_be_a_slice_of_a_wider_projection_and_results_are_in_memory_of_their_own(op: Op) -> None:
    inputs = made(op, 4, 9)
    count = 2 if op is PAIR_NORMED_ROTATED else 1
    sliced = tuple(torch.cat([heads.flatten(1)] * 3, dim=1)[:, 48:96].unflatten(1, (3, 16)) for heads in inputs[:count])
    before = [heads.clone() for heads in sliced]
    result = op.launcher(*sliced, *inputs[count:])
    assert torch.equal(result, op.launcher(*inputs))
    assert result.is_contiguous()
    result.fill_(7)
    assert all(torch.equal(heads, kept) for heads, kept in zip(sliced, before, strict=True))


def test_a_head_of_zeros_stays_one() -> None:
    heads, weight, cosine, sine = made(NORMED_ROTATED, 0, 4)
    heads[2, 1] = 0
    result = normed_rotated(heads, weight, cosine, sine)
    assert result[2, 1].count_nonzero() == 0
    assert result[2, 0].count_nonzero() == 16


@each_op
def test_it_is_an_op_that_torch_s_own_checks_pass(op: Op) -> None:
    for dtype in (BF16, FP32):
        inputs = (*(poisoned(tensor) for tensor in made(op, 3, 5, dtype)), 1e-6)
        torch.library.opcheck(getattr(torch.ops.kontextd, op.name).default, inputs)


@each_op
def test_a_compiler_does_not_look_inside_and_one_graph_does_for_any_number_of_tokens(op: Op) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(op.launcher, backend=counter, fullgraph=True)
    for text_tokens, image_tokens in ((4, 9), (7, 30)):
        inputs = made(op, text_tokens, image_tokens)
        for tensor in inputs:
            if tensor.dim() > 1:
                torch._dynamo.mark_dynamic(tensor, 0)
        assert torch.equal(compiled(*inputs), op.launcher(*inputs))
    assert counter.frame_count == 1
    called = [str(node.target) for node in counter.graphs[0].graph.nodes if node.op.startswith("call")]
    assert [name for name in called if "built-in" not in name] == [f"kontextd.{op.name}"]  # the rest compares sizes


def test_tensors_on_cuda_without_memory_come_out_in_their_shape() -> None:
    with FakeTensorMode():
        heads = torch.empty(8704, 24, 128, dtype=BF16, device="cuda")
        weight, angles = torch.empty(128, dtype=BF16, device="cuda"), torch.empty(8704, 128, device="cuda")
        result = normed_rotated(heads, weight, angles, angles)
    assert (result.shape, result.dtype, result.device.type) == ((8704, 24, 128), BF16, "cuda")
    assert result.is_contiguous()


def test_what_does_not_fit_is_refused_with_its_value_and_a_remedy() -> None:
    text, image, of_text, of_image, cosine, sine = made(PAIR_NORMED_ROTATED, 4, 6, FP32)
    refused = [
        (dict(image=image.double()), r"image is \[6, 3, 16\] in torch.float64 .*must be \[T, H, W\] in bf16"),
        (dict(image=image[None]), r"image is \[1, 6, 3, 16\]"),
        (dict(image=image[..., :15]), r"image is \[6, 3, 15\] .* W even"),
        (dict(image=image[:, :0]), r"image is \[6, 0, 3*"),
        (
            dict(text=text.transpose(0, 1).contiguous().transpose(0, 1)),
            r"strides \[16, 64, 1\]; .*contiguous\(\) first",
        ),
        (dict(text=text.transpose(1, 2)), r"text is \[4, 16, 3\] .*W even"),
        (dict(text=text[:, :2].contiguous()), r"text is \[4, 2, 16\] .* and image \[6, 3, 16\]"),
        (dict(text=text.bfloat16()), r"text is \[4, 3, 16\] in torch.bfloat16 .* and image .* in torch.float32"),
        (dict(text_weight=of_text[:8]), r"weight of text is \[8\] .* must be \[16\]"),
        (dict(text_weight=of_text.bfloat16()), r"text_weight is torch.bfloat16 and image_weight torch.float32"),
        (dict(image_weight=torch.ones(32)[::2]), r"weight of image is \[16\] .* strides \[2\]"),
        (dict(image_weight=of_image.to("meta")), r"weight of image is .* on meta .* on cpu"),
        (dict(cosine=cosine[:9]), r"cosine is \[9, 16\] .*must be \[10, 16\] in fp32"),
        (dict(sine=sine.double()), r"sine is \[10, 16\] in torch.float64"),
        (dict(sine=sine.T.contiguous().T), r"sine is .* strides \[1, 10\]"),
    ]
    given = dict(text=text, image=image, text_weight=of_text, image_weight=of_image, cosine=cosine, sine=sine)
    for wrong, message in refused:
        with pytest.raises(ValueError, match=message):
            pair_normed_rotated(**given | wrong)
    with pytest.raises(ValueError, match=r"heads is \[6, 48\]"):
        normed_rotated(image.flatten(1), of_image, cosine[:6], sine[:6])
    with pytest.raises(ValueError, match=r"cosine is \[10, 16\] .*must be \[6, 16\]"):
        normed_rotated(image, of_image, cosine, sine)
