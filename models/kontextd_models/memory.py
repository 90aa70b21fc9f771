"""Memory modes: where the weights live while an edit runs. Knows sizes and devices; knows no requests and no images.

`choose` is arithmetic on bytes; torch comes in with `place`, `free_bytes` and `forget`, so `doctor` can plan without
it. What a mode needs on the device, R being a reserve of 1 GB for the CUDA context, cuBLAS and fragments, A the
activations, and K what presets keep of the reference:

| mode | on the device | FLUX.1 Kontext, bfloat16, A at 1 MP + 1 MP | 2 MP + 2 MP |
|---|---|---|---|
| `resident` | transformer + text encoders + VAE + A + K + R | 37.4 GB | 40.1 GB |
| `encoders_off` | transformer + VAE + max(A + K, one encoder layer) + R | 27.7 GB | 30.3 GB |
| `group_offload` | the rest of the transformer + 2 blocks + VAE + A + R | 5.3 GB | 8.0 GB |
| `sequential` | 2 layers + VAE + A + R | 4.4 GB | 7.1 GB |

(transformer 23.8 GB, T5 9.5, CLIP 0.25, VAE 0.17; a double block 0.68, T5's embedding 0.26; A 2.7 and 5.4 GB, which
are estimates. Where presets reuse the reference, K is 2.9 and 5.7 GB, else 0. With the blocks in float8 the transformer
has 15.3 GB and a double block 0.45: the first three modes need 28.9, 19.2 and 4.8 GB.) The engine asks for A at the
model's ceiling, so that no size it accepts runs out of memory.

Off the device is in host memory, pinned on CUDA: `encoders_off` wants 10 GB of that, the two below it 34 GB. Files in
the dtype the model runs in are mapped while they load, which takes page cache but no memory of the process's own;
others are converted, and then all parts lie in host memory at once.

Weights are streamed through the device by diffusers' group offloading, a block (`group_offload`) or a layer at a time,
the next one copied while this one computes; the encoders always a layer at a time. Moving T5 there and back whole would
need 9.5 GB beside the transformer and copy it twice. Where blocks run the plain way (`execution/blocks.py`), the same
kernels run on the same numbers in every mode: results are equal to the bit. Weights stay ordinary parameters that may
be written in place between two edits.
"""

from __future__ import annotations

import gc
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kontextd_models.execution.precision import fp8_layers
from kontextd_models.folder import ModelFolder
from kontextd_models.records import MemoryMode

if TYPE_CHECKING:
    import torch

    from kontextd_models.encode import Pipeline
    from kontextd_models.weight_files import TensorInfo

RESERVE_BYTES = 1_000_000_000
_BLOCK = re.compile(r"(transformer_blocks|single_transformer_blocks)\.\d+\.")
_ENCODERS = ("text_encoder", "text_encoder_2")
# Tensors of [tokens, width] that are alive at once in a single block: 7 of the joined projection, 5 of its input to the
# way out, q and k in float32 for the rotation, residual, modulation. Estimated from the graph.
_TOKEN_TENSORS = 24
# Tensors of [width of the second level, height, width] alive at once in the decoder's last block; estimated likewise.
_PIXEL_TENSORS = 5
_PROMPT_TOKENS = 512


@dataclass(frozen=True)
class ModelSizes:
    """Bytes, in the dtype the model runs in. `outside_blocks` is the part of the transformer that is in no block.

    `kept_reference` are the reference's keys and values in all blocks, where presets reuse them; `gone_once_loaded` is
    what the transformer has more of before its blocks are in float8.
    """

    transformer: int
    text_encoders: int
    vae: int
    largest_block: int
    outside_blocks: int
    largest_layer: int
    activations: int
    kept_reference: int = 0
    gone_once_loaded: int = 0


def choose(
    free_bytes: int, sizes: ModelSizes, is_cuda: bool, asked: MemoryMode = MemoryMode.AUTO
) -> tuple[MemoryMode, str]:
    """The mode to run in, and one sentence that says why.

    `auto` takes the first mode that fits, in the order of the table above, and `sequential` where none does. What was
    asked for is taken as it is, except on the CPU: there all weights lie in host memory anyway, so it is `resident`.
    """
    if not is_cuda:
        also = "" if asked in (MemoryMode.AUTO, MemoryMode.RESIDENT) else f"; {asked.value} has no effect there"
        return MemoryMode.RESIDENT, f"on the CPU everything is in host memory{also}"
    wanted = needs(sizes)
    if asked is not MemoryMode.AUTO:
        return asked, f"asked for; it needs {_gb(wanted[asked])} of the {_gb(free_bytes)} free on the device"
    fitting = [mode for mode, need in wanted.items() if need <= free_bytes]
    if not fitting:
        least = wanted[MemoryMode.SEQUENTIAL]
        return (
            MemoryMode.SEQUENTIAL,
            f"only {_gb(free_bytes)} are free; at the largest size it needs {_gb(least)}",
        )
    chosen = fitting[0]
    why = f"it needs {_gb(wanted[chosen])} of the {_gb(free_bytes)} free on the device"
    if chosen is not MemoryMode.RESIDENT:
        why += f"; resident would need {_gb(wanted[MemoryMode.RESIDENT])}"
    return chosen, why


def needs(sizes: ModelSizes) -> dict[MemoryMode, int]:
    """Bytes on the device by mode, the fastest mode first."""
    always = sizes.vae + RESERVE_BYTES
    edit = sizes.activations + sizes.kept_reference
    return {
        MemoryMode.RESIDENT: always + sizes.transformer + sizes.text_encoders + edit,
        MemoryMode.ENCODERS_OFF: always + sizes.transformer + max(edit, 2 * sizes.largest_layer),
        MemoryMode.GROUP_OFFLOAD: always + sizes.outside_blocks + 2 * sizes.largest_block + sizes.activations,
        MemoryMode.SEQUENTIAL: always + 2 * sizes.largest_layer + sizes.activations,
    }


def host_needs(sizes: ModelSizes, mode: MemoryMode, is_cuda: bool) -> int:
    """Bytes of host memory that the weights take in `mode`. Of what goes to a GPU, the transformer passes through."""
    transformer = sizes.transformer + sizes.gone_once_loaded
    if not is_cuda or mode in (MemoryMode.GROUP_OFFLOAD, MemoryMode.SEQUENTIAL):
        return transformer + sizes.text_encoders + sizes.vae
    return max(transformer, sizes.text_encoders)


def sizes_of(
    folder: ModelFolder, bytes_per_element: int, area: int, *, fp8: bool = False, keeps_reference: bool = False
) -> ModelSizes:
    """The sizes of a checked folder, with activations for an output and a reference of `area` pixels each."""
    transformer = folder.tensors["transformer"]
    lowered = _lowered(transformer) if fp8 else frozenset()
    sizes = {  # by part and tensor
        part: {
            name: _fp8_bytes(info) if part == "transformer" and name in lowered else bytes_per_element * info.elements
            for name, info in tensors.items()
        }
        for part, tensors in folder.tensors.items()
    }
    blocks: dict[str, int] = {}
    for name, size in sizes["transformer"].items():
        found = _BLOCK.match(name)
        if found:
            blocks[found[0]] = blocks.get(found[0], 0) + size
    total = sum(sizes["transformer"].values())
    keys = 2 * len(blocks) * (area // folder.card.limits.grid**2) * folder.token_width
    return ModelSizes(
        transformer=total,
        text_encoders=sum(sum(sizes[part].values()) for part in _ENCODERS),
        vae=sum(sizes["vae"].values()),
        largest_block=max(blocks.values(), default=0),
        outside_blocks=total - sum(blocks.values()),
        largest_layer=max(size for tensors in sizes.values() for size in tensors.values()),
        activations=bytes_per_element * _activation_elements(folder, area),
        kept_reference=bytes_per_element * keys if keeps_reference else 0,
        gone_once_loaded=bytes_per_element * sum(info.elements for info in transformer.values()) - total,
    )


def _lowered(transformer: Mapping[str, TensorInfo]) -> frozenset[str]:
    """The weights that are in float8 then, by the names of tensors."""
    linears = [name.removesuffix(".weight") for name, info in transformer.items() if len(info.shape) == 2]
    return frozenset(f"{name}.weight" for name in fp8_layers(linears))


def _fp8_bytes(info: TensorInfo) -> int:
    return info.elements + 4 * info.shape[0]  # codes, and a scale a row


def _activation_elements(folder: ModelFolder, area: int) -> int:
    tokens = _PROMPT_TOKENS + 2 * (area // folder.card.limits.grid**2)
    return max(_TOKEN_TENSORS * tokens * folder.token_width, _PIXEL_TENSORS * area * folder.pixel_width)


def place(pipeline: Pipeline, mode: MemoryMode, device: torch.device) -> None:
    """Put the weights of a pipeline that lies in host memory where `mode` wants them. Once for each pipeline."""
    pipeline.vae.to(device)  # small, and entered by its `encode` and `decode`, which hooks on `forward` do not see
    if mode is MemoryMode.RESIDENT:
        pipeline.text_encoder.to(device)
        pipeline.text_encoder_2.to(device)
    else:
        _stream(pipeline.text_encoder, device, "leaf_level")
        # T5's stack holds all that is run. The module around it has the embedding once more, under a second name.
        _stream(pipeline.text_encoder_2.encoder, device, "leaf_level")
    if mode in (MemoryMode.RESIDENT, MemoryMode.ENCODERS_OFF):
        pipeline.transformer.to(device)
    else:
        _stream(pipeline.transformer, device, "block_level" if mode is MemoryMode.GROUP_OFFLOAD else "leaf_level")


def rest(pipeline: Pipeline) -> None:
    """Send every streamed weight that a broken-off forward pass left on the device back to host memory."""
    for name in (*_ENCODERS, "transformer"):
        for module in getattr(pipeline, name).modules():
            registry = getattr(module, "_diffusers_hook", None)
            hook = registry.get_hook("group_offloading") if registry else None
            if hook is not None:
                hook.group.offload_()


def forget() -> None:
    """Free what an engine that was given up has left, such as its compiled functions: torch keeps eight ways of each.

    Without it the device's memory seems to be full for the next engine: torch keeps what it once had.
    """
    import torch

    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None:
        dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def free_bytes(device: torch.device) -> int:
    """Free memory of a CUDA device, in bytes; 0 for the CPU, where it decides nothing."""
    import torch

    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0


def _stream(module: torch.nn.Module, device: torch.device, offload_type: str) -> None:
    import torch
    from diffusers.hooks.group_offloading import apply_group_offloading

    apply_group_offloading(
        module,
        onload_device=device,
        offload_device=torch.device("cpu"),
        offload_type=offload_type,
        num_blocks_per_group=1,
        use_stream=device.type == "cuda",
    )


def _gb(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:.1f} GB"
