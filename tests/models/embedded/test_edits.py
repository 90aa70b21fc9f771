"""The instructions: what they mean in pixels, and how they may be worded."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch
from kontextd_models.embedded import edits, wordings
from kontextd_models.embedded.edits import COLOUR, EDITS, IDENTITY, MASKS, NAMES, apply
from torch import Tensor


@pytest.fixture
def picture() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(3, 64, 96, generator=generator)


def by_name(name: str, picture: Tensor, seed: int = 0) -> Tensor:
    return apply(picture, (NAMES.index(name),), random.Random(seed))


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.name)
def test_an_edit_keeps_shape_and_range_and_changes_the_picture(edit: edits.Edit, picture: Tensor) -> None:
    before = picture.clone()
    after = edit.draw(picture, random.Random(0))
    assert after.shape == picture.shape
    assert after.min() >= 0
    assert after.max() <= 1
    assert (after - before).abs().mean() > 0.01
    assert torch.equal(picture, before)


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.name)
def test_only_random_edits_draw_differently_each_time(edit: edits.Edit, picture: Tensor) -> None:
    one, other = edit.draw(picture, random.Random(1)), edit.draw(picture, random.Random(2))
    assert torch.equal(one, other) == (edit.kind != "random")
    assert torch.equal(one, edit.draw(picture, random.Random(1)))


def test_what_the_names_promise_is_what_happens(picture: Tensor) -> None:
    assert by_name("black and white", picture).std(0).max() < 1e-6
    assert torch.equal(by_name("flip horizontally", picture), picture.flip(2))
    assert torch.equal(by_name("turn upside down", picture), picture.flip(1))
    assert torch.equal(by_name("swap red and blue", picture), picture[[2, 1, 0]])
    assert torch.allclose(by_name("invert", by_name("invert", picture)), picture)
    assert by_name("darker", picture).mean() < picture.mean() < by_name("brighter", picture).mean()
    assert by_name("more contrast", picture).std() > picture.std() > by_name("blur", picture).std()
    warm, cool = by_name("warmer", picture), by_name("cooler", picture)
    assert (warm[0] - warm[2]).mean() > (picture[0] - picture[2]).mean() > (cool[0] - cool[2]).mean()


def test_a_blur_of_a_flat_picture_is_the_picture() -> None:
    flat = torch.full((3, 40, 40), 0.3)
    assert torch.allclose(by_name("blur", flat), flat, atol=1e-6)


def test_a_posterized_ramp_has_three_levels() -> None:
    ramp = torch.linspace(0, 1, 300).expand(3, 32, 300)
    levels = Counter((by_name("posterize", ramp)[0, 16] * 100).round().int().tolist())
    assert {level for level, _ in levels.most_common(3)} == {0, 50, 100}
    assert sum(count for _, count in levels.most_common(3)) > 0.55 * 300


@pytest.mark.parametrize("name", MASKS)
def test_a_local_edit_leaves_the_rest_alone(name: str, picture: Tensor) -> None:
    after = by_name(name, picture)
    mask = MASKS[name](64, 96, picture)
    assert torch.equal(after[:, mask == 0], picture[:, mask == 0])
    assert after[:, mask == 1].std(1).max() < 1e-6  # one colour
    assert 0.1 < mask.mean() < 0.8


def test_the_sky_covers_the_upper_half_only(picture: Tensor) -> None:
    after = by_name("starry sky over the upper half", picture)
    assert torch.equal(after[:, 32:], picture[:, 32:])
    assert (after[:, :32].amax(0) > 0.9).any()  # stars
    assert after[:, :32].median() < 0.4


def test_joined_edits_apply_in_their_order_and_identity_changes_nothing(picture: Tensor) -> None:
    invert, darker = NAMES.index("invert"), NAMES.index("darker")
    rng = random.Random(0)
    assert torch.equal(apply(picture, (invert, darker), rng), (1 - picture) * 0.5)
    assert torch.equal(apply(picture, (darker, invert), rng), 1 - picture * 0.5)
    assert torch.equal(apply(picture, (IDENTITY, IDENTITY), rng), picture)


def test_there_are_the_instructions_that_are_promised_each_in_five_wordings_or_more() -> None:
    assert len(wordings.WORDINGS) == len(EDITS)
    assert Counter(edit.kind for edit in EDITS) == {"colour": 12, "flip": 2, "local": 3, "random": 3}
    assert min(len(set(row)) for row in wordings.WORDINGS) >= 5


def test_no_wording_stands_for_two_instructions() -> None:
    rows = [
        {" ".join(wording.replace("{o}", thing).split()) for wording in row for thing in ("", "it", "the photo")}
        for row in wordings.WORDINGS
    ]
    said = Counter(text for row in rows for text in row)
    assert [text for text, times in said.items() if times > 1] == []


def test_a_prompt_that_is_none_is_never_a_known_one() -> None:
    known, rng = wordings.known_prompts(), random.Random(0)
    drawn = [wordings.other(rng, known) for _ in range(500)]
    assert not {prompt.lower() for prompt in drawn} & known
    assert len(set(drawn)) > 300


def test_prompts_vary_in_case_and_courtesy_and_repeat_with_their_seed() -> None:
    prompts = [wordings.single(0, random.Random(seed)) for seed in range(100)]
    assert prompts == [wordings.single(0, random.Random(seed)) for seed in range(100)]
    assert any(prompt.isupper() for prompt in prompts)
    assert any("please" in prompt.lower() for prompt in prompts)
    first, second = COLOUR[:2]
    joined = wordings.joined(first, second, random.Random(0))
    assert len(joined) > max(len(wordings.single(first, random.Random(0))), 10)
