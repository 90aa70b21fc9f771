"""LoRAs through the engine's door: files in, pictures and reports out, and the base again after anything."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from dialect_files import CASES, build
from hand_made import digest, errors
from kontextd_models import Done, EditRequest, EngineConfig, LoraLimits, LoraWeight, load_engine
from kontextd_models.engine import Engine
from kontextd_models.errors import LoraError, LoraFileError, LoraMismatch
from kontextd_models.errors import OutOfMemory as EngineOutOfMemory
from kontextd_models.lora import merging, stack
from kontextd_models.lora.layout import Component, Layout, Parameter
from kontextd_models.lora.merging import Merger
from kontextd_models.lora.pristine import parameters_of
from safetensors.torch import save_file
from torch import Tensor

Write = Callable[..., LoraWeight]


def run(engine: Engine, request: EditRequest, *loras: LoraWeight) -> Done:
    *_, done = engine.edit(replace(request, loras=loras))
    assert isinstance(done, Done)
    return done


def picture(done: Done) -> np.ndarray:
    return np.asarray(done.images[0])


@pytest.fixture
def write(tmp_path: Path, tiny_layout: Layout) -> Write:
    """A LoRA file that is strong enough to be seen, and the request's line for it."""

    def make(name: str = "ink", scale: float = 1.0, dialect: str = "diffusers", **options: object) -> LoraWeight:
        file = build(tiny_layout, dialect, **{"rank": 4, "alpha": 16.0, **options})
        path = tmp_path / f"{name}.safetensors"
        tensors = {
            key: value * 3 if "lora" in key and "alpha" not in key else value for key, value in file.tensors.items()
        }
        save_file(tensors, path)
        return LoraWeight(path, scale, name)

    return make  # fmt: skip


def in_transformer(name: str) -> bool:
    return name.startswith("transformer.")


def in_encoders(name: str) -> bool:
    return name.startswith("text_encoder")


# What comes out.


@pytest.mark.parametrize(("dialect", "form"), CASES)
def test_a_file_of_every_dialect_and_form_changes_the_weights_by_what_it_says_and_nothing_else(
    tiny_folder: Path, tmp_path: Path, tiny_layout: Layout, dialect: str, form: str
) -> None:
    engine = load_engine(EngineConfig(model=tiny_folder, device="cpu", dtype="bfloat16"))
    now = parameters_of(engine.model.pipeline)
    base = {at: value.detach().clone() for at, value in now.items()}
    file = build(tiny_layout, dialect, form=form, rank=4, weights=base)
    save_file(file.tensors, tmp_path / "style.safetensors")
    lora = LoraWeight(tmp_path / "style.safetensors", 0.75)
    done = stack.LoraStack(engine.model, EngineConfig()).merge([lora])
    assert done.warnings == ()
    for at, value in now.items():
        if at in file.expected:
            error, floor = errors(value.detach(), base[at].double() + 0.75 * file.expected[at])
            assert error < 1.002 * floor, at
        else:
            assert torch.equal(value, base[at]), at


def test_a_lora_changes_the_picture_and_an_empty_list_brings_the_base_back_to_the_bit(
    tiny_engine: Engine, tiny_request: EditRequest, write: Write
) -> None:
    bits = digest(tiny_engine.model.pipeline)
    base, styled = run(tiny_engine, tiny_request), run(tiny_engine, tiny_request, write())
    assert not np.array_equal(picture(styled), picture(base))
    assert digest(tiny_engine.model.pipeline) != bits
    assert np.array_equal(picture(run(tiny_engine, tiny_request)), picture(base))
    assert digest(tiny_engine.model.pipeline) == bits


def test_a_lora_at_scale_0_is_the_base_and_any_order_is_the_same_picture(
    tiny_engine: Engine, tiny_request: EditRequest, write: Write
) -> None:
    first, second = write("first", 0.7), write("second", -1.2, "kohya", seed=1)
    base = picture(run(tiny_engine, tiny_request))
    assert np.array_equal(picture(run(tiny_engine, tiny_request, replace(first, scale=0.0))), base)
    both = picture(run(tiny_engine, tiny_request, first, second))
    run(tiny_engine, tiny_request, second)
    assert np.array_equal(picture(run(tiny_engine, tiny_request, second, first)), both)
    assert not np.array_equal(both, base)


def test_what_became_of_each_lora_is_reported(tiny_engine: Engine, tiny_request: EditRequest, write: Write) -> None:
    ink, paper = write("ink", 0.5), replace(write("paper", 2, "kohya", seed=1), name="")
    run(tiny_engine, tiny_request, ink)
    done = run(tiny_engine, tiny_request, ink, paper)
    first, second = done.loras
    assert (first.name, first.scale, first.dialects, first.was_cached) == ("ink", 0.5, ("diffusers",), True)
    assert (second.name, second.scale, second.dialects, second.was_cached) == (
        "paper.safetensors",
        2,
        ("kohya",),
        False,
    )
    assert first.matched == first.total > 0
    assert first.unmatched == second.unmatched == done.warnings == ()
    assert len({first.key, second.key}) == 2
    assert run(tiny_engine, tiny_request).loras == ()


def test_the_time_of_merging_is_told_and_only_a_set_that_was_there_already_is_a_hit(
    tiny_engine: Engine, tiny_request: EditRequest, write: Write
) -> None:
    first, second = write("first"), write("second", seed=1)
    found = [
        run(tiny_engine, tiny_request, *loras) for loras in [(), (first,), (first,), (second, first), (first, second)]
    ]
    assert ["loras" in done.cache_hits for done in found] == [False, True, True, True, True]
    assert [done.cache_hits.get("loras") for done in found] == [None, False, True, False, True]
    assert found[0].timings["merge"] == 0.0
    assert all(done.timings["merge"] > 0 for done in found[1:])
    assert run(tiny_engine, tiny_request).timings["merge"] > 0  # the base is brought back
    assert run(tiny_engine, tiny_request).timings["merge"] == 0.0


def test_a_file_that_fits_in_part_is_merged_with_a_warning_that_names_the_rest(
    tiny_engine: Engine, tiny_request: EditRequest, write: Write, tmp_path: Path, tiny_layout: Layout,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    file = build(tiny_layout, "diffusers")
    beyond = {
        f"transformer.transformer_blocks.{n}.attn.to_q.lora_{f}.weight": torch.ones(4, 4) for n in (7, 8) for f in "AB"
    }
    save_file(file.tensors | beyond, tmp_path / "deep.safetensors")
    done = run(tiny_engine, tiny_request, write(), LoraWeight(tmp_path / "deep.safetensors", name="d" * 300))
    (warning,) = done.warnings
    assert warning.startswith(f"loras[1] ({'d' * 100}…): 4 of its {len(file.tensors) + 4} tensors have no place")
    assert "transformer_blocks.7.attn.to_q.lora_A.weight" in warning
    assert warning.endswith(" and 1 more.")
    assert warning in caplog.text
    assert set(done.loras[1].unmatched) == beyond.keys()
    assert done.loras[1].matched == len(file.tensors)


def test_prompts_are_encoded_anew_where_the_text_encoders_changed_and_only_there(
    tiny_engine: Engine, tiny_request: EditRequest, write: Write
) -> None:
    words, style = write("words", only=in_encoders), write("style", only=in_transformer)
    sets = [(), (style,), (words,), (words, style), (replace(words, scale=0.5),), ()]
    found = [run(tiny_engine, tiny_request, *loras) for loras in sets]
    assert [done.cache_hits["prompt"] for done in found] == [False, True, False, True, False, True]
    assert np.array_equal(picture(found[0]), picture(found[-1]))
    fresh = load_engine(EngineConfig(model=tiny_engine.model.folder, device="cpu"))
    assert np.array_equal(picture(run(fresh, tiny_request, words, style)), picture(found[3]))
    assert len({picture(done).tobytes() for done in found}) == 5


def test_a_file_that_was_exchanged_under_its_name_is_read_anew(
    tiny_engine: Engine, tiny_request: EditRequest, write: Write
) -> None:
    ink = write("ink")
    before = run(tiny_engine, tiny_request, ink)
    write("ink", seed=9)
    after = run(tiny_engine, tiny_request, ink)
    assert before.loras[0].key != after.loras[0].key
    assert not after.cache_hits["loras"]
    assert not np.array_equal(picture(before), picture(after))


def test_two_engines_around_one_model_know_of_each_other_s_merges(
    tiny_engine: Engine, tiny_request: EditRequest, write: Write
) -> None:
    other = Engine(tiny_engine.model, EngineConfig(prompt_cache_bytes=0, reference_cache_bytes=0))
    base = picture(run(tiny_engine, tiny_request))
    styled = picture(run(tiny_engine, tiny_request, write()))
    assert np.array_equal(picture(run(other, tiny_request)), base)
    assert np.array_equal(picture(run(tiny_engine, tiny_request, write())), styled)


def test_a_merge_in_a_caller_s_inference_mode_can_be_undone_outside_of_it(
    tiny_engine: Engine, tiny_request: EditRequest, write: Write
) -> None:
    base = picture(run(tiny_engine, tiny_request))
    with torch.inference_mode():
        run(tiny_engine, tiny_request, write())
    assert np.array_equal(picture(run(tiny_engine, tiny_request)), base)


def test_any_number_of_loras_is_taken(tiny_engine: Engine, tiny_request: EditRequest, write: Write) -> None:
    """As many as 64, of mixed dialects and ranks."""
    dialects = [dialect for dialect, form in CASES if form == "lora"]
    loras = [
        write(f"{seed}", 0.05, dialects[seed % len(dialects)], seed=seed, rank=1 + seed % 8, alpha=2.0)
        for seed in range(64)
    ]
    done = run(tiny_engine, tiny_request, *loras)
    assert len(done.loras) == 64
    assert {dialect for report in done.loras for dialect in report.dialects} > {"kohya", "diffusers", "XLabs"}


# What is refused.


@pytest.mark.parametrize("scale", [math.nan, math.inf, -math.inf, 10.1, -10.1, True, "1", None])
def test_a_scale_out_of_range_is_refused_at_the_call(
    tiny_engine: Engine, tiny_request: EditRequest, write: Write, scale: object
) -> None:
    loras = (write("first"), replace(write("second"), scale=scale))
    with pytest.raises(LoraError, match=r"^loras\[1\] \(second\): scale is .*from -10 to 10") as caught:
        tiny_engine.edit(replace(tiny_request, loras=loras))
    assert (caught.value.index, caught.value.field) == (1, "loras")


@pytest.mark.parametrize("scale", [10, -10, 0.5])
def test_the_ends_of_the_scale_s_range_are_allowed(
    tiny_engine: Engine, tiny_request: EditRequest, write: Write, scale: float
) -> None:
    assert run(tiny_engine, tiny_request, write(scale=scale)).loras[0].scale == scale


def test_the_range_of_scales_is_a_setting(tiny_folder: Path, tiny_request: EditRequest, write: Write) -> None:
    limits = LoraLimits(max_scale=1.5)
    engine = load_engine(EngineConfig(model=tiny_folder, device="cpu", lora_limits=limits))
    with pytest.raises(LoraError, match=r"from -1\.5 to 1\.5"):
        engine.edit(replace(tiny_request, loras=(write(scale=1.6),)))


def test_a_file_that_is_not_there_is_refused_at_the_call(
    tiny_engine: Engine, tiny_request: EditRequest, write: Write, tmp_path: Path
) -> None:
    for path in (tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(LoraFileError, match=r"^loras\[1\] \(gone\): there is no such file") as caught:
            tiny_engine.edit(replace(tiny_request, loras=(write(), LoraWeight(path, name="gone"))))
        assert caught.value.index == 1


def test_a_name_that_no_file_can_have_is_refused_as_one_that_is_not_there(
    tiny_engine: Engine, tiny_request: EditRequest, tmp_path: Path
) -> None:
    path = tmp_path / ("x" * 300)
    with pytest.raises(LoraFileError, match=r"^loras\[0\] \(x{100}…\): File name too long\. Give a file") as caught:
        tiny_engine.edit(replace(tiny_request, loras=(LoraWeight(path),)))
    assert caught.value.index == 0


def test_one_bad_file_among_good_ones_is_named_and_nothing_is_merged(
    tiny_engine: Engine, tiny_request: EditRequest, write: Write, tmp_path: Path
) -> None:
    bits, base = digest(tiny_engine.model.pipeline), picture(run(tiny_engine, tiny_request))
    (tmp_path / "page.safetensors").write_text("<!DOCTYPE html><html><body>Sign in</body></html>")
    save_file({"unet.down_blocks.0.lora_A.weight": torch.ones(4, 4)}, tmp_path / "sdxl.safetensors")
    cases = {"page": LoraFileError, "sdxl": LoraMismatch}
    for name, kind in cases.items():
        bad = LoraWeight(tmp_path / f"{name}.safetensors", name=f"my {name}")
        edit = tiny_engine.edit(replace(tiny_request, loras=(write("a"), write("b", seed=1), bad, write("c", seed=2))))
        with pytest.raises(kind, match=rf"^loras\[2\] \(my {name}\): (?!my {name}: )") as caught:
            next(edit)
        assert caught.value.index == 2
        assert digest(tiny_engine.model.pipeline) == bits
        assert np.array_equal(picture(run(tiny_engine, tiny_request)), base)


def test_a_bad_file_leaves_the_set_before_it_merged(
    tiny_engine: Engine, tiny_request: EditRequest, write: Write, tmp_path: Path
) -> None:
    run(tiny_engine, tiny_request, write())
    (tmp_path / "bad.safetensors").write_bytes(b"")
    with pytest.raises(LoraError):
        run(tiny_engine, tiny_request, LoraWeight(tmp_path / "bad.safetensors"))
    assert run(tiny_engine, tiny_request, write()).cache_hits["loras"]


def test_loading_an_engine_reads_no_lora_and_an_edit_only_its_own(
    tiny_engine: Engine, tiny_request: EditRequest, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    def merged(*_: object) -> None:
        raise AssertionError("nothing was to be merged")

    monkeypatch.setattr(Merger, "merge", merged)
    write()
    assert run(tiny_engine, tiny_request).images
    assert tiny_engine.edit(replace(tiny_request, loras=(write(),)))  # nothing runs before its first step is asked for


# Breaking off.


class BrokenOff(Exception):
    """Raised by the tests inside a merge."""


@pytest.fixture
def break_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException | None, int], None]:
    """Have the nth weight that is merged into from now on be written wrongly, and raise."""
    armed: dict[str, object] = {"error": None, "left": 0}

    def spoiling(base: Tensor, up: Tensor, down: Tensor, out: Tensor) -> Tensor:
        armed["left"] -= 1
        if armed["error"] is not None and armed["left"] == 0:
            product(base, up * 3, down, out=out)
            error, armed["error"] = armed["error"], None
            raise error
        return product(base, up, down, out=out)

    product = merging.merge_low_rank
    monkeypatch.setattr(merging, "merge_low_rank", spoiling)
    return lambda error, at: armed.update(error=error, left=at)


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (BrokenOff(), BrokenOff),
        (KeyboardInterrupt(), KeyboardInterrupt),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB."), EngineOutOfMemory),
    ],
)
def test_an_edit_that_breaks_off_while_merging_leaves_nothing_behind(
    tiny_engine: Engine, tiny_request: EditRequest, write: Write, break_at: Callable[..., None], error: BaseException,
    raised: type[BaseException],
) -> None:  # fmt: skip
    base = picture(run(tiny_engine, tiny_request))
    styled = picture(run(tiny_engine, tiny_request, write()))
    for loras, expected in [((), base), ((write(),), styled)]:
        break_at(error, 7)
        with pytest.raises(raised):
            run(tiny_engine, tiny_request, write("other", seed=5))
        assert np.array_equal(picture(run(tiny_engine, tiny_request, *loras)), expected)


def test_after_random_edits_with_errors_and_cancels_an_empty_list_is_the_base_to_the_bit(
    tiny_engine: Engine, tiny_request: EditRequest, write: Write, break_at: Callable[..., None], tmp_path: Path
) -> None:
    bits, base, chance = digest(tiny_engine.model.pipeline), picture(run(tiny_engine, tiny_request)), random.Random(2)
    (tmp_path / "bad.safetensors").write_bytes(b"\0" * 100)
    bad = LoraWeight(tmp_path / "bad.safetensors")
    library = [
        write(f"{seed}", dialect=dialect, seed=seed) for seed, dialect in enumerate(["diffusers", "kohya", "BFL"])
    ]
    ends = []
    for _ in range(25):
        loras = [
            replace(lora, scale=chance.choice([-1, 0, 0.5, 2])) for lora in chance.sample(library, chance.randint(0, 3))
        ]
        end = chance.choice(["whole", "cancel", "error", "bad file"])
        break_at(BrokenOff() if end == "error" else None, chance.randint(1, 30))
        edit = tiny_engine.edit(replace(tiny_request, loras=(*loras, *[bad] * (end == "bad file"))))
        try:
            next(edit)
            if end == "cancel":
                edit.close()
            ends.append(list(edit) and end)
        except (BrokenOff, LoraError) as error:
            ends.append(type(error).__name__)
    assert {"whole", "BrokenOff", "LoraFileError"} <= set(map(str, ends))
    break_at(None, 0)
    assert np.array_equal(picture(run(tiny_engine, tiny_request)), base)
    assert digest(tiny_engine.model.pipeline) == bits


def test_biases_and_text_encoders_come_back_too(tiny_engine: Engine, tiny_request: EditRequest, write: Write) -> None:
    bits, before = digest(tiny_engine.model.pipeline), parameters_of(tiny_engine.model.pipeline)
    copies = {at: value.detach().clone() for at, value in before.items()}
    run(tiny_engine, tiny_request, write("full", form="full"))
    changed = {at for at, value in before.items() if not torch.equal(value, copies[at])}
    assert {at.component for at in changed} == set(Component)
    assert Parameter(Component.TRANSFORMER, "proj_out.weight") in changed
    run(tiny_engine, tiny_request)
    assert digest(tiny_engine.model.pipeline) == bits
