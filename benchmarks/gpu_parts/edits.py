"""Whole edits from noise to latents, diffusers' and ours. Knows stands and clocks; knows no processes."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
from kontextd_models.acceleration.cost import plan_flops
from kontextd_models.acceleration.preset import StepKind
from kontextd_models.denoise import Denoised, Trajectory
from kontextd_models.records import Acceleration

from gpu_parts import ours
from gpu_parts.clocks import Marks, compiled_graphs, forget_peak, now, peak_bytes, timed
from gpu_parts.parts import STEPS, Part
from gpu_parts.stand import GUIDANCE, Stand

_ENOUGH_S = 18.0  # of timed edits of a kind: slow ones are run once
_REPEATS = 3

Edit = Callable[[Marks], list[StepKind]]  # runs an edit, marks each of its steps, and says what they were


@torch.no_grad()
def stock(stand: Stand, part: Part) -> dict[str, object]:
    """`FluxKontextPipeline.__call__` on encoded inputs; compiled as diffusers' guide has it, block by block."""
    pipeline = stand.model.pipeline
    if part.compiled:
        backend = {"backend": "eager"} if stand.options.tiny else {}  # the tiny model proves the code, and is not timed
        pipeline.transformer.compile_repeated_blocks(fullgraph=True, **backend)
    prompt, reference, noise = stand.inputs
    width, height = stand.sizes.native
    picture = pipeline._unpack_latents(reference.latents, height, width, pipeline.vae_scale_factor)

    def edit(marks: Marks, steps: int = STEPS) -> list[StepKind]:
        def after_step(*_: object) -> dict[str, object]:
            marks.mark()
            return {}

        marks.mark()
        pipeline(
            image=picture,
            prompt_embeds=prompt.sequence,
            pooled_prompt_embeds=prompt.pooled,
            latents=noise,
            width=width,
            height=height,
            max_area=width * height,
            num_inference_steps=steps,
            guidance_scale=GUIDANCE,
            output_type="latent",
            callback_on_step_end=after_step,
        )
        return [StepKind.FULL] * steps

    return {**_merged(stand, part), **_edits(stand, lambda: edit(Marks(stand.device), 2), edit, trimmed=False)}


@torch.no_grad()
def edit(stand: Stand, part: Part) -> dict[str, object]:
    """The engine's own loop, with the shipped row of the preset."""

    def run(marks: Marks) -> list[StepKind]:
        marks.mark()
        return [state.kind for state in marked(steps_of(stand, part.preset), marks)]

    def warm_up() -> None:
        """Until every kind of step has run."""
        trajectory, seen = trajectory_of(stand, part.preset), set()
        for state in trajectory.run(stand.inputs[2]):
            seen.add(state.kind)
            if seen == set(trajectory.plan.kinds):
                return

    trimmed = trajectory_of(stand, part.preset).forward.trims
    figures = {**_merged(stand, part), **_edits(stand, warm_up, run, trimmed=trimmed)}
    if not part.loras:
        figures["distance_to_stock"] = _distance_to_stock(stand, part.preset)
    return {**figures, "execution": ours.told(stand.model)}


def trajectory_of(stand: Stand, preset: str, steps: int = STEPS) -> Trajectory:
    prompt, reference, _ = stand.inputs
    row = stand.model.presets.rows[Acceleration(preset)]
    return Trajectory.of(stand.model, prompt, reference, stand.sizes.native, steps, GUIDANCE, row)


def steps_of(stand: Stand, preset: str) -> Iterator[Denoised]:
    return trajectory_of(stand, preset).run(stand.inputs[2])


def marked(states: Iterator[Denoised], marks: Marks) -> Iterator[Denoised]:
    for state in states:
        marks.mark()
        yield state


def _edits(stand: Stand, warm_up: Callable[[], object], edit: Edit, *, trimmed: bool) -> dict[str, object]:
    """Seconds of whole edits and of their steps, what they computed, and the memory and graphs they took."""
    graphs = compiled_graphs()
    warm_up_s = timed(warm_up, stand.device)
    warm_graphs = compiled_graphs()
    forget_peak(stand.device)
    runs: list[float] = []
    repeats = 1 if stand.options.tiny else _REPEATS
    while not runs or (len(runs) < repeats and sum(runs) + runs[-1] <= _ENOUGH_S):
        marks = Marks(stand.device)
        began = now(stand.device)
        kinds = edit(marks)
        runs.append(now(stand.device) - began)
    seconds = statistics.median(runs)
    flops = plan_flops(stand.shape, kinds, trimmed=trimmed)
    return {
        "seconds": seconds,
        "runs_s": runs,
        "steps": "".join(kinds),
        "step_s": _by_kind(kinds, marks.seconds()),
        "warm_up_s": warm_up_s,
        "graphs": warm_graphs - graphs,
        "recompiled": compiled_graphs() - warm_graphs,
        "peak_bytes": peak_bytes(stand.device),
        "tflop": flops / 1e12,
        "tflop_per_s": flops / seconds / 1e12,
    }


def _by_kind(kinds: list[StepKind], seconds: list[float]) -> dict[str, float]:
    """The median of each kind in the last edit. The first step is left out: preparation comes before its mark."""
    pairs = list(zip(kinds, seconds, strict=True))[1:]
    return {
        kind.name.lower(): statistics.median(taken for one, taken in pairs if one is kind)
        for kind in StepKind
        if any(one is kind for one, _ in pairs)
    }


def _merged(stand: Stand, part: Part) -> dict[str, object]:
    """The weights with the part's LoRAs. Seconds, where these were not there yet: for the first time, and again."""
    began = now(stand.device)
    written = stand.wear(part.loras)
    first_s = now(stand.device) - began
    if not (written and part.loras):
        return {}
    again_s = timed(lambda: stand.wear(0), stand.device) + timed(lambda: stand.wear(part.loras), stand.device)
    return {"merge_s": {"first": first_s, "off and on again": again_s}}


def _distance_to_stock(stand: Stand, preset: str) -> float:
    """‖v − v_stock‖ / ‖v_stock‖ of the first step: whether the same thing is computed. It says nothing of fidelity."""
    state: Any = next(steps_of(stand, preset))
    wanted = stand.first_velocity.float()
    return float((state.velocity.float() - wanted).norm() / wanted.norm())
