"""From a LoRA file's key names to entries of the model's own parameters. Knows names and shapes; knows no torch.

A key is a prefix, a module's name and a suffix: `diffusion_model.` `double_blocks.0.img_attn.qkv` `.lora_A.weight`.
`suffixes` says what a tensor is, `prefixes` whose spelling its name is in, `names` which parameters have that name,
`metadata` what the file's header adds, and `normalising` puts the matrices together. Nothing is decided for a file as
a whole: every key is read by itself, so mixtures of spellings need no rule of their own.
"""

from kontextd_models.lora.dialects.normalising import normalise
from kontextd_models.lora.dialects.unsupported import unsupported_form

__all__ = ["normalise", "unsupported_form"]
