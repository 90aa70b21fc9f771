"""What `kontextd verify` proves, on a random model of FLUX.1 Kontext's full size; on the CPU, on a small one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gpu import full_size
from kontextd_models import EngineConfig
from kontextd_models.checks import Check, failed
from kontextd_models.verify import Subject, checks

_DEVICE_BYTES_NEEDED = 42e9  # 34 GB of weights, activations at 1 MP, and the loop of the yardstick beside ours


def proofs(name: str, device: str, tokenizers: Path) -> dict[str, Check]:
    """All checks by name. A random model gives nothing back unchanged, so that its alignment cannot be measured."""

    def in_new_process(config: EngineConfig) -> str:
        command = [sys.executable, full_size.__file__, name, config.device, str(tokenizers)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1]

    subject = Subject(
        EngineConfig(device=device),
        load=lambda config: full_size.load(name, tokenizers, config),
        in_new_process=in_new_process,
        knows_identity=False,
    )
    return {check.name: check for check in checks(subject)}


def test_a_small_random_kontext_passes_every_proof_on_the_cpu(tiny_folder: Path) -> None:
    found = proofs("small", "cpu", tiny_folder)
    assert failed(found.values()) == []
    not_here = {"alignment", "out of memory", "memory encoders_off", "memory group_offload", "memory sequential"}
    assert {name for name, check in found.items() if check.passed is None} == not_here
    assert [name for name in found if name.startswith("loop ")] == ["loop 64x64", "loop 80x48", "loop 48x80"]


@pytest.mark.gpu
def test_a_full_size_random_kontext_passes_every_proof_on_the_gpu(tiny_folder: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    free = torch.cuda.mem_get_info()[0]
    if free < _DEVICE_BYTES_NEEDED:
        pytest.skip(
            f"{free / 1e9:.0f} GB are free on the device; a full-size model needs {_DEVICE_BYTES_NEEDED / 1e9:.0f}"
        )
    found = proofs("full", "cuda", tiny_folder)
    assert failed(found.values()) == []
    assert {name for name, check in found.items() if check.passed is None} == {"alignment"}
