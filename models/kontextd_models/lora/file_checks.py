"""A LoRA file from elsewhere, opened and checked by its header. Knows bytes and limits; knows no torch, no layouts.

Whatever lies at the path, the outcome is a sound safetensors file of lawful size, or a `LoraFileError` that says what
it is instead and what to do. Names of tensors are printable and short afterwards, so messages may hold them. Nothing
of a file's content but names of tensors gets into a message: a server may have fetched it from inside a network.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path

from kontextd_models.errors import LoraFileError
from kontextd_models.records import LoraLimits
from kontextd_models.weight_files import LFS_POINTER, Header, HeaderFault, TensorInfo, clipped, header_of

# Names and shapes of FLUX take about 200 bytes a tensor; sd-scripts' metadata, with the tags of every picture, some MB.
_HEADER_BYTES_PER_TENSOR = 512
_MAX_NAME_CHARACTERS = 256
_CHUNK_BYTES = 2**20  # hashed while the processor's cache still has it
_AGAIN = "Download it again."
_CONVERT = "Only safetensors files are read; convert it, or get its .safetensors version."
_TEXT = rb"(?s)(?!.{0,7}\0)(\xef\xbb\xbf)?\s*"  # the length of a header has a zero in its eight bytes, a text has none
# What a file that is no safetensors file begins with, what it is then, and the way out.
_SIGNATURES = (
    (LFS_POINTER, "a Git LFS pointer, not the LoRA itself", "Run `git lfs pull`, or download the file itself."),
    (rb"PK\x03\x04", "a zip archive, such as a pickle of torch.save", f"Pickles are never read. {_CONVERT}"),
    (rb"\x80[\x02-\x05]", "a pickle", f"Pickles are never read. {_CONVERT}"),
    (rb"GGUF", "a GGUF file", _CONVERT),
    (rb"\x1f\x8b|7z\xbc\xaf|Rar!", "a packed archive", "Unpack it first."),
    (
        _TEXT + rb"<",
        "a web page",
        "Use the link of the file itself; where it asks for a login, download it by hand.",
    ),
    (_TEXT + rb"[{\[\"]", "a JSON document, such as a server's error", "Check the link, and its token."),
)


@dataclass(frozen=True)
class CheckedFile:
    """An open file whose header is sound. `data` stands at the first byte of the tensors, which `raw_header` precedes.

    `name` is what messages call it.
    """

    name: str
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    raw_header: bytes
    size_bytes: int
    data: BufferedReader

    def read_into(self, buffers: Mapping[str, memoryview]) -> str:
        """Fill the buffers of the tensors named, of their sizes, and give the SHA-256 of the whole file.

        Once, front to back, and every byte is hashed as it is read: what is kept is what the sum is of, even where the
        file changes meanwhile. (With a memory map it need not be, and a file cut short would end the process.)
        Raises `LoraFileError`.
        """
        digest = hashlib.sha256(self.raw_header)
        spare = memoryview(bytearray(_CHUNK_BYTES))
        for name, info in sorted(self.tensors.items(), key=lambda item: (item[1].start, item[1].end)):
            left = info.end - info.start
            buffer = buffers.get(name)
            while left:
                chunk = (spare if buffer is None else buffer[info.end - info.start - left :])[: min(left, _CHUNK_BYTES)]
                self._fill(chunk)
                digest.update(chunk)
                left -= len(chunk)
        if self.data.read(1):
            raise LoraFileError(f"{self.name} grew while it was read. Use it once it is whole.")
        return digest.hexdigest()

    def _fill(self, chunk: memoryview) -> None:
        try:
            count = self.data.readinto(chunk)
        except OSError as error:
            raise LoraFileError(f"{self.name} cannot be read: {_cause(error)}. {_AGAIN}") from error
        if count < len(chunk):
            raise LoraFileError(f"{self.name} was cut short while it was read. Use it once it is whole.")


@contextmanager
def open_checked(path: Path, limits: LoraLimits, name: str = "") -> Iterator[CheckedFile]:
    """The file at `path` while it is open; messages call it `name`. Raises `LoraFileError`."""
    name = clipped(name or path.name)
    try:
        _check_regular(path, name, limits)
        opened = path.open("rb")
    except FileNotFoundError as error:
        raise LoraFileError(f"{name} is missing. Check the path.") from error
    except (OSError, ValueError) as error:  # a ValueError for a path with a NUL
        raise LoraFileError(f"{name} cannot be read: {_cause(error)}. Check its permissions.") from error
    with opened:
        header = _header(opened, name, limits)
        _check_names(header.tensors, name)
        yield CheckedFile(name, header.tensors, header.metadata, header.raw, header.size_bytes, opened)


def _check_regular(path: Path, name: str, limits: LoraLimits) -> None:
    """Before it is opened: opening a pipe would wait for its other end."""
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise LoraFileError(f"{name} is no file. Give the path of the .safetensors file.")
    if found.st_size == 0:
        raise LoraFileError(f"{name} is empty: 0 bytes. {_AGAIN}")
    if found.st_size > limits.max_file_bytes:
        raise LoraFileError(
            f"{name} has {found.st_size} bytes; the most allowed is {limits.max_file_bytes}. "
            "A whole checkpoint is no LoRA; extract one from it, or raise the limit."
        )


def _header(opened: BufferedReader, name: str, limits: LoraLimits) -> Header:
    most = _HEADER_BYTES_PER_TENSOR * limits.max_tensors
    try:
        header = header_of(opened, most, limits.max_tensors)
    except OSError as error:
        raise LoraFileError(f"{name} cannot be read: {_cause(error)}. {_AGAIN}") from error
    except HeaderFault as fault:
        raise LoraFileError(f"{name}{_what_is_wrong(fault, os.fstat(opened.fileno()).st_size, most)}") from fault
    if not header.tensors:
        raise LoraFileError(f"{name} has no tensors. {_AGAIN}")
    return header


def _what_is_wrong(fault: HeaderFault, size_bytes: int, most: int) -> str:
    for signature, what, remedy in _SIGNATURES:
        if re.match(signature, fault.start):
            return f" is {what}. {remedy}"
    length = int.from_bytes(fault.start[:8], "little")
    if most < length <= size_bytes - 8:
        return f" has a header of {length} bytes; the most allowed is {most}. No LoRA has such a one."
    return f"{fault}. {_AGAIN}"


def _check_names(tensors: Mapping[str, TensorInfo], name: str) -> None:
    for tensor in tensors:
        if not tensor.isprintable() or not 0 < len(tensor) <= _MAX_NAME_CHARACTERS:
            raise LoraFileError(
                f"{name} has a tensor named '{clipped(tensor, 60)}', {len(tensor)} characters long; names are "
                f"printable, with {_MAX_NAME_CHARACTERS} characters at most. {_AGAIN}"
            )


def _cause(error: OSError | ValueError) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
