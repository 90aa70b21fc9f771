"""Paths to calls: every way a client writes them, and what is nothing."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kontextd_server.wire.endpoints import ENDPOINTS, Action, Endpoint, queue_call, run_call
from kontextd_server.wire.errors import NotFound, UnknownEndpoint, UnknownRequest

LORA = "fal-ai/flux-kontext-lora"
DEV = Endpoint("fal-ai", "flux-kontext", "dev")
TABLE = (*ENDPOINTS, DEV, Endpoint("fal-ai", "flux-kontext-lora", "text-to-image"))


@pytest.mark.parametrize(
    ("path", "action", "endpoint_id"),
    [
        (f"/{LORA}", Action.RUN, LORA),
        (f"/{LORA}/", Action.RUN, LORA),  # JavaScript, given a whole URL as id
        (f"/{LORA}/stream", Action.STREAM, LORA),
        ("/fal-ai/flux-kontext/dev", Action.RUN, "fal-ai/flux-kontext/dev"),
        ("/fal-ai/flux-kontext/dev/stream", Action.STREAM, "fal-ai/flux-kontext/dev"),
        (f"/{LORA}/text-to-image/stream", Action.STREAM, f"{LORA}/text-to-image"),
    ],
)
def test_an_endpoint_is_run_and_streamed_by_its_id(path: str, action: Action, endpoint_id: str) -> None:
    call = run_call(path, TABLE)
    assert call.endpoint is not None
    assert (call.action, call.endpoint.id) == (action, endpoint_id)
    assert call.path == path.rstrip("/")


@pytest.mark.parametrize("ending", ["", "/response"])
@pytest.mark.parametrize("front", [LORA, f"{LORA}/text-to-image"])
def test_a_request_is_found_under_owner_and_alias_and_under_the_full_id(front: str, ending: str) -> None:
    call = queue_call(f"/{front}/requests/0b5b-_1{ending}", TABLE)
    assert (call.action, call.app, call.request_id) == (Action.RESULT, LORA, "0b5b-_1")
    assert call.path == f"/{LORA}/requests/0b5b-_1"


@pytest.mark.parametrize(
    ("ending", "action"),
    [("status", Action.STATUS), ("status/stream", Action.STATUS_STREAM), ("cancel", Action.CANCEL)],
)
def test_a_request_has_a_status_a_stream_of_it_and_a_cancel(ending: str, action: Action) -> None:
    path = f"/fal-ai/flux-kontext/requests/abc/{ending}"
    call = queue_call(path, TABLE)
    assert (call.action, call.app, call.path) == (action, DEV.app, path)


def test_a_submit_takes_the_whole_id() -> None:
    assert queue_call("/fal-ai/flux-kontext/dev", TABLE).endpoint == DEV
    with pytest.raises(UnknownEndpoint):
        queue_call("/fal-ai/flux-kontext", TABLE)


@pytest.mark.parametrize("path", ["/", "/fal-ai", "/fal-ai/flux-kontext-lor", "/acme/foo/stream", "/workflows/a/b"])
def test_an_unknown_id_is_told_which_exist(path: str) -> None:
    for parse in (run_call, queue_call):
        with pytest.raises(UnknownEndpoint, match=LORA):
            parse(path)


def test_there_is_no_realtime() -> None:
    with pytest.raises(NotFound, match="no realtime endpoint"):
        run_call(f"/{LORA}/realtime")


@pytest.mark.parametrize("request_id", ["a b", "a\x00", "ü", "x" * 65, "%2e%2e", ".."])
def test_what_cannot_be_a_request_id_never_reaches_a_store(request_id: str) -> None:
    with pytest.raises(UnknownRequest):
        queue_call(f"/{LORA}/requests/{request_id}/status")


@pytest.mark.parametrize("path", [f"/{LORA}/requests", f"/{LORA}/requests/", f"/{LORA}/requests/abc/statuses"])
def test_a_path_between_two_calls_is_nothing(path: str) -> None:
    with pytest.raises(NotFound):
        queue_call(path)


@given(st.text())
def test_any_path_is_a_call_or_not_found(path: str) -> None:
    for parse in (run_call, queue_call):
        try:
            call = parse(path)
        except NotFound:
            continue
        assert parse(call.path) == call
