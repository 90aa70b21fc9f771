"""Ways to run a block: the first that works, and a loud fall to the next."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from kontextd_models import Acceleration, Done, EditRequest, EngineConfig, load_engine
from kontextd_models.acceleration.preset import SHORTCUTS
from kontextd_models.engine import Engine
from kontextd_models.errors import OutOfMemory
from kontextd_models.execution import blocks as module
from kontextd_models.execution.attention_backends import Backend
from kontextd_models.execution.blocks import NATIVE_WAY, Blocks, Way, open_blocks
from kontextd_models.execution.planning import ExecutionPlan
from kontextd_models.execution.trial import Trial
from kontextd_models.transformer.attention import native
from torch import Tensor


class Failing:
    """A way that raises from its nth call on; it counts them."""

    def __init__(self, error: Exception, at: int = 1) -> None:
        self.error, self.at, self.calls = error, at, 0

    def way(self, name: str = "by a backend") -> Way:
        return Way(name, *(self._then(run) for run in (NATIVE_WAY.double, NATIVE_WAY.single, NATIVE_WAY.last_single)))

    def _then(self, run: Callable[..., object]) -> Callable[..., object]:
        def call(*given: object) -> object:
            self.calls += 1
            if self.calls >= self.at:
                raise self.error
            return run(*given)

        return call


def picture(engine: Engine, request: EditRequest) -> np.ndarray:
    *_, done = engine.edit(request)
    assert isinstance(done, Done)
    return np.asarray(done.images[0])


def running(engine: Engine, blocks: Blocks) -> Engine:
    """With shortcuts in `none`, which blocks that round anyway take, so that a way that is given up changes no bit."""
    changed = Engine(replace(engine.model, blocks=blocks), EngineConfig(prompt_cache_bytes=0, reference_cache_bytes=0))
    changed.presets = replace(changed.presets, rows={**changed.presets.rows, Acceleration.NONE: SHORTCUTS})
    return changed


@pytest.mark.parametrize("at", [1, 2, 5])
def test_a_way_that_fails_is_given_up_once_and_the_edit_goes_on_to_the_same_bits(
    tiny_engine: Engine, tiny_request: EditRequest, caplog: pytest.LogCaptureFixture, at: int
) -> None:
    failing = Failing(RuntimeError("no kernel image\nmore"), at)
    engine = running(tiny_engine, Blocks((failing.way(), NATIVE_WAY)))
    assert not engine.model.blocks.is_plain
    assert engine.model.numerics == "float32, blocks by a backend"
    with caplog.at_level(logging.WARNING):
        found = picture(engine, tiny_request)
        assert np.array_equal(found, picture(engine, tiny_request))
    assert np.array_equal(found, picture(running(tiny_engine, Blocks((NATIVE_WAY,))), tiny_request))
    assert failing.calls == at
    (note,) = engine.model.notes
    assert note == (
        "blocks that run by a backend failed (RuntimeError: no kernel image more); "
        "from now on they run uncompiled with native attention."
    )
    assert [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING] == [note]
    assert engine.model.blocks.is_plain


def test_the_ways_are_tried_in_their_order(tiny_engine: Engine, tiny_request: EditRequest) -> None:
    first, second = Failing(ValueError("one")), Failing(RuntimeError("two"), at=3)
    blocks = Blocks((first.way("first"), second.way("second"), NATIVE_WAY), ["of attention"])
    picture(running(tiny_engine, blocks), tiny_request)
    assert [note.partition(")")[0] for note in blocks.notes] == [
        "of attention",
        "blocks that run first failed (ValueError: one",
        "blocks that run second failed (RuntimeError: two",
    ]


def test_the_last_way_s_failure_is_the_caller_s(tiny_engine: Engine, tiny_request: EditRequest) -> None:
    blocks = Blocks((Failing(RuntimeError("broken")).way(),))
    with pytest.raises(RuntimeError, match="broken"):
        picture(running(tiny_engine, blocks), tiny_request)
    assert blocks.notes == ()


def test_running_out_of_memory_gives_no_way_up(tiny_engine: Engine, tiny_request: EditRequest) -> None:
    blocks = Blocks((Failing(torch.OutOfMemoryError("full")).way(), NATIVE_WAY))
    with pytest.raises(OutOfMemory):
        picture(running(tiny_engine, blocks), tiny_request)
    assert (blocks.way, blocks.notes) == ("by a backend", ())


@pytest.mark.parametrize(("free_mib", "is_given_up"), [(100, False), (40_000, True)], ids=["full", "roomy"])
def test_a_library_that_breaks_gives_a_way_up_only_where_the_device_has_room(
    tiny_engine: Engine, free_mib: int, is_given_up: bool
) -> None:
    error = RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR")
    blocks = Blocks((Failing(error).way(), NATIVE_WAY), free_bytes=lambda: free_mib * 2**20)
    block = tiny_engine.model.pipeline.transformer.single_transformer_blocks[0]
    tokens, modulation, angles = torch.zeros(1, 3, 32), torch.zeros(1, 96), torch.zeros(3, 16)
    with torch.no_grad(), nullcontext() if is_given_up else pytest.raises(RuntimeError, match="INTERNAL_ERROR"):
        blocks.single(block, tokens, modulation, (angles, angles), None)
    assert blocks.is_plain == is_given_up


def test_an_interrupt_gives_no_way_up(tiny_engine: Engine, tiny_request: EditRequest) -> None:
    blocks = Blocks((Failing(KeyboardInterrupt()).way(), NATIVE_WAY))  # type: ignore[arg-type]  # no Exception
    with pytest.raises(KeyboardInterrupt):
        picture(running(tiny_engine, blocks), tiny_request)
    assert blocks.notes == ()


def test_an_engine_on_the_cpu_runs_the_plain_way(tiny_engine: Engine) -> None:
    assert tiny_engine.model.blocks.is_plain
    assert tiny_engine.model.numerics == "float32"
    assert tiny_engine.model.notes == ()


def opened(engine: Engine, monkeypatch: pytest.MonkeyPatch, plan: ExecutionPlan, backend: Backend) -> Blocks:
    monkeypatch.setattr(module, "choose", lambda *_: backend)
    monkeypatch.setattr(Trial, "run", lambda *_: None)
    blocks = open_blocks(plan, engine.model.pipeline, torch.device("cpu"), torch.float32, 16, None)
    assert blocks.notes[: len(backend.notes)] == backend.notes
    return blocks


def names(blocks: Blocks) -> list[str]:
    """Of the ways in their order."""
    return [way.name for way in blocks._ways]


def other(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return native(query, key, value)


def test_compiled_comes_before_uncompiled_and_a_backend_before_native(
    tiny_engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled, eager = ExecutionPlan(compiled=True, attention="auto"), ExecutionPlan(attention="auto")
    flash, plain = Backend("flash", other, ("a note",)), Backend("native", native)
    last = "uncompiled with native attention"
    expected = [
        (compiled, flash, ["compiled with flash attention", "uncompiled with flash attention", last]),
        (compiled, plain, ["compiled with native attention", last]),
        (eager, flash, ["uncompiled with flash attention", last]),
        (eager, plain, [last]),
    ]
    for plan, backend, expected_names in expected:
        assert names(opened(tiny_engine, monkeypatch, plan, backend)) == expected_names


def test_kernels_that_are_asked_for_come_before_formulas(tiny_engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, last = Backend("native", native), "uncompiled with native attention"
    with_kernels = f"{last} and kernels"
    assert names(opened(tiny_engine, monkeypatch, ExecutionPlan(kernels="on"), plain)) == [with_kernels, last]
    both = ExecutionPlan(compiled=True, kernels="on")
    assert names(opened(tiny_engine, monkeypatch, both, plain)) == [
        "compiled with native attention and kernels",
        with_kernels,
        last,
    ]


@pytest.mark.parametrize(
    ("error", "seconds", "way", "said"),
    [
        (0.4, (1.0, 2.0), "compiled with native attention and kernels", "take 0.500 times as long as compiled"),
        (0.4, (0.99, 1.0), "compiled with native attention", "take 0.990 times as long as compiled"),
        (0.4, (2.0, 1.0), "compiled with native attention", "take 2.000 times as long as compiled"),
        (1.5, (1.0, 2.0), "compiled with native attention", "are off by 1.5 times what is allowed, and not used"),
        (float("nan"), (1.0, 2.0), "compiled with native attention", "are off by nan times what is allowed"),
        (OSError("ptxas"), (1.0, 2.0), "compiled with native attention", "failed and are not used: ptxas"),
    ],
)
def test_kernels_are_taken_by_themselves_where_they_are_right_and_faster(
    tiny_engine: Engine,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: float | OSError,
    seconds: tuple[float, float],
    way: str,
    said: str,
) -> None:
    def measured(*_: object) -> float:
        if isinstance(error, OSError):
            raise error
        return error

    monkeypatch.setattr(Trial, "error", measured)
    monkeypatch.setattr(Trial, "seconds", lambda *_: seconds)
    with caplog.at_level(logging.INFO):
        plan = ExecutionPlan(compiled=True, kernels="auto")
        blocks = opened(tiny_engine, monkeypatch, plan, Backend("native", native))
    assert blocks.way == way
    assert names(blocks)[-2:] == ["compiled with native attention", "uncompiled with native attention"]
    is_fault = "times as long" not in said
    (told,) = blocks.notes if is_fault else blocks.tried
    assert said in told
    assert told in caplog.text
    assert blocks.tried + blocks.notes == (told,)  # a fault is a note, which /health shows; slower kernels are none


def test_memory_that_runs_out_while_kernels_are_tried_is_the_caller_s(
    tiny_engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> float:
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(Trial, "error", full)
    with pytest.raises(torch.OutOfMemoryError):
        opened(tiny_engine, monkeypatch, ExecutionPlan(compiled=True, kernels="auto"), Backend("native", native))


def test_what_runs_and_what_failed_reaches_the_description(tiny_folder: Path) -> None:
    from kontextd_models.description import as_text, choice, describe

    config = EngineConfig(model=tiny_folder, device="cpu", precision="fp8", attention="fa3")
    announced = describe(choice(config))
    assert announced == describe(load_engine(config).model)
    assert (announced["precision"], announced["compiled"]) == ("fp8", False)
    assert len(announced["notes"]) == 2
    lines = as_text(choice(config)).splitlines()
    assert "blocks    fp8 precision, not compiled, attention native, no kernels" in lines
    assert sum(line.startswith("note      ") for line in lines) == 2
