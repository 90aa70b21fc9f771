"""Blocks by kernels, here by their references: near to formulas in every precision, and one graph whatever the size."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from kontextd_models import Done, EditRequest, EngineConfig, load_engine
from kontextd_models.embedded.evaluate import as_tensor, psnr
from kontextd_models.engine import Engine
from kontextd_models.execution import blocks as module
from kontextd_models.execution.blocks import Way
from kontextd_models.execution.compilation import compiled
from kontextd_models.execution.fp8 import Fp8Linear, Quantised
from kontextd_models.execution.fp8_ops import Fp8Ops
from kontextd_models.execution.kernel_ops import KernelOps
from kontextd_models.execution.trial import Trial
from kontextd_models.transformer.block_ops import BlockOps
from PIL import Image
from torch._dynamo.utils import counters

Photo = Callable[[int, int], Image.Image]


@pytest.fixture
def no_graphs_of_others() -> Iterator[None]:
    """The compiler keeps graphs by function, for the whole process."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def engine_of(folder: Path, **changes: str) -> Engine:
    return load_engine(EngineConfig(model=folder, device="cpu", **changes))


def picture(engine: Engine, image: Image.Image) -> torch.Tensor:
    request = EditRequest(image, "make it black and white", 6, 7, enable_safety_checker=False)
    *_, done = engine.edit(request)
    assert isinstance(done, Done)
    return as_tensor(done.images[0])


@pytest.mark.parametrize(
    ("dtype", "precision"), [("float32", "full"), ("bfloat16", "full"), ("float32", "fp8"), ("bfloat16", "fp8")]
)
def test_every_kind_of_block_is_near_to_its_formulas(embedded_folder: Path, dtype: str, precision: str) -> None:
    """Within what is allowed where kernels are tried; `test_trial.py` shows what is more than that."""
    model = engine_of(embedded_folder, dtype=dtype, precision=precision).model
    trial = Trial(model.pipeline.transformer, 24, 96, model.device, model.dtype, precision == "fp8")
    assert 0 < trial.error(Way.eager("kernels", KernelOps()), Way.eager("formulas", BlockOps())) <= 1


@pytest.mark.parametrize(("precision", "least_db"), [("full", 80), ("fp8", 50)])
def test_a_picture_by_kernels_is_that_by_formulas_but_for_rounding(
    embedded_folder: Path, photo: Photo, precision: str, least_db: float
) -> None:
    """80 dB are fifty of the 73,728 numbers, off by one of 255: how many differ by rounding is the CPU's affair."""
    by_kernels = engine_of(embedded_folder, precision=precision, kernels="on")
    assert by_kernels.model.blocks.way == "uncompiled with native attention and kernels"
    by_formulas = engine_of(embedded_folder, precision=precision)
    assert psnr(*(picture(engine, photo(192, 128)) for engine in (by_kernels, by_formulas))) > least_db
    assert by_kernels.model.blocks.notes == ()


@pytest.mark.usefixtures("no_graphs_of_others")
@pytest.mark.parametrize("precision", ["full", "fp8"])
def test_compiled_blocks_with_kernels_compile_no_more_after_loading(
    tiny_folder: Path, photo: Photo, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    monkeypatch.setattr(module, "compiled", partial(compiled, backend="aot_eager"))
    engine = engine_of(tiny_folder, precision=precision, compile="on", kernels="on")
    assert engine.model.blocks.way == "compiled with native attention and kernels"
    graphs = counters["stats"]["unique_graphs"]
    assert graphs == 6
    plain = engine_of(tiny_folder, precision=precision, kernels="on")
    for size in ((64, 64), (96, 64), (48, 112)):
        assert psnr(*(picture(one, photo(*size)) for one in (engine, plain))) > 45
    assert counters["stats"]["unique_graphs"] == graphs
    assert engine.model.blocks.notes == ()


def test_formulas_that_quantise_rows_once_are_to_the_bit_those_of_every_layer_by_itself(embedded_folder: Path) -> None:
    model = engine_of(embedded_folder, dtype="bfloat16", precision="fp8").model
    trial = Trial(model.pipeline.transformer, 24, 96, model.device, model.dtype, fp8=True)
    assert trial.error(Way.eager("once", Fp8Ops()), Way.eager("by each", BlockOps())) == 0


def test_a_float8_layer_takes_rows_that_are_quantised_already(embedded_folder: Path) -> None:
    model = engine_of(embedded_folder, precision="fp8").model
    layer = model.pipeline.transformer.transformer_blocks[0].attn.to_q
    assert isinstance(layer, Fp8Linear)
    tokens = torch.randn(1, 7, layer.in_features, generator=torch.Generator().manual_seed(0))
    scale = tokens[0].abs().amax(dim=1, keepdim=True) / 448
    codes = (tokens[0] / scale).to(torch.float8_e4m3fn)
    with torch.no_grad():
        assert torch.equal(layer(Quantised(codes, scale, torch.float32)), layer(tokens))
