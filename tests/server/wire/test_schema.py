"""The input model by table: every field, every kind of wrong value, in fal's words."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kontextd_models import Acceleration, EditRequest, LoraWeight, ResolutionMode
from kontextd_models.request import MAX_GUIDANCE, MAX_IMAGES, MAX_STEPS, SEED_RANGE
from kontextd_server.wire import answers, schema
from kontextd_server.wire.error_table import answer
from kontextd_server.wire.errors import Invalid
from kontextd_server.wire.schema import FluxKontextLoraInput
from kontextd_server.wire.validation import parse

NEEDED = {"image_url": "https://x/a.png", "prompt": "make it red"}


def entries(data: object) -> list[dict[str, object]]:
    with pytest.raises(Invalid) as caught:
        parse(FluxKontextLoraInput, data)
    told = answer(caught.value)
    assert told.status == 422
    json.dumps(told.body, allow_nan=False)
    detail: list[dict[str, object]] = told.body["detail"]  # type: ignore[assignment]
    return detail


def test_the_defaults_are_fals() -> None:
    assert parse(FluxKontextLoraInput, NEEDED).model_dump() == {
        **NEEDED,
        "num_inference_steps": 30,
        "seed": None,
        "guidance_scale": 2.5,
        "sync_mode": False,
        "num_images": 1,
        "enable_safety_checker": True,
        "output_format": "png",
        "loras": [],
        "acceleration": "none",
        "resolution_mode": "match_input",
    }


def test_the_defaults_and_values_are_the_engines_too() -> None:
    wire, engine = parse(FluxKontextLoraInput, NEEDED), EditRequest(None, "")  # type: ignore[arg-type]
    for name in ("num_inference_steps", "seed", "guidance_scale", "num_images", "enable_safety_checker"):
        assert getattr(wire, name) == getattr(engine, name)
    assert (wire.acceleration, wire.resolution_mode) == (engine.acceleration.value, engine.resolution_mode.value)
    for wires, engines in ((schema.AccelerationEnum, Acceleration), (schema.ResolutionModeEnum, ResolutionMode)):
        assert [(one.name, one.value) for one in wires] == [(one.name, one.value) for one in engines]
    assert schema.LoraWeight(path="x").scale == LoraWeight(None).scale  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("field", "low", "high"),
    [
        ("num_inference_steps", 1, MAX_STEPS),
        ("num_images", 1, MAX_IMAGES),
        ("guidance_scale", 0, MAX_GUIDANCE),
        ("seed", 0, SEED_RANGE - 1),
    ],
)
def test_the_limits_are_the_engines(field: str, low: float, high: float) -> None:
    for value in (low, high):
        assert getattr(parse(FluxKontextLoraInput, {**NEEDED, field: value}), field) == value
    (under,), (over,) = entries({**NEEDED, field: low - 1}), entries({**NEEDED, field: high + 1})
    assert (under["type"], under["ctx"], under["input"]) == ("greater_than_equal", {"ge": low}, low - 1)
    assert (over["type"], over["ctx"], over["loc"]) == ("less_than_equal", {"le": high}, ["body", field])


WRONG = [
    ("image_url", None, "string_type"),
    ("image_url", 7, "string_type"),
    ("image_url", "", "sequence_too_short"),
    ("image_url", ["x"], "string_type"),
    ("prompt", None, "string_type"),
    ("prompt", {"a": 1}, "string_type"),
    ("num_inference_steps", None, "int_type"),
    ("num_inference_steps", "many", "int_parsing"),
    ("num_inference_steps", 1.5, "int_from_float"),
    ("num_inference_steps", [], "int_type"),
    ("num_inference_steps", 10**30, "less_than_equal"),
    ("seed", "x", "int_parsing"),
    ("seed", 2**53, "less_than_equal"),
    ("seed", 10**39, "less_than_equal"),
    ("seed", -1, "greater_than_equal"),
    ("guidance_scale", "nan", "finite_number"),
    ("guidance_scale", "inf", "finite_number"),
    ("guidance_scale", "-inf", "finite_number"),
    ("guidance_scale", "high", "float_parsing"),
    ("guidance_scale", None, "float_type"),
    ("guidance_scale", 10**39, "less_than_equal"),
    ("sync_mode", "perhaps", "bool_parsing"),
    ("sync_mode", 2, "bool_parsing"),
    ("sync_mode", None, "bool_type"),
    ("num_images", 0, "greater_than_equal"),
    ("num_images", 5, "less_than_equal"),
    ("enable_safety_checker", [], "bool_type"),
    ("output_format", "webp", "one_of"),
    ("output_format", "PNG", "one_of"),
    ("output_format", None, "one_of"),
    ("loras", None, "list_type"),
    ("loras", {}, "list_type"),
    ("loras", "x", "list_type"),
    ("acceleration", "extreme", "one_of"),
    ("acceleration", 1, "one_of"),
    ("resolution_mode", "16:10", "one_of"),
    ("resolution_mode", "Auto", "one_of"),
]


@pytest.mark.parametrize(("field", "value", "kind"), WRONG)
def test_a_wrong_value_is_told_by_field_and_type(field: str, value: object, kind: str) -> None:
    (entry,) = entries({**NEEDED, field: value})
    assert (entry["loc"], entry["type"]) == (["body", field], kind)
    assert entry["input"] == value
    assert str(entry["url"]).startswith("https://")
    assert entry["msg"]


def test_of_a_set_of_values_the_error_lists_all() -> None:
    (entry,) = entries({**NEEDED, "resolution_mode": "16:10"})
    assert entry["ctx"] == {"expected": [*schema.ResolutionModeEnum]}
    assert entry["url"] == "https://docs.fal.ai/errors#one_of"


@pytest.mark.parametrize("missing", NEEDED)
def test_a_missing_field_is_told_without_the_rest_of_the_body(missing: str) -> None:
    (entry,) = entries({name: value for name, value in NEEDED.items() if name != missing})
    assert (entry["loc"], entry["type"], "input" in entry) == (["body", missing], "missing", False)
    assert str(entry["url"]).startswith("https://errors.pydantic.dev/")


@pytest.mark.parametrize("body", [[], "x", 7, None, True])
def test_a_body_that_is_no_object_is_refused(body: object) -> None:
    (entry,) = entries(body)
    assert (entry["loc"], entry["type"]) == (["body"], "model_type")


def test_each_error_of_several_is_told() -> None:
    found = entries({"num_images": 9, "prompt": 1})
    assert {tuple(entry["loc"]) for entry in found} == {
        ("body", "image_url"),
        ("body", "prompt"),
        ("body", "num_images"),
    }


@pytest.mark.parametrize(
    ("lora", "end", "kind"),
    [
        ({}, ["path"], "missing"),
        ({"path": ""}, ["path"], "sequence_too_short"),
        ({"path": "x", "scale": "big"}, ["scale"], "float_parsing"),
        ({"path": "x", "scale": "nan"}, ["scale"], "finite_number"),
        ("x", [], "model_type"),
    ],
)
def test_a_wrong_lora_is_told_by_its_place_in_the_list(lora: object, end: list[str], kind: str) -> None:
    (entry,) = entries({**NEEDED, "loras": [{"path": "fine"}, lora]})
    assert (entry["loc"], entry["type"]) == (["body", "loras", 1, *end], kind)


def test_a_million_wrong_elements_are_one_error() -> None:
    assert len(entries({**NEEDED, "loras": [0] * 10**6})) == 1


def test_any_number_of_loras_is_taken() -> None:
    loras = [{"path": f"https://x/{index}.safetensors", "scale": -0.5} for index in range(500)]
    assert len(parse(FluxKontextLoraInput, {**NEEDED, "loras": loras}).loras) == 500


def test_long_values_are_not_sent_back() -> None:
    (entry,) = entries({**NEEDED, "output_format": "x" * 10**6})
    assert "input" not in entry
    (entry,) = entries({**NEEDED, "prompt": ["x" * 10**6]})
    assert "input" not in entry


def test_unknown_fields_are_ignored_and_numbers_in_strings_read_as_at_fal() -> None:
    told = parse(FluxKontextLoraInput, {**NEEDED, "num_images": "2", "seed": 7.0, "aspect_ratio": "1:1", "x": None})
    assert (told.num_images, told.seed, told.model_extra) == (2, 7, None)


def test_booleans_are_read_as_the_numbers_1_and_0_as_at_fal() -> None:
    """`scale: wanted && 0.8` is ordinary JavaScript, and a page that does so runs at fal."""
    loras = [{"path": "x", "scale": False}]
    sent = {"num_inference_steps": True, "num_images": True, "seed": False, "guidance_scale": False, "loras": loras}
    told = parse(FluxKontextLoraInput, {**NEEDED, **sent})
    assert (told.num_inference_steps, told.num_images, told.seed) == (1, 1, 0)
    assert (told.guidance_scale, told.loras[0].scale) == (0.0, 0.0)
    (entry,) = entries({**NEEDED, "num_images": False})
    assert (entry["type"], entry["input"]) == ("greater_than_equal", False)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@given(st.fixed_dictionaries({}, optional={name: JSON for name in FluxKontextLoraInput.model_fields}))
def test_any_input_is_taken_or_refused_with_a_body_that_can_be_sent(data: dict[str, object]) -> None:
    try:
        parse(FluxKontextLoraInput, data)
    except Invalid as error:
        told = answer(error)
        assert told.status == 422
        json.dumps(told.body, allow_nan=False)


# The other bodies.


def test_a_token_is_asked_for_as_the_clients_do() -> None:
    asked = parse(answers.TokenRequest, {"allowed_apps": ["flux-kontext-lora"], "token_expiration": 120})
    assert (asked.allowed_apps, asked.token_expiration) == (["flux-kontext-lora"], 120)
    for wrong in ({}, {"allowed_apps": []}, {"allowed_apps": ["a"], "token_expiration": 0}, {"allowed_apps": [1]}):
        with pytest.raises(Invalid):
            parse(answers.TokenRequest, wrong)


def test_parts_are_named_as_the_clients_do() -> None:
    sent = {"parts": [{"partNumber": 1, "etag": '"x"'}, {"partNumber": 2, "etag": "y"}]}
    parts = parse(answers.CompleteUpload, sent).parts
    assert [(part.part_number, part.etag) for part in parts] == [(1, '"x"'), (2, "y")]
    assert parts[0].model_dump(by_alias=True) == sent["parts"][0]
    with pytest.raises(Invalid):
        parse(answers.CompleteUpload, {"parts": [{"partNumber": 0, "etag": "x"}]})
    multipart = answers.CdnMultipart(access_url="http://box/files/a", upload_id="u")
    assert multipart.model_dump(by_alias=True) == {"access_url": "http://box/files/a", "uploadId": "u"}
