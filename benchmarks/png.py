"""PNG encoders side by side: milliseconds a megapixel on one core, and file size, each against Pillow's default.

    python benchmarks/png.py [--repeats 5] [--out FILE]

On photos of scikit-image, in colour, enlarged (smooth, as a decoder's output is) and as grey RGB (what "make it black
and white" gives). All encoders take turns on each picture, and CPU seconds of the one thread are counted, the least of
`--repeats`: other work on the machine slows them all. Candidates beyond the dependencies of kontextd (zlib-ng, isal,
fpng-py, imagecodecs) are measured where they are installed. Every file is decoded and compared to the bit.
Writes JSON into benchmarks/results/ and prints a table.
"""

from __future__ import annotations

import argparse
import importlib
import io
import json
import statistics
import struct
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import deflate
import numpy as np
import PIL.features
import skimage
from kontextd_server import pictures
from PIL import Image

RESULTS = Path(__file__).parent / "results"
PHOTOS = ("astronaut.png", "chelsea.png", "coffee.png", "hubble_deep_field.jpg", "ihc.png", "motorcycle_left.png",
          "retina.jpg", "rocket.jpg")  # fmt: skip
ENLARGED = ("astronaut.png", "coffee.png")
GREY = ("coffee.png", "motorcycle_left.png", "rocket.jpg")
BASE, OURS = "Pillow, its default", "ours: one filter, libdeflate 3"
GOAL_MS, GOAL_SIZE = 75, 1.15  # a megapixel; times Pillow's default

Encoder = Callable[[Image.Image], bytes]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS / "png.json")
    options = parser.parse_args()
    encoders = dict(candidates())
    images = dict(test_images())
    rows = measure(encoders, images, options.repeats)
    report = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python", *sys.argv]),
        "versions": {
            "pillow": version("pillow"),
            "deflate": version("deflate"),
            "zlib-ng in pillow": PIL.features.version("zlib_ng"),
        },
        "goal": {"ms a megapixel": GOAL_MS, "size": GOAL_SIZE},
        "pictures": {name: list(image.size) for name, image in images.items()},
        "encoders": rows,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    show(rows)
    print(f"written: {options.out}")


def test_images() -> Iterator[tuple[str, Image.Image]]:
    folder = Path(skimage.__file__).parent / "data"
    photos = {name: Image.open(folder / name).convert("RGB") for name in PHOTOS}
    yield from photos.items()
    for name in ENLARGED:
        image = photos[name]
        yield f"{name}, twice as large", image.resize((2 * image.width, 2 * image.height), Image.Resampling.BICUBIC)
    for name in GREY:
        yield f"{name}, grey", photos[name].convert("L").convert("RGB")


def candidates() -> Iterator[tuple[str, Encoder]]:
    yield BASE, pillow()
    yield OURS, pictures.encode_png
    for level in (1, 2, 4):
        yield f"Pillow, level {level}", pillow(compress_level=level)
    yield "Pillow, level 1, run lengths only", pillow(compress_level=1, compress_type=zlib.Z_RLE)
    yield "Pillow, level 1, Huffman only", pillow(compress_level=1, compress_type=zlib.Z_HUFFMAN_ONLY)
    for level in (1, 2, 4, 6):
        yield f"one filter, libdeflate {level}", filtered(lambda rows, level=level: deflate.zlib_compress(rows, level))
    yield "one filter, zlib, run lengths only", filtered(run_lengths)
    yield from extras()


def extras() -> Iterator[tuple[str, Encoder]]:
    """What is not a dependency of ours, where it is installed."""
    if zlib_ng := optional("zlib_ng.zlib_ng"):
        yield "one filter, zlib-ng 1", filtered(lambda rows: zlib_ng.compress(rows, 1))
    if isal := optional("isal.isal_zlib"):
        yield "one filter, ISA-L 1", filtered(lambda rows: isal.compress(rows, 1))
    if fpng := optional("fpng_py"):
        yield "fpng", lambda image: fpng.fpng_encode_image_to_memory(image.tobytes(), *image.size, 3)
    if codecs := optional("imagecodecs"):
        yield "libpng 1 (imagecodecs)", lambda image: codecs.png_encode(np.asarray(image), level=1)
        yield "libspng 1 (imagecodecs)", lambda image: codecs.spng_encode(np.asarray(image), level=1)


def optional(name: str) -> Any:
    """Any: a module that may be there, of which we know no types."""
    try:
        return importlib.import_module(name)
    except ImportError:
        print(f"not installed, left out: {name.split('.')[0]}", file=sys.stderr)
        return None


def pillow(**options: int) -> Encoder:
    def encode(image: Image.Image) -> bytes:
        buffer = io.BytesIO()
        image.save(buffer, "PNG", **options)
        return buffer.getvalue()

    return encode


def filtered(compress: Callable[[np.ndarray], bytes]) -> Encoder:
    """Our own filtering with another compressor."""

    def encode(image: Image.Image) -> bytes:
        header = struct.pack(">IIBBBBB", *image.size, 8, 2, 0, 0, 0)
        chunks = ((b"IHDR", header), (b"IDAT", compress(pictures._filtered(image))), (b"IEND", b""))
        return b"\x89PNG\r\n\x1a\n" + b"".join(part for kind, data in chunks for part in pictures._chunk(kind, data))

    return encode


def run_lengths(rows: np.ndarray) -> bytes:
    compressor = zlib.compressobj(1, zlib.DEFLATED, 15, 9, zlib.Z_RLE)
    return compressor.compress(rows) + compressor.flush()


def measure(
    encoders: Mapping[str, Encoder], images: Mapping[str, Image.Image], repeats: int
) -> Mapping[str, Mapping[str, object]]:
    sizes = {
        name: {label: checked(encode, image) for label, image in images.items()} for name, encode in encoders.items()
    }
    taken = {name: {label: [] for label in images} for name in encoders}
    for _ in range(repeats):
        for label, image in images.items():
            for name, encode in encoders.items():
                taken[name][label].append(cpu_seconds(encode, image))
    return {name: summary(name, taken, sizes, images) for name in encoders}


def checked(encode: Encoder, image: Image.Image) -> int:
    """The size of the file, once it was found to hold the picture."""
    data = encode(image)
    if Image.open(io.BytesIO(data)).convert("RGB").tobytes() != image.tobytes():
        raise SystemExit("an encoder changed the picture")
    return len(data)


def cpu_seconds(encode: Encoder, image: Image.Image) -> float:
    began = time.thread_time()
    encode(image)
    return time.thread_time() - began


def summary(
    name: str,
    taken: Mapping[str, Mapping[str, list[float]]],
    sizes: Mapping[str, Mapping[str, int]],
    images: Mapping[str, Image.Image],
) -> Mapping[str, object]:
    ms = {label: 1e9 * min(taken[name][label]) / (image.width * image.height) for label, image in images.items()}
    times = [min(taken[name][label]) / min(taken[BASE][label]) for label in images]
    larger = {label: sizes[name][label] / sizes[BASE][label] for label in images}
    return {
        "ms a megapixel": statistics.mean(ms.values()),
        "time / default": statistics.geometric_mean(times),
        "size / default": statistics.geometric_mean(larger.values()),
        "largest size / default": max(larger.values()),
        "size by picture": larger,
    }


def show(rows: Mapping[str, Mapping[str, object]]) -> None:
    print(f"{'encoder':38}{'ms/MP':>8}{'time':>8}{'size':>8}{'worst':>8}")
    for name, row in sorted(rows.items(), key=lambda each: str(each[0])):
        columns = ("ms a megapixel", "time / default", "size / default", "largest size / default")
        ms, *ratios = (row[column] for column in columns)
        print(f"{name:38}{ms:8.0f}" + "".join(f"{ratio:8.3f}" for ratio in ratios))


if __name__ == "__main__":
    main()
