"""What is said of a model before it is loaded is what loading it then does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
from kontextd_models import EngineConfig, MemoryMode, load_engine
from kontextd_models.description import as_text, choice, describe
from kontextd_models.errors import InvalidValue, ModelError


@pytest.mark.parametrize(
    "changes", [{}, {"dtype": "bfloat16"}, {"max_area": 96 * 96}, {"memory_mode": MemoryMode.SEQUENTIAL}]
)
def test_what_is_announced_is_what_loading_chooses(tiny_folder: Path, changes: dict[str, object]) -> None:
    config = EngineConfig(model=tiny_folder, device="cpu", **changes)
    announced = describe(choice(config))
    assert announced == describe(load_engine(config).model)
    json.dumps(announced)


def test_a_demonstration_model_says_so_and_lists_what_it_knows(tmp_path: Path) -> None:
    folder = tiny.build(tmp_path / "model")
    card = {**tiny.CARD, "demonstration": True, "instructions": ["sepia", "blur"]}
    (folder / "kontextd.json").write_text(json.dumps(card))
    lines = as_text(choice(EngineConfig(model=folder))).splitlines()
    assert "This is a demonstration model." in lines[-3]
    assert lines[-2:] == ["  sepia", "  blur"]


def test_what_loading_would_refuse_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="nowhere is not a folder"):
        choice(EngineConfig(model=tmp_path / "nowhere"))
    for wrong in ({"device": "tpu"}, {"dtype": "float16"}, {"max_area": 1}):
        with pytest.raises(InvalidValue):
            choice(EngineConfig(model=tiny_folder, **wrong))
