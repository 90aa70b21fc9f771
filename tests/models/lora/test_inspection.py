"""What is said of a file to people: from its header alone, and never in the way of what it says of itself."""

from __future__ import annotations

import hashlib
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from kontextd_models import LoraLimits
from kontextd_models.errors import LoraFileError
from kontextd_models.folder import check_folder
from kontextd_models.lora.factors import number
from kontextd_models.lora.inspection import Inspection, Ranks, inspect
from kontextd_models.lora.layout import layout_of_folder
from kontextd_models.lora.metadata import Description, description_of
from safetensors.torch import save_file
from torch import Tensor

LIMITS = LoraLimits()
QKV, FC1 = "lora_unet_double_blocks_0_img_attn_qkv", "lora_te1_text_model_encoder_layers_0_mlp_fc1"
KOHYA = {
    "ss_output_name": "ink",
    "ss_base_model_version": "flux1",
    "ss_network_module": "networks.lora_flux",
    "ss_steps": "2000",
    "ss_tag_frequency": json.dumps({"a": {"ink style": 20, "a cat": 3}, "b": {"ink style": 5, " a cat": 4, "x": 0.5}}),
    "modelspec.title": "Ink drawings",
    "modelspec.trigger_phrase": "inkstyle, in ink",
    "modelspec.architecture": "flux-1-dev/lora",
}  # fmt: skip
AI_TOOLKIT = {
    "format": "pt",
    "name": "ink",
    "version": "1.0",
    "training_info": '{"step": 2000, "epoch": 9}',
    "software": '{"name": "ai-toolkit", "repo": "https://github.com/ostris/ai-toolkit", "version": "0.1.0"}',
    "ss_base_model_version": "flux1",
}


@pytest.fixture
def inspected(tmp_path: Path, tiny_folder: Path) -> Callable[..., Inspection]:
    def make(tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Inspection:
        save_file(tensors, tmp_path / "ink.safetensors", metadata=metadata)
        return inspect(tmp_path / "ink.safetensors", layout_of_folder(check_folder(tiny_folder)), LIMITS)

    return make


def kohya(name: str, rows: int, rank: int, alpha: float | None = None, columns: int = 32) -> dict[str, Tensor]:
    tensors = {f"{name}.lora_down.weight": torch.ones(rank, columns), f"{name}.lora_up.weight": torch.ones(rows, rank)}
    return tensors if alpha is None else tensors | {f"{name}.alpha": torch.tensor(alpha)}


def test_a_file_is_described_whole(inspected: Callable[..., Inspection], tmp_path: Path) -> None:
    tensors = kohya(QKV, 96, 4, 2.0) | kohya(FC1, 37, 8, 8.0) | kohya("lora_unet_double_blocks_7_img_attn_qkv", 96, 4)
    tensors |= kohya("lora_unet_double_blocks_0_img_mlp_0", 128, 4) | {
        "lora_unet_double_blocks_0_txt_mlp_0.diff": torch.ones(128, 32)
    }
    tensors |= {"lora_unet_double_blocks_0_img_mlp_0.dora_scale": torch.ones(128, 1, dtype=torch.bfloat16)}
    seen = inspected(tensors, KOHYA)
    content = (tmp_path / "ink.safetensors").read_bytes()
    assert (seen.name, seen.size_bytes, seen.sha256) == (
        "ink.safetensors", len(content), hashlib.sha256(content).hexdigest()
    )  # fmt: skip
    assert seen.dtypes == {"BF16": 1, "F32": 11}
    assert (seen.coverage.dialects, seen.coverage.matched, seen.coverage.total) == (("kohya",), 10, 12)
    assert seen.coverage.unmatched[0] == "lora_unet_double_blocks_7_img_attn_qkv.lora_down.weight"
    assert (seen.forms, seen.dora_count) == ({"full difference": 1, "low-rank": 3}, 1)
    assert (seen.ranks, seen.alphas) == (Ranks(4, 8, 4), (2.0, 8.0))
    assert seen.modules == {"text_encoder": 1, "transformer": 5}
    assert (seen.looks_like, seen.problem) == ("", "")
    assert seen.description.title == "Ink drawings"


def test_values_are_never_looked_at(inspected: Callable[..., Inspection]) -> None:
    tensors = {name: value * math.nan for name, value in kohya(QKV, 96, 4).items()}
    assert inspected(tensors).problem == ""


def test_what_does_not_fit_is_told_and_not_raised(inspected: Callable[..., Inspection]) -> None:
    assert "[96, 32] in this model and [9216, 3072] in the file" in inspected(kohya(QKV, 9216, 4, columns=3072)).problem
    other = inspected(kohya("lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q", 640, 4, 1.0, 640))
    assert "matches nothing of this model" in other.problem
    assert other.looks_like.startswith("SD")
    assert other.looks_like in other.problem
    assert (other.coverage.matched, other.ranks, other.modules, other.forms) == (0, None, {}, {})
    odd = inspected({f"{QKV}.lora_down.weight": torch.tensor(1.0), f"{QKV}.lora_up.weight": torch.ones(96, 4)})
    assert "do not make a matrix" in odd.problem
    odd = inspected(kohya(QKV, 96, 4) | {f"{QKV}.alpha": torch.tensor(True)})
    assert ("of dtype BOOL" in odd.problem, odd.alphas) == (True, ())


def test_what_is_no_safetensors_file_is_refused(tmp_path: Path, tiny_folder: Path) -> None:
    (tmp_path / "ink.safetensors").write_bytes(b"<html>Sign in</html>")
    with pytest.raises(LoraFileError, match="a web page"):
        inspect(tmp_path / "ink.safetensors", layout_of_folder(check_folder(tiny_folder)), LIMITS)


def test_a_file_is_inspected_without_importing_torch() -> None:
    code = "import sys, kontextd_models.lora.inspection, kontextd_models.folder; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("False\n", "")


# What a file says of itself.


def test_the_metadata_of_the_usual_trainers_are_understood() -> None:
    assert description_of(KOHYA) == Description(
        title="Ink drawings",
        base_model="flux-1-dev/lora",
        trainer="networks.lora_flux",
        trigger_words=("inkstyle", "in ink"),
        tags=("ink style", "a cat"),
        steps=2000,
    )
    assert description_of(AI_TOOLKIT) == Description(title="ink", base_model="flux1", trainer="ai-toolkit", steps=2000)
    assert description_of({"format": "pt"}) == Description()


HOSTILE = (
    *("", "None", "null", "{", "[" * 99_999, "9" * 5000, "NaN", "1e999"),
    *("[1, {}]", '{"name": {}}', '{"a": {"b": "c"}, "d": 1}'),
)


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_no_metadata_make_the_description_fail(text: str) -> None:
    keys = [*KOHYA, *AI_TOOLKIT, "ss_trigger_words", "trigger_word"]
    for found in (description_of(dict.fromkeys(keys, text)), description_of({"ss_tag_frequency": text})):
        assert all(len(word) < 300 for word in (found.title, found.base_model, *found.trigger_words, *found.tags))


def test_the_texts_of_strangers_are_made_printable_and_short() -> None:
    found = description_of({"modelspec.title": "\x1b[31m" + "x" * 5000, "ss_tag_frequency": '{"a": {"b\\u202e": 1}}'})
    assert found.title.startswith(r"\x1b[31mxxx")
    assert len(found.title) < 300
    assert found.tags == (r"b\u202e",)


# Alphas without torch.


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        (torch.float64, "F64"),
        (torch.float32, "F32"),
        (torch.float16, "F16"),
        (torch.bfloat16, "BF16"),
        (torch.float8_e4m3fn, "F8_E4M3"),
        (torch.float8_e5m2, "F8_E5M2"),
        (torch.int64, "I64"),
        (torch.int32, "I32"),
        (torch.int16, "I16"),
        (torch.int8, "I8"),
        (torch.uint8, "U8"),
    ],
)
def test_a_number_is_what_torch_says_it_is(dtype: torch.dtype, name: str) -> None:
    """All 256 of one byte, and as many of the others."""
    raw = torch.arange(256, dtype=torch.uint8).repeat_interleave(dtype.itemsize)
    for piece in raw.split(dtype.itemsize):
        ours, theirs = number(name, piece.numpy().tobytes()), float(piece.view(dtype).double())
        assert ours == theirs or (math.isnan(ours) and math.isnan(theirs))
