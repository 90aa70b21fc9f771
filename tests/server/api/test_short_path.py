"""The short path of submit, run, status and result: answers and records as by FastAPI's routes, to the byte."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import httpx
import pytest
from fastapi import FastAPI
from kontextd_models.errors import ImageTooLarge
from kontextd_server.store import LogLine, NewJob, Progress, Queued, StoreUnavailable
from kontextd_server.store.polls import Polls
from kontextd_server.wire.auth import infer_token
from kontextd_server.wire.cors import CorsSettings
from kontextd_server.wire.front_door import DoorSettings
from kontextd_server.worker.failures import failure_of
from starlette.types import ASGIApp

from .conftest import ENDPOINT, Box

QUEUE = f"/queue/{ENDPOINT}/requests"
ORIGIN = "https://app.example"
RANDOM_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


@dataclass(frozen=True)
class Call:
    """`key` names one of `Scene.keys`; "" sends none."""

    path: str
    method: str = "GET"
    key: str = "anna"
    headers: Mapping[str, str] = field(default_factory=dict)
    body: str = ""


@dataclass(frozen=True)
class Scene:
    """A box with a request in each state there is."""

    box: Box
    ids: Mapping[str, str]
    keys: Mapping[str, str]

    def answers(self, app: ASGIApp, *calls: Call) -> list[httpx.Response]:
        return asyncio.run(self._answers(app, calls))

    async def _answers(self, app: ASGIApp, calls: tuple[Call, ...]) -> list[httpx.Response]:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://box.example:8000") as client:
            return [await self._answer(client, call) for call in calls]

    async def _answer(self, client: httpx.AsyncClient, call: Call) -> httpx.Response:
        own = {"Authorization": f"Key {self.keys[call.key]}"} if call.key else {}
        headers = {name: self.named(value) for name, value in {**own, **call.headers}.items()}
        return await client.request(call.method, self.named(call.path), headers=headers, content=call.body)

    def named(self, text: str) -> str:
        """`{waiting}` is the id of the request that waits, `{key}` a key, `{token}` a token."""
        return text.format(**self.ids, key=self.keys["anna"], token=self.keys["token"], other=self.keys["other token"])


@pytest.fixture
def scene(idle_box: Box) -> Scene:
    box = idle_box
    box.configure(door=DoorSettings(cors=CorsSettings((ORIGIN,))))
    states: dict[str, Callable[[str], object]] = {
        "done": lambda request_id: box.worker.work(claimed(box)),
        "transient": lambda request_id: box.worker.work(claimed(box)),
        "gone": lambda request_id: (box.worker.work(claimed(box)), box.store.retention.expire(request_id)),
        "wrong": lambda request_id: failed(box, ImageTooLarge("image is 20000x10; 14142 px is the most. Resize it.")),
        "broken": lambda request_id: failed(box, RuntimeError("secret of the house")),
        "cancelled": box.store.jobs.request_cancel,
        "running": lambda request_id: running(box),
        "stopping": lambda request_id: (claimed(box), box.store.jobs.request_cancel(request_id)),
        "first": lambda request_id: None,
        "waiting": lambda request_id: None,
    }
    ids = {}
    for name, brought in states.items():
        ids[name] = queued(box, transient=name in ("transient", "gone"))
        brought(ids[name])
    ids["theirs"] = queued(box, owner="bert")
    revoked = box.store.keys.create("anna")
    assert box.store.keys.revoke(revoked.key.id)
    keys = {"anna": box.key, "bert": box.other_key, "root": box.admin_key, "revoked": revoked.plain}
    return Scene(box, ids, {**keys, "wrong": "id:nobody-has-this-key", **tokens(box)})


def queued(box: Box, **fields: object) -> str:
    payload = b'{"image_url": "https://studio.example/cat.png", "prompt": "x", "seed": 7}'
    answer = box.store.jobs.enqueue(NewJob(**{"endpoint": ENDPOINT, "owner": "anna", "payload": payload} | fields))
    assert isinstance(answer, Queued)
    return answer.request_id


def claimed(box: Box):  # the job that waits
    claim = box.store.leases.claim("double")
    assert claim is not None
    return claim


def failed(box: Box, error: Exception) -> None:
    claim = claimed(box)
    box.store.leases.finish(claim.lease, failure_of(error, claim.request_id))


def running(box: Box) -> None:
    lines = [LogLine(f"{10 * number}%|█▍ 'quoted' ü", 1_700_000_000.25 + number) for number in range(3)]
    box.store.leases.renew(claimed(box).lease, logs=lines, progress=Progress(3, 30))


def tokens(box: Box) -> dict[str, str]:
    class Caller:
        key_id = next(key.id for key in box.store.keys.all() if key.name == "anna")

        def require(self, scope: object) -> None:
            pass

    expires_at = int(time.time()) + 600
    apps = {"token": "flux-kontext-lora", "other token": "flux-other"}
    return {name: infer_token(box.signer, Caller(), [app], expires_at) for name, app in apps.items()}


STATUS, RESULT = "/status", ""
CASES = [
    *(
        Call(f"{QUEUE}/{{{state}}}{end}")
        for state in (
            *("done", "transient", "gone", "wrong", "broken", "cancelled"),
            *("running", "stopping", "first", "waiting", "theirs"),
        )
        for end in (STATUS, f"{STATUS}?logs=1", RESULT)
    ),
    *(Call(f"{QUEUE}/unknown{end}") for end in (STATUS, f"{STATUS}?logs=true", RESULT)),
    *(
        Call(f"{QUEUE}/{{running}}{STATUS}?logs={flag}")
        for flag in ("0", "false", "TRUE", "", "2", "yes%20no", "1&logs=0")
    ),
    # Who calls, and how it is said.
    *(
        Call(f"{QUEUE}/{{done}}{end}", key=key)
        for key in ("bert", "root", "revoked", "wrong", "")
        for end in (STATUS, RESULT)
    ),
    *(
        Call(f"{QUEUE}/{{done}}{STATUS}", key="", headers={"Authorization": value})
        for value in ("Bearer {key}", "Basic {key}", "Bearer {token}", "Key")
    ),
    *(
        Call(f"{QUEUE}/{{done}}{STATUS}?fal_jwt_token={secret}", key="")
        for secret in ("{token}", "{other}", "{key}", "nonsense")
    ),
    # Ways to write one call.
    *(Call(f"{QUEUE}/{{done}}{end}") for end in ("/status/", "/response", "/", "/nothing")),
    Call(f"{QUEUE}/{'x' * 65}/status"),
    Call("/queue/fal-ai/other/requests/{done}/status"),
    Call(f"/{ENDPOINT}/requests/{{running}}/status?logs=1", headers={"Host": "queue.fal.run"}),
    Call(f"/{ENDPOINT}/requests/{{done}}", headers={"Host": "queue.falrun.com:8443"}),
    Call(f"{QUEUE}/{{done}}/status", headers={"Host": "not a host"}),
    *(
        Call("/api/fal/proxy", headers={"x-fal-target-url": f"https://queue.fal.run/{ENDPOINT}/requests/{rest}"})
        for rest in ("{done}", "{running}/status?logs=1", "unknown/status")
    ),
    # Pages, and other methods.
    *(
        Call(f"{QUEUE}/{{done}}{end}", key=key, headers={"Origin": origin})
        for end in (STATUS, RESULT)
        for key in ("anna", "")
        for origin in (ORIGIN, "https://evil.example")
    ),
    *(
        Call(f"{QUEUE}/{{done}}{end}", method)
        for method in ("HEAD", "OPTIONS", "POST", "PUT")
        for end in (STATUS, RESULT)
    ),
]

SUBMIT, RUN = f"/queue/{ENDPOINT}", f"/{ENDPOINT}"
GOOD = '{"image_url": "https://studio.example/cat.png", "prompt": "x"}'
ACCEPTED = [
    Call(SUBMIT, "POST", body=GOOD),
    Call(f"{SUBMIT}/", "POST", body=GOOD),
    Call(SUBMIT, "POST", body=GOOD, headers={"x-fal-queue-priority": "low", "Origin": ORIGIN}),
    Call(f"/{ENDPOINT}", "POST", body=GOOD, headers={"Host": "queue.fal.run"}),
    Call(SUBMIT, "POST", key="", body=GOOD, headers={"Authorization": "Bearer {token}"}),
]
REFUSED = [
    Call(f"{path}{query}", method, key, headers, body)
    for path in (SUBMIT, RUN)
    for query, method, key, headers, body in (
        *(("", "POST", "anna", {}, body) for body in ("", "{", "[]", '{"prompt": 1}', GOOD[:-1] + ', "seed": "x"}')),
        *(("", "POST", key, {}, GOOD) for key in ("", "wrong", "revoked")),
        ("", "POST", "anna", {"x-fal-queue-priority": "highest"}, GOOD),
        ("", "POST", "anna", {"Content-Encoding": "gzip"}, GOOD),
        ("", "GET", "anna", {}, ""),
        ("", "PUT", "anna", {}, GOOD),
    )
] + [Call(f"{SUBMIT}?{query}", "POST", body=GOOD) for query in ("fal_max_queue_length=0", "fal_webhook=nowhere")]


def told(scene: Scene, answer: httpx.Response) -> object:
    """All of it, but for an id that was drawn for this answer."""
    request_id = answer.headers["x-fal-request-id"]
    if request_id not in scene.ids.values():
        assert RANDOM_ID.fullmatch(request_id)
        answer.headers["x-fal-request-id"] = "(drawn)"
    return answer.status_code, answer.headers.raw, answer.content


def test_each_answer_is_the_same_to_the_byte(scene: Scene) -> None:
    routed = scene.answers(scene.box.app(short=False), *CASES)
    short = scene.answers(scene.box.app(), *CASES)
    for call, long_answer, short_answer in zip(CASES, routed, short, strict=True):
        assert told(scene, long_answer) == told(scene, short_answer), call
    assert {answer.status_code for answer in short} >= {200, 202, 204, 400, 401, 403, 404, 405, 422, 499, 500}


def test_submits_and_runs_are_refused_alike(scene: Scene) -> None:
    routed = scene.answers(scene.box.app(short=False), *REFUSED)
    short = scene.answers(scene.box.app(), *REFUSED)
    for call, long_answer, short_answer in zip(REFUSED, routed, short, strict=True):
        assert told(scene, long_answer) == told(scene, short_answer), call
    assert {answer.status_code for answer in short} >= {400, 401, 405, 422, 429}


def test_submits_are_accepted_alike(scene: Scene) -> None:
    forms = []
    for short in (False, True):
        answers = scene.answers(scene.box.app(short=short), *ACCEPTED)
        forms.append([(answer.status_code, sorted(answer.headers), answered(answer)) for answer in answers])
    assert forms[0] == forms[1]
    assert all(status == 200 for status, *_ in forms[0])


def answered(answer: httpx.Response) -> str:
    """Without the id, and the place in the queue that each submit makes longer."""
    assert answer.headers["x-fal-request-id"] == answer.json()["request_id"]
    return re.sub(r'"queue_position":[0-9]+', "(place)", RANDOM_ID.sub("(id)", answer.text))


def test_no_router_is_asked_on_the_short_path(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the comparison would compare one form with itself."""
    app, asked = scene.box.app(), []
    real = FastAPI.__call__

    async def counted(self: FastAPI, scope: Mapping[str, object], *rest: object) -> None:
        asked.append(scope["path"])
        await real(self, scope, *rest)

    monkeypatch.setattr(FastAPI, "__call__", counted)
    ends = ("/status", "/status?logs=1", "")
    calls = [Call(f"{QUEUE}/{{done}}{end}") for end in ends] + [Call(SUBMIT, "POST", body=GOOD), Call(RUN, "POST")]
    answers = scene.answers(app, *calls, Call("/health"))
    assert [answer.status_code for answer in answers] == [200, 200, 200, 200, 422, 200]
    assert asked == ["/health"]


@pytest.mark.parametrize(("error", "status"), [(StoreUnavailable("away"), 503), (RuntimeError("a bug"), 500)])
def test_what_goes_wrong_inside_is_told_and_logged_alike(
    scene: Scene,
    error: Exception,
    status: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(Polls, "statuses", fail)
    monkeypatch.setattr(scene.box.store.views, "result", fail)
    caplog.set_level(logging.DEBUG, logger="kontextd_server")
    forms = []
    for short in (False, True):
        caplog.clear()
        calls = (Call(f"{QUEUE}/{{done}}/status"), Call(f"{QUEUE}/{{done}}"))
        answers = scene.answers(scene.box.app(short=short), *calls)
        records = [(record.name, record.levelname, shape(record.getMessage())) for record in caplog.records]
        forms.append(([told(scene, answer) for answer in answers], records))
    assert forms[0] == forms[1]
    assert [answer.status_code for answer in answers] == [status, status]


def test_each_call_is_logged_and_counted_alike(scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, logger="kontextd_server")
    forms = []
    for short in (False, True):
        app = scene.box.app(short=short)
        caplog.clear()
        scene.answers(app, *CASES)
        records = [(record.levelname, shape(record.getMessage())) for record in caplog.records]
        (metrics,) = scene.answers(app, Call("/metrics"))
        counts = [line for line in metrics.text.splitlines() if line.startswith("kontextd_http_answers_total")]
        forms.append((records, counts))
    assert forms[0] == forms[1]
    assert any("GET status 200" in text for _, text in forms[0][0])
    assert any('call="result",status="422"' in line for line in forms[0][1])


def shape(message: str) -> str:
    """Without times and ids."""
    return RANDOM_ID.sub("(id)", re.sub(r"[0-9]+\.[0-9]{3} s", "(time)", message))


def test_many_polls_at_once_are_few_calls_of_the_store(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    reads, real = [], scene.box.store.database.read

    def counted() -> object:
        reads.append(1)
        return real()

    monkeypatch.setattr(scene.box.store.database, "read", counted)
    app, calls = scene.box.app(), [Call(f"{QUEUE}/{{waiting}}/status"), Call(f"{QUEUE}/{{first}}/status")] * 25

    async def at_once() -> list[list[httpx.Response]]:
        return await asyncio.gather(*(scene._answers(app, (call,)) for call in calls))

    answers = [answer for (answer,) in asyncio.run(at_once())]
    assert [answer.json()["queue_position"] for answer in answers] == [1, 0] * 25
    assert len(reads) < 10  # one for the key, one for all


def test_a_status_never_goes_back(scene: Scene) -> None:
    """What one poll has told is true for every later one, also while polls overlap with changes."""
    box, order = scene.box, ["IN_QUEUE", "IN_PROGRESS", "COMPLETED"]
    request_id = scene.ids["first"]
    path = f"{QUEUE}/{request_id}/status"

    async def polled_until_completed(client: httpx.AsyncClient, seen: list[int]) -> None:
        while not seen or seen[-1] < 2:
            known = max(latest, default=0)
            answer = await client.get(path, headers={"Authorization": f"Key {box.key}"})
            seen.append(order.index(answer.json()["status"]))
            latest.append(seen[-1])
            assert seen[-1] >= known, "a later poll was told an earlier state"

    async def tested() -> None:
        transport = httpx.ASGITransport(box.app())
        async with httpx.AsyncClient(transport=transport, base_url="http://box.example") as client:
            pollers = [asyncio.ensure_future(polled_until_completed(client, seen)) for seen in all_seen]
            while min(map(len, all_seen)) < 3:
                await asyncio.sleep(0)
            claim = await asyncio.to_thread(claimed, box)
            assert claim.request_id == request_id
            while min(seen[-1] for seen in all_seen) < 1:
                await asyncio.sleep(0)
            await asyncio.to_thread(box.worker.work, claim)
            await asyncio.gather(*pollers)

    latest: list[int] = []
    all_seen: list[list[int]] = [[] for _ in range(8)]
    asyncio.run(tested())
