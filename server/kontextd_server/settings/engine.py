"""The settings of the engine, which every command that edits or serves obeys. Knows the engine's configuration only."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kontextd_models import EngineConfig, LoraLimits, MemoryMode, SafetyConfig

from kontextd_server.settings.rows import (
    MIB,
    area,
    count,
    flag,
    names,
    one_of,
    path,
    positive,
    probability,
    rate,
    seconds,
    setting,
)


def _memory_mode(text: str) -> MemoryMode:
    return MemoryMode(one_of(*MemoryMode)(text))


@dataclass(frozen=True)
class EngineSettings:
    model: Path | None = setting(None, path, "diffusers folder; without it the embedded demonstration model")
    device: str = setting("auto", str, "auto, cpu, cuda or cuda:1")
    dtype: str = setting("auto", one_of("auto", "bfloat16", "float32"), "auto (bfloat16 on CUDA), bfloat16, float32")
    memory_mode: MemoryMode = setting(MemoryMode.AUTO, _memory_mode, "where weights live: " + ", ".join(MemoryMode))
    max_area: int | None = setting(None, area, "ceiling of an edit in pixels; without it the model's own")
    presets: Path | None = setting(None, path, "table of presets (JSON); without it the model's own")
    precision: str = setting(
        "auto", one_of("auto", "full", "fp8"), "of the blocks: auto (as the presets were settled), full, fp8"
    )
    compile: str = setting("auto", one_of("auto", "on", "off"), "compiled blocks: auto (on CUDA), on, off")
    compile_cache: Path | None = setting(
        None, path, "folder for what was compiled; without it compiled in the data folder of a worker"
    )
    attention: str = setting(
        "auto",
        one_of("auto", "native", "cudnn", "flash", "fa3"),
        "auto (on CUDA the fastest that is right), native, cudnn, flash, fa3",
    )
    kernels: str = setting(
        "auto",
        one_of("auto", "on", "off"),
        "our kernels around the products of a block: auto (in compiled blocks, where they are faster), on, off",
    )
    prompt_cache_mib: int = setting(256, count, "memory for prompt embeddings, MiB; 0 keeps none")
    reference_cache_mib: int = setting(256, count, "memory for reference latents, MiB; 0 keeps none")
    lora_memory_mib: int = setting(2048, count, "memory for LoRA files that were read, MiB; 0 keeps none")
    lora_device_memory_mib: int = setting(2048, count, "of these on a GPU too, where so much is to spare, MiB")
    lora_merged_memory_mib: int = setting(256, count, "sets of merged weights that are kept whole, MiB")
    max_lora_mib: int = setting(4096, positive, "largest LoRA file")
    max_lora_tensors: int = setting(20_000, positive, "tensors in a LoRA file")
    max_lora_rank: int = setting(1024, positive, "rank of a LoRA")
    max_lora_scale: float = setting(10.0, rate, "largest scale of a LoRA, either sign")
    safety_checkers: tuple[str, ...] = setting(
        ("embedded",), names, '"embedded" or folders of checkers, comma-separated; one flag is enough'
    )
    safety_threshold: float = setting(0.8, probability, "probability from which the embedded checker flags")
    safety_check_inputs: bool = setting(False, flag, "1 also checks the input image")
    safety_forced: bool = setting(False, flag, "1 also checks where a request switches the checker off")
    safety_time_limit_s: float = setting(60.0, seconds, "a checker that takes longer fails the edit")
    log_level: str | None = setting(
        None, one_of("DEBUG", "INFO", "WARNING", "ERROR"), "what goes to stderr; a server's default is INFO"
    )
    debug: bool = setting(False, flag, "1 shows a traceback with every error")

    def lora_limits(self) -> LoraLimits:
        return LoraLimits(
            max_file_bytes=self.max_lora_mib * MIB,
            max_tensors=self.max_lora_tensors,
            max_rank=self.max_lora_rank,
            max_scale=self.max_lora_scale,
        )

    def engine_config(self, compile_cache: Path | None = None) -> EngineConfig:
        """`compile_cache` is where it goes unless an operator says otherwise."""
        return EngineConfig(
            model=self.model,
            device=self.device,
            dtype=self.dtype,
            memory_mode=self.memory_mode,
            max_area=self.max_area,
            presets=self.presets,
            precision=self.precision,
            compile=self.compile,
            compile_cache=self.compile_cache or compile_cache,
            attention=self.attention,
            kernels=self.kernels,
            prompt_cache_bytes=self.prompt_cache_mib * MIB,
            reference_cache_bytes=self.reference_cache_mib * MIB,
            lora_cache_bytes=self.lora_memory_mib * MIB,
            lora_device_cache_bytes=self.lora_device_memory_mib * MIB,
            lora_merged_cache_bytes=self.lora_merged_memory_mib * MIB,
            lora_limits=self.lora_limits(),
            safety=SafetyConfig(
                checkers=self.safety_checkers,
                threshold=self.safety_threshold,
                check_inputs=self.safety_check_inputs,
                forced=self.safety_forced,
                time_limit_s=self.safety_time_limit_s,
            ),
        )
