"""One part of a folder through its library's own loader. Knows `from_pretrained`; knows no pipeline and no checker.

The classes are named by the caller, not taken from the folder; weights are safetensors, and nothing is looked for
elsewhere: no code of a folder runs, and nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from kontextd_models.errors import ModelError
from kontextd_models.out_of_memory import is_out_of_memory


def load_part(kind: Any, folder: Path) -> Any:  # Any: the loaders of both libraries are untyped
    """What has no weights, such as a tokenizer. Raises `ModelError`."""
    try:
        return kind.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # from OSError to what the Rust tokenizers raise: they promise no set of classes
        raise _damaged(folder, error) from error


def load_weights(kind: Any, folder: Path, dtype: torch.dtype) -> tuple[Any, Sequence[str]]:  # Any: as above
    """A module that is only run, and the names of the folder's tensors that it has no use for.

    Raises `ModelError`, and what tells of too little memory as it is.
    """
    try:
        module, info = kind.from_pretrained(
            folder, dtype=dtype, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except Exception as error:  # a wrong shape is a RuntimeError, a wrong setting a TypeError, and so on
        if is_out_of_memory(error):
            raise
        raise _damaged(folder, error) from error
    missing = sorted(info["missing_keys"])
    if missing:  # both libraries would go on with random numbers in their place
        raise ModelError(f"{folder}: {len(missing)} tensors are missing, {missing[0]} for one. Copy the weights again.")
    return module.eval().requires_grad_(False), sorted(info["unexpected_keys"])


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars, and none of transformers' remarks on packages that are not installed, while a part loads."""
    bars, level = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def _damaged(folder: Path, error: Exception) -> ModelError:
    return ModelError(f"{folder} cannot be loaded: {error}. Copy it again.")
