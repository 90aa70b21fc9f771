"""From a request's stored body to the engine's record. Knows the wire's names and the engine's; fetches nothing."""

from __future__ import annotations

import json

from kontextd_models import Acceleration, EditRequest, ResolutionMode

from kontextd_server.wire.errors import FieldError, Invalid
from kontextd_server.wire.schema import FluxKontextLoraInput
from kontextd_server.wire.validation import parse
from kontextd_server.worker.inputs import Gathered


def parse_input(payload: bytes) -> FluxKontextLoraInput:
    """The API has checked it; it may have been another version of it. Raises `Invalid`."""
    try:
        data = json.loads(payload)
    except (ValueError, RecursionError) as error:
        raise Invalid([FieldError(("body",), f"the body is not valid JSON: {error}", "json_invalid")]) from error
    return parse(FluxKontextLoraInput, data)


def edit_request(wanted: FluxKontextLoraInput, gathered: Gathered, preview_interval: int) -> EditRequest:
    return EditRequest(
        image=gathered.picture,
        prompt=wanted.prompt,
        num_inference_steps=wanted.num_inference_steps,
        seed=wanted.seed,
        guidance_scale=wanted.guidance_scale,
        num_images=wanted.num_images,
        resolution_mode=ResolutionMode(wanted.resolution_mode.value),
        loras=gathered.loras.weights,
        acceleration=Acceleration(wanted.acceleration.value),
        enable_safety_checker=wanted.enable_safety_checker,
        preview_interval=preview_interval,
    )
