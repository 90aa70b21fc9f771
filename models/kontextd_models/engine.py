"""The engine: one loaded model, one edit at a time. Knows the order of the stages; knows no HTTP and no job ids.

    engine = Engine.load(EngineConfig())
    for event in engine.edit(EditRequest(image, "make it black and white")):
        ...  # a `Step` after each denoise step, then one `Done`

Closing the iterator, or an exception anywhere, stops the work within one step and leaves the engine as if nothing had
happened: the scheduler belongs to the image that is made, caches take in only what is whole, each edit first makes
the weights what its own LoRAs ask for, and the iterator alone holds the rest.
"""

from __future__ import annotations

import gc
import logging
import traceback
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from functools import partial
from typing import TypeVar

import torch
from PIL import Image
from torch import Tensor

from kontextd_models import memory
from kontextd_models.acceleration.preset import StepKind
from kontextd_models.cache import ByteLRU, content_key
from kontextd_models.denoise import Denoised, Trajectory, decode, draw_noise
from kontextd_models.encode import (
    EncodedPrompt,
    EncodedReference,
    encode_prompt,
    encode_reference,
    max_prompt_tokens,
    prepare_reference,
)
from kontextd_models.errors import EngineBusy, OutOfMemory
from kontextd_models.loading import LoadedModel, load_model, pick_device
from kontextd_models.lora.stack import LoraStack, Stacked
from kontextd_models.out_of_memory import is_out_of_memory
from kontextd_models.preview import Projection, estimate, fit_projection
from kontextd_models.records import Done, EditRequest, EngineConfig, PresetUse, Step
from kontextd_models.request import Edit, check
from kontextd_models.safety import PreviewScreen, SafetyGate
from kontextd_models.timing import Pace, StageClock

log = logging.getLogger(__name__)

Events = Generator[Step | Done, None, None]
Work = Generator[Step, None, Done]  # yields the steps, returns the result
Loaded = TypeVar("Loaded")
_HOST = torch.device("cpu")


class Engine:
    """Used by one thread at a time; `edit` of a second caller, on any engine around the model, raises `EngineBusy`."""

    def __init__(self, model: LoadedModel, config: EngineConfig, gate: SafetyGate | None = None) -> None:
        self.model = model
        self.presets = model.presets  # another table may be put here between two edits
        self.prompts = ByteLRU[EncodedPrompt](config.prompt_cache_bytes)
        self.references = ByteLRU[EncodedReference](config.reference_cache_bytes)
        self._stack, self._lora_limits = LoraStack(model, config), config.lora_limits
        self._gate = gate or SafetyGate(config.safety)
        self._projection: Projection | None = None

    @classmethod
    def load(cls, config: EngineConfig) -> Engine:
        """Load and place the model. Nothing is downloaded.

        Raises `ModelError` naming the file at fault, `InvalidValue` for a setting that cannot be, and `OutOfMemory`.
        """
        with _own_modes():
            # The gate first: its faults show in a second, a large model takes a minute.
            gate = _loaded(lambda: SafetyGate(config.safety), config)
            return cls(_loaded(lambda: load_model(config), config), config, gate)

    def edit(self, request: EditRequest) -> Events:
        """Check the request at once, and return the edit as an iterator that does the work as it is consumed.

        Raises `InputError` here. From its first `next` on, the iterator holds the engine until its `Done`, or until it
        is closed or dropped; it raises `EngineBusy` there if another one does, later `LoraError`, `OutOfMemory`,
        `SafetyCheckFailed` or, for a flagged input, `ContentPolicyViolation`.
        """
        edit = check(request, self.model.limits, self._lora_limits)
        if edit.size.reason:
            log.warning("%s", edit.size.reason)
        return self._alone(edit)

    def _alone(self, edit: Edit) -> Events:
        if not self.model.busy.acquire(blocking=False):
            raise EngineBusy("an edit is running; this model makes one at a time. Wait for it, or close its iterator.")
        try:
            done = yield from self._recovering(_in_own_modes(self._run(edit)))
        finally:
            self.model.busy.release()
        yield done

    def _run(self, edit: Edit) -> Work:
        """The whole edit."""
        clock = StageClock(self.model.device)
        with clock.stage("safety"):
            self._gate.check_input(edit.image, asked=edit.safety_asked)
        stacked = self._stacked(edit, clock)
        with clock.stage("encode_prompt"):
            prompt, prompt_hit = self._encoded_prompt(edit.prompt)
        with clock.stage("encode_image"):
            reference, reference_hit = self._encoded_reference(edit)
        if edit.preview_interval:
            self._fit_projection()
        images, kinds = [], Counter[StepKind]()
        with closing(self._gate.preview_screen(asked=edit.safety_asked)) as screen:
            with clock.stage("denoise"):
                trajectory = self._trajectory(edit, prompt, reference)
            for index in range(len(edit.seeds)):
                with clock.stage("denoise"):
                    latents = yield from self._denoise(edit, index, trajectory, screen, clock, kinds)
                with clock.stage("decode"):
                    images.append(decode(self.model.pipeline, latents, edit.size.width, edit.size.height))
        with clock.stage("safety"):
            checked, flags = self._gate.check(images, asked=edit.safety_asked)
        hits = {"prompt": prompt_hit, "reference": reference_hit}
        if edit.loras:
            hits["loras"] = stacked.is_hit
        warnings = _warnings(edit, prompt, self._gate, stacked)
        preset = PresetUse(edit.acceleration, kinds[StepKind.FULL], kinds[StepKind.CACHED], kinds[StepKind.SKIPPED])
        return Done(checked, edit.seeds, flags, clock.seconds(), hits, edit.size, preset, stacked.reports, warnings)

    def _stacked(self, edit: Edit, clock: StageClock) -> Stacked:
        """The weights with the LoRAs of this edit; without any, the base's."""
        if not edit.loras and self._stack.is_base:
            return Stacked()
        with clock.stage("merge"):
            return self._stack.merge(edit.loras)

    def _trajectory(self, edit: Edit, prompt: EncodedPrompt, reference: EncodedReference) -> Trajectory:
        size, preset = (edit.size.width, edit.size.height), self.presets.rows[edit.acceleration]
        return Trajectory.of(self.model, prompt, reference, size, edit.steps, edit.guidance_scale, preset)

    def _denoise(
        self,
        edit: Edit,
        image_index: int,
        trajectory: Trajectory,
        screen: PreviewScreen,
        clock: StageClock,
        kinds: Counter[StepKind],
    ) -> Generator[Step, None, Tensor]:
        """Yield the steps of one image, count their kinds, and return its packed latents [1, N, C]."""
        pipeline, size, device = self.model.pipeline, edit.size, self.model.device
        latents = draw_noise(pipeline, edit.seeds[image_index], size.width, size.height, self.model.dtype, device)
        pace = Pace(device)
        before, total = image_index * edit.steps, len(edit.seeds) * edit.steps
        for index, state in enumerate(trajectory.run(latents), 1):
            latents = state.latents
            kinds[state.kind] += 1
            pace.step()
            if edit.preview_interval and index % edit.preview_interval == 0:
                screen.submit(image_index, self._preview(state, edit))
            yield Step(before + index, total, clock.since_first("denoise"), image_index, screen.take(image_index))
        return latents

    def _fit_projection(self) -> Projection:
        """Once for each engine, in the first edit with previews: before its steps, so that none of them waits."""
        if self._projection is None:
            self._projection = fit_projection(self.model.pipeline.vae)
        return self._projection

    def _preview(self, state: Denoised, edit: Edit) -> Image.Image:
        """A small picture of what the model has in mind."""
        latents = estimate(state.latents, state.velocity, state.sigma)
        return self._fit_projection().render(latents, edit.size.height, edit.size.width)

    def _encoded_prompt(self, prompt: str) -> tuple[EncodedPrompt, bool]:
        """From the cache where it is there; True for a hit."""
        pipeline, max_tokens = self.model.pipeline, max_prompt_tokens(self.model.pipeline)
        key = content_key(prompt, max_tokens, self._stack.encoders_key())
        found = self.prompts.get(key)
        if found is not None:
            return found.to(self.model.device), True
        encoded = encode_prompt(pipeline, prompt, max_tokens, self.model.device)
        self.prompts.put(key, encoded.to(_HOST))
        return encoded, False

    def _encoded_reference(self, edit: Edit) -> tuple[EncodedReference, bool]:
        """From the cache where it is there; True for a hit."""
        grid = (edit.size.reference_width, edit.size.reference_height)
        key = content_key(edit.image.tobytes(), *edit.image.size, *grid)
        found = self.references.get(key)
        if found is not None:
            return found.to(self.model.device), True
        prepared = prepare_reference(edit.image, *grid)
        encoded = encode_reference(self.model.pipeline, prepared, self.model.dtype, self.model.device)
        self.references.put(key, encoded.to(_HOST))
        return encoded, False

    def _recovering(self, run: Work) -> Work:
        """After a failure inside `run` nothing of it is left on the device; out of memory gets a class of its own."""
        try:
            return (yield from run)
        except GeneratorExit:  # between two steps, where nothing is half done
            raise
        except BaseException as error:
            if not is_out_of_memory(error, partial(memory.free_bytes, self.model.device)):
                memory.rest(self.model.pipeline)
                raise
            what = _first_line(error)
            traceback.clear_frames(error.__traceback__)  # they hold the tensors
        memory.rest(self.model.pipeline)  # outside of the handlers: in them the error itself is still held
        self._stack.release_device()
        gc.collect()
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()
        raise OutOfMemory(
            f"the {self.model.device.type} device ran out of memory: {what}. Ask for a smaller size; or set a lower "
            f"max_area, or a leaner memory mode than {self.model.memory_mode.value}."
        )


def _loaded(load: Callable[[], Loaded], config: EngineConfig) -> Loaded:
    """What `load` loads, with a class of its own for running out of memory."""
    try:
        return load()
    except Exception as error:
        if not is_out_of_memory(error, lambda: memory.free_bytes(pick_device(config.device))):
            raise
        what = _first_line(error)
        traceback.clear_frames(error.__traceback__)  # they hold the weights
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    raise OutOfMemory(
        f"memory ran out while the model was loaded: {what}. Free some, or set a leaner memory mode than "
        f"{config.memory_mode.value}."
    )


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0].rstrip(".") or type(error).__name__


def _in_own_modes(run: Work) -> Work:
    """Advance `run` in the engine's modes, and give its consumer its own ones back at each yield.

    A generator that yields inside `with torch.no_grad()` would leave its consumer without gradients.
    """
    try:
        while True:
            try:
                with _own_modes():
                    step = next(run)
            except StopIteration as stop:
                done: Done = stop.value
                return done
            yield step
    finally:
        run.close()


@contextmanager
def _own_modes() -> Iterator[None]:
    """`no_grad`, and neither `inference_mode` nor `autocast` even where the caller is in them.

    What the one makes cannot be changed in place, and what the other rounds would be kept for other callers.
    """
    no_autocast = torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False)
    with torch.inference_mode(False), torch.no_grad(), no_autocast[0], no_autocast[1]:
        yield


def _warnings(edit: Edit, prompt: EncodedPrompt, gate: SafetyGate, stacked: Stacked) -> tuple[str, ...]:
    """What was done otherwise than it was asked for, logged and told."""
    warnings = [*stacked.warnings]
    if prompt.cut_tokens:  # how many, and not what they say: prompts are no business of a log
        warnings.append(
            f"the prompt is longer than the model reads: its last {prompt.cut_tokens} tokens were not seen. Shorten it."
        )
    if not edit.safety_asked and gate.applies(edit.safety_asked):
        warnings.append("the images were checked for safety all the same: here a request cannot switch that off.")
    for warning in warnings:
        log.warning("%s", warning)
    return tuple(warnings)
