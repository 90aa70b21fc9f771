"""The model folder, checked before anything is loaded. Knows file names, JSON and safetensors headers; knows no torch.

A folder is taken if it is a whole `FluxKontextPipeline` in diffusers' layout with safetensors weights:

    model_index.json                     the parts and their classes
    scheduler/  tokenizer/  tokenizer_2/
    text_encoder/  text_encoder_2/       config.json, model.safetensors (or an index and its shards)
    transformer/  vae/                   config.json, diffusion_pytorch_model.safetensors (or an index and its shards)
    kontextd.json                        optional: what the model is called, knows, and which sizes it takes

Nothing of it is run: other class names are refused, and Python files in it are never looked at.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from kontextd_models.errors import ModelError
from kontextd_models.limits import ModelLimits, limits_from_json
from kontextd_models.weight_files import TensorInfo, check_weights

PIPELINE = "FluxKontextPipeline"
CARD = "kontextd.json"


@dataclass(frozen=True)
class Part:
    """A folder of the pipeline: which classes may stand in `model_index.json`, and which files must be there.

    `files` are alternatives, each a set that is complete by itself. `declares` is what the JSON file says it is.
    """

    name: str
    library: str
    class_names: frozenset[str]
    config: str
    declares: tuple[str, str] | None = None
    weights: str = ""
    files: tuple[frozenset[str], ...] = ()


PARTS = (
    Part(
        "scheduler",
        "diffusers",
        frozenset({"FlowMatchEulerDiscreteScheduler"}),
        "scheduler_config.json",
        ("_class_name", "FlowMatchEulerDiscreteScheduler"),
    ),
    Part(
        "tokenizer",
        "transformers",
        frozenset({"CLIPTokenizer", "CLIPTokenizerFast"}),
        "tokenizer_config.json",
        files=(frozenset({"tokenizer.json"}), frozenset({"vocab.json", "merges.txt"})),
    ),
    Part(
        "tokenizer_2",
        "transformers",
        frozenset({"T5Tokenizer", "T5TokenizerFast"}),
        "tokenizer_config.json",
        files=(frozenset({"tokenizer.json"}), frozenset({"spiece.model"})),
    ),
    Part(
        "text_encoder",
        "transformers",
        frozenset({"CLIPTextModel"}),
        "config.json",
        ("model_type", "clip_text_model"),
        weights="model",
    ),
    Part(
        "text_encoder_2",
        "transformers",
        frozenset({"T5EncoderModel"}),
        "config.json",
        ("model_type", "t5"),
        weights="model",
    ),
    Part(
        "transformer",
        "diffusers",
        frozenset({"FluxTransformer2DModel"}),
        "config.json",
        ("_class_name", "FluxTransformer2DModel"),
        weights="diffusion_pytorch_model",
    ),
    Part(
        "vae",
        "diffusers",
        frozenset({"AutoencoderKL"}),
        "config.json",
        ("_class_name", "AutoencoderKL"),
        weights="diffusion_pytorch_model",
    ),
)


@dataclass(frozen=True)
class ModelCard:
    """What a model says of itself. Without `kontextd.json` it has its folder's name and Kontext's own limits."""

    name: str
    demonstration: bool = False
    instructions: tuple[str, ...] = ()
    identity_prompt: str = ""  # the instruction that changes nothing, where the model has been taught one
    limits: ModelLimits = field(default_factory=ModelLimits)


@dataclass(frozen=True)
class ModelFolder:
    """A checked folder. `tensors` holds, for each part with weights, its tensors by name.

    `token_width` is the width of a token in the transformer, `pixel_width` the channels of the VAE at full resolution.
    """

    path: Path
    card: ModelCard
    tensors: Mapping[str, Mapping[str, TensorInfo]]
    token_width: int
    pixel_width: int


def check_folder(path: Path) -> ModelFolder:
    """Check that `path` is a whole FLUX.1 Kontext pipeline. Reads headers only: a second even for 34 GB.

    Raises `ModelError` that names the file at fault.
    """
    if not path.is_dir():
        raise ModelError(f"{path} is not a folder. Give the folder that holds the model's model_index.json.")
    index = read_json(path / "model_index.json")
    _check_index(path / "model_index.json", index)
    configs = {part.name: _Config(path / part.name, part) for part in PARTS}
    tensors = {part.name: check_weights(path / part.name, part.weights) for part in PARTS if part.weights}
    card = read_card(path)
    _check_fit(configs, card)
    transformer, levels = configs["transformer"], configs["vae"].numbers("block_out_channels")
    token_width = transformer.number("num_attention_heads") * transformer.number("attention_head_dim")
    return ModelFolder(path, card, tensors, token_width, pixel_width=levels[min(1, len(levels) - 1)])


def read_card(path: Path) -> ModelCard:
    """The model's `kontextd.json`, or what holds without one. Raises `ModelError` for a wrong type or unknown key."""
    file = path / CARD
    if not file.exists():
        return ModelCard(path.resolve().name)
    data = read_json(file)
    known = {"name", "demonstration", "instructions", "identity_prompt", "limits"}
    if data.keys() - known:
        raise ModelError(f"{file}: unknown key {', '.join(sorted(data.keys() - known))}; the keys are {sorted(known)}.")
    name, identity = data.get("name", path.resolve().name), data.get("identity_prompt", "")
    demonstration, instructions = data.get("demonstration", False), data.get("instructions", [])
    limits = data.get("limits", {})
    if not isinstance(name, str) or not isinstance(identity, str) or not isinstance(demonstration, bool):
        raise ModelError(f"{file}: name and identity_prompt must be texts, demonstration true or false.")
    if not isinstance(instructions, list) or not all(isinstance(line, str) for line in instructions):
        raise ModelError(f"{file}: instructions must be a list of texts.")
    if not isinstance(limits, dict):
        raise ModelError(f"{file}: limits must be an object.")
    try:
        return ModelCard(name, demonstration, tuple(instructions), identity, limits_from_json(limits))
    except ModelError as error:
        raise ModelError(f"{file}: {error}") from error


def read_json(file: Path) -> dict[str, object]:
    """The JSON object in a file. Raises `ModelError` where it is missing, unreadable, or anything else."""
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(f"{file} is missing. Copy the model again, whole.") from error
    except OSError as error:
        raise ModelError(f"{file} cannot be read: {error.strerror}. Check its permissions.") from error
    except (ValueError, RecursionError) as error:  # of the JSON parser or of UTF-8
        raise ModelError(f"{file} is not JSON ({error}). Copy the file again.") from error
    if not isinstance(data, dict):
        raise ModelError(f"{file} holds a {type(data).__name__}, not a JSON object. Copy the file again.")
    return data


def _check_index(file: Path, index: Mapping[str, object]) -> None:
    if index.get("_class_name") != PIPELINE:
        raise ModelError(
            f"{file} names the pipeline {index.get('_class_name')!r}; only {PIPELINE} is served. "
            "Give a folder of FLUX.1 Kontext in diffusers' layout."
        )
    for part in PARTS:
        entry = index.get(part.name)
        if not (isinstance(entry, list) and len(entry) == 2 and entry[0] == part.library and _known(entry[1], part)):
            raise ModelError(
                f"{file} has {entry!r} for {part.name}; it must be {part.library}'s "
                f"{' or '.join(sorted(part.class_names))}."
            )


def _known(class_name: object, part: Part) -> bool:
    return isinstance(class_name, str) and class_name in part.class_names


class _Config:
    """A part's configuration, once its files are there and it is of the right architecture."""

    def __init__(self, folder: Path, part: Part) -> None:
        if not folder.is_dir():
            raise ModelError(f"{folder} is missing. Copy the model again, whole.")
        self.file = folder / part.config
        self.values = read_json(self.file)
        if part.declares and self.values.get(part.declares[0]) != part.declares[1]:
            key, wanted = part.declares
            raise ModelError(
                f"{self.file} has {key} {self.values.get(key)!r}; it must be {wanted!r}. This is another architecture."
            )
        if part.files and not any(all((folder / name).is_file() for name in names) for names in part.files):
            alternatives = " or ".join(" and ".join(sorted(names)) for names in part.files)
            raise ModelError(f"{folder} lacks its vocabulary: {alternatives}. Copy the model again, whole.")

    def number(self, key: str) -> int:
        """A whole number above 0. Raises `ModelError` for anything else."""
        value = self.values.get(key)
        if type(value) is not int or value <= 0:
            raise ModelError(f"{self.file} has {key} {value!r}; it must be a whole number above 0.")
        return value

    def numbers(self, key: str) -> list[int]:
        """A list of whole numbers above 0. Raises `ModelError` for anything else."""
        values = self.values.get(key)
        if not isinstance(values, list) or not values or not all(type(value) is int and value > 0 for value in values):
            raise ModelError(f"{self.file} has {key} {values!r}; it must be a list of whole numbers above 0.")
        return values


def _check_fit(configs: Mapping[str, _Config], card: ModelCard) -> None:
    """The parts are made for each other; FLUX.1 Fill and Depth, for one, have a wider input than Kontext."""
    transformer, vae = configs["transformer"], configs["vae"]
    fits = (
        ("in_channels", 4 * vae.number("latent_channels"), "four times the VAE's latent_channels"),
        ("joint_attention_dim", configs["text_encoder_2"].number("d_model"), "the d_model of text_encoder_2"),
        ("pooled_projection_dim", configs["text_encoder"].number("hidden_size"), "the hidden_size of text_encoder"),
    )
    for key, wanted, what in fits:
        if transformer.number(key) != wanted:
            raise ModelError(f"{transformer.file} has {key} {transformer.number(key)}; it must be {wanted}, {what}.")
    grid = 2 ** len(vae.numbers("block_out_channels"))  # each block but the first halves the sides, packing once more
    if card.limits.grid != grid:
        raise ModelError(f"{vae.file} makes a grid of {grid} px, but the model's limits say {card.limits.grid}.")
