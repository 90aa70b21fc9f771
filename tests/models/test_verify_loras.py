"""The LoRA proofs of `kontextd verify` pass on a sound engine and fail on one that merges wrongly or leaves traces."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from kontextd_models import EngineConfig, load_engine
from kontextd_models.engine import Engine
from kontextd_models.lora.merging import Merger, MergeReport, Scaled
from kontextd_models.verify_loras import check_lora_merge, check_lora_restored


@pytest.fixture(params=["float32", "bfloat16"])
def engine(request: pytest.FixtureRequest, tiny_folder: Path) -> Engine:
    return load_engine(EngineConfig(model=tiny_folder, device="cpu", dtype=request.param))


def test_a_sound_engine_merges_as_peft_does_and_gives_the_base_back(engine: Engine) -> None:
    merge, restored = check_lora_merge(engine), check_lora_restored(engine)
    assert merge.passed is True
    assert merge.figures["compared"] == min(40, int(str(merge.figures["linears"])))
    assert restored.passed is True
    assert restored.figures["refused"] == 5


def test_a_scale_that_is_a_tenth_off_is_found(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def louder(self: Merger, wanted: Sequence[Scaled], *_: object, exact=Merger.merge) -> MergeReport:  # type: ignore[no-untyped-def]  # bound early
        return exact(self, [(adapter, 1.1 * scale) for adapter, scale in wanted])

    monkeypatch.setattr(Merger, "merge", louder)
    assert check_lora_merge(engine).passed is False


def test_an_engine_that_takes_loras_off_by_subtracting_them_is_found(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def leave_a_trace(self: Merger, wanted: Sequence[Scaled], *_: object, exact=Merger.merge) -> MergeReport:  # type: ignore[no-untyped-def]  # bound early
        report = exact(self, wanted)
        if not wanted:
            weight = engine.model.pipeline.transformer.proj_out.weight
            weight.copy_(torch.nextafter(weight, torch.full_like(weight, 9)))
        return report

    monkeypatch.setattr(Merger, "merge", leave_a_trace)
    restored = check_lora_restored(engine)
    assert restored.passed is False
    assert "not the base" in restored.detail


def test_an_engine_on_which_loras_do_nothing_is_found(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Merger, "merge", lambda *_: MergeReport(0, 0))
    assert check_lora_merge(engine).passed is False
    restored = check_lora_restored(engine)
    assert restored.passed is False
    assert "changed nothing" in restored.detail
