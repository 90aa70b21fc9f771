"""Stage "loras": small LoRAs for the embedded model, trained through peft by flow matching. Knows no dialects.

    python -m kontextd_models.embedded.train loras --photos photos --work work --out MODEL_FOLDER

Each learns a style the model does not know (`styles.py`), laid over whatever the prompt asks for. The base stays as it
is. The state of each is kept in the work folder, the result as peft has it in `work/{style}.lora.safetensors`, and what
ships in the package (`export_loras.py`).
"""

from __future__ import annotations

import random
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn

from kontextd_models.embedded import architecture
from kontextd_models.embedded.data import Photos
from kontextd_models.embedded.export_loras import export_lora
from kontextd_models.embedded.loop import Schedule, averaged, run
from kontextd_models.embedded.styles import STYLES
from kontextd_models.embedded.train_flow import Batches, TextPool, exported, flow_loss, positions, text_pool
from kontextd_models.lora.layout import layout_of

RANKS = {"duotone": 8, "vignette": 8, "pixelate": 8, "line-drawing": 16}  # alpha is the rank
_STEPS = {"duotone": 500, "vignette": 500, "pixelate": 500, "line-drawing": 1200}
# Every linear of the blocks but the modulation.
TARGETS = (
    "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",
    "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2", "proj_mlp", "proj_out",
)  # fmt: skip
# Most prompts ask for nothing the model knows: the style alone is what is seen first.
_PRACTICE = {"other 0": 10, "other 1": 10, "other 2": 10}
_GRIDS = ((16, 16), (16, 16), (16, 24), (24, 16), (12, 20), (8, 8), (8, 12), (12, 8), (18, 14), (9, 28), (20, 20))
_TOKENS = 3 * 256  # output tokens a batch


def train(photos: Photos, folder: Path, work: Path, device: torch.device, steps: int | None) -> None:
    """Train each style on the model in `folder`."""
    pipeline = exported(folder, device)
    pool, vae = text_pool(pipeline), pipeline.vae.cpu()
    for style in STYLES:
        torch.manual_seed(0)
        transformer = exported(folder, device).transformer.train()
        schedule = Schedule(steps or _STEPS[style], learning_rate=2e-3, warm_up=0.05, average=0.99)
        _train(style, transformer, photos, pool, vae, schedule, work, device)
        export_lora(style, trained_lora(work, style), layout_of(pipeline))


def _train(
    style: str,
    transformer: architecture.Transformer,
    photos: Photos,
    pool: TextPool,
    vae: architecture.Vae,
    schedule: Schedule,
    work: Path,
    device: torch.device,
) -> None:
    batches = Batches(photos, pool, vae, _PRACTICE, device, STYLES[style])
    transformer.requires_grad_(False)
    rank = RANKS[style]
    transformer.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=list(TARGETS)))
    adapter = nn.ParameterDict({name: value for name, value in _factors(transformer).items()})

    def loss_of(step: int, rng: random.Random) -> Tensor:
        rows, columns = rng.choice(_GRIDS)
        count = max(1, _TOKENS // (rows * columns))
        batch = batches.draw(rows, columns, count, rng)
        return flow_loss(transformer, batch, positions(rows, columns, device), batches.weights)

    checkpoint = work / f"{style}.safetensors"
    run(adapter, adapter.parameters(), loss_of, schedule, checkpoint)
    means = averaged(checkpoint)
    with torch.no_grad():
        for name, value in adapter.items():
            value.copy_(means[name])
    save_file(get_peft_model_state_dict(transformer), trained_lora(work, style))


def trained_lora(work: Path, style: str) -> Path:
    """Where the factors of a style are, under peft's names."""
    return work / f"{style}.lora.safetensors"


def _factors(transformer: architecture.Transformer) -> dict[str, nn.Parameter]:
    """What is trained, under names that a ParameterDict takes."""
    return {name.replace(".", "/"): value for name, value in transformer.named_parameters() if value.requires_grad}
