"""What torch sees of this machine, found out in a process of its own: `python -m kontextd_models.probe` prints JSON.

A driver that makes torch hang or crash then takes down the probe, not `doctor`. Everything the engine imports is
imported here under an audit hook that notes each attempt to reach the network. Knows no model.
"""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Mapping

_NETWORK_EVENTS = frozenset({"socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"})


def probe() -> dict[str, object]:
    """Versions, devices, and the network attempts of importing the engine. Only for a process of its own."""
    attempts: list[str] = []

    def note(event: str, arguments: tuple[object, ...]) -> None:
        # A Unix socket's address is a path, text or bytes: it reaches nobody outside.
        if event in _NETWORK_EVENTS and not (event == "socket.connect" and isinstance(arguments[1], str | bytes)):
            attempts.append(f"{event} {arguments[1:] if event == 'socket.connect' else arguments}")

    sys.addaudithook(note)
    import torch
    from diffusers import FluxKontextPipeline  # noqa: F401  for what it imports

    import kontextd_models.engine  # noqa: F401  likewise

    return {
        "versions": versions(),
        "cuda_build": torch.version.cuda,
        "threads": torch.get_num_threads(),
        "gpus": gpus(),
        "network_attempts": attempts,
    }


def versions() -> dict[str, str]:
    """Of Python and of what decides how the engine behaves; torch-free."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for name in ("kontextd", "torch", "diffusers", "transformers", "peft", "onnxruntime", "pillow", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def gpus() -> list[Mapping[str, object]]:
    """What torch sees, with memory in bytes."""
    import torch

    if not torch.cuda.is_available():
        return []
    rows: list[Mapping[str, object]] = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        properties = torch.cuda.get_device_properties(index)
        capability = f"{properties.major}.{properties.minor}"
        rows.append({"name": properties.name, "capability": capability, "free_bytes": free, "total_bytes": total})
    return rows


if __name__ == "__main__":
    print(json.dumps(probe()))
