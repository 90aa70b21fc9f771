"""One edit at a time, and what is left when an edit is broken off: an engine as new."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_lora
import torch
from kontextd_models import Done, EditRequest, EngineConfig, LoraWeight, Step, load_engine
from kontextd_models.engine import Engine
from kontextd_models.errors import EngineBusy
from kontextd_models.errors import OutOfMemory as EngineOutOfMemory
from PIL import Image

Photo = Callable[[int, int], Image.Image]


def run(engine: Engine, request: EditRequest) -> Done:
    *_, done = engine.edit(request)
    assert isinstance(done, Done)
    return done


def pixels(done: Done) -> list[np.ndarray]:
    return [np.asarray(image) for image in done.images]


# One edit at a time.


def test_a_second_edit_is_refused_while_one_runs_and_welcome_after_it(
    tiny_engine: Engine, tiny_request: EditRequest
) -> None:
    alone = pixels(run(tiny_engine, tiny_request))[0]
    first = tiny_engine.edit(tiny_request)
    next(first)
    with pytest.raises(EngineBusy):
        next(tiny_engine.edit(replace(tiny_request, seed=8)))
    *_, done = first
    assert np.array_equal(pixels(done)[0], alone)
    assert run(tiny_engine, replace(tiny_request, seed=8)).images


def test_two_engines_around_one_model_take_turns(
    tiny_engine: Engine, tiny_request: EditRequest, tmp_path: Path
) -> None:
    """Its weights are what the LoRAs of one edit make of them, and those of the other may have none."""
    inked = replace(tiny_request, loras=(LoraWeight(tiny_lora.write(tmp_path / "ink.safetensors")),))
    alone = pixels(run(tiny_engine, inked))[0]
    other = Engine(tiny_engine.model, EngineConfig())
    first = tiny_engine.edit(inked)
    next(first)
    with pytest.raises(EngineBusy, match="this model makes one at a time"):
        next(other.edit(tiny_request))
    *_, done = first
    assert np.array_equal(pixels(done)[0], alone)
    assert not np.array_equal(pixels(run(other, tiny_request))[0], alone)


def test_another_thread_is_refused_while_an_edit_runs(tiny_engine: Engine, tiny_request: EditRequest) -> None:
    alone = pixels(run(tiny_engine, tiny_request))[0]
    first = tiny_engine.edit(tiny_request)
    next(first)
    raised: list[BaseException] = []

    def second() -> None:
        try:
            run(tiny_engine, tiny_request)
        except EngineBusy as error:
            raised.append(error)

    thread = threading.Thread(target=second)
    thread.start()
    thread.join()
    assert len(raised) == 1
    assert np.array_equal(pixels([*first][-1])[0], alone)


def test_an_iterator_that_was_never_started_holds_nothing(tiny_engine: Engine, tiny_request: EditRequest) -> None:
    waiting = tiny_engine.edit(tiny_request)
    assert run(tiny_engine, tiny_request).images
    assert isinstance(next(waiting), Step)


def test_an_iterator_that_has_given_its_result_holds_nothing(tiny_engine: Engine, tiny_request: EditRequest) -> None:
    finished = tiny_engine.edit(tiny_request)
    while not isinstance(next(finished), Done):
        pass
    assert run(tiny_engine, tiny_request).images
    assert list(finished) == []


def test_a_dropped_iterator_lets_the_engine_go(tiny_engine: Engine, tiny_request: EditRequest) -> None:
    dropped = tiny_engine.edit(tiny_request)
    next(dropped)
    del dropped
    gc.collect()
    assert run(tiny_engine, tiny_request).images


def test_an_edit_can_be_closed_from_another_thread(tiny_engine: Engine, tiny_request: EditRequest) -> None:
    edit = tiny_engine.edit(tiny_request)
    next(edit)
    thread = threading.Thread(target=edit.close)
    thread.start()
    thread.join()
    assert run(tiny_engine, tiny_request).images


# Breaking off.


class BrokenOff(Exception):
    """Raised by the tests inside a stage."""


BREAKING_POINTS = (
    "text_encoder.encoder.layers.0",
    "text_encoder_2.encoder.block.1",
    "vae.encoder.mid_block",
    "transformer.transformer_blocks.0.attn.to_q",
    "transformer.single_transformer_blocks.1.proj_mlp",
    "vae.decoder.mid_block",
)


@pytest.fixture
def raising() -> Iterator[Callable[[Engine, str, BaseException, int], None]]:
    """Have a module raise on its nth forward pass, and never again after the test."""
    handles = []

    def arm(engine: Engine, path: str, error: BaseException, at: int = 1) -> None:
        calls = 0

        def hook(*_: object) -> None:
            nonlocal calls
            calls += 1
            if calls == at:
                raise error

        part, _, inner = path.partition(".")
        module = getattr(engine.model.pipeline, part).get_submodule(inner)
        handles.append(module.register_forward_pre_hook(hook))

    yield arm
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("steps_taken", [1, 2, 3, 4, 5])
def test_an_edit_closed_after_any_step_leaves_the_engine_as_new(
    tiny_folder: Path, tiny_engine: Engine, tiny_request: EditRequest, photo: Photo, steps_taken: int
) -> None:
    edit = tiny_engine.edit(replace(tiny_request, num_images=2, image=photo(96, 48), seed=1))
    for _ in range(steps_taken):
        next(edit)
    edit.close()
    fresh = load_engine(EngineConfig(model=tiny_folder, device="cpu"))
    assert np.array_equal(pixels(run(tiny_engine, tiny_request))[0], pixels(run(fresh, tiny_request))[0])


@pytest.mark.parametrize("point", BREAKING_POINTS)
@pytest.mark.parametrize("error", [BrokenOff, KeyboardInterrupt])
def test_an_exception_at_any_point_leaves_the_engine_as_new(
    tiny_folder: Path,
    tiny_engine: Engine,
    tiny_request: EditRequest,
    raising: Callable[..., None],
    point: str,
    error: type[BaseException],
) -> None:
    raising(tiny_engine, point, error())
    with pytest.raises(error):
        run(tiny_engine, tiny_request)
    fresh = load_engine(EngineConfig(model=tiny_folder, device="cpu"))
    done, expected = run(tiny_engine, tiny_request), run(fresh, tiny_request)
    assert np.array_equal(pixels(done)[0], pixels(expected)[0])


def test_an_exception_in_a_preview_leaves_the_engine_as_new(
    tiny_engine: Engine, tiny_request: EditRequest, raising: Callable[..., None]
) -> None:
    expected = run(tiny_engine, tiny_request)
    raising(tiny_engine, "vae.encoder", BrokenOff())  # what the previews' projection is fitted with; the rest is cached
    request = replace(tiny_request, preview_interval=1)
    with pytest.raises(BrokenOff):
        run(tiny_engine, request)
    assert np.array_equal(pixels(run(tiny_engine, request))[0], pixels(expected)[0])


def test_an_edit_closed_while_a_preview_is_checked_leaves_no_thread(
    tiny_engine: Engine, tiny_request: EditRequest
) -> None:
    def screens() -> list[threading.Thread]:
        return [thread for thread in threading.enumerate() if "preview-screen" in thread.name]

    edit = tiny_engine.edit(replace(tiny_request, preview_interval=1, enable_safety_checker=True))
    next(edit)
    assert len(screens()) == 1
    edit.close()
    assert screens() == []
    assert run(tiny_engine, tiny_request).images


def test_closing_stops_within_one_step(tiny_engine: Engine, tiny_request: EditRequest) -> None:
    passes = []
    tiny_engine.model.pipeline.transformer.x_embedder.register_forward_hook(lambda *_: passes.append(1))
    edit = tiny_engine.edit(replace(tiny_request, num_inference_steps=50))
    for _ in range(4):
        next(edit)
    edit.close()
    assert len(passes) == 4


def test_the_caller_s_own_gradient_mode_is_untouched_between_steps(
    tiny_engine: Engine, tiny_request: EditRequest
) -> None:
    edit = tiny_engine.edit(tiny_request)
    for _ in edit:
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()
    with torch.no_grad():
        for _ in tiny_engine.edit(tiny_request):
            assert not torch.is_grad_enabled()
    with torch.inference_mode():
        for _ in tiny_engine.edit(tiny_request):
            assert torch.is_inference_mode_enabled()


def test_an_exception_leaves_the_caller_s_gradient_mode_untouched(
    tiny_engine: Engine, tiny_request: EditRequest, raising: Callable[..., None]
) -> None:
    raising(tiny_engine, "transformer.transformer_blocks.0.attn.to_q", BrokenOff())
    with pytest.raises(BrokenOff):
        run(tiny_engine, tiny_request)
    assert torch.is_grad_enabled()


# Out of memory.


@pytest.mark.parametrize(
    "point", ["transformer.single_transformer_blocks.1.proj_mlp", "vae.decoder.mid_block", "vae.encoder"]
)
def test_out_of_memory_is_an_error_of_its_own_after_which_the_engine_works(
    tiny_engine: Engine, tiny_request: EditRequest, photo: Photo, raising: Callable[..., None], point: str
) -> None:
    expected = pixels(run(tiny_engine, replace(tiny_request, seed=70)))[0]
    raising(tiny_engine, point, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB."), at=1)
    with pytest.raises(EngineOutOfMemory, match="20 GiB"):
        run(tiny_engine, replace(tiny_request, prompt="other", image=photo(48, 80)))
    assert np.array_equal(pixels(run(tiny_engine, replace(tiny_request, seed=70)))[0], expected)


def test_after_running_out_of_memory_nothing_of_the_edit_is_held(
    tiny_engine: Engine, tiny_request: EditRequest
) -> None:
    seen: list[weakref.ref[torch.Tensor]] = []

    def hook(_: torch.nn.Module, given: tuple[torch.Tensor]) -> None:
        seen.append(weakref.ref(given[0]))
        if len(seen) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    transformer = tiny_engine.model.pipeline.transformer
    handle = transformer.transformer_blocks[0].norm1.norm.register_forward_pre_hook(hook)
    gc.disable()  # what is freed must be freed by the engine
    try:
        edit = tiny_engine.edit(tiny_request)
        next(edit)
        try:
            next(edit)
        except EngineOutOfMemory as error:
            kept = error  # a caller may keep the error, and with it all frames it passed through
        assert [reference() for reference in seen] == [None, None]
        assert isinstance(kept, EngineOutOfMemory)
    finally:
        gc.enable()
        handle.remove()


def cuda_error(code: int) -> torch.AcceleratorError:
    """As C++ raises it where pinned host memory or a library's own memory is not to be had."""
    error = torch.AcceleratorError("CUDA error: out of memory")
    error.error_code = code
    return error


@pytest.mark.parametrize(("code", "expected"), [(2, EngineOutOfMemory), (700, torch.AcceleratorError)])
def test_of_cuda_s_errors_only_the_one_for_memory_is_taken_for_it(
    tiny_engine: Engine,
    tiny_request: EditRequest,
    raising: Callable[..., None],
    code: int,
    expected: type[Exception],
) -> None:
    raising(tiny_engine, "transformer.transformer_blocks.0.attn.to_q", cuda_error(code))
    with pytest.raises(expected, match="out of memory"):
        run(tiny_engine, tiny_request)
    assert run(tiny_engine, tiny_request).images


@pytest.mark.parametrize(
    ("free_mib", "expected"), [(100, EngineOutOfMemory), (40_000, RuntimeError)], ids=["full", "roomy"]
)
def test_a_library_that_only_says_it_broke_ran_out_of_memory_where_the_device_is_full(
    tiny_engine: Engine,
    tiny_request: EditRequest,
    raising: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    free_mib: int,
    expected: type[Exception],
) -> None:
    asked = []
    monkeypatch.setattr("kontextd_models.memory.free_bytes", lambda device: asked.append(device) or free_mib * 2**20)
    raising(tiny_engine, "vae.encoder", RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR"))
    with pytest.raises(expected, match="CUDNN_STATUS_INTERNAL_ERROR") as raised:
        run(tiny_engine, tiny_request)
    assert raised.type is expected
    assert asked == [tiny_engine.model.device]
    assert run(tiny_engine, tiny_request).images


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB."),
        MemoryError(),
        cuda_error(2),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_running_out_of_memory_while_loading_is_the_same_error_with_the_way_out(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def exhausted(*_: object) -> None:
        raise error

    with monkeypatch.context() as patched:
        patched.setattr("kontextd_models.memory.place", exhausted)
        with pytest.raises(EngineOutOfMemory, match=r"while the model was loaded.*leaner memory mode than auto"):
            load_engine(EngineConfig(model=tiny_folder, device="cpu"))
    assert load_engine(EngineConfig(model=tiny_folder, device="cpu"))
