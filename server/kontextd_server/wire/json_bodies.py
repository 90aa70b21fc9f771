"""JSON bodies read with limits, so that no body is answered by a 5xx. Knows JSON's pitfalls; knows no endpoint.

Refused, each as a 422 that says so: bytes that are no UTF-8, NaN and Infinity, numbers that overflow (`1e400`), whole
numbers of absurd length, a key twice in one object, lone surrogates (they cannot be stored or sent on), and what is too
deep or of too many parts. Too many bytes is a 413, before they are read where the length is declared.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request

from kontextd_server.wire.errors import BadRequest, BodyTooLarge, FieldError, Invalid

_OFF_LOOP_BYTES = 2**16  # a larger body is parsed on a thread: 100 MB take a quarter of a second


@dataclass(frozen=True)
class JsonLimits:
    """`max_nodes` counts values; `max_digits` is the length of a whole number."""

    max_bytes: int = 135_000_000
    max_depth: int = 32
    max_nodes: int = 100_000
    max_digits: int = 40

    @classmethod
    def for_files(cls, max_file_bytes: int) -> JsonLimits:
        """Room for one file of that size as base64, and for the rest of the request."""
        return cls(max_bytes=-(-max_file_bytes * 4 // 3) + 2**20)


async def read_json(request: Request, limits: JsonLimits) -> object:
    """The JSON value of a request's body, whatever its Content-Type says; an empty body counts as `{}`.

    Raises `Invalid`, `BodyTooLarge`, and `BadRequest` for a compressed body.
    """
    body = await read_body(request, limits.max_bytes)
    if not body.strip():
        return {}
    if len(body) > _OFF_LOOP_BYTES:
        return await run_in_threadpool(parse_json, body, limits)
    return parse_json(body, limits)


async def read_body(request: Request, max_bytes: int) -> bytes:
    """The bytes of a request's body. Raises `BodyTooLarge` and `BadRequest`."""
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding != "identity":
        raise BadRequest(f"the body has the Content-Encoding {encoding[:50]!r}; send it as it is.")
    declared = request.headers.get("content-length", "")
    if declared.isascii() and declared.isdigit() and int(declared[:20]) > max_bytes:
        raise BodyTooLarge(max_bytes)
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > max_bytes:
            raise BodyTooLarge(max_bytes)
    return bytes(body)


def parse_json(data: bytes, limits: JsonLimits) -> object:
    """The value of JSON text. Raises `Invalid` with one entry of the type `json_invalid`."""
    # Each value but the first follows a comma or opens a list or object: this bounds the memory before it is taken.
    if data.count(b",") > limits.max_nodes:
        _refuse(f"it holds more than {limits.max_nodes} values")
    try:
        value: object = json.loads(
            data.decode("utf-8-sig"),
            object_pairs_hook=_object,
            parse_constant=_constant,
            parse_float=_float,
            parse_int=lambda text: _whole(text, limits.max_digits),
        )
    except json.JSONDecodeError as error:
        _refuse(error.msg[:1].lower() + error.msg[1:], error.pos)
    except UnicodeDecodeError as error:
        _refuse(f"it is not UTF-8: {error.reason}", error.start)
    except RecursionError:
        _refuse(f"it is nested deeper than {limits.max_depth} levels")
    _check_tree(value, limits)
    return value


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        _refuse(f"the key {twice[:100]!r} is there twice")
    return found


def _constant(name: str) -> NoReturn:
    _refuse(f"{name} is not a JSON number")


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        _refuse(f"the number {text[:20]} is out of range")
    return value


def _whole(text: str, max_digits: int) -> int:
    if len(text) > max_digits:
        _refuse(f"a number has {len(text)} digits; the most allowed is {max_digits}")
    return int(text)


def _check_tree(value: object, limits: JsonLimits) -> None:
    """Level by level, so that depth is counted without recursion."""
    level: Sequence[object] = (value,)
    nodes = depth = 0
    while level:
        nodes += len(level)
        if nodes > limits.max_nodes:
            _refuse(f"it holds more than {limits.max_nodes} values")
        if depth >= limits.max_depth and any(isinstance(node, dict | list) for node in level):
            _refuse(f"it is nested deeper than {limits.max_depth} levels")
        below: list[object] = []
        for node in level:
            if isinstance(node, str):
                _check_text(node)
            elif isinstance(node, dict):
                below += (*node, *node.values())
            elif isinstance(node, list):
                below += node
        level, depth = below, depth + 1


def _check_text(text: str) -> None:
    try:
        text.isascii() or text.encode()
    except UnicodeEncodeError as error:
        _refuse(f"a text holds half a surrogate pair (\\u{ord(text[error.start]):04x}), which is no character")


def _refuse(what: str, position: int = 0) -> NoReturn:
    raise Invalid([FieldError(("body", position), f"the body is not valid JSON: {what}.", "json_invalid")])
