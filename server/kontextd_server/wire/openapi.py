"""The OpenAPI document with fal's schema names. Knows FastAPI and pydantic; the models are in `schema` and `answers`.

Bodies are read by our own JSON reader, which FastAPI cannot see: a route calls `body_of(Model, limits)` once it knows
who asks, and documents the body with `openapi_extra=takes(Model)`. As a dependency it would be read before that, from
anybody and for as long as he likes.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.requests import Request

from kontextd_server.wire import answers, schema
from kontextd_server.wire.json_bodies import JsonLimits, read_json
from kontextd_server.wire.validation import parse

REF = "#/components/schemas/{model}"
Model = TypeVar("Model", bound=BaseModel)

# In the document whether or not a route mentions them.
MODELS: tuple[type[BaseModel], ...] = (
    schema.FluxKontextLoraInput,
    schema.FluxKontextLoraOutput,
    schema.ImageSize,
    answers.QueueStatus,
    answers.QueueSubmission,
    answers.CancelAnswer,
    answers.InitiateUpload,
    answers.CompleteUpload,
    answers.TokenRequest,
    answers.HTTPValidationError,
    answers.RequestError,
)


def body_of(model: type[Model], limits: JsonLimits) -> Callable[[Request], Awaitable[Model]]:
    """A reader of requests: the JSON body as a model. Raises `Invalid`, `BodyTooLarge`, `BadRequest`."""

    async def read(request: Request) -> Model:
        return parse(model, await read_json(request, limits))

    return read


def takes(model: type[BaseModel]) -> dict[str, object]:
    """The `openapi_extra` of a route that takes this body."""
    content = {"application/json": {"schema": {"$ref": REF.format(model=model.__name__)}}}
    return {"requestBody": {"required": True, "content": content}}


def document(app: FastAPI, models: Sequence[type[BaseModel]] = MODELS) -> dict[str, object]:
    """The document of an application, with the schemas of `models`."""
    made = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
    components = made.setdefault("components", {}).setdefault("schemas", {})
    _, found = models_json_schema([(model, "validation") for model in models], ref_template=REF)
    components.update(found["$defs"])
    made["components"]["schemas"] = dict(sorted(components.items()))
    result: dict[str, object] = made
    return result
