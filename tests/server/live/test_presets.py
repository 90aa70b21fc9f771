"""The presets over the wire: what a caller asks for, what ran, and that the next caller has none of it."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from .box import ENDPOINT, LiveBox
from .expected import check_output, check_picture, edit_of
from .studio import Studio

STEPS = 20


@pytest.fixture(scope="module")
def outputs(box: LiveBox, studio: Studio) -> dict[str, dict[str, Any]]:
    """By preset, in this order; "again" is `none` once more."""
    told = {}
    with httpx.Client(headers={"Authorization": f"Key {box.keys.own}"}, trust_env=False, timeout=300) as client:
        for name in ("none", "regular", "high", "again"):
            asked = edit_of(studio, acceleration="none" if name == "again" else name, num_inference_steps=STEPS)
            answer = client.post(f"{box.url}/{ENDPOINT}", json=asked)
            assert answer.status_code == 200, answer.text
            told[name] = answer.json()
            told[name]["picture"] = client.get(told[name]["images"][0]["url"]).content
    return told


@pytest.mark.parametrize("preset", ["none", "regular", "high"])
def test_a_preset_makes_the_edit_and_says_how(outputs: dict[str, dict[str, Any]], box: LiveBox, preset: str) -> None:
    output = outputs[preset]
    check_output(output, f"{box.url}/files/")
    check_picture(output["picture"])
    used = output["kontextd"]["preset"]
    assert used["name"] == preset
    assert used["full"] + used["cached"] + used["skipped"] == STEPS


def test_the_higher_the_preset_the_fewer_steps_run(outputs: dict[str, dict[str, Any]]) -> None:
    skipped = [outputs[preset]["kontextd"]["preset"]["skipped"] for preset in ("none", "regular", "high")]
    assert skipped[0] == 0 < skipped[1] < skipped[2]


def test_none_after_the_presets_is_none_before_them(outputs: dict[str, dict[str, Any]]) -> None:
    assert outputs["again"]["picture"] == outputs["none"]["picture"]
    assert outputs["high"]["picture"] != outputs["none"]["picture"]
