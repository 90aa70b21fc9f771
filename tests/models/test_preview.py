from __future__ import annotations

import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import skimage.data
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxKontextPipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from kontextd_models.preview import MAX_SIDE, Projection, encode, estimate, fit_projection, training_pictures, unpack
from PIL import Image
from torch import Tensor, nn

PHOTOS = ("astronaut", "chelsea", "coffee", "rocket")


class LinearVae(nn.Module):
    """An AutoencoderKL in all that the fit looks at, whose 16 latents are known linear functions of an 8 × 8 cell.

    12 of them hold the colours of its four quarters, mixed by an orthogonal matrix; 4 hold nothing.
    """

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.mix = nn.Parameter(nn.init.orthogonal_(torch.empty(12, 12), generator=generator).to(dtype))
        self.config = SimpleNamespace(shift_factor=0.3, scaling_factor=0.5)
        self.dtype, self.device = dtype, torch.device("cpu")

    def encode(self, pictures: Tensor) -> SimpleNamespace:
        assert pictures.dtype == self.dtype
        quarters = nn.functional.pixel_unshuffle(nn.functional.avg_pool2d(pictures, 4), 2)  # [B, 12, H/8, W/8]
        latents = torch.einsum("oc,bchw->bohw", self.mix, quarters) + 0.7
        padded = torch.cat([latents, torch.zeros_like(latents[:, :4])], dim=1)
        return SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: padded))


def tiny_vae(seed: int = 2) -> AutoencoderKL:
    """Random, with norms and biases off their initial ones and zeros."""
    torch.manual_seed(seed)
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=4,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )
    with torch.no_grad():
        for weight in vae.parameters():
            weight.add_(torch.randn_like(weight) * 0.05)
    return vae.eval()


def photo(name: str, size: tuple[int, int] = (256, 256)) -> Image.Image:
    return Image.fromarray(getattr(skimage.data, name)()).resize(size, Image.Resampling.LANCZOS)


@torch.no_grad()
def packed(vae: nn.Module, image: Image.Image) -> Tensor:
    """The packed latents of an image, by diffusers' own packing."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 127.5 - 1
    latents = encode(vae, pixels)
    return FluxKontextPipeline._pack_latents(latents, *latents.shape)


def grey(image: Image.Image, size: tuple[int, int]) -> np.ndarray:
    return np.asarray(image.convert("L").resize(size, Image.Resampling.BOX), dtype=float)


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(a.ravel(), b.ravel())[0, 1])


@pytest.mark.parametrize("size", [(256, 256), (384, 256), (256, 512), (96, 160), (1024, 512)])
def test_a_linear_vae_is_undone_up_to_what_it_threw_away(size: tuple[int, int]) -> None:
    vae = LinearVae()
    image = photo("coffee", size).point(lambda level: 64 + level // 2)  # a preview sharpens; at the ends it would clip
    preview = fit_projection(vae).render(packed(vae, image), image.height, image.width)
    quarters = (size[0] // 4, size[1] // 4)  # a colour for each quarter of a cell is what the latents know
    expected = np.asarray(image.resize(quarters, Image.Resampling.BOX), dtype=float)
    got = np.asarray(preview.resize(quarters, Image.Resampling.BOX), dtype=float)
    assert np.abs(got - expected).max() <= 3


def test_previews_through_a_random_vae_look_like_the_photo_as_far_as_any_linear_map_can() -> None:
    vae = tiny_vae()
    fitted, best = fit_projection(vae), fitted_to_photos(vae)
    for name in PHOTOS:
        wanted, latents = grey(photo(name), (32, 32)), packed(vae, photo(name))
        ours = correlation(grey(fitted.render(latents, 256, 256), (32, 32)), wanted)
        theirs = correlation(grey(best.render(latents, 256, 256), (32, 32)), wanted)
        assert ours > 0.5  # the random VAE has lost the rest:
        assert ours > theirs - 0.06


def fitted_to_photos(vae: nn.Module) -> Projection:
    """What no fit to other pictures can beat by much: least squares on the very photos it is then shown."""
    pixels = torch.stack([torch.from_numpy(np.array(photo(name))).permute(2, 0, 1) / 127.5 - 1 for name in PHOTOS])
    with torch.no_grad():
        latents = encode(vae, pixels).permute(0, 2, 3, 1).flatten(0, 2).double()
    targets = nn.functional.avg_pool2d(pixels, 8).permute(0, 2, 3, 1).flatten(0, 2).double()
    matrix = torch.linalg.lstsq(nn.functional.pad(latents, (0, 1), value=1.0), targets).solution  # [17, 3]
    return Projection(matrix.float()[:, None, None].expand(17, 8, 8, 3).contiguous())


def test_the_fit_is_the_same_to_the_bit_each_time_and_leaves_the_random_state_alone() -> None:
    vae = tiny_vae()
    first = fit_projection(vae)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    second = fit_projection(vae)
    assert torch.equal(first.matrix, second.matrix)
    assert torch.equal(state, torch.get_rng_state())


def test_a_vae_in_bfloat16_gives_the_projection_of_one_in_float32() -> None:
    exact, rounded = tiny_vae(), copy.deepcopy(tiny_vae()).bfloat16()
    latents = packed(exact, photo("chelsea"))
    want = np.asarray(fit_projection(exact).render(latents, 256, 256), dtype=float)
    fitted = fit_projection(rounded)
    got = np.asarray(fitted.render(latents.bfloat16(), 256, 256), dtype=float)
    assert fitted.matrix.dtype == torch.float32
    assert np.abs(got - want).mean() < 6  # of 255; bfloat16 holds 8 bits


def test_the_fit_leaves_no_autograd_graph_and_no_gradients() -> None:
    vae = tiny_vae()
    assert not fit_projection(vae).matrix.requires_grad
    assert all(weight.grad is None for weight in vae.parameters())


def test_training_pictures_cover_the_range_of_every_colour() -> None:
    pictures = training_pictures()
    assert pictures.shape == (8, 3, 256, 256)
    for channel in pictures.unbind(1):
        assert channel.min() == -1
        assert channel.max() == 1
        assert channel.std() > 0.4


def test_unpacking_undoes_the_packing_of_diffusers() -> None:
    latents = torch.randn(1, 16, 6, 10)
    unpacked = unpack(FluxKontextPipeline._pack_latents(latents, 1, 16, 6, 10), 6, 10)
    assert torch.equal(unpacked, latents[0].permute(1, 2, 0))


@pytest.mark.parametrize(
    ("width", "height", "shown"),
    [
        (256, 256, (256, 256)),
        (384, 256, (192, 128)),
        (128, 128, (128, 128)),
        (512, 512, (256, 256)),
        (1024, 1024, (256, 256)),
        (672, 1568, (84, 196)),
        (1920, 1088, (240, 136)),
        (2048, 1024, (256, 128)),
        (2896, 720, (256, 64)),
        (16, 4096, (1, 256)),
    ],
)
def test_a_preview_has_whole_pixels_for_each_latent_and_256_a_side_at_most(
    width: int, height: int, shown: tuple[int, int]
) -> None:
    projection = Projection(torch.zeros(17, 8, 8, 3))
    preview = projection.render(torch.zeros(1, width * height // 256, 64), height, width)
    assert (preview.mode, preview.size) == ("RGB", shown)


@settings(max_examples=60, deadline=None)
@given(columns=st.integers(1, 256), rows=st.integers(1, 256))
def test_every_preview_fits_and_keeps_the_aspect(columns: int, rows: int) -> None:
    projection = Projection(torch.zeros(17, 8, 8, 3))
    preview = projection.render(torch.zeros(1, columns * rows, 64), rows * 16, columns * 16)
    assert max(preview.size) <= MAX_SIDE
    scale = preview.width / columns if columns > rows else preview.height / rows
    assert abs(preview.width - columns * scale) <= 1
    assert abs(preview.height - rows * scale) <= 1


def test_each_part_of_a_preview_stands_where_it_belongs() -> None:
    """A photo 2:1 whose halves differ: neither axis is swapped, mirrored or shifted."""
    vae = LinearVae()
    image = Image.new("RGB", (512, 256), "blue")
    image.paste("red", (0, 0, 128, 64))
    preview = fit_projection(vae).render(packed(vae, image), 256, 512)
    pixels = np.asarray(preview, dtype=float)
    assert preview.size == (256, 128)
    assert np.abs(pixels[:32, :64] - (255, 0, 0)).max() <= 3
    assert np.abs(pixels[32:] - (0, 0, 255)).max() <= 3
    assert np.abs(pixels[:32, 64:] - (0, 0, 255)).max() <= 3


def test_colours_beyond_the_range_are_clipped_and_do_not_wrap() -> None:
    matrix = torch.zeros(17, 8, 8, 3)
    matrix[-1, ..., 0], matrix[-1, ..., 2] = 5.0, -5.0
    preview = Projection(matrix).render(torch.zeros(1, 4, 64), 32, 32)
    assert preview.getcolors() == [(256 * 4, (255, 128, 0))]


def test_rendering_leaves_the_latents_alone() -> None:
    latents = torch.randn(1, 256, 64)
    before = latents.clone()
    fit_projection(LinearVae()).render(latents, 256, 256)
    assert torch.equal(latents, before)


def test_the_estimate_is_exact_on_a_straight_path_before_and_after_a_step_of_the_scheduler() -> None:
    generator = torch.Generator().manual_seed(0)
    finished, noise = torch.randn(2, 1, 64, 64, generator=generator).unbind()
    velocity = noise - finished
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 0.25, 4))
    latents = noise
    for timestep, sigma, next_sigma in zip(
        scheduler.timesteps, scheduler.sigmas[:-1].tolist(), scheduler.sigmas[1:].tolist(), strict=True
    ):
        torch.testing.assert_close(estimate(latents, velocity, sigma), finished, atol=1e-5, rtol=0)
        latents = scheduler.step(velocity, timestep, latents, return_dict=False)[0]
        torch.testing.assert_close(estimate(latents, velocity, next_sigma), finished, atol=1e-5, rtol=0)
    assert math.isclose(scheduler.sigmas[-1], 0)
