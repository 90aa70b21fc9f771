"""Resolution planning over all sizes a caller can send, for Kontext's limits and the embedded model's."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kontextd_models.errors import AspectRatioOutOfRange, ImageTooSmall, ModelError
from kontextd_models.limits import KONTEXT_PREFERRED_SIZES, ModelLimits, limits_from_json
from kontextd_models.records import ResolutionMode
from kontextd_models.resolution import SizePlan, plan, preferred_sizes

KONTEXT = ModelLimits()
EMBEDDED = ModelLimits(preferred_sizes=preferred_sizes(256**2), native_area=256**2, max_area=512**2, min_area=128**2)
MODELS = {"kontext": KONTEXT, "embedded": EMBEDDED}
RATIOS = [mode for mode in ResolutionMode if ":" in mode.value]

# The bounds that the docstring of `resolution` states, by model.
OVER_CEILING = {"kontext": 0.008, "embedded": 0.021}
UNDER_FLOOR = {"kontext": 0.038, "embedded": 0.073}
AUTO = {"kontext": 0.082, "embedded": 0.095}
OWN_REFERENCE = {"kontext": 0.011, "embedded": 0.043}

examples = settings(max_examples=300, deadline=None, derandomize=True, database=None)
models = st.sampled_from(sorted(MODELS))
modes = st.sampled_from(list(ResolutionMode))


@st.composite
def inputs(draw: st.DrawFn, longest: int = 14142) -> tuple[int, int]:
    """Any (width, height) of 64 px or more a side and an aspect from 1:4 to 4:1."""
    longer = draw(st.integers(64, longest))
    shorter = draw(st.integers(max(64, -(-longer // 4)), longer))
    return draw(st.sampled_from([(longer, shorter), (shorter, longer)]))


def error(width: int, height: int, aspect: float) -> float:
    factor = width / height / aspect
    return max(factor, 1 / factor) - 1


def output_error(planned: SizePlan) -> float:
    return error(planned.width, planned.height, planned.asked[0] / planned.asked[1])


def reference_error(planned: SizePlan) -> float:
    return error(planned.reference_width, planned.reference_height, planned.asked[0] / planned.asked[1])


def ratio_of(mode: ResolutionMode) -> float:
    across, down = mode.value.split(":")
    return int(across) / int(down)


@examples
@given(inputs(), modes, models)
def test_every_size_lies_on_the_grid_and_within_the_models_limits(
    size: tuple[int, int], mode: ResolutionMode, model: str
) -> None:
    limits = MODELS[model]
    planned = plan(mode, *size, limits)
    for width, height in (
        (planned.width, planned.height),
        (planned.reference_width, planned.reference_height),
    ):
        assert width % 16 == 0
        assert height % 16 == 0
        assert limits.min_area <= width * height <= limits.max_area
        assert max(width, height) <= limits.max_aspect * min(width, height)
    assert planned.asked == size


@examples
@given(inputs(), modes, st.integers(2 * 256**2, 3 * 1024**2))
def test_an_operators_ceiling_is_never_exceeded(size: tuple[int, int], mode: ResolutionMode, ceiling: int) -> None:
    planned = plan(mode, *size, replace(KONTEXT, max_area=ceiling))
    assert planned.width * planned.height <= ceiling
    assert planned.reference_width * planned.reference_height <= ceiling


@examples
@given(inputs(longest=2100), models)
def test_match_input_moves_no_side_by_more_than_half_a_cell_within_the_limits(
    size: tuple[int, int], model: str
) -> None:
    planned = plan(ResolutionMode.MATCH_INPUT, *size, MODELS[model])
    nearest = tuple((side + 8) // 16 * 16 for side in size)
    fits = MODELS[model].min_area <= math.prod(nearest) <= MODELS[model].max_area
    if fits and max(nearest) <= 4 * min(nearest):
        assert (planned.width, planned.height) == nearest
        assert planned.reason == ""
    else:
        assert (planned.width, planned.height) != nearest
        assert planned.reason


@examples
@given(inputs(), models)
def test_match_input_keeps_the_aspect_where_it_has_to_scale(size: tuple[int, int], model: str) -> None:
    planned = plan(ResolutionMode.MATCH_INPUT, *size, MODELS[model])
    if "ceiling" in planned.reason:
        assert output_error(planned) <= OVER_CEILING[model]
        assert planned.width * planned.height >= 0.85 * MODELS[model].max_area
    elif "floor" in planned.reason:
        assert output_error(planned) <= UNDER_FLOOR[model]
        assert planned.width * planned.height <= 1.7 * MODELS[model].min_area


@pytest.mark.parametrize("model", sorted(MODELS))
def test_match_input_keeps_the_aspect_of_every_input_under_the_floor(model: str) -> None:
    limits = MODELS[model]
    sides = range(64, 2 * math.isqrt(limits.min_area), 3)
    plans = [plan(ResolutionMode.MATCH_INPUT, w, h, limits) for w in sides for h in sides if max(w, h) <= 4 * min(w, h)]
    scaled = [planned for planned in plans if "floor" in planned.reason]
    assert len(scaled) > 100
    assert max(output_error(planned) for planned in scaled) <= UNDER_FLOOR[model]


@examples
@given(inputs(), models)
def test_auto_picks_the_nearest_preferred_size_for_every_aspect(size: tuple[int, int], model: str) -> None:
    limits = MODELS[model]
    planned = plan(ResolutionMode.AUTO, *size, limits)
    distances = {chosen: abs(math.log(chosen[0] / chosen[1] * size[1] / size[0])) for chosen in limits.preferred_sizes}
    assert distances[planned.width, planned.height] <= min(distances.values()) + 1e-9


@pytest.mark.parametrize("model", sorted(MODELS))
def test_auto_reaches_every_preferred_size_by_its_own_aspect(model: str) -> None:
    for width, height in MODELS[model].preferred_sizes:
        planned = plan(ResolutionMode.AUTO, 3 * width, 3 * height, MODELS[model])
        assert (planned.width, planned.height) == (width, height)


@pytest.mark.parametrize("mode", RATIOS)
def test_a_ratio_is_met_within_one_percent_and_six_percent_of_kontexts_area(mode: ResolutionMode) -> None:
    planned = plan(mode, 1000, 1000, KONTEXT)
    assert error(planned.width, planned.height, ratio_of(mode)) <= 0.01
    assert abs(planned.width * planned.height / KONTEXT.native_area - 1) <= 0.06


@pytest.mark.parametrize("mode", RATIOS)
def test_a_ratio_on_the_embedded_models_coarse_grid_is_off_by_as_little_as_stated(mode: ResolutionMode) -> None:
    planned = plan(mode, 1000, 1000, EMBEDDED)
    off = error(planned.width, planned.height, ratio_of(mode))
    assert off <= 0.016
    assert abs(planned.width * planned.height / EMBEDDED.native_area - 1) <= 0.18
    if mode is not ResolutionMode.R1_1:
        assert f"{off * 100:.1f} %" in planned.reason


@pytest.mark.parametrize("mode", RATIOS)
def test_no_size_on_the_grid_is_nearer_to_the_native_area_than_the_one_planned(mode: ResolutionMode) -> None:
    planned = plan(mode, 1000, 1000, KONTEXT)
    grid = [(w, h) for w in range(256, 2048, 16) for h in range(256, 2048, 16) if error(w, h, ratio_of(mode)) <= 0.01]
    nearest = min(abs(math.log(math.prod(size) / KONTEXT.native_area)) for size in grid)
    assert abs(math.log(planned.width * planned.height / KONTEXT.native_area)) == pytest.approx(nearest)


@pytest.mark.parametrize(("tall", "wide"), [("9:16", "16:9"), ("9:21", "21:9"), ("2:3", "3:2"), ("4:5", "5:4")])
def test_a_ratio_and_its_inverse_have_mirrored_sizes(tall: str, wide: str) -> None:
    for limits in MODELS.values():
        upright = plan(ResolutionMode(tall), 500, 500, limits)
        lying = plan(ResolutionMode(wide), 500, 500, limits)
        assert (upright.width, upright.height) == (lying.height, lying.width)


@examples
@given(inputs(), modes, models)
def test_the_reference_is_never_squashed(size: tuple[int, int], mode: ResolutionMode, model: str) -> None:
    limits = MODELS[model]
    planned = plan(mode, *size, limits)
    shared = (planned.reference_width, planned.reference_height) == (planned.width, planned.height)
    if mode is ResolutionMode.MATCH_INPUT:
        assert shared
    elif mode is ResolutionMode.AUTO and shared:
        assert reference_error(planned) <= AUTO[model]
    elif shared:
        assert reference_error(planned) <= 0.05
    else:
        assert reference_error(planned) <= OWN_REFERENCE[model]
        assert 0.7 * limits.native_area <= planned.reference_width * planned.reference_height <= limits.native_area
        assert output_error(planned) > 0.05


@pytest.mark.parametrize("model", sorted(MODELS))
def test_auto_shares_the_grid_with_the_reference_between_its_extreme_sizes(model: str) -> None:
    aspects = sorted(width / height for width, height in MODELS[model].preferred_sizes)
    for low, high in pairwise(aspects):
        for part in (0.0, 0.25, 0.5, 0.75, 0.999):
            height = 4000
            width = math.ceil(height * low * (high / low) ** part)
            planned = plan(ResolutionMode.AUTO, width, height, MODELS[model])
            assert (planned.reference_width, planned.reference_height) == (planned.width, planned.height)
            assert reference_error(planned) <= AUTO[model]


def test_auto_does_not_squash_an_input_longer_than_every_preferred_size() -> None:
    planned = plan(ResolutionMode.AUTO, 4000, 1000, KONTEXT)
    assert (planned.width, planned.height) == (1568, 672)
    assert (planned.reference_width, planned.reference_height) == (2048, 512)
    assert "its own aspect at 2048x512" in planned.reason


def test_full_hd_is_edited_at_its_own_size_on_the_grid() -> None:
    assert plan(ResolutionMode.MATCH_INPUT, 1920, 1080, KONTEXT) == SizePlan(1920, 1088, 1920, 1088, (1920, 1080))


def test_an_input_that_rounding_alone_would_push_over_the_ceiling_is_scaled_below_it() -> None:
    planned = plan(ResolutionMode.MATCH_INPUT, 1448, 1448, KONTEXT)
    assert 1448 * 1448 < KONTEXT.max_area < 1456 * 1456
    assert (planned.width, planned.height) == (1440, 1440)
    assert "over the model's ceiling of 2097152 pixels" in planned.reason


def test_rounding_does_not_carry_a_four_to_one_input_beyond_the_aspect_limit() -> None:
    planned = plan(ResolutionMode.MATCH_INPUT, 2072, 518, KONTEXT)
    assert (planned.width, planned.height) == (2048, 512)
    assert "beyond the model's 4:1" in planned.reason


@pytest.mark.parametrize("mode", list(ResolutionMode))
def test_the_reason_names_both_sizes_unless_the_input_is_only_rounded(mode: ResolutionMode) -> None:
    planned = plan(mode, 1500, 700, KONTEXT)
    if mode is ResolutionMode.MATCH_INPUT:
        assert planned.reason == ""
    else:
        assert f"1500x700 input is edited at {planned.width}x{planned.height}" in planned.reason


def test_an_input_that_already_is_the_planned_size_gives_no_reason() -> None:
    for mode in (ResolutionMode.AUTO, ResolutionMode.R3_2, ResolutionMode.MATCH_INPUT):
        assert plan(mode, 1248, 832, KONTEXT).reason == ""


@pytest.mark.parametrize("mode", list(ResolutionMode))
@pytest.mark.parametrize("size", [(63, 64), (64, 63), (8, 8), (0, 100), (63, 14142)])
def test_a_side_under_64_px_is_refused_naming_the_limit(mode: ResolutionMode, size: tuple[int, int]) -> None:
    with pytest.raises(ImageTooSmall, match=rf"{size[0]}x{size[1]}.*64 px"):
        plan(mode, *size, KONTEXT)


@pytest.mark.parametrize("mode", list(ResolutionMode))
@pytest.mark.parametrize("size", [(401, 100), (100, 401), (14142, 64)])
def test_an_aspect_beyond_four_to_one_is_refused_naming_the_limit(mode: ResolutionMode, size: tuple[int, int]) -> None:
    with pytest.raises(AspectRatioOutOfRange, match=rf"{size[0]}x{size[1]}.*4:1"):
        plan(mode, *size, KONTEXT)


def test_the_limits_themselves_are_accepted() -> None:
    for size in ((64, 64), (64, 256), (256, 64), (14142, 14142)):
        for mode in ResolutionMode:
            assert plan(mode, *size, KONTEXT).asked == size


def test_kontexts_own_list_is_found_again_at_its_native_area() -> None:
    assert preferred_sizes(1024**2) == KONTEXT_PREFERRED_SIZES


def test_the_embedded_models_list_is_on_the_grid_near_its_native_area_and_symmetric() -> None:
    sizes = preferred_sizes(256**2)
    assert (256, 256) in sizes
    assert len(set(sizes)) == len(sizes) == 17
    assert {(height, width) for width, height in sizes} == set(sizes)
    assert [w / h for w, h in sizes] == sorted(w / h for w, h in sizes)
    for width, height in sizes:
        assert width % 16 == height % 16 == 0
        assert abs(width * height / 256**2 - 1) <= 0.15
    assert min(abs(math.log(w / h / (672 / 1568))) for w, h in sizes) <= 0.02


def test_limits_survive_the_way_through_json() -> None:
    for limits in MODELS.values():
        assert limits_from_json(json.loads(json.dumps(asdict(limits)))) == limits
    assert limits_from_json({}) == KONTEXT


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        ({"max_arae": 1}, "unknown key max_arae"),
        ({"native_area": "1024"}, "native_area is '1024'"),
        ({"max_area": 1e6}, "max_area is 1000000.0"),
        ({"grid": True}, "grid is True"),
        ({"preferred_sizes": [[1024]]}, r"preferred_sizes holds \[1024\]"),
        ({"preferred_sizes": 3}, "preferred_sizes is 3"),
        ({"preferred_sizes": []}, "preferred_sizes is empty"),
        ({"preferred_sizes": [[1000, 1024]]}, "multiples of 16"),
        ({"min_area": 0}, "min_area is 0"),
        ({"max_aspect": 0.5}, "max_aspect is 0.5"),
        ({"max_aspect": float("nan")}, "max_aspect is nan"),
        ({"max_area": 70000}, "at least twice the min_area"),
    ],
)
def test_limits_that_make_no_sense_are_refused_naming_the_key(data: dict[str, object], complaint: str) -> None:
    with pytest.raises(ModelError, match=complaint):
        limits_from_json(data)
