"""What is measured beside whole edits: sizes, one step of each kind, the stages around the loop. Knows stands."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from kontextd_models.denoise import Trajectory, decode
from kontextd_models.encode import encode_reference
from kontextd_models.random_weights import make_encoders
from kontextd_models.records import Acceleration
from PIL import Image
from torch.profiler import ProfilerActivity, profile

from gpu_parts import ours
from gpu_parts.clocks import Marks, compiled_graphs, forget_peak, peak_bytes, timed
from gpu_parts.edits import marked, steps_of, trajectory_of
from gpu_parts.model import Size, make_inputs
from gpu_parts.parts import Part
from gpu_parts.stand import GUIDANCE, Stand

_CLIP_TOKENS = 77
_TOP = 12  # kernels that are named


@torch.no_grad()
def sizes(stand: Stand, part: Part) -> dict[str, object]:
    """All 17 sizes that Kontext was trained at, one after the other: seconds a step, and graphs made anew for it."""
    stand.wear(0)
    one_step(stand, stand.sizes.native)  # what the first edit of a process compiles
    rows = [{"size": f"{size[0]}x{size[1]}", **one_step(stand, size)} for size in stand.sizes.preferred]
    recompiled = sum(int(str(row["recompiled"])) for row in rows)
    return {"sizes": rows, "recompiled": recompiled, "execution": ours.told(stand.model)}


def one_step(stand: Stand, size: Size) -> dict[str, object]:
    """A full and a cached step, each for the second time at that size."""
    prompt, reference, noise = make_inputs(stand.sizes, stand.model, size)
    regular = stand.model.presets.rows[Acceleration.REGULAR]
    preset = replace(regular, masks={4: "FcFc"})
    graphs, marks = compiled_graphs(), Marks(stand.device)
    trajectory = Trajectory.of(stand.model, prompt, reference, size, 4, GUIDANCE, preset)
    marks.mark()
    for _ in marked(trajectory.run(noise), marks):
        pass
    *_, full, cached = marks.seconds()
    return {
        "tokens": noise.shape[1],
        "full_s": full,
        "cached_s": cached,
        "recompiled": compiled_graphs() - graphs,
    }


@torch.no_grad()
def trace(stand: Stand, part: Part) -> dict[str, object]:
    """A Chrome trace of a step of each kind, warm, and the kernels that take longest in it."""
    stand.wear(0)
    kinds = trajectory_of(stand, "regular").plan.kinds
    wanted = {kinds.index(kind, 1): kind for kind in sorted(set(kinds[1:]))}
    for _ in zip(range(max(wanted) + 1), steps_of(stand, "regular"), strict=False):
        pass
    states, found = steps_of(stand, "regular"), {}
    for step in range(max(wanted) + 1):
        if step in wanted:
            name = wanted[step].name.lower()
            found[name] = _traced(lambda: next(states), stand, f"trace-{part.precision}-{name}.json.gz")
        else:
            next(states)
    return {"steps": found}


def _traced(work: Callable[[], object], stand: Stand, file: str) -> dict[str, object]:
    on_gpu = stand.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities, acc_events=True) as profiler:
        timed(work, stand.device)
    profiler.export_chrome_trace(str(stand.options.out / file))
    rows = [
        (row.key, (row.self_device_time_total if on_gpu else row.self_cpu_time_total) / 1000, row.count)
        for row in profiler.key_averages()
    ]
    rows.sort(key=lambda row: -row[1])
    longest = [{"name": name, "ms": ms, "count": count} for name, ms, count in rows[:_TOP]]
    return {"file": file, "longest": longest, "all_ms": sum(ms for _, ms, _ in rows)}


@torch.no_grad()
def stages(stand: Stand, part: Part) -> dict[str, object]:
    """What an edit needs beside its steps, from token numbers and pixels to a picture; nothing of it cached."""
    model, (width, height) = stand.model, stand.sizes.native
    forget_peak(stand.device)
    clip, t5 = make_encoders(stand.sizes, model.device, model.dtype)
    words = torch.ones(1, _CLIP_TOKENS, dtype=torch.long, device=model.device)
    sentence = torch.ones(1, stand.sizes.text_tokens, dtype=torch.long, device=model.device)
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    picture, latents = Image.fromarray(pixels), stand.inputs[2]
    work = {
        "prompt, CLIP": lambda: clip(words).pooler_output,
        "prompt, T5": lambda: t5(sentence)[0],
        "reference, VAE": lambda: encode_reference(model.pipeline, picture, model.dtype, model.device),
        "decode, VAE": lambda: decode(model.pipeline, latents, width, height),
    }
    seconds = {name: _warm_median(way, stand) for name, way in work.items()}
    return {"stages_s": seconds, "peak_bytes": peak_bytes(stand.device)}


def _warm_median(way: Callable[[], object], stand: Stand) -> float:
    way()
    return statistics.median(timed(way, stand.device) for _ in range(3))
