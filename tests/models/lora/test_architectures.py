"""What a file that is not for our model is said to be: real key names of other models' trainers."""

from __future__ import annotations

import pytest
from dialect_files import DIALECTS, build
from kontextd_models.lora.architectures import UNKNOWN, looks_like
from kontextd_models.lora.layout import Layout

Shape = tuple[int, ...]


def pair(module: str, out: int, inputs: int, ends: tuple[str, str] = ("lora_A", "lora_B")) -> dict[str, Shape]:
    return {f"{module}.{ends[0]}.weight": (4, inputs), f"{module}.{ends[1]}.weight": (out, 4)}


def kohya(module: str, out: int = 64, inputs: int = 64) -> dict[str, Shape]:
    return pair(module, out, inputs, ("lora_down", "lora_up")) | {f"{module}.alpha": ()}


SDXL_UNET = "lora_unet_down_blocks_2_attentions_1_transformer_blocks_"
LORAS = [
    ("SDXL", kohya(SDXL_UNET + "0_attn2_to_k", 1280, 2048)),
    ("SDXL", kohya(SDXL_UNET + "9_attn1_to_q", 1280, 1280)),
    ("SDXL", kohya("lora_unet_input_blocks_8_1_transformer_blocks_4_attn1_to_q", 1280, 1280)),
    ("SDXL", pair("unet.up_blocks.0.attentions.1.transformer_blocks.1.attn2.to_v", 1280, 2048)),
    ("SDXL", kohya("lora_te2_text_model_encoder_layers_31_mlp_fc1", 5120, 1280)),
    ("SD 1.5", kohya("lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k", 320, 768)),
    ("SD 1.5", pair("unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k", 1280, 768)),
    ("SD 2", kohya("lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k", 1280, 1024)),
    ("SD 1.5 or SDXL", kohya("lora_unet_up_blocks_1_attentions_0_proj_in", 1280, 1280)),
    ("SD 1.5 or SDXL", kohya("lora_te_text_model_encoder_layers_0_mlp_fc1", 3072, 768)),
    ("SD 3", kohya("lora_unet_joint_blocks_0_x_block_attn_qkv", 4608, 1536)),
    ("SD 3", pair("transformer.transformer_blocks.0.attn.add_q_proj", 1536, 1536)),
    ("SD 3", pair("transformer.transformer_blocks.30.attn.add_q_proj", 2432, 2432)),
    ("Wan", pair("diffusion_model.blocks.0.self_attn.q", 5120, 5120)),
    ("Wan", kohya("lora_unet_blocks_39_cross_attn_k", 5120, 5120)),
    ("Wan", pair("transformer.blocks.0.attn1.to_q", 5120, 5120)),
    ("FLUX.2", pair("transformer.single_transformer_blocks.0.attn.to_qkv_mlp_proj", 55296, 6144)),
    ("FLUX.2", pair("diffusion_model.single_blocks.0.linear1", 55296, 6144)),
    ("FLUX.2", pair("double_blocks.0.img_attn.qkv", 18432, 6144)),
    ("FLUX.2", pair("double_blocks.0.img_attn.qkv", 12288, 4096)),
    ("FLUX.2", pair("diffusion_model.single_blocks.0.linear1", 27648, 3072)),
    ("Qwen-Image", pair("transformer.transformer_blocks.0.img_mlp.net.0.proj", 12288, 3072)),
    ("Qwen-Image", pair("transformer_blocks.59.attn.add_q_proj", 3072, 3072)),
    ("Qwen-Image", kohya("lora_unet_transformer_blocks_3_txt_mod_1", 18432, 3072)),
    ("HunyuanVideo", pair("transformer.double_blocks.0.img_attn_qkv", 9216, 3072)),
    ("HunyuanVideo", kohya("lora_unet_double_blocks_0_img_mlp_fc1", 12288, 3072)),
    ("HunyuanVideo", pair("double_blocks.0.img_attn_q", 2048, 2048)),
    ("LTX", pair("diffusion_model.transformer_blocks.0.attn1.to_q", 2048, 2048)),
    ("LTX", pair("transformer.transformer_blocks.0.attn2.to_k", 2048, 2048)),
    ("Z-Image", pair("diffusion_model.layers.0.attention.to_q", 3840, 3840)),
    ("Z-Image", kohya("lora_unet_layers_0_feed_forward_w1", 10240, 3840)),
    ("Lumina", pair("transformer.layers.0.attn.to_q", 2304, 2304)),
    ("Lumina", kohya("lora_unet_noise_refiner_0_attention_qkv", 4608, 2304)),
    ("Chroma", kohya("lora_unet_distilled_guidance_layer_layers_0_in_layer", 5120, 5120)),
    ("PixArt", pair("transformer.transformer_blocks.0.attn1.to_q", 1152, 1152)),
    ("CogVideoX", pair("transformer.transformer_blocks.0.attn1.to_q", 3072, 3072)),
    ("HiDream", pair("transformer.double_stream_blocks.0.block.attn1.to_q", 2560, 2560)),
    ("AuraFlow", pair("transformer.joint_transformer_blocks.0.attn.to_q", 3072, 3072)),
    ("Stable Cascade", kohya("lora_prior_unet_down_blocks_0_1_channelwise_0", 8192, 2048)),
    ("a language model", pair("base_model.model.model.layers.0.self_attn.q_proj", 4096, 4096)),
]


@pytest.mark.parametrize(("architecture", "shapes"), LORAS)
def test_the_architecture_of_a_lora_is_named(architecture: str, shapes: dict[str, Shape]) -> None:
    assert looks_like(shapes, shapes) == architecture


@pytest.mark.parametrize(
    ("what", "keys"),
    [
        ("a full checkpoint", ["double_blocks.0.img_attn.qkv.weight", "img_in.weight"]),
        ("a full checkpoint", ["model.diffusion_model.input_blocks.1.1.proj_in.weight", "first_stage_model.x"]),
        ("a full checkpoint", ["transformer_blocks.0.attn.to_q.weight", "proj_out.bias"]),
        ("a full checkpoint", ["down_blocks.0.resnets.0.conv1.weight"]),
        ("a VAE", ["encoder.down.0.block.0.conv1.weight", "decoder.conv_in.bias", "quant_conv.weight"]),
        ("a VAE", ["decoder.up_blocks.0.resnets.0.conv1.weight"]),
        ("a text encoder", ["text_model.encoder.layers.0.self_attn.q_proj.weight"]),
        ("a text encoder", ["encoder.block.0.layer.0.SelfAttention.q.weight", "shared.weight"]),
        ("a ControlNet", ["controlnet_blocks.0.weight", "transformer_blocks.0.attn.to_q.weight"]),
        ("a ControlNet", ["control_model.zero_convs.0.0.weight", "lora_controlnet"]),
        ("an IP-Adapter", ["image_proj.proj.weight", "ip_adapter.1.to_k_ip.weight"]),
        ("an IP-Adapter", ["double_blocks.0.processor.ip_adapter_double_stream_k_proj.weight"]),
        ("a textual-inversion embedding", ["emb_params"]),
        ("a textual-inversion embedding", ["clip_l", "clip_g"]),
        ("a textual-inversion embedding", ["<my-style>"]),
        (UNKNOWN, ["nothing.like.it.lora_A.weight"]),
        (UNKNOWN, ["conv1.weight"]),
        (UNKNOWN, []),
    ],
)
def test_what_is_no_lora_is_named(what: str, keys: list[str]) -> None:
    assert looks_like(keys, dict.fromkeys(keys, (8, 8))) == what


@pytest.mark.parametrize("dialect", DIALECTS)
def test_flux_of_another_size_is_not_taken_for_another_model(dialect: str, tiny_layout: Layout) -> None:
    """Whichever spelling the file has; of the tiny model's size no other model is."""
    file = build(tiny_layout, dialect, only=lambda name: "single" in name)
    shapes = {key: tuple(tensor.shape) for key, tensor in file.tensors.items()}
    assert looks_like(shapes, shapes) == "a FLUX.1 or Chroma of another size"


def test_the_full_size_of_flux_1_is_not_taken_for_flux_2(full_layout: Layout) -> None:
    for dialect in ("kohya", "BFL", "diffusers", "XLabs"):
        file = build(full_layout, dialect, rank=1, only=lambda name: "blocks" in name and name.count("0") > 0)
        shapes = {key: tuple(tensor.shape) for key, tensor in file.tensors.items()}
        assert looks_like(shapes, shapes) == "a FLUX.1 or Chroma of another size"


def test_shapes_that_no_matrix_has_do_no_harm() -> None:
    keys = list(pair("double_blocks.0.img_attn.qkv", 1, 1))
    for shape in ((), (0,), (1, 2, 3, 4)):
        assert "FLUX.1" in looks_like(keys, dict.fromkeys(keys, shape))
    assert "FLUX.1" in looks_like(keys, {})
