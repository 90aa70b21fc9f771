"""The training loop of all stages: one-cycle AdamW, for matrices perhaps Muon, and a checkpoint to go on from.

Knows no data.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


@dataclass(frozen=True)
class Schedule:
    steps: int
    learning_rate: float
    warm_up: float = 0.05  # share of the steps
    weight_decay: float = 0.0
    clip: float = 1.0
    matrix_learning_rate: float = 0.0  # of Muon
    checkpoint_every: int = 250
    average: float = 0.999  # decay of the running average of the weights


class Average:
    """A running average of a module's weights: what is exported."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.weights = {name: value.detach().clone() for name, value in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, value in module.state_dict().items():
            self.weights[name].lerp_(value, 1 - decay)


def run(
    module: nn.Module,
    parameters: Iterable[nn.Parameter],
    loss_of: Callable[[int, random.Random], Tensor],
    schedule: Schedule,
    checkpoint: Path,
    matrices: Iterable[nn.Parameter] = (),
) -> None:
    """Minimise `loss_of(step, rng)`. Step n draws from a generator seeded by n alone: a stopped run goes on exactly.

    Those of the parameters that are among `matrices` are trained by Muon (Jordan et al. 2024), the others by AdamW.
    """
    parameters = list(parameters)
    optimisers = _optimisers(parameters, list(matrices), schedule)
    average = Average(module, schedule.average)
    first = _restore(checkpoint, module, average, optimisers, parameters) if checkpoint.exists() else 0
    began, losses = time.monotonic(), []
    for step in range(first, schedule.steps):
        torch.manual_seed(step)
        for optimiser, peak in optimisers:
            optimiser.param_groups[0]["lr"] = peak * cycle(schedule, step)
        loss = loss_of(step, random.Random(step))
        module.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, schedule.clip)
        for optimiser, _ in optimisers:
            optimiser.step()
        average.update(module, step)
        losses.append(loss.item())
        done = step + 1
        if done % 50 == 0:
            mean, speed = sum(losses) / len(losses), (done - first) / (time.monotonic() - began)
            print(f"{checkpoint.stem} {done}/{schedule.steps} loss {mean:.5f} {speed:.2f} it/s", flush=True)
            losses.clear()
        if done % schedule.checkpoint_every == 0 or done == schedule.steps:
            _save(checkpoint, done, module, average, optimisers, parameters)


def averaged(checkpoint: Path) -> dict[str, Tensor]:
    """The averaged weights of a checkpoint."""
    prefix = "average."
    state = load_file(checkpoint)
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def cycle(schedule: Schedule, step: int) -> float:
    """The share of the highest learning rate: linear warm-up, then half a cosine down to a hundredth."""
    warm_up = max(1, round(schedule.warm_up * schedule.steps))
    if step < warm_up:
        return (step + 1) / warm_up
    progress = (step - warm_up) / max(1, schedule.steps - warm_up)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress))


_Optimisers: TypeAlias = Sequence[tuple[torch.optim.Optimizer, float]]  # each with its highest learning rate


def _optimisers(
    parameters: Sequence[nn.Parameter], matrices: Sequence[nn.Parameter], schedule: Schedule
) -> _Optimisers:
    by_muon = {id(matrix) for matrix in matrices}
    others = [parameter for parameter in parameters if id(parameter) not in by_muon]
    adam = torch.optim.AdamW(others, betas=(0.9, 0.99), weight_decay=schedule.weight_decay)
    if not matrices:
        return [(adam, schedule.learning_rate)]
    # With steps of AdamW's size, as Liu et al. 2025 (arXiv 2502.16982) scale them.
    muon = torch.optim.Muon(matrices, weight_decay=schedule.weight_decay, adjust_lr_fn="match_rms_adamw")
    return [(adam, schedule.learning_rate), (muon, schedule.matrix_learning_rate)]


def _state(optimisers: _Optimisers, parameter: nn.Parameter) -> dict[str, Tensor]:
    """What its optimiser keeps of a parameter; to be filled where that is nothing yet."""
    (found,) = [one for one, _ in optimisers if any(parameter is its for its in one.param_groups[0]["params"])]
    state: dict[str, Tensor] = found.state[parameter]
    return state


def _save(
    path: Path,
    step: int,
    module: nn.Module,
    average: Average,
    optimisers: _Optimisers,
    parameters: list[nn.Parameter],
) -> None:
    tensors = {f"module.{name}": value for name, value in module.state_dict().items()}
    tensors |= {f"average.{name}": value for name, value in average.weights.items()}
    for index, parameter in enumerate(parameters):
        state = _state(optimisers, parameter)
        tensors |= {f"optimiser.{index}.{name}": value for name, value in state.items()}
    part = path.with_suffix(".part")
    unshared = {name: value.detach().clone().contiguous() for name, value in tensors.items()}
    save_file(unshared, part, metadata={"step": str(step)})
    part.replace(path)


def _restore(
    path: Path,
    module: nn.Module,
    average: Average,
    optimisers: _Optimisers,
    parameters: list[nn.Parameter],
) -> int:
    """Load what `_save` wrote; return the number of steps done."""
    with safe_open(path, framework="pt") as file:
        step = int(file.metadata()["step"])
    state = load_file(path)
    module.load_state_dict({name: state[f"module.{name}"] for name in module.state_dict()})
    average.weights = {name: state[f"average.{name}"].to(value.device) for name, value in average.weights.items()}
    for key, value in state.items():
        kind, _, rest = key.partition(".")
        if kind == "optimiser":
            index, _, name = rest.partition(".")
            parameter = parameters[int(index)]
            _state(optimisers, parameter)[name] = value if name == "step" else value.to(parameter.device)
    return step
