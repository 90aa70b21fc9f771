"""Proofs on the operator's own device and weights: is the engine what it says it is? Knows engines; prints nothing.

`checks(subject)` yields one `Check` after the other. A new capability adds a function that returns one and a line in
`_on_one_engine` (it needs a loaded model) or in `_on_fresh_engines` (it loads models of its own, one at a time).
"""

from __future__ import annotations

import logging
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch

from kontextd_models import Done, EngineConfig, MemoryMode, SafetyConfig, load_engine, memory
from kontextd_models.acceleration.preset import Preset
from kontextd_models.checks import Check
from kontextd_models.denoise import Trajectory, decode, draw_noise
from kontextd_models.description import describe
from kontextd_models.embedded import embedded_model_dir
from kontextd_models.encode import encode_prompt, encode_reference, max_prompt_tokens
from kontextd_models.engine import Engine
from kontextd_models.errors import OutOfMemory
from kontextd_models.fingerprint import (
    GUIDANCE,
    SEED,
    arguments,
    exactly,
    fingerprint,
    fixed_edit,
    native_size,
    photo_at,
)
from kontextd_models.folder import check_folder
from kontextd_models.loading import LoadedModel, pick_device, pick_dtype
from kontextd_models.safety.open_nsfw import OpenNsfwChecker
from kontextd_models.stock import StockEdit, stock_latents
from kontextd_models.verify_alignment import check_alignment
from kontextd_models.verify_loras import check_lora_merge, check_lora_restored

log = logging.getLogger(__name__)

_ASPECTS = (1.0, 1.5, 0.5625)
_LOOP_STEPS = 3
_PROMPT = "make it brighter"
_RESTART_TIMEOUT_S = 600
_SMALLEST_FILLING = 2 * 2**20  # bytes; the size of the segments from which torch serves small tensors
_UNCACHED = EngineConfig(prompt_cache_bytes=0, reference_cache_bytes=0)


@dataclass(frozen=True)
class Subject:
    """What is verified. `load` and `in_new_process` are how engines come about, for models that lie in no folder too.

    `needs` are the bytes of device memory by mode; a mode that is not in it is tried.
    """

    config: EngineConfig
    load: Callable[[EngineConfig], Engine] = load_engine
    in_new_process: Callable[[EngineConfig], str] | None = None
    needs: Mapping[MemoryMode, int] = field(default_factory=dict)
    knows_identity: bool = True  # a random model gives nothing back unchanged


def subject_of(config: EngineConfig) -> Subject:
    """The model of a configuration, with blocks as diffusers runs them: that is what is proved.

    A proof may switch the safety checker off where an operator forces it on. Raises `ModelError` where the folder
    cannot be used.
    """
    exact = replace(exactly(config), safety=replace(config.safety, forced=False))
    return Subject(exact, in_new_process=fingerprint_elsewhere, needs=_needs(exact))


def fingerprint_elsewhere(config: EngineConfig) -> str:
    """`fingerprint` from a process that has just started. Raises `CalledProcessError` and `TimeoutExpired`."""
    command = [sys.executable, "-m", "kontextd_models.fingerprint", *arguments(config)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=_RESTART_TIMEOUT_S, check=True)
    return ran.stdout.split()[-1]


def checks(subject: Subject) -> Iterator[Check]:
    """All checks, each as soon as it is made. At most one model is loaded at any time."""
    engine = subject.load(subject.config)
    header = describe(engine.model)
    kind = " (a demonstration model)" if header["demonstration"] else ""
    where = f"on {header['device']} in {header['dtype']}, {header['memory_mode']}"
    yield Check("model", True, f"{header['name']}{kind} {where}", header)
    yield from _on_one_engine(subject, engine)
    repeated = _guarded("repeat", partial(check_repeat, engine))
    yield repeated
    wanted, is_cuda = str(repeated.figures.get("sha256")), engine.model.device.type == "cuda"
    del engine
    yield from _on_fresh_engines(subject, wanted, is_cuda)


def _on_one_engine(subject: Subject, engine: Engine) -> Iterator[Check]:
    for aspect in _ASPECTS:
        size = native_size(engine, aspect)
        yield _guarded(f"loop {size[0]}x{size[1]}", partial(check_loop, engine, size))
    yield _guarded("alignment", partial(check_alignment, engine, knows_identity=subject.knows_identity))
    yield _guarded("LoRA merge", partial(check_lora_merge, engine))
    yield _guarded("LoRA restored", partial(check_lora_restored, engine))
    yield _guarded("safety", partial(check_safety, subject, engine))
    yield _guarded("out of memory", partial(check_out_of_memory, engine))


def _on_fresh_engines(subject: Subject, wanted: str, is_cuda: bool) -> Iterator[Check]:
    memory.forget()
    yield _guarded("restart", partial(check_restart, subject, wanted))
    for mode in MemoryMode:
        if mode is not MemoryMode.AUTO:
            yield _guarded(f"memory {mode.value}", partial(check_memory_mode, subject, mode, wanted, is_cuda))


def _guarded(name: str, proof: Callable[[], Check]) -> Check:
    """A proof that breaks has failed, whatever the error, and those after it may still say something."""
    try:
        return proof()
    except Exception as error:
        log.info("%s broke", name, exc_info=True)
        return Check(name, False, f"broke with {type(error).__name__}: {str(error).partition(chr(10))[0]}")


def check_loop(engine: Engine, size: tuple[int, int]) -> Check:
    """Our loop gives the stock pipeline's latents to the bit, and the engine's picture is what they decode to."""
    name = f"loop {size[0]}x{size[1]}"
    photo = photo_at(size)
    edit = StockEdit(photo, _PROMPT, *size, _LOOP_STEPS, GUIDANCE, SEED)
    theirs = stock_latents(engine.model, edit)
    ours = _our_latents(engine.model, edit)
    picture = fixed_edit(engine, photo, _PROMPT, _LOOP_STEPS).images[0]
    with torch.no_grad():
        decoded = decode(engine.model.pipeline, theirs, *size)
    difference = (ours.float() - theirs.float()).abs().max().item()
    figures = {"steps": _LOOP_STEPS, "largest_difference": difference}
    if not torch.equal(ours, theirs):  # NaN fails too
        return Check(name, False, f"latents differ by up to {difference:.2g} from the stock pipeline's", figures)
    if not np.ptp(np.asarray(decoded)):
        return Check(name, False, "the picture is one flat colour, so that nothing was compared", figures)
    if picture.tobytes() != decoded.tobytes():
        return Check(name, False, "the engine's picture is not what the stock pipeline's latents decode to", figures)
    return Check(name, True, f"bit-identical to FluxKontextPipeline over {_LOOP_STEPS} steps", figures)


def check_repeat(engine: Engine) -> Check:
    """The same seed gives the same picture again, from the caches too."""
    cold, warm = fingerprint(Engine(engine.model, _UNCACHED)), [fingerprint(engine) for _ in range(2)]
    same = [cold, cold] == warm
    detail = "the same picture, to the bit, with cold and with warm caches" if same else "another picture each time"
    return Check("repeat", same, detail, {"sha256": cold, "sha256_of_others": warm})


def check_restart(subject: Subject, wanted: str) -> Check:
    """The same seed gives the same picture in a process that has just started."""
    if subject.in_new_process is None:
        return Check("restart", None, "this model lies in no folder that another process could load")
    try:
        found = subject.in_new_process(subject.config)
    except subprocess.TimeoutExpired:
        return Check("restart", False, f"the second process took over {_RESTART_TIMEOUT_S} s")
    except subprocess.CalledProcessError as error:
        last = (str(error.stderr).strip().splitlines() or ["no message"])[-1]
        return Check("restart", False, f"the second process failed: {last}")
    same = found == wanted
    detail = "the same picture, to the bit, from a second process" if same else "a second process made another picture"
    return Check("restart", same, detail, {"sha256": wanted, "sha256_of_second": found})


def check_memory_mode(subject: Subject, mode: MemoryMode, wanted: str, is_cuda: bool) -> Check:
    """An engine in this mode makes the same picture, to the bit."""
    name = f"memory {mode.value}"
    if not is_cuda and mode is not MemoryMode.RESIDENT:
        return Check(name, None, "on the CPU everything lies in host memory")
    memory.forget()
    free, need = memory.free_bytes(pick_device(subject.config.device)), subject.needs.get(mode, 0)
    if is_cuda and need > free:
        return Check(name, None, f"needs {need / 1e9:.1f} GB of the {free / 1e9:.1f} GB free", {"needed_bytes": need})
    if is_cuda:
        torch.cuda.reset_peak_memory_stats(pick_device(subject.config.device))
    began = time.perf_counter()
    engine = subject.load(replace(subject.config, memory_mode=mode))
    loaded = time.perf_counter()
    found = fingerprint(engine)
    figures: dict[str, object] = {"load_s": loaded - began, "edit_s": time.perf_counter() - loaded}
    if is_cuda:
        figures["peak_device_bytes"] = torch.cuda.max_memory_allocated(engine.model.device)
    detail = "the same picture, to the bit" if found == wanted else "another picture than in the mode that was chosen"
    return Check(name, found == wanted, f"{detail}; loaded in {loaded - began:.1f} s", figures)


def check_safety(subject: Subject, engine: Engine) -> Check:
    """Positive control: a picture is flagged and black with the threshold under its score, and whole with it above."""
    size = native_size(engine, 1.0)
    photo = photo_at(size)
    unchecked = fixed_edit(engine, photo, _PROMPT, _LOOP_STEPS).images[0]
    (score,) = OpenNsfwChecker(threshold=1.0).scores([unchecked])

    def judged(safety: SafetyConfig) -> Done:
        checking = Engine(engine.model, replace(_UNCACHED, safety=safety))
        return fixed_edit(checking, photo, _PROMPT, _LOOP_STEPS, checked=True)

    under, above = judged(SafetyConfig(threshold=score / 2)), judged(SafetyConfig(threshold=(1 + score) / 2))
    as_set = judged(subject.config.safety)
    is_black = under.images[0].size == size and not np.asarray(under.images[0]).any()
    is_whole = above.images[0].tobytes() == unchecked.tobytes()
    figures = {
        "score": score,
        "under_it": {"flagged": under.has_nsfw_concepts[0], "black": is_black},
        "above_it": {"flagged": above.has_nsfw_concepts[0], "unchanged": is_whole},
        "as_set": {"checkers": subject.config.safety.checkers, "flagged": as_set.has_nsfw_concepts[0]},
        "seconds": as_set.timings["safety"],
    }
    works = under.has_nsfw_concepts[0] and is_black and not above.has_nsfw_concepts[0] and is_whole
    detail = "flags and blackens from its threshold on, and only then" if works else "does not do what it must"
    return Check("safety", works, f"{detail}; {as_set.timings['safety']:.2f} s a picture", figures)


def check_out_of_memory(engine: Engine) -> Check:
    """With the device full an edit raises `OutOfMemory`; once there is room the picture is the same again."""
    name = "out of memory"
    if engine.model.device.type != "cuda":
        return Check(name, None, "needs a CUDA device: on the CPU the system kills a process that takes too much")
    before = fingerprint(engine)
    fresh = Engine(engine.model, _UNCACHED)
    filling = _fill(engine.model.device)
    try:
        fingerprint(fresh)
        raised = False
    except OutOfMemory:
        raised = True
    finally:
        del filling
        torch.cuda.empty_cache()
    recovered = fingerprint(fresh) == before
    figures = {"raised": raised, "recovered": recovered}
    if not raised:
        return Check(name, False, "the device was full and the edit went through: nothing was proved", figures)
    detail = "a typed error, then the same picture again" if recovered else "the engine did not recover"
    return Check(name, recovered, detail, figures)


def _our_latents(model: LoadedModel, edit: StockEdit) -> torch.Tensor:
    """Packed latents [1, N, C] by the stages that `Engine.edit` is made of."""
    pipeline, device = model.pipeline, model.device
    with torch.no_grad():
        prompt = encode_prompt(pipeline, edit.prompt, max_prompt_tokens(pipeline), device)
        reference = encode_reference(pipeline, edit.reference, model.dtype, device)
        noise = draw_noise(pipeline, edit.seed, edit.width, edit.height, model.dtype, device)
        size = (edit.width, edit.height)
        *_, last = Trajectory.of(model, prompt, reference, size, edit.steps, edit.guidance_scale, Preset()).run(noise)
    return last.latents


def _needs(config: EngineConfig) -> Mapping[MemoryMode, int]:
    """Bytes of device memory by mode, at the largest size the model takes."""
    folder = check_folder(config.model or embedded_model_dir())
    dtype = pick_dtype(config.dtype, pick_device(config.device))
    area = config.max_area or folder.card.limits.max_area
    return memory.needs(memory.sizes_of(folder, dtype.itemsize, area))


def _fill(device: torch.device) -> list[torch.Tensor]:
    """Plain allocations until the device has no room, not even in the segments that torch keeps."""
    torch.cuda.empty_cache()
    filling: list[torch.Tensor] = []
    size = torch.cuda.mem_get_info(device)[0]
    while size >= _SMALLEST_FILLING:
        try:
            filling.append(torch.empty(size, dtype=torch.uint8, device=device))
        except torch.OutOfMemoryError:
            size //= 2
    return filling
