"""Float8 blocks, attention and compilation on a real CUDA device: what no CPU can show."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from kontextd_kernels.fp8_linear import launch
from kontextd_kernels.fp8_linear.rows import FP8_LINEAR
from kontextd_kernels.lora_merge import merged_fp8
from kontextd_kernels.op import Case
from kontextd_models import Acceleration, Done, EditRequest, EngineConfig, load_engine
from kontextd_models.acceleration.preset import SHORTCUTS
from kontextd_models.embedded.evaluate import as_tensor, psnr
from kontextd_models.engine import Engine
from kontextd_models.execution import fp8
from kontextd_models.execution.attention_backends import CANDIDATES, Shape, choose, error_of
from kontextd_models.execution.blocks import NATIVE_WAY, Way
from kontextd_models.execution.kernel_ops import KernelOps
from kontextd_models.execution.trial import Trial
from kontextd_models.lora.pristine import parameters_of
from PIL import Image
from torch._dynamo.utils import counters

Photo = Callable[[int, int], Image.Image]
CUDA = torch.device("cuda")
KONTEXT = Shape(heads=24, width=128, queries=4608, keys=8704)
OURS = [pytest.param(case, id=case.name) for case in FP8_LINEAR.ours["cuda"]]
REUSING = replace(SHORTCUTS, computed=0.6, prefix=1, reuse_reference=True)
LIKENESS_DB = 45.0  # of rounding in bfloat16 alone; another product or another weight is below 30

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")]


@pytest.fixture
def multiplies_fp8() -> None:
    skip_without_fp8()


def skip_without_fp8() -> None:
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this device has no tensor cores for fp8")


def engine_of(
    folder: Path, precision: str = "full", compile: str = "off", attention: str = "native", kernels: str = "off"
) -> Engine:
    config = EngineConfig(folder, "cuda", precision=precision, compile=compile, attention=attention, kernels=kernels)
    engine = load_engine(replace(config, prompt_cache_bytes=0, reference_cache_bytes=0))
    engine.presets = replace(engine.presets, rows={**engine.presets.rows, Acceleration.HIGH: REUSING})
    return engine


def picture(engine: Engine, image: Image.Image, acceleration: Acceleration = Acceleration.NONE) -> Image.Image:
    request = EditRequest(image, "make it brighter", 8, 5, acceleration=acceleration, enable_safety_checker=False)
    *_, done = engine.edit(request)
    assert isinstance(done, Done)
    return done.images[0]


# Float8.


@pytest.mark.usefixtures("multiplies_fp8")
@pytest.mark.parametrize("case", OURS)
def test_a_layer_of_the_model_gives_the_fp64_product_of_its_codes_within_the_tolerance(case: Case) -> None:
    given = case.inputs(CUDA)
    assert launch._goes_to_scaled_mm(given[1], given[0].dtype)
    assert FP8_LINEAR.excess(given, launch.fp8_linear(*given)) <= 1


@pytest.mark.usefixtures("multiplies_fp8")
@pytest.mark.parametrize("tokens", [1, 17, 4608])
def test_any_number_of_tokens_with_a_bias_gives_what_the_reference_gives(tokens: int) -> None:
    random = torch.Generator(CUDA).manual_seed(0)
    base = torch.randn(3072, 768, device=CUDA, generator=random).mul_(0.03).bfloat16()
    codes, scale = merged_fp8(base, base[:, :0], base[:0])
    x = torch.randn(tokens, 768, device=CUDA, generator=random).bfloat16()
    bias = torch.randn(3072, device=CUDA, generator=random).bfloat16()
    assert FP8_LINEAR.excess((x, codes, scale, bias), launch.fp8_linear(x, codes, scale, bias)) <= 1


@pytest.mark.usefixtures("multiplies_fp8")
def test_the_embedded_model_in_float8_is_near_to_full_precision_and_its_codes_are_those_of_the_cpu(
    embedded_folder: Path, photo: Photo
) -> None:
    full, lowered = engine_of(embedded_folder), engine_of(embedded_folder, precision="fp8")
    assert lowered.model.execution.fp8
    assert psnr(*(as_tensor(picture(engine, photo(256, 256))) for engine in (full, lowered))) > 35
    masters, live = parameters_of(full.model.pipeline), parameters_of(lowered.model.pipeline)
    scales = fp8.scales_of(lowered.model.pipeline)
    assert scales
    for at, scale in scales.items():
        master = masters[at].detach().cpu()
        codes, expected = merged_fp8(master, master[:, :0], master[:0])
        assert torch.equal(scale.cpu(), expected)
        assert (live[at].detach().cpu().float() == codes.float()).float().mean() > 0.999  # ties may fall either way


# Attention.


@pytest.mark.parametrize("name", ["native", "cudnn", "flash"])
def test_a_backend_of_torch_is_right_on_this_device(name: str) -> None:
    assert error_of(CANDIDATES[name](), KONTEXT, CUDA, torch.bfloat16) <= 1


def test_the_one_that_is_chosen_is_right() -> None:
    chosen = choose("auto", KONTEXT, CUDA, torch.bfloat16)
    assert chosen.notes == ()
    assert error_of(chosen.dot_product, KONTEXT, CUDA, torch.bfloat16) <= 1


def test_another_backend_gives_nearly_the_same_picture(embedded_folder: Path, photo: Photo) -> None:
    exact = as_tensor(picture(engine_of(embedded_folder), photo(256, 256)))
    for name in ("cudnn", "flash"):
        engine = engine_of(embedded_folder, attention=name)
        assert engine.model.blocks.way == f"uncompiled with {name} attention"
        assert psnr(as_tensor(picture(engine, photo(256, 256))), exact) > LIKENESS_DB


# Compilation.


@pytest.mark.parametrize("kernels", ["off", "on"])
@pytest.mark.parametrize("precision", ["full", "fp8"])
def test_compiled_blocks_compile_no_more_after_loading_and_are_near_to_uncompiled_ones(
    embedded_folder: Path, photo: Photo, precision: str, kernels: str
) -> None:
    if precision == "fp8":
        skip_without_fp8()
    torch._dynamo.reset()
    counters.clear()
    engine = engine_of(embedded_folder, precision=precision, compile="on", attention="auto", kernels=kernels)
    assert engine.model.blocks.way.startswith("compiled with ")
    assert engine.model.blocks.way.endswith(" and kernels") == (kernels == "on")
    graphs = counters["stats"]["unique_graphs"]
    plain = engine_of(embedded_folder, precision=precision)
    for size in ((256, 256), (384, 256), (256, 448)):
        for acceleration in (Acceleration.NONE, Acceleration.HIGH):
            pictures = [as_tensor(picture(one, photo(*size), acceleration)) for one in (engine, plain)]
            assert psnr(*pictures) > LIKENESS_DB - 10
    assert counters["stats"]["unique_graphs"] == graphs
    assert engine.model.notes == ()
    torch._dynamo.reset()


# Kernels.


@pytest.mark.parametrize("precision", ["full", "fp8"])
def test_blocks_by_kernels_are_right_wherever_they_are_tried(embedded_folder: Path, precision: str) -> None:
    if precision == "fp8":
        skip_without_fp8()
    model = engine_of(embedded_folder, precision=precision).model
    trial = Trial(model.pipeline.transformer, 512, 1024, model.device, model.dtype, precision == "fp8")
    assert trial.error(Way.eager("kernels", KernelOps()), NATIVE_WAY) <= 1


def test_kernels_that_choose_themselves_leave_no_note_and_work(embedded_folder: Path, photo: Photo) -> None:
    torch._dynamo.reset()
    engine = engine_of(embedded_folder, compile="on", attention="auto", kernels="auto")
    assert engine.model.notes == ()
    assert len(engine.model.blocks.tried) == 1
    exact = as_tensor(picture(engine_of(embedded_folder), photo(256, 256)))
    assert psnr(as_tensor(picture(engine, photo(256, 256))), exact) > LIKENESS_DB - 10
    torch._dynamo.reset()


def test_uncompiled_full_precision_with_native_attention_is_the_same_to_the_bit_every_time(
    embedded_folder: Path, photo: Photo
) -> None:
    engine = engine_of(embedded_folder)
    assert engine.model.blocks.is_plain
    assert engine.model.numerics == "bfloat16"
    first, again = (np.asarray(picture(one, photo(256, 256))) for one in (engine, engine_of(embedded_folder)))
    assert np.array_equal(first, again)
