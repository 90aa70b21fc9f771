"""Fixtures that several test files share: tiny random models, pictures, and the way to `tests/tiny.py`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from PIL import Image

if TYPE_CHECKING:
    from kontextd_models import EditRequest
    from kontextd_models.engine import Engine

# How long an example takes on a busy machine says nothing of what is tested.
settings.register_profile("unhurried", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("unhurried")

sys.path.insert(0, str(Path(__file__).parent))  # tests are imported by path: only this folder knows tiny.py


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model, for all tests of a run: do not write into it."""
    import tiny

    return tiny.build(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def embedded_folder() -> Path:
    """The demonstration model that the package ships; without it a test fails, and is not skipped."""
    from kontextd_models.embedded import embedded_model_dir

    folder = embedded_model_dir()
    assert (folder / "model_index.json").is_file(), f"the package ships its demonstration model, but {folder} is absent"
    return folder


@pytest.fixture
def photo() -> Callable[[int, int], Image.Image]:
    """Pictures of any size: smooth colours with an edge and some grain, the same ones every time."""

    def make(width: int, height: int) -> Image.Image:
        y, x = np.mgrid[0:height, 0:width]
        channels = [np.sin(x / 9) * 90 + 128, np.cos(y / 7) * 90 + 128, (x + 2 * y) * 255 / (width + 2 * height)]
        pixels = np.stack(channels, axis=-1) + np.random.default_rng(5).normal(0, 6, (height, width, 3))
        pixels[height // 3 : height // 2, width // 4 : width // 2] = (200, 30, 40)
        return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))

    return make


@pytest.fixture
def tiny_engine(tiny_folder: Path) -> Engine:
    """An engine of the test's own."""
    from kontextd_models import EngineConfig, load_engine

    return load_engine(EngineConfig(model=tiny_folder, device="cpu"))


@pytest.fixture
def tiny_request(photo: Callable[[int, int], Image.Image]) -> EditRequest:
    from kontextd_models import EditRequest

    return EditRequest(photo(64, 64), "make it red", 3, 7, enable_safety_checker=False)
