"""pydantic's findings in fal's words. Knows both vocabularies; knows no endpoint.

Types that fal names otherwise are renamed (a value out of a set is `one_of`), the rest keep pydantic's name and page.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from kontextd_server.wire.errors import FieldError, Invalid

Model = TypeVar("Model", bound=BaseModel)

_FAL_TYPES = {
    "enum": "one_of",
    "literal_error": "one_of",
    "too_long": "sequence_too_long",
    "too_short": "sequence_too_short",
    "string_too_long": "sequence_too_long",
    "string_too_short": "sequence_too_short",
    "greater_than": "greater_than",
    "greater_than_equal": "greater_than_equal",
    "less_than": "less_than",
    "less_than_equal": "less_than_equal",
    "multiple_of": "multiple_of",
}
_KEPT_CTX = {"gt", "ge", "lt", "le", "multiple_of", "min_length", "max_length"}
_MAX_ERRORS = 20
_MAX_INPUT = 500  # characters of JSON: what was sent need not be sent back, least of all a picture


def parse(model: type[Model], data: object, at: str = "body") -> Model:
    """A model of decoded JSON. Raises `Invalid`."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        # Any: pydantic's own TypedDict, which FastAPI hands on as plain dicts.
        found: list[Any] = list(error.errors(include_context=True, include_url=True))
        raise Invalid(field_errors([{**one, "loc": (at, *one["loc"])} for one in found])) from error


def field_errors(found: Sequence[Mapping[str, Any]]) -> list[FieldError]:
    """One `FieldError` for each of pydantic's, of the first twenty."""
    return [_field_error(one) for one in found[:_MAX_ERRORS]]


def _field_error(found: Mapping[str, Any]) -> FieldError:
    fals = _FAL_TYPES.get(found["type"])
    ctx = dict(found.get("ctx") or {})
    kept = {name: value for name, value in ctx.items() if name in _KEPT_CTX}
    if fals == "one_of":
        kept = {"expected": _choices(str(ctx.get("expected", "")))}
    value = found.get("input")
    shown = found["type"] != "missing" and _is_short(value)  # of a missing value pydantic shows the whole object
    return FieldError(
        loc=tuple(found["loc"]),
        msg=found["msg"],
        type=fals or found["type"],
        ctx=kept or None,
        input=value if shown else None,
        has_input=shown,
        url=None if fals else found.get("url") or f"https://errors.pydantic.dev/2/v/{found['type']}",
    )


def _choices(expected: str) -> list[str]:
    """pydantic's "'none', 'regular' or 'high'" as a list."""
    return re.findall(r"'([^']*)'", expected)


def _is_short(value: object) -> bool:
    size = 0
    try:
        for part in json.JSONEncoder(allow_nan=False).iterencode(value):  # part by part: a body may be very long
            size += len(part)
            if size > _MAX_INPUT:
                return False
    except (TypeError, ValueError):  # of no JSON type, or NaN
        return False
    return True
