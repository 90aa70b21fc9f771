"""Compiled blocks: one graph for each function and kind, whatever the size, the step and the LoRAs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from kontextd_models import Acceleration, Done, EditRequest, EngineConfig, LoraWeight, load_engine
from kontextd_models.acceleration.preset import SHORTCUTS
from kontextd_models.engine import Engine
from kontextd_models.execution import blocks as module
from kontextd_models.execution.blocks import NATIVE_WAY, Blocks, Way
from kontextd_models.execution.compilation import compiled, keep_compiled_in
from kontextd_models.folder import check_folder
from kontextd_models.transformer.attention import KeyValue
from kontextd_models.transformer.blocks import FORMULAS
from PIL import Image
from safetensors.torch import save_file
from torch._dynamo.utils import counters

Photo = Callable[[int, int], Image.Image]
# FLUX.1 Kontext's preferred sizes, in tokens of a fourth of their sides: 4042 to 4150 tokens become 231 to 273.
SIZES = [(w // 64, h // 64) for w, h in (
    (672, 1568), (688, 1504), (720, 1456), (752, 1392), (800, 1328), (832, 1248), (880, 1184), (944, 1104),
    (1024, 1024),
    (1104, 944), (1184, 880), (1248, 832), (1328, 800), (1392, 752), (1456, 720), (1504, 688), (1568, 672),
)]  # fmt: skip
GRAPHS = 6  # three functions, with and without keys kept of the reference
REUSING = replace(SHORTCUTS, computed=0.6, prefix=1, reuse_reference=True)


@pytest.fixture(autouse=True)
def no_graphs_of_others() -> Iterator[None]:
    """The compiler keeps graphs by function, for the whole process."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs are traced and guarded as for the real compiler, and then run by torch as they are: to the same bits."""
    monkeypatch.setattr(module, "compiled", partial(compiled, backend="eager"))


def graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


def compiling(folder: Path, **changes: object) -> Engine:
    engine = load_engine(EngineConfig(model=folder, device="cpu", compile="on", **changes))
    rows = {Acceleration.NONE: SHORTCUTS, Acceleration.REGULAR: SHORTCUTS, Acceleration.HIGH: REUSING}
    engine.presets = replace(engine.presets, rows=rows)
    return engine


def picture(
    engine: Engine, image: Image.Image, acceleration: Acceleration, loras: tuple[LoraWeight, ...] = ()
) -> np.ndarray:
    request = EditRequest(
        image, "make it red", 5, 7, loras=loras, acceleration=acceleration, enable_safety_checker=False
    )
    *_, done = engine.edit(request)
    assert isinstance(done, Done)
    if acceleration is Acceleration.HIGH:
        assert done.preset.cached
    return np.asarray(done.images[0])


@pytest.fixture
def lora(tiny_folder: Path, tmp_path: Path) -> LoraWeight:
    """For every linear layer of the transformer's blocks."""
    random, tensors = torch.Generator().manual_seed(5), {}
    for name, info in check_folder(tiny_folder).tensors["transformer"].items():
        if "blocks." in name and len(info.shape) == 2:
            rows, columns = info.shape
            stem = f"transformer.{name.removesuffix('.weight')}"
            tensors[f"{stem}.lora_A.weight"] = torch.randn(4, columns, generator=random)
            tensors[f"{stem}.lora_B.weight"] = torch.randn(rows, 4, generator=random) * 0.1
    save_file(tensors, tmp_path / "lora.safetensors")
    return LoraWeight(tmp_path / "lora.safetensors")


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("precision", ["full", "fp8"])
def test_all_is_compiled_at_loading_and_no_edit_compiles_anything(
    tiny_folder: Path, photo: Photo, lora: LoraWeight, precision: str
) -> None:
    engine = compiling(tiny_folder, precision=precision)
    assert graphs() == GRAPHS
    assert engine.model.blocks.way == "compiled with native attention"
    plain = load_engine(EngineConfig(model=tiny_folder, device="cpu", precision=precision))
    plain.presets = engine.presets
    made = []
    for loras in ((), (lora,), (replace(lora, scale=0.4),), ()):
        for size in ((64, 64), (96, 64), (48, 112)):
            for preset in (Acceleration.NONE, Acceleration.HIGH):
                made.append(picture(plain, photo(*size), preset, loras))
                assert np.array_equal(picture(engine, photo(*size), preset, loras), made[-1])
    assert graphs() == GRAPHS
    assert len({picture.tobytes() for picture in made}) == len(made) * 3 // 4  # the last ones are the first ones again
    assert engine.model.blocks.notes == ()


@pytest.mark.usefixtures("traced")
def test_the_17_preferred_sizes_share_the_graphs_of_one(tiny_folder: Path) -> None:
    model = compiling(tiny_folder).model
    transformer, plain = model.pipeline.transformer, NATIVE_WAY
    heads, width = transformer.config.num_attention_heads, transformer.config.attention_head_dim
    random = torch.Generator().manual_seed(0)
    draw = partial(torch.randn, generator=random)
    text = 24
    with torch.no_grad():
        for columns, rows in SIZES:
            output = columns * rows
            for seen, keeps in ((2 * output, None), (output, output + 7)):
                kept = None if keeps is None else KeyValue(draw(1, keeps, heads, width), draw(1, keeps, heads, width))
                rotary = draw(text + seen, width), draw(text + seen, width)
                tokens = draw(1, text + seen, heads * width)
                for block in transformer.single_transformer_blocks:
                    modulation = draw(1, 3 * heads * width)
                    found, keys = model.blocks.single(block, tokens, modulation, rotary, kept)
                    expected, expected_keys = plain.single(block, tokens, modulation, rotary, kept)
                    assert torch.equal(found, expected)
                    assert torch.equal(keys.key, expected_keys.key)
                last = transformer.single_transformer_blocks[-1], tokens, draw(1, 3 * heads * width), rotary, kept, text
                of_output = draw(output, width), draw(output, width)
                found, _ = model.blocks.last_single(*last, of_output)
                assert torch.equal(found, plain.last_single(*last, of_output)[0])
                for block in transformer.transformer_blocks:
                    vectors = draw(1, 6 * heads * width), draw(1, 6 * heads * width)
                    given = draw(1, seen, heads * width), draw(1, text, heads * width), *vectors, rotary, kept
                    found, *_ = model.blocks.double(block, *given)
                    assert torch.equal(found, plain.double(block, *given)[0])
    assert graphs() == GRAPHS


def test_a_compiler_that_fails_leaves_the_blocks_uncompiled_with_a_note(
    tiny_folder: Path, photo: Photo, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_compiler(*_: object) -> object:
        raise OSError("cc: not found")

    monkeypatch.setattr(module, "compiled", partial(compiled, backend=no_compiler))
    engine = compiling(tiny_folder)
    assert engine.model.blocks.is_plain
    (note,) = engine.model.notes
    assert "blocks that run compiled with native attention failed (BackendCompilerFailed: " in note
    assert "cc: not found" in note
    plain = load_engine(EngineConfig(model=tiny_folder, device="cpu"))
    plain.presets = engine.presets
    found = picture(engine, photo(64, 64), Acceleration.NONE)
    assert np.array_equal(found, picture(plain, photo(64, 64), Acceleration.NONE))


def test_a_size_that_would_need_another_graph_every_time_gives_compilation_up(
    tiny_engine: Engine, tiny_request: EditRequest
) -> None:
    """Eight graphs for one function are the limit of torch; then it fails, and does not go on uncompiled in silence."""
    blocks = Blocks((Way("compiled", *compiled(FORMULAS, backend="eager")), NATIVE_WAY))
    engine = Engine(replace(tiny_engine.model, blocks=blocks), EngineConfig())
    engine.presets = replace(engine.presets, rows={**engine.presets.rows, Acceleration.HIGH: REUSING})
    request = replace(tiny_request, acceleration=Acceleration.HIGH)
    with torch._dynamo.config.patch(recompile_limit=1):
        *_, done = engine.edit(request)
    assert isinstance(done, Done)
    assert blocks.is_plain
    assert "FailOnRecompileLimitHit" in blocks.notes[0]


def test_what_was_compiled_is_kept_where_it_is_said_and_for_the_owner_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "elsewhere")
    keep_compiled_in(tmp_path / "data" / "compiled")
    assert cache_dir() == str(tmp_path / "data" / "compiled")
    assert (tmp_path / "data" / "compiled").stat().st_mode & 0o777 == 0o700


LOAD = """
import json, sys
from pathlib import Path
from kontextd_models import EngineConfig, load_engine
from torch._dynamo.utils import counters
engine = load_engine(EngineConfig(Path(sys.argv[1]), "cpu", compile="on", compile_cache=Path(sys.argv[2])))
found = {"way": engine.model.blocks.way, "graphs": counters["stats"]["unique_graphs"]}
print(json.dumps({**found, **{name: counters["inductor"][f"fxgraph_cache_{name}"] for name in ("hit", "miss")}}))
"""


@pytest.mark.long
def test_a_second_start_compiles_nothing(tiny_folder: Path, tmp_path: Path) -> None:
    """By torch's own compiler, with gcc; each start in a process of its own."""
    command = [sys.executable, "-c", LOAD, str(tiny_folder), str(tmp_path / "compiled")]
    starts = [
        json.loads(subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ).stdout)
        for _ in range(2)
    ]
    expected = {"way": "compiled with native attention", "graphs": GRAPHS}
    assert starts == [{**expected, "hit": 0, "miss": GRAPHS}, {**expected, "hit": GRAPHS, "miss": 0}]


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # torch uses it
def test_compiled_pictures_are_those_of_diffusers_within_the_published_tolerance(
    embedded_folder: Path, photo: Photo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """docs/presets.md says 90 dB."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    engine = load_engine(EngineConfig(model=embedded_folder, device="cpu", compile="on"))
    assert engine.model.blocks.way == "compiled with native attention"
    plain = load_engine(EngineConfig(model=embedded_folder, device="cpu"))
    found, expected = (picture(one, photo(192, 128), Acceleration.NONE).astype(float) for one in (engine, plain))
    assert np.square(found - expected).mean() < 255**2 / 10**9
