"""The error table: every exception has its answer, and no answer makes a client post twice where it must not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import fal_clients
import pytest
from fastapi import FastAPI
from kontextd_models import errors as engine
from kontextd_server.certs import write_certificates
from kontextd_server.fetch import errors as fetch
from kontextd_server.files import errors as files
from kontextd_server.store import errors as store
from kontextd_server.wire import errors as wire
from kontextd_server.wire.error_answers import answer_errors
from kontextd_server.wire.error_table import ANSWERS, Shape, answer, kept_answer, placed
from kontextd_server.wire.errors import FieldError, Invalid, WireError
from kontextd_server.wire.front_door import DoorSettings, front_door
from kontextd_server.wire.request_ids import RequestIds
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.testclient import TestClient
from starlette.types import ASGIApp

EXAMPLES: dict[str, tuple[BaseException, int, str]] = {
    "BadRequest": (wire.BadRequest("x"), 400, "bad_request"),
    "StillInProgress": (wire.StillInProgress(), 400, "bad_request"),
    "AuthError": (wire.AuthError("x"), 401, "auth_error"),
    "NotPermitted": (wire.NotPermitted("x"), 403, "auth_error"),
    "NotFound": (wire.NotFound("x"), 404, "not_found"),
    "UnknownEndpoint": (wire.UnknownEndpoint("a/b", ["c/d"]), 404, "not_found"),
    "UnknownRequest": (wire.UnknownRequest("r"), 404, "not_found"),
    "ResultGone": (wire.ResultGone("x"), 404, "not_found"),
    "MethodNotAllowed": (wire.MethodNotAllowed("GET", ["POST"]), 405, "bad_request"),
    "BodyTooLarge": (wire.BodyTooLarge(7), 413, "bad_request"),
    "Invalid": (Invalid([FieldError(("body", "seed"), "x", "one_of")]), 422, "one_of"),
    "IdempotencyMismatch": (wire.IdempotencyMismatch("k"), 422, "idempotency_key_reused"),
    "TooManyRequests": (wire.TooManyRequests("x"), 429, "concurrent_requests_limit"),
    "QueueFull": (wire.QueueFull("x"), 429, "concurrent_requests_limit"),
    "RateLimited": (wire.RateLimited("x", retry_after_s=9), 429, "concurrent_requests_limit"),
    "Cancelled": (wire.Cancelled("x"), 499, "client_cancelled"),
    "RunnerDisconnected": (wire.RunnerDisconnected("x"), 500, "runner_disconnected"),
    "InternalError": (wire.InternalError("x"), 500, "internal_error"),
    "NotAccepted": (wire.NotAccepted("x"), 503, "runner_scheduling_failure"),
    "StartTimeout": (wire.StartTimeout(3), 504, "request_timeout"),
    "GenerationTimeout": (wire.GenerationTimeout("x"), 504, "generation_timeout"),
    "InputError": (engine.InputError("x"), 422, "value_error"),
    "InvalidValue": (engine.InvalidValue("x", field="seed"), 422, "value_error"),
    "ImageLoadError": (engine.ImageLoadError("x"), 422, "image_load_error"),
    "UnsupportedImageFormat": (engine.UnsupportedImageFormat("x"), 422, "unsupported_image_format"),
    "ImageTooLarge": (engine.ImageTooLarge("x"), 422, "image_too_large"),
    "ImageTooSmall": (engine.ImageTooSmall("x"), 422, "image_too_small"),
    "AspectRatioOutOfRange": (engine.AspectRatioOutOfRange("x"), 422, "image_aspect_ratio_error"),
    "ContentPolicyViolation": (engine.ContentPolicyViolation("x"), 422, "content_policy_violation"),
    "FeatureNotSupported": (engine.FeatureNotSupported("x"), 422, "feature_not_supported"),
    "LoraError": (engine.LoraError("x", index=1), 422, "value_error"),
    "LoraFileError": (engine.LoraFileError("x"), 422, "value_error"),
    "LoraMismatch": (engine.LoraMismatch("x"), 422, "value_error"),
    "KontextdError": (engine.KontextdError("x"), 500, "internal_server_error"),
    "ModelError": (engine.ModelError("x"), 500, "internal_server_error"),
    "EngineError": (engine.EngineError("x"), 500, "internal_server_error"),
    "EngineBusy": (engine.EngineBusy("x"), 500, "internal_server_error"),
    "OutOfMemory": (engine.OutOfMemory("x"), 500, "internal_server_error"),
    "SafetyCheckFailed": (engine.SafetyCheckFailed("x"), 500, "internal_server_error"),
    "FileStoreError": (files.FileStoreError("x"), 500, "internal_server_error"),
    "FileNotHere": (files.FileNotHere("x"), 404, "not_found"),
    "UploadNotFound": (files.UploadNotFound("x"), 404, "not_found"),
    "KeyTaken": (files.KeyTaken("x"), 400, "bad_request"),
    "InvalidPart": (files.InvalidPart("x"), 400, "bad_request"),
    "InvalidGrant": (files.InvalidGrant("x"), 403, "auth_error"),
    "GrantExpired": (files.GrantExpired("x"), 403, "auth_error"),
    "FileTooLarge": (files.FileTooLarge("x"), 413, "file_too_large"),
    "InvalidRange": (files.InvalidRange("x"), 416, "bad_request"),
    "QuotaExceeded": (files.QuotaExceeded("x"), 507, "internal_error"),
    "StoreFull": (files.StoreFull("x"), 507, "internal_error"),
    "FetchError": (fetch.FetchError("x"), 422, "file_download_error"),
    "InvalidReference": (fetch.InvalidReference("x"), 422, "file_download_error"),
    "InvalidDataUri": (fetch.InvalidDataUri("x"), 422, "file_download_error"),
    "AddressDenied": (fetch.AddressDenied("x", setting="KONTEXTD_X"), 422, "file_download_error"),
    "UnknownRoot": (fetch.UnknownRoot("x"), 422, "file_download_error"),
    "NotInRoot": (fetch.NotInRoot("x"), 422, "file_download_error"),
    "RootUnavailable": (fetch.RootUnavailable("x"), 422, "file_download_error"),
    "NoHubFile": (fetch.NoHubFile("x"), 422, "file_download_error"),
    "NotMirrored": (fetch.NotMirrored("x"), 422, "file_download_error"),
    "OwnFileGone": (fetch.OwnFileGone("x"), 422, "file_download_error"),
    "DownloadFailed": (fetch.DownloadFailed("x"), 422, "file_download_error"),
    "DownloadTimedOut": (fetch.DownloadTimedOut("x"), 422, "file_download_error"),
    "InputTooLarge": (fetch.InputTooLarge("x"), 422, "file_too_large"),
    "NotWeights": (fetch.NotWeights("x"), 422, "file_download_error"),
    "StoreError": (store.StoreError("x"), 500, "internal_error"),
    "StoreUnavailable": (store.StoreUnavailable("x"), 503, "runner_scheduling_failure"),
    "FileStoreUnavailable": (files.StoreUnavailable("x"), 503, "runner_scheduling_failure"),
    "KeyError": (KeyError("x"), 500, "internal_error"),
}


def descendants(kind: type[BaseException]) -> set[type[BaseException]]:
    return {kind}.union(*(descendants(child) for child in kind.__subclasses__()))


def test_every_class_of_the_trees_has_an_example_here() -> None:
    modules = {module.__name__ for module in (wire, engine, files, fetch)}
    ours = descendants(WireError) | descendants(engine.KontextdError)
    assert {kind.__name__ for kind in ours if kind.__module__ in modules} - EXAMPLES.keys() == {"WireError"}


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_error_has_its_status_type_and_form(name: str) -> None:
    error, status, error_type = EXAMPLES[name]
    told = answer(error)
    assert (told.status, told.error_type, told.headers["X-Fal-Error-Type"]) == (status, error_type, error_type)
    detail = told.body["detail"]
    if isinstance(detail, list):
        assert detail[0].keys() >= {"loc", "msg", "type", "url"}
        assert detail[0]["type"] == error_type
    else:
        assert told.body == {"detail": told.message, "error_type": error_type}


def test_the_engine_and_the_wire_name_fields_each_in_their_way() -> None:
    assert answer(engine.ImageTooLarge("x")).body["detail"][0]["loc"] == ["body", "image_url"]  # type: ignore[index]
    told = answer(engine.InvalidValue("x", field="guidance_scale"))
    assert told.body["detail"][0]["loc"] == ["body", "guidance_scale"]  # type: ignore[index]


@pytest.mark.parametrize("kind", [engine.LoraError, engine.LoraFileError, engine.LoraMismatch])
def test_a_lora_is_named_by_its_place_in_the_list_once_that_is_known(kind: type[engine.LoraError]) -> None:
    (entry,) = answer(kind("x", index=0)).body["detail"]  # type: ignore[misc]
    assert (entry["loc"], entry["type"]) == (["body", "loras", 0, "path"], "value_error")
    (entry,) = answer(kind("x")).body["detail"]  # type: ignore[misc]
    assert entry["loc"] == ["body", "loras"]


@pytest.mark.parametrize(
    "error",
    [
        KeyError("/root/secret"),
        engine.ModelError("/root/secret"),
        files.StoreFull("/root/secret"),
        files.QuotaExceeded("/root/secret"),
        files.StoreUnavailable("/root/secret"),
        store.StoreUnavailable("/root/secret"),
    ],
)
def test_what_was_not_meant_for_callers_stays_in_the_log(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    told = answer(error)
    assert "secret" not in f"{told.message} {told.encoded!r} {told.headers}"

    def fail(request: Request) -> None:
        raise error

    app = Starlette(routes=[Route("/files/grants/a-grant", fail)])
    answer_errors(app)
    response = TestClient(RequestIds(app), raise_server_exceptions=False).get("/files/grants/a-grant")
    assert (response.status_code, response.json()) == (told.status, told.body)
    (record,) = (one for one in caplog.records if one.levelname == "ERROR")
    logged = f"{record.getMessage()} {record.exc_info}"
    assert "/root/secret" in logged
    assert response.headers["x-fal-request-id"] in logged
    assert "a-grant" not in logged


def test_an_error_about_one_value_is_placed_there_unless_it_is_ours() -> None:
    placed_one = answer(placed(fetch.InputTooLarge("too large"), ("body", "loras", 1, "path")))
    assert (placed_one.status, placed_one.error_type) == (422, "file_too_large")
    assert placed_one.body["detail"][0]["loc"] == ["body", "loras", 1, "path"]  # type: ignore[index]
    ours = files.StoreFull("x")
    assert placed(ours, ("body",)) is ours


@pytest.mark.parametrize("name", [name for name, (_, status, _) in EXAMPLES.items() if status in (422, 499, 500, 504)])
def test_an_answer_is_kept_with_its_request_and_comes_back_whole(name: str) -> None:
    told = answer(EXAMPLES[name][0])
    again = kept_answer(told.status, told.error_type, told.encoded)
    assert replace(again, message=told.message) == told
    assert again.message


# Retries.


def test_no_status_makes_a_client_post_again_unless_nothing_was_accepted() -> None:
    for kind, row in ANSWERS.items():
        assert row.status not in (408, 409, 502)
        assert row.retry == (row.status in (429, 503))
        assert (row.headers.get("X-Fal-Request-Timeout-Type") == "user") == (row.status == 504)
        if row.retry:
            nothing_accepted = (wire.TooManyRequests, wire.NotAccepted, files.StoreUnavailable, store.StoreUnavailable)
            assert issubclass(kind, nothing_accepted)


def counting(posts: Counter[str]) -> ASGIApp:
    """An endpoint that fails as its prompt says, and counts."""

    async def run(request: Request) -> JSONResponse:
        name = (await request.json())["prompt"]
        posts[name] += 1
        raise EXAMPLES[name][0]

    app = Starlette(routes=[Route("/fal-ai/flux-kontext-lora", run, methods=["POST"])])
    answer_errors(app)
    return front_door(app, DoorSettings())


@pytest.fixture
def failing() -> list[str]:
    """One error of each row that is no plain refusal."""
    return [name for name, (error, status, _) in EXAMPLES.items() if status >= 499 and isinstance(error, Exception)]


def test_one_failing_run_of_javascript_posts_once_unless_nothing_was_accepted(
    serve: Callable[..., int], failing: list[str]
) -> None:
    posts: Counter[str] = Counter()
    url = f"http://127.0.0.1:{serve(counting(posts))}/api/fal/proxy"
    told = fal_clients.run_js("run_failing.cjs", url, *failing)
    assert posts == {name: 4 if EXAMPLES[name][1] == 503 else 1 for name in failing}
    for name in failing:
        assert told[name]["status"] == EXAMPLES[name][1]
        assert told[name]["requestId"]


PYTHON_RUNS = """
import json, os, sys, concurrent.futures, fal_client
def run(name):
    try:
        fal_client.run("fal-ai/flux-kontext-lora", {"prompt": name})
    except fal_client.client.FalClientHTTPError as error:
        return [error.status_code, error.error_type]
names = os.environ["NAMES"].split(",")
with concurrent.futures.ThreadPoolExecutor() as pool:
    print(json.dumps(dict(zip(names, pool.map(run, names)))))
"""


def test_one_failing_run_of_python_posts_once(serve: Callable[..., int], failing: list[str], tmp_path: Path) -> None:
    posts: Counter[str] = Counter()
    files = write_certificates(tmp_path, ["127.0.0.1"])
    host = f"127.0.0.1:{serve(counting(posts), files.leaf, files.leaf_key)}"
    variables = {"FAL_KEY": "k", "FAL_RUN_HOST": host, "SSL_CERT_FILE": str(files.ca), "NAMES": ",".join(failing)}
    told = fal_clients.run_python(PYTHON_RUNS, variables)
    assert posts == dict.fromkeys(failing, 1)
    assert told == {name: list(EXAMPLES[name][1:]) for name in failing}


# Frameworks' own errors.


@pytest.fixture
def client() -> TestClient:
    app = FastAPI(redirect_slashes=False)

    @app.get("/number/{number}")
    async def number(number: int) -> int:
        return 1 // number

    @app.get("/gone")
    async def gone() -> None:
        raise ClientDisconnect

    answer_errors(app)
    return TestClient(RequestIds(app), raise_server_exceptions=False)


def test_no_such_path_and_no_such_method_are_answered_by_the_table(client: TestClient) -> None:
    response = client.get("/nowhere")
    assert (response.status_code, response.json()["error_type"]) == (404, "not_found")
    response = client.post("/gone")
    assert (response.status_code, response.json()["error_type"]) == (405, "bad_request")
    assert response.headers["allow"] == "GET"


def test_a_value_that_fastapi_refuses_is_told_like_one_that_we_refuse(client: TestClient) -> None:
    response = client.get("/number/x")
    assert response.status_code == 422
    (entry,) = response.json()["detail"]
    assert (entry["loc"], entry["type"], entry["input"]) == (["path", "number"], "int_parsing", "x")
    assert entry["url"].startswith("https://errors.pydantic.dev/")


def test_a_client_that_goes_away_while_it_sends_is_no_failure_of_ours(client: TestClient) -> None:
    assert client.get("/gone").status_code == 499


def test_a_bug_is_a_500_with_an_id_that_the_log_names(client: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    response = client.get("/number/0")
    assert (response.status_code, response.json()["error_type"]) == (500, "internal_error")
    assert response.headers["x-fal-request-id"] in caplog.text
    assert "ZeroDivisionError" in caplog.text


def test_an_error_can_bring_headers_of_its_own() -> None:
    assert answer(wire.RateLimited("x", retry_after_s=9)).headers["Retry-After"] == "9"
    assert answer(wire.AuthError("x")).headers["WWW-Authenticate"] == "Key"
    assert all(row.shape in Shape for row in ANSWERS.values())


def test_request_ids_are_of_each_request(client: TestClient) -> None:
    seen = {client.get("/nowhere").headers["x-fal-request-id"] for _ in range(5)}
    assert len(seen) == 5
