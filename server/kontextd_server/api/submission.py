"""From an HTTP request to a job in the queue: the one path of submit, run and stream. Knows limits; runs nothing."""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Iterable
from dataclasses import dataclass

from starlette.datastructures import QueryParams
from starlette.requests import Request

from kontextd_server.api.config import ApiLimits
from kontextd_server.api.parts import Api
from kontextd_server.fetch.errors import FetchError
from kontextd_server.store import JobKind, NewJob, Priority, Queued, Refusal
from kontextd_server.wire import request_options as wire
from kontextd_server.wire.auth import Identity
from kontextd_server.wire.endpoints import Endpoint
from kontextd_server.wire.error_table import placed
from kontextd_server.wire.errors import FieldError, IdempotencyMismatch, Invalid, Loc, NotFound, QueueFull
from kontextd_server.wire.json_bodies import read_json
from kontextd_server.wire.request_ids import request_id_of
from kontextd_server.wire.request_options import RequestOptions, SubmitOptions, request_options, submit_options
from kontextd_server.wire.schema import MAX_SAFE_SEED, FluxKontextLoraInput, LoraWeight
from kontextd_server.wire.validation import parse
from kontextd_server.wire.virtual_hosts import context_of


@dataclass(frozen=True)
class Submitted:
    """A job of the store. `is_shared`: an Idempotency-Key may lead others to it, so nobody alone decides its end."""

    request_id: str
    queue_position: int
    endpoint: Endpoint
    wanted: FluxKontextLoraInput
    transient: bool
    is_shared: bool


async def submit(api: Api, request: Request, kind: JobKind) -> Submitted:
    """Raises `AuthError`, `BadRequest`, `Invalid`, `TooManyRequests`, `NotAccepted`, `StoreUnavailable`."""
    api.drain.check_open()
    caller = await api.gate.caller(request)
    api.rate.take(caller.owner)
    options = request_options(request.headers)
    asked = submit_options(request.query_params if kind is JobKind.QUEUE else QueryParams())
    wanted = parse(FluxKontextLoraInput, await read_json(request, api.config.limits.body))
    check_limits(wanted, api.config.limits)
    if asked.webhook_url is not None:
        await _check_webhook(api, asked.webhook_url)
    return await api.off_loop.write(_enqueue, api, request, _Order(kind, caller, options, asked, wanted))


def check_limits(wanted: FluxKontextLoraInput, limits: ApiLimits) -> None:
    """Raises `Invalid` for more than the operator allows."""
    if wanted.num_images > limits.max_images:
        told = f"Input should be less than or equal to {limits.max_images} on this server"
        field, ctx = ("body", "num_images"), {"le": limits.max_images}
        raise Invalid([FieldError(field, told, "less_than_equal", ctx, wanted.num_images, has_input=True)])
    if limits.max_loras is not None and len(wanted.loras) > limits.max_loras:
        told = f"List should have at most {limits.max_loras} items on this server, not {len(wanted.loras)}"
        raise Invalid([FieldError(("body", "loras"), told, "sequence_too_long", {"max_length": limits.max_loras})])
    for place, lora in enumerate(wanted.loras):
        _check_scale(lora.scale, ("body", "loras", place, "scale"), limits.max_lora_scale)


def _check_scale(scale: float, loc: Loc, most: float) -> None:
    if abs(scale) <= most:
        return
    told, ctx = f"Input should be from {-most:g} to {most:g} on this server", {"ge": -most, "le": most}
    wrong = "less_than_equal" if scale > 0 else "greater_than_equal"
    raise Invalid([FieldError(loc, told, wrong, ctx, scale, has_input=True)])


def lora_key(loras: Iterable[LoraWeight]) -> str:
    """Names a LoRA set, for a worker that has it merged already: order does not matter, scale 0 is absence.

    By what was sent, since nobody has looked at the files yet. Where a file changed meanwhile, or has two names, a job
    goes sooner or later than it might, and no more: what is merged goes by the files' contents.
    """
    merged = sorted([lora.path, lora.scale] for lora in loras if lora.scale)
    return hashlib.sha256(json.dumps(merged).encode()).hexdigest() if merged else ""


@dataclass(frozen=True)
class _Order:
    kind: JobKind
    caller: Identity
    options: RequestOptions
    asked: SubmitOptions
    wanted: FluxKontextLoraInput


async def _check_webhook(api: Api, url: str) -> None:
    try:
        await api.off_loop.check(api.parts.check_webhook, url)
    except FetchError as error:
        raise placed(error, ("query", "fal_webhook")) from error


def _enqueue(api: Api, request: Request, order: _Order) -> Submitted:
    """In a thread: an input may hold a picture of a hundred megabytes."""
    options, endpoint = order.options, _endpoint(request)
    transient = order.wanted.sync_mode or not options.store_io
    as_sent = order.wanted.model_dump_json().encode()
    seeded = order.wanted.model_copy(update={"seed": _seed(order.wanted)})
    job = NewJob(
        endpoint=endpoint.id,
        owner=order.caller.owner,
        payload=as_sent if order.wanted.seed is not None else seeded.model_dump_json().encode(),
        request_id=request_id_of(request),
        kind=order.kind,
        priority=Priority.LOW if options.priority is wire.Priority.LOW else Priority.NORMAL,
        lora_key=lora_key(order.wanted.loras),
        runner_hint=options.runner_hint,
        start_within_s=options.start_timeout_s,
        no_retry=not options.retry,
        transient=transient,
        webhook_url=order.asked.webhook_url,
        base_url=str(context_of(request).origin),
        tags=json.dumps(options.tags) if options.tags else None,
        idempotency_key=options.idempotency_key,
        body_hash=hashlib.sha256(as_sent).hexdigest(),
        max_queue_length=order.asked.max_queue_length,
        files_expire_s=options.files_expire_s,
        key_id=order.caller.key_id,
    )
    queued = _accepted(api.store.jobs.enqueue(job), job)
    is_shared = options.idempotency_key is not None
    return Submitted(queued.request_id, queued.queue_position, endpoint, seeded, transient, is_shared)


def _endpoint(request: Request) -> Endpoint:
    call = context_of(request).call
    if call is None or call.endpoint is None:
        raise NotFound(f"there is nothing to run at {request.url.path[:200]!r}.")
    return call.endpoint


def _seed(wanted: FluxKontextLoraInput) -> int:
    """Decided here, so that a job that is run again after a crash makes the same image."""
    return secrets.randbelow(MAX_SAFE_SEED + 1) if wanted.seed is None else wanted.seed


def _accepted(answer: Queued | Refusal, job: NewJob) -> Queued:
    if isinstance(answer, Queued):
        return answer
    if answer is Refusal.IDEMPOTENCY_KEY_REUSED:
        raise IdempotencyMismatch(job.idempotency_key or "")
    if answer is Refusal.OWNER_QUEUE_FULL:
        raise QueueFull("as many of your requests are waiting as may. Send it again when some of them are done.")
    allowed = "" if job.max_queue_length is None else f" (fal_max_queue_length is {job.max_queue_length})"
    raise QueueFull(f"the queue is full{allowed}. Send the request again later.")
