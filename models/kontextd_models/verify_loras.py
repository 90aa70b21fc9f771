"""The proofs that LoRAs are merged as peft would, and leave no trace. Knows engines and adapters; prints nothing.

The LoRAs are random ones of rank 8 for every linear of the transformer's blocks and of both text encoders, in files, so
that what is proved is the whole way from a file to the weights.
"""

from __future__ import annotations

import hashlib
import random
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import Linear as PeftLinear
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kontextd_models import EngineConfig, LoraWeight, memory
from kontextd_models.checks import Check
from kontextd_models.engine import Engine
from kontextd_models.errors import LoraError
from kontextd_models.lora.layout import Component
from kontextd_models.lora.stack import LoraStack

_RANK, _FILES, _SWITCHES = 8, 3, 20
_COMPARED = 40  # linears, of thousands in a model of full size
_SCALES = (0.7, -0.4, 1.3)
# How far over the error of rounding the exact sum once: in bfloat16 the sum in float32 does not show; in float32 its
# own roundings count too, some of half a unit each.
_TOLERANCE = {torch.bfloat16: 1.02, torch.float32: 2.0}


def check_lora_merge(engine: Engine) -> Check:
    """Every tensor has its place, and merged weights are peft's deltas in float64, added up and rounded once."""
    with _files(engine) as files, _cleaned(engine) as stack:
        names = _names(engine)
        compared = random.Random(0).sample(names, min(_COMPARED, len(names)))
        before = {name: _weight(engine, name).double().cpu() for name in compared}
        reports = stack.merge([LoraWeight(path, scale) for path, scale in zip(files, _SCALES, strict=True)]).reports
        tensors = [load_file(path) for path in files]
        worst, worst_floor = 0.0, 0.0
        for name in compared:
            exact = before[name] + sum(
                scale * _delta_of_peft(engine, name, one) for one, scale in zip(tensors, _SCALES, strict=True)
            )
            merged = _weight(engine, name)
            worst = max(worst, _relative(merged.double().cpu(), exact))
            worst_floor = max(worst_floor, _relative(exact.to(merged.dtype).double(), exact))
    covered = all(report.matched == report.total == 2 * len(names) for report in reports)
    figures = {"relative_error": worst, "rounded_once": worst_floor, "linears": len(names), "compared": len(compared)}
    if not covered:
        return Check("LoRA merge", False, f"{reports[0].matched} of {reports[0].total} tensors had a place", figures)
    passed = 0 < worst <= _TOLERANCE[engine.model.dtype] * worst_floor
    said = (
        f"{_FILES} LoRAs on {len(names)} linears: relative error {worst:.2g}, rounding the exact sum {worst_floor:.2g}"
    )
    return Check("LoRA merge", passed, said, figures)


def check_lora_restored(engine: Engine) -> Check:
    """After switches, failed ones among them, no LoRA is the base to the bit."""
    before = _digest(engine)
    with _files(engine) as files, _cleaned(engine) as stack:
        broken = files[0].with_name("broken.safetensors")
        broken.write_bytes(files[0].read_bytes()[:-1])
        rng, refused, other = random.Random(0), 0, False
        for turn in range(_SWITCHES):
            chosen = [LoraWeight(path, rng.choice(_SCALES)) for path in rng.sample(files, rng.randint(1, _FILES))]
            try:
                stack.merge([*chosen, LoraWeight(broken)] if turn % 4 == 3 else chosen)
            except LoraError:
                refused += 1
        other = _digest(engine) != before
    after = _digest(engine)
    figures = {"switches": _SWITCHES, "refused": refused, "sha256": before, "sha256_after": after}
    if not other or refused != _SWITCHES // 4:
        return Check("LoRA restored", False, "the LoRAs changed nothing, so that nothing was proved", figures)
    detail = "the base to the bit" if after == before else "not the base: some weights differ"
    return Check("LoRA restored", after == before, f"after {_SWITCHES} switches, {refused} refused: {detail}", figures)


@contextmanager
def _cleaned(engine: Engine) -> Iterator[LoraStack]:
    """A stack over the engine's weights, that gives them back as the base's."""
    stack = LoraStack(engine.model, EngineConfig())
    with torch.no_grad():
        try:
            yield stack
        finally:
            stack.merge(())


@contextmanager
def _files(engine: Engine) -> Iterator[Sequence[Path]]:
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{index}.safetensors" for index in range(_FILES)]
        for index, path in enumerate(paths):
            save_file(_random(engine, index), path)
        yield paths


def _random(engine: Engine, seed: int) -> dict[str, Tensor]:
    """A LoRA under diffusers' names, of a hundredth of the weights' size."""
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for name in _names(engine):
        rows, columns = _weight(engine, name).shape
        tensors[f"{name}.lora_A.weight"] = torch.randn(_RANK, columns, generator=generator) / columns**0.5
        tensors[f"{name}.lora_B.weight"] = 0.01 * torch.randn(rows, _RANK, generator=generator)
    return {key: value.to(torch.bfloat16).contiguous() for key, value in tensors.items()}


def _names(engine: Engine) -> list[str]:
    """Linears, with the component before the dot."""
    return [
        f"{component.value}.{name}"
        for component in Component
        for name, module in getattr(engine.model.pipeline, component.value).named_modules()
        if isinstance(module, nn.Linear) and re.search(r"(blocks|layers|block)\.\d", name)
    ]


def _weight(engine: Engine, name: str) -> Tensor:
    weight: Tensor = _linear(engine, name).weight.detach()
    return weight


def _linear(engine: Engine, name: str) -> nn.Linear:
    component, _, path = name.partition(".")
    linear: nn.Linear = getattr(engine.model.pipeline, component).get_submodule(path)
    return linear


def _delta_of_peft(engine: Engine, name: str, tensors: Mapping[str, Tensor]) -> Tensor:
    """What peft's own layer says the delta is, in float64."""
    rows, columns = _weight(engine, name).shape
    base = nn.Linear(columns, rows, bias=False, dtype=torch.float64)
    config = LoraConfig(r=_RANK, lora_alpha=_RANK, init_lora_weights=False)
    layer = PeftLinear(base, "it", config, r=_RANK, lora_alpha=_RANK)
    layer.lora_A["it"].weight.data = tensors[f"{name}.lora_A.weight"].double()
    layer.lora_B["it"].weight.data = tensors[f"{name}.lora_B.weight"].double()
    delta: Tensor = layer.get_delta_weight("it")
    return delta


def _relative(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


def _digest(engine: Engine) -> str:
    """SHA-256 over every weight of the transformer and both encoders."""
    memory.rest(engine.model.pipeline)
    digest = hashlib.sha256()
    for component in Component:
        for name, value in getattr(engine.model.pipeline, component.value).named_parameters():
            digest.update(name.encode())
            digest.update(value.detach().flatten().view(torch.uint8).cpu().numpy())
    return digest.hexdigest()
