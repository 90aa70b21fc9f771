"""How attention is chosen: by trying, with what is wrong or absent left out. On the CPU, with backends made for it."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType

import pytest
import torch
from kontextd_models.execution import attention_backends as backends
from kontextd_models.execution.attention_backends import Shape, choose, error_of, fa3, seconds_of
from kontextd_models.transformer.attention import DotProduct, native
from torch import Tensor

CPU = torch.device("cpu")
SHAPE = Shape(heads=2, width=16, queries=24, keys=40)


def exact(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    return scores.softmax(dim=-1) @ value


def slowly(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return exact(query, key, value)


def without_scale(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return (query @ key.transpose(-1, -2)).softmax(dim=-1) @ value


def nowhere(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return torch.full_like(query, float("nan"))


def failing(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    raise RuntimeError("no kernel image is available\nfor this device")


def exhausting(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    raise torch.OutOfMemoryError("full")


def absent() -> DotProduct:
    raise ImportError("no module named fa3")


@pytest.fixture
def offered(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def offer(**candidates: Callable[[], DotProduct]) -> None:
        monkeypatch.setattr(backends, "CANDIDATES", candidates)

    return offer


def giving(dot_product: DotProduct) -> Callable[[], DotProduct]:
    return lambda: dot_product


def test_the_fastest_of_those_that_are_right_is_taken_and_logged(
    offered: Callable[..., None], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "seconds_of", lambda dot_product, *_: {exact: 0.001, slowly: 0.0125}[dot_product])
    offered(
        native=giving(slowly), wrong=giving(without_scale), nan=giving(nowhere), broken=giving(failing), gone=absent,
        good=giving(exact),
    )  # fmt: skip
    with caplog.at_level(logging.INFO):
        found = choose("auto", SHAPE, CPU, torch.float32)
    assert (found.name, found.dot_product, found.notes) == ("good", exact, ())
    lines = [record.getMessage() for record in caplog.records]
    assert [line.partition(":")[0] for line in lines[:4]] == [
        f"attention {name} cannot be used here" for name in ("wrong", "nan", "broken", "gone")
    ]
    assert "off by" in lines[0]
    assert lines[2].endswith("RuntimeError: no kernel image is available")
    assert lines[4] == "attention good of good 1.00 ms, native 12.50 ms"


def test_times_are_medians_of_real_runs_on_the_model_s_shape() -> None:
    seen = []

    def looking(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        seen.append((tuple(query.shape), tuple(key.shape), tuple(value.shape)))
        return native(query, key, value)

    assert seconds_of(looking, SHAPE, CPU, torch.float32) > 0
    assert set(seen) == {((1, 2, 24, 16), (1, 2, 40, 16), (1, 2, 40, 16))}
    assert len(seen) > 3


@pytest.mark.parametrize("make", [giving(without_scale), giving(failing), absent])
def test_one_that_is_asked_for_and_cannot_be_had_is_native_with_a_note(
    offered: Callable[..., None], caplog: pytest.LogCaptureFixture, make: Callable[[], DotProduct]
) -> None:
    offered(native=giving(slowly), fa3=make)
    with caplog.at_level(logging.WARNING):
        found = choose("fa3", SHAPE, CPU, torch.float32)
    assert (found.name, found.dot_product) == ("native", native)
    assert found.notes[0].startswith("attention fa3 was asked for, and ")
    assert found.notes[0].endswith("; native runs instead.")
    assert found.notes[0] in caplog.text


def test_only_the_one_that_is_asked_for_is_tried(offered: Callable[..., None]) -> None:
    offered(native=giving(failing), other=giving(failing), flash=giving(exact))
    assert choose("flash", SHAPE, CPU, torch.float32).dot_product is exact
    assert choose("native", SHAPE, CPU, torch.float32).dot_product is native


def test_where_nothing_can_be_used_native_runs_with_a_note(offered: Callable[..., None]) -> None:
    offered(native=giving(failing))
    found = choose("auto", SHAPE, CPU, torch.float32)
    assert (found.name, len(found.notes)) == ("native", 1)


def test_running_out_of_memory_while_trying_is_no_fault_of_a_backend(offered: Callable[..., None]) -> None:
    offered(native=giving(exact), flash=giving(exhausting))
    with pytest.raises(torch.OutOfMemoryError):
        choose("auto", SHAPE, CPU, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [1, 3])
def test_what_is_right_is_within_the_tolerance_and_a_tenth_off_is_not(dtype: torch.dtype, heads: int) -> None:
    shape = Shape(heads, 48, 9, 9)
    off = error_of(native, shape, CPU, dtype)
    assert 0 < off < 0.6
    assert error_of(lambda query, key, value: native(query, key, value) * 1.1, shape, CPU, dtype) > 1
    assert error_of(without_scale, shape, CPU, dtype) > 1


@pytest.mark.parametrize("name", ["cudnn", "flash"])
def test_torch_s_own_backends_take_the_layout_of_the_blocks(name: str) -> None:
    """Without memory: torch checks what it is given as on a GPU, and computes nothing."""
    dot_product = backends.CANDIDATES[name]()
    heads = [torch.empty(1, tokens, 24, 128, device="meta", dtype=torch.bfloat16) for tokens in (4608, 8704, 8704)]
    found = dot_product(*(tensor.transpose(1, 2) for tensor in heads))
    assert (found.shape, found.dtype) == ((1, 24, 4608, 128), torch.bfloat16)


@pytest.fixture
def flash_attn_interface(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """A package of that name, which computes what the real one does, in its layout."""
    package = ModuleType("flash_attn_interface")

    def flash_attn_func(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return exact(*(tensor.transpose(1, 2) for tensor in (query, key, value))).transpose(1, 2).contiguous()

    package.flash_attn_func = flash_attn_func  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn_interface", package)
    fa3.cache_clear()
    yield package
    fa3.cache_clear()


def test_flash_attention_3_is_an_op_that_the_compiler_takes_whole(flash_attn_interface: ModuleType) -> None:
    dot_product = fa3()
    assert fa3() is dot_product
    assert error_of(dot_product, SHAPE, CPU, torch.float32) <= 1
    torch._dynamo.reset()
    compiled = torch.compile(lambda *given: dot_product(*given) * 2, fullgraph=True, backend="eager")
    given = backends._random(SHAPE, CPU, torch.float32)
    with torch.no_grad():
        assert torch.equal(compiled(*given), dot_product(*given) * 2)
    torch._dynamo.reset()


def test_without_its_package_flash_attention_3_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    fa3.cache_clear()
    monkeypatch.setitem(sys.modules, "flash_attn_interface", None)  # type: ignore[arg-type]  # stands for absence
    with pytest.raises(ImportError):
        fa3()
    found = choose("fa3", SHAPE, CPU, torch.float32)
    assert (found.name, len(found.notes)) == ("native", 1)


def test_choosing_leaves_no_switch_of_torch_changed(offered: Callable[..., None]) -> None:
    def switches() -> Mapping[str, bool]:
        cuda = torch.backends.cuda
        return {
            "flash": cuda.flash_sdp_enabled(),
            "efficient": cuda.mem_efficient_sdp_enabled(),
            "math": cuda.math_sdp_enabled(),
            "cudnn": cuda.cudnn_sdp_enabled(),
        }

    before = switches()
    choose("auto", SHAPE, CPU, torch.float32)
    assert switches() == before
