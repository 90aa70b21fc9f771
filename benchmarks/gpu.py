"""The speed of FLUX.1 Kontext on one GPU, diffusers' and ours, in nine minutes at most, from a bare machine.

    python benchmarks/gpu.py [--out DIR] [--device cuda:0]

A random transformer of the full size (12 B parameters; nothing is downloaded), 1 MP from 1 MP, 28 steps, 512 tokens of
text: stock diffusers eager and compiled; ours in bf16 and fp8 with every preset, without LoRAs and with three merged;
all 17 preferred sizes; a Chrome trace of a step of each kind; the stages beside the steps. Into DIR go gpu.json,
gpu.md, gpu.svg and the traces, written after every part. Every part has its own time, and one that fails is told with
its error. What was not measured, goals that were missed and graphs that were compiled after the warm-up are told on
stderr too, and the exit status is 1 then. docs/gpu_benchmark.md says what each figure means.

It needs an 80 GB card, Python 3.11, torch >= 2.11 for CUDA with Triton, transformers >= 5.17, and these wheels:

    pip install 'diffusers>=0.42,<0.43' 'peft>=0.18'

and takes kontextd itself from the source tree it lies in. `--tiny --device cpu` runs all of it on a tiny model in two
minutes: it shows that everything works, and its figures mean nothing.
"""

from __future__ import annotations

import argparse
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / folder) for folder in ("benchmarks", "models", "kernels")]

from gpu_parts.parts import STEPS, Options, all_parts  # noqa: E402  it lies on the path from here on
from gpu_parts.report import TABLE_FILE, Report  # noqa: E402
from gpu_parts.supervise import measure  # noqa: E402


def main() -> int:
    options = parse()
    if options.device == "cuda" and not sees_cuda():
        print("torch sees no CUDA device, and nothing else is worth measuring here; try --tiny --device cpu.")
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    report = Report(options, head(options), all_parts())
    for name, result in measure(all_parts(), options):
        report.add(name, result)
        outcome = "failed" if "error" in result else f"done in {result['part_s']:.1f} s"
        print(f"{time.monotonic() - began:6.1f} s  {name}: {outcome}", flush=True)
    print(f"\n{(options.out / TABLE_FILE).read_text(encoding='utf-8')}\nwritten: {options.out}")
    wrong = report.wrong()
    if wrong:
        print("\n".join(wrong), file=sys.stderr)
    return 1 if wrong else 0


def parse() -> Options:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N or cpu (default: %(default)s)")
    parser.add_argument("--tiny", action="store_true", help="a tiny model: proves the script, measures nothing")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "gpu")
    found = parser.parse_args()
    return Options(found.device, found.tiny, found.out)


def sees_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def head(options: Options) -> dict[str, object]:
    kind = "tiny" if options.tiny else "full-size"
    return {
        "what": f"FLUX.1 Kontext on one GPU: {kind} random weights, {STEPS} steps",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python", *(Path(word).name for word in sys.argv)]),
    }


if __name__ == "__main__":
    sys.exit(main())
