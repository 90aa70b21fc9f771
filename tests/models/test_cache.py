"""The byte-budgeted cache, and what it does for the engine: a second edit skips both encoders."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kontextd_models import Done, EditRequest, EngineConfig, ResolutionMode
from kontextd_models.cache import ByteLRU, content_key
from kontextd_models.engine import Engine
from PIL import Image

Photo = Callable[[int, int], Image.Image]


@dataclass(frozen=True)
class Blob:
    size_bytes: int


def test_what_was_used_longest_ago_is_forgotten_first() -> None:
    cache = ByteLRU[Blob](30)
    for key in "abc":
        cache.put(key, Blob(10))
    assert cache.get("a") == Blob(10)
    cache.put("d", Blob(10))
    assert [key for key in "abcd" if key in cache] == ["a", "c", "d"]


def test_a_value_larger_than_the_budget_is_not_kept_and_drives_nothing_out() -> None:
    cache = ByteLRU[Blob](30)
    cache.put("a", Blob(10))
    cache.put("big", Blob(31))
    assert ("a" in cache, "big" in cache, cache.used_bytes) == (True, False, 10)


def test_a_larger_value_under_the_same_key_replaces_the_old_one() -> None:
    cache = ByteLRU[Blob](30)
    cache.put("a", Blob(10))
    cache.put("a", Blob(31))
    assert (cache.get("a"), cache.used_bytes) == (None, 0)


def test_a_budget_of_nothing_keeps_nothing() -> None:
    cache = ByteLRU[Blob](0)
    cache.put("a", Blob(1))
    assert len(cache) == 0


def test_hits_and_misses_are_counted() -> None:
    cache = ByteLRU[Blob](30)
    cache.put("a", Blob(10))
    for key in ("a", "a", "b"):
        cache.get(key)
    assert (cache.hits, cache.misses) == (2, 1)


@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(0, 40), st.booleans())), st.integers(0, 60))
def test_the_budget_holds_and_the_sum_is_right_whatever_happens(ops: list[tuple[str, int, bool]], budget: int) -> None:
    cache, kept = ByteLRU[Blob](budget), {}
    for key, size, is_put in ops:
        if is_put:
            cache.put(key, Blob(size))
            kept[key] = Blob(size)
        else:
            assert cache.get(key) in (None, kept.get(key))
        present = [kept[key].size_bytes for key in kept if key in cache]
        assert cache.used_bytes == sum(present) <= budget


def test_keys_differ_where_any_part_differs_in_value_type_or_place() -> None:
    keys = {
        content_key(*parts) for parts in [("a", "b"), ("ab",), ("b", "a"), (b"a", "b"), ("1",), (1,), (1, 1), (11,)]
    }
    assert len(keys) == 8
    assert content_key("a", 1) == content_key("a", 1)


# In the engine.


def load(folder: Path, **settings: int) -> Engine:
    return Engine.load(EngineConfig(model=folder, device="cpu", **settings))


def edited(engine: Engine, image: Image.Image, prompt: str = "make it red", **values: object) -> Done:
    request = EditRequest(image, prompt, 2, 3, enable_safety_checker=False, **values)
    *_, done = engine.edit(request)
    assert isinstance(done, Done)
    return done


def count_encodings(engine: Engine) -> dict[str, int]:
    """Counts, from now on, how often each encoder really runs."""
    pipeline, counts = engine.model.pipeline, {"text_encoder": 0, "text_encoder_2": 0, "vae.encoder": 0}

    def counting(name: str) -> Callable[..., None]:
        def hook(*_: object) -> None:
            counts[name] += 1

        return hook

    for name in counts:
        pipeline_part, _, inner = name.partition(".")
        module = getattr(pipeline, pipeline_part)
        module.get_submodule(inner).register_forward_hook(counting(name))
    return counts


def test_a_second_edit_skips_both_encoders_and_is_equal_to_the_bit(tiny_folder: Path, photo: Photo) -> None:
    engine = load(tiny_folder)
    counts = count_encodings(engine)
    first = edited(engine, photo(64, 64))
    assert counts == {"text_encoder": 1, "text_encoder_2": 1, "vae.encoder": 1}
    second = edited(engine, photo(64, 64).copy())
    assert counts == {"text_encoder": 1, "text_encoder_2": 1, "vae.encoder": 1}
    assert (first.cache_hits, second.cache_hits) == (
        {"prompt": False, "reference": False},
        {"prompt": True, "reference": True},
    )
    assert np.array_equal(np.asarray(first.images[0]), np.asarray(second.images[0]))


def test_several_images_encode_once(tiny_folder: Path, photo: Photo) -> None:
    engine = load(tiny_folder)
    counts = count_encodings(engine)
    edited(engine, photo(64, 64), num_images=3)
    assert counts == {"text_encoder": 1, "text_encoder_2": 1, "vae.encoder": 1}


@pytest.mark.parametrize(
    ("prompt", "shift", "mode", "hits"),
    [
        ("make it blue", 0, ResolutionMode.MATCH_INPUT, {"prompt": False, "reference": True}),
        ("make it red", 1, ResolutionMode.MATCH_INPUT, {"prompt": True, "reference": False}),
        ("make it red", 0, ResolutionMode.R1_1, {"prompt": True, "reference": False}),
    ],
    ids=["other prompt", "one pixel differs", "another grid"],
)
def test_only_what_is_the_same_is_taken_from_the_cache(
    tiny_folder: Path, photo: Photo, prompt: str, shift: int, mode: ResolutionMode, hits: dict[str, bool]
) -> None:
    engine = load(tiny_folder)
    edited(engine, photo(128, 72))
    other = photo(128, 72)
    other.putpixel((9, 9), (other.getpixel((9, 9))[0] ^ shift, 0, 0) if shift else other.getpixel((9, 9)))
    done = edited(engine, other, prompt, resolution_mode=mode)
    assert done.cache_hits == hits
    fresh = edited(load(tiny_folder), other, prompt, resolution_mode=mode)
    assert np.array_equal(np.asarray(done.images[0]), np.asarray(fresh.images[0]))


def test_without_a_budget_every_edit_encodes_and_the_result_is_the_same(tiny_folder: Path, photo: Photo) -> None:
    engine = load(tiny_folder, prompt_cache_bytes=0, reference_cache_bytes=0)
    first, second = edited(engine, photo(64, 64)), edited(engine, photo(64, 64))
    assert second.cache_hits == {"prompt": False, "reference": False}
    assert np.array_equal(np.asarray(first.images[0]), np.asarray(second.images[0]))


def test_what_is_cached_is_what_the_tensors_take(tiny_folder: Path, photo: Photo) -> None:
    engine = load(tiny_folder)
    edited(engine, photo(64, 64))
    tokens, width, pooled = 24, 32, 32
    assert engine.prompts.used_bytes == 4 * (tokens * width + pooled + tokens * 3)
    assert engine.references.used_bytes == 4 * (16 * 64 + 16 * 3)


def test_a_caller_s_autocast_reaches_neither_the_picture_nor_the_caches(tiny_folder: Path, photo: Photo) -> None:
    plain = edited(load(tiny_folder), photo(64, 64))
    engine = load(tiny_folder)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        first = edited(engine, photo(64, 64))
        assert torch.is_autocast_enabled("cpu")
    second = edited(engine, photo(64, 64))
    assert second.cache_hits == {"prompt": True, "reference": True}
    for done in (first, second):
        assert np.array_equal(np.asarray(done.images[0]), np.asarray(plain.images[0]))


def test_what_was_cached_in_a_caller_s_inference_mode_serves_outside_of_it(tiny_folder: Path, photo: Photo) -> None:
    engine = load(tiny_folder)
    with torch.inference_mode():
        first = edited(engine, photo(64, 64))
    second = edited(engine, photo(64, 64))
    assert second.cache_hits == {"prompt": True, "reference": True}
    assert np.array_equal(np.asarray(first.images[0]), np.asarray(second.images[0]))
