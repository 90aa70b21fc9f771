"""Starts the embedded VAE from a linear transform instead of noise. Knows the parts of diffusers' `AutoencoderKL`.

The encoder computes, exactly, a principal-component transform of 8 × 8 pixel blocks to 16 coefficients, and stays so:
latents of an edit are then near-linear in its pixels, flips are permutations with sign changes, and the transformer can
be trained before the decoder is. Three devices make the standard modules linear:

- residual branches end in zeros, so only the shortcuts carry;
- SiLU is applied to pairs (x, −x): silu(x) − silu(−x) = x;
- two constant channels ±C, far larger than the image, fix the statistics of the (one-group) norms to
  std = C·sqrt(2/n), so that a weight of the same size undoes them. So crops train for any size.
"""

from __future__ import annotations

import math

import torch
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from kontextd_models.embedded.architecture import Vae

CONSTANT = 256.0
_LOG_VARIANCE = -14.0


def principal_axes(samples: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` leading principal axes [count, D] of samples [N, D], and their standard deviations."""
    centred = (samples - samples.mean(0)).double()
    values, vectors = torch.linalg.eigh(centred.T @ centred / len(centred))
    order = values.argsort(descending=True)[:count]
    return vectors[:, order].T.float(), values[order].sqrt().float()


def space_to_depth(x: Tensor) -> Tensor:
    """[B, C, H, W] → [B, 4C, H/2, W/2], offsets (row, column) slowest."""
    return torch.cat([x[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1)], dim=1)


def _rows(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).flatten(0, 2)


def block_transform(pictures: Tensor, coefficients: int) -> tuple[Tensor, Tensor]:
    """Fit the two-stage transform to pictures [B, 3, H, W] in −1..1: 4 × 4 blocks to 30, then 8 × 8 to `coefficients`.

    Mirrored copies are added, so that every axis is even or odd under flips. Returns the matrices
    [30, 48] and [coefficients, 120]; latents are of unit power on average, each scaled by the root of its deviation.
    """
    pictures = torch.cat([pictures, pictures.flip(2)])
    pictures = torch.cat([pictures, pictures.flip(3)])
    four = space_to_depth(space_to_depth(pictures))
    first, _ = principal_axes(_rows(four), 30)
    first = first / 4  # a 4 × 4 mean, not a sum
    eight = space_to_depth(torch.einsum("oc,bchw->bohw", first, four))
    second, deviations = principal_axes(_rows(eight), coefficients)
    scales = deviations**-0.5
    scales = scales / ((deviations * scales) ** 2).mean().sqrt()
    return first, second * scales[:, None]


@torch.no_grad()
def _linearise(module: nn.Module) -> None:
    """Zero the ends of all residual branches; make norms undo the statistics that the constant channels set."""
    for part in module.modules():
        if isinstance(part, ResnetBlock2D):
            assert part.conv1.bias is not None
            assert part.conv2.bias is not None
            nn.init.zeros_(part.conv2.weight)
            nn.init.zeros_(part.conv2.bias)
            part.conv1.weight[-2:] = 0
            part.conv1.bias[-2], part.conv1.bias[-1] = CONSTANT, -CONSTANT
        if isinstance(part, nn.GroupNorm):
            part.weight.fill_(CONSTANT * math.sqrt(2 / part.num_channels))
            part.weight[-2:] = 0
            part.bias.zero_()


def hold_constants(decoder: nn.Module) -> None:
    """Keep the training off what writes or reads the constant channels: one step there moves a layer by 256."""
    for part in decoder.modules():
        if isinstance(part, nn.GroupNorm | nn.Conv2d) and part is not decoder.conv_out:
            part.weight.register_hook(_without_last_rows)
            assert part.bias is not None
            part.bias.register_hook(_without_last_rows)
    for part in decoder.modules():
        if isinstance(part, ResnetBlock2D) and part.conv_shortcut is not None:
            part.conv_shortcut.weight.register_hook(_without_last_columns)
        if isinstance(part, Upsample2D) and part.conv is not None:
            part.conv.weight.register_hook(_without_last_columns)


def _without_last_rows(gradient: Tensor) -> Tensor:
    gradient = gradient.clone()
    gradient[-2:] = 0
    return gradient


def _without_last_columns(gradient: Tensor) -> Tensor:
    gradient = gradient.clone()
    gradient[:, -2:] = 0
    return gradient


@torch.no_grad()
def _set(conv: nn.Conv2d, taps: Tensor) -> None:
    """Make `conv` compute `taps` [o, i, kh, kw] in its first channels, top left tap first, and the constants last."""
    conv.weight.zero_()
    assert conv.bias is not None
    conv.bias.zero_()
    offset = 1 if conv.stride == (1, 1) and conv.kernel_size == (3, 3) else 0
    out_channels, in_channels, height, width = taps.shape
    conv.weight[:out_channels, :in_channels, offset : offset + height, offset : offset + width] = taps
    conv.bias[-2], conv.bias[-1] = CONSTANT, -CONSTANT


def _depth_taps(matrix: Tensor) -> Tensor:
    """Turn a matrix on `space_to_depth` channels [o, 4i] into the taps [o, i, 2, 2] of a stride-2 convolution."""
    out_channels, columns = matrix.shape
    return matrix.view(out_channels, 2, 2, columns // 4).permute(0, 3, 1, 2)


@torch.no_grad()
def init_encoder(vae: Vae, first: Tensor, second: Tensor) -> None:
    """Make the encoder of `vae` the transform (`first`, `second`) of `block_transform`, exactly."""
    encoder = vae.encoder
    _linearise(encoder)
    _set(encoder.conv_in, torch.eye(3)[:, :, None, None])
    # 4 × 4 blocks are made in two halves: 12 channels by the first, all 48 inputs mixed to 30 by the second.
    pairs = torch.cat([second, -second])
    for block, matrix in zip(encoder.down_blocks[:3], (torch.eye(12), first, pairs), strict=True):
        resnet = block.resnets[0]
        if resnet.conv_shortcut is not None:
            channels = resnet.conv_shortcut.in_channels - 2
            _set(resnet.conv_shortcut, torch.eye(channels)[:, :, None, None])
        _set(block.downsamplers[0].conv, _depth_taps(matrix))
    last = encoder.down_blocks[3].resnets[0].conv_shortcut
    _set(last, torch.eye(last.in_channels - 2)[:, :, None, None])
    count = len(second)
    encoder.conv_out.weight.zero_()
    encoder.conv_out.bias.zero_()
    for index in range(count):
        encoder.conv_out.weight[index, index, 1, 1] = 1
        encoder.conv_out.weight[index, count + index, 1, 1] = -1
    encoder.conv_out.bias[count:] = _LOG_VARIANCE


@torch.no_grad()
def init_decoder(vae: Vae, generator: torch.Generator) -> None:
    """Start the decoder linear: orthogonal mixes along the shortcuts, silent residual branches, paired output."""
    decoder = vae.decoder
    _linearise(decoder)
    convs = [decoder.conv_in]
    for block in decoder.up_blocks:
        convs += [resnet.conv_shortcut for resnet in block.resnets if resnet.conv_shortcut is not None]
        convs += [up.conv for up in block.upsamplers or ()]
    for conv in convs:
        free_in = conv.in_channels - (0 if conv is decoder.conv_in else 2)
        free_out = conv.out_channels - 2
        if conv is convs[-1]:  # the last one before the output pairs
            half = nn.init.orthogonal_(torch.empty(free_out // 2, free_in), generator=generator)
            mix = torch.cat([half, -half])
        else:
            mix = nn.init.orthogonal_(torch.empty(free_out, free_in), generator=generator)
        _set(conv, mix[:, :, None, None])
        if conv.kernel_size == (3, 3):
            noise = 0.02 * torch.randn(free_out, free_in, 3, 3, generator=generator)
            conv.weight[:free_out, :free_in] += noise
    pairs = (decoder.conv_out.in_channels - 2) // 2
    half = 0.3 * torch.randn(3, pairs, 3, 3, generator=generator) / 3
    decoder.conv_out.weight.zero_()
    decoder.conv_out.bias.zero_()
    decoder.conv_out.weight[:, :pairs] = half
    decoder.conv_out.weight[:, pairs : 2 * pairs] = -half
