"""Trains the embedded demonstration model from nothing, in stages, and exports it as a diffusers folder.

    python -m kontextd_models.embedded.train vae  --photos photos --work work
    python -m kontextd_models.embedded.train text --work work
    python -m kontextd_models.embedded.train flow --photos photos --work work
    python -m kontextd_models.embedded.train export --work work --out model
    python -m kontextd_models.embedded.train refine --photos photos --work work --out model
    python -m kontextd_models.embedded.train loras --photos photos --work work --out model

Each stage keeps its state in the work folder, goes on from there when started again, and depends on fixed seeds only.
`vae` must have begun (the encoder is fixed from its first step) and `text` must have ended before `flow` starts; `vae`
and `flow` may then run at the same time. `refine` and `loras` need nothing but the exported folder.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from kontextd_models.embedded import train_flow, train_loras, train_text, train_vae
from kontextd_models.embedded.data import Photos
from kontextd_models.embedded.export import export


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the embedded demonstration model.")
    parser.add_argument("stage", choices=("vae", "text", "flow", "export", "refine", "loras"))
    parser.add_argument("--photos", type=Path, help="folder made by kontextd_models.embedded.photos")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--steps", type=int, help="steps of the stage (default: its own)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.work.mkdir(parents=True, exist_ok=True)
    device = torch.device(arguments.device)
    if arguments.stage in ("export", "refine", "loras") and arguments.out is None:
        parser.error(f"{arguments.stage} needs --out FOLDER")
    if arguments.stage == "export":
        export(arguments.work, arguments.out)
        return
    if arguments.stage == "text":
        train_text.train(arguments.work, device, arguments.steps)
        return
    if arguments.photos is None:
        parser.error(f"{arguments.stage} needs --photos FOLDER")
    if arguments.stage == "refine":
        train_flow.refine(Photos(arguments.photos), arguments.out, arguments.work, device, arguments.steps)
        return
    if arguments.stage == "loras":
        train_loras.train(Photos(arguments.photos), arguments.out, arguments.work, device, arguments.steps)
        return
    stage = train_vae if arguments.stage == "vae" else train_flow
    stage.train(Photos(arguments.photos), arguments.work, device, arguments.steps)


if __name__ == "__main__":
    main()
