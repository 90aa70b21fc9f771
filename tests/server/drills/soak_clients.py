"""Clients of a soak: each asks for one thing after the other, in all the ways there are. Knows HTTP; kills nobody."""

from __future__ import annotations

import json
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from uuid import uuid4

import httpx

from .calls import ENDPOINT, Caller, Json, body, picture

_PAUSE_S = 0.1


@dataclass
class Accounts:
    """What clients were promised, and what they met with."""

    accepted: dict[str, bool] = field(default_factory=dict)  # request id → it has a webhook
    counts: Counter[str] = field(default_factory=Counter)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def accept(self, request_id: str, *, has_webhook: bool) -> None:
        with self._lock:
            assert request_id not in self.accepted, "one id for two requests"
            self.accepted[request_id] = has_webhook

    def count(self, what: str) -> None:
        with self._lock:
            self.counts[what] += 1


class SoakClient:
    """`run` is a thread's loop; it raises what must not happen."""

    def __init__(self, caller: Caller, webhook: str, accounts: Accounts, stop: threading.Event, seed: int) -> None:
        self._caller, self._http = caller, caller.http
        self._webhook, self._accounts, self._stop = webhook, accounts, stop
        self._random = random.Random(seed)
        self._photo: str | None = None

    def run(self) -> None:
        ways = [self._queue, self._queue, self._queue, self._cancel, self._sync_mode, self._run, self._stream]
        rarely = [self._wrong, self._upload]
        with closing(self._http):
            while not self._stop.is_set():
                self._random.choice(ways)()
                if self._random.random() < 0.2:
                    self._random.choice(rarely)()

    # Through the queue: everything can be asked again.

    def _queue(self) -> None:
        request_id, sent = self._submit()
        result = self._ended(request_id)
        if self._is_ok(result):
            assert result.json()["seed"] == sent["seed"]
            assert self._insist(lambda: self._http.get(result.json()["images"][0]["url"])).status_code == 200

    def _cancel(self) -> None:
        request_id, _ = self._submit()
        self._stop.wait(self._random.uniform(0, 0.3))
        answer = self._insist(lambda: self._http.put(f"{_place(request_id)}/cancel"))
        result = self._ended(request_id)
        # Where the first answer was lost, the second may be that the job has ended.
        assert (answer.status_code, result.status_code) == (202, 499) or answer.status_code == 400, result.text
        self._accounts.count("cancels")

    def _sync_mode(self) -> None:
        request_id, _ = self._submit(sync_mode=True)
        result = self._ended(request_id)
        assert not self._is_ok(result) or result.json()["images"][0]["url"].startswith("data:image/png")

    def _submit(self, **fields: object) -> tuple[str, Json]:
        sent, key = self._body(**fields), {"Idempotency-Key": uuid4().hex}
        has_webhook = self._random.random() < 0.5
        params = {"fal_webhook": self._webhook} if has_webhook else {}
        answer = self._insist(lambda: self._http.post(f"/queue/{ENDPOINT}", json=sent, params=params, headers=key))
        assert answer.status_code == 200, answer.text
        request_id = str(answer.json()["request_id"])
        self._accounts.accept(request_id, has_webhook=has_webhook)
        return request_id, sent

    def _ended(self, request_id: str) -> httpx.Response:
        def status() -> httpx.Response:
            return self._http.get(f"{_place(request_id)}/status?logs=1")

        while self._insist(status).json()["status"] != "COMPLETED":
            threading.Event().wait(_PAUSE_S)
        return self._insist(lambda: self._http.get(_place(request_id)))

    # What waits: when the API is killed its job goes on without it.

    def _run(self) -> None:
        with self._may_break("runs"):
            self._is_ok(self._http.post(f"/{ENDPOINT}", json=self._body()))

    def _stream(self) -> None:
        with (
            self._may_break("streams"),
            self._http.stream("POST", f"/{ENDPOINT}/stream", json=self._body()) as answer,
        ):
            assert answer.status_code == 200, answer.read()
            events = [json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: ")]
            assert events[-1]["images"][0]["url"].startswith("http"), events[-1]
            self._accounts.count("streams")

    # Beside.

    def _wrong(self) -> None:
        assert self._insist(lambda: self._http.post(f"/queue/{ENDPOINT}", json={"prompt": 7})).status_code == 422

    def _upload(self) -> None:
        with self._may_break("uploads"):
            self._photo = self._caller.upload(picture(200))

    def _body(self, **fields: object) -> Json:
        prompt = self._random.choice(("nothing", "nothing", "walk /never"))
        if self._photo is not None and self._random.random() < 0.5:
            fields["image_url"] = self._photo
        return body(prompt, **{"num_inference_steps": self._random.randint(1, 20), **fields})

    def _is_ok(self, result: httpx.Response) -> bool:
        """Nothing may have come between but workers that were lost too often."""
        if result.status_code == 200:
            self._accounts.count("results")
            return True
        assert result.json()["error_type"] == "runner_disconnected", result.text
        self._accounts.count("workers lost too often")
        return False

    def _insist(self, call: Callable[[], httpx.Response]) -> httpx.Response:
        while True:
            with self._may_break("calls"):
                answer = call()
                if answer.status_code != 503:
                    return answer
                self._accounts.count("503")
            threading.Event().wait(_PAUSE_S)

    @contextmanager
    def _may_break(self, what: str) -> Iterator[None]:
        """A connection may break with the process behind it, but none is refused."""
        try:
            yield
        except httpx.ConnectError:
            raise
        except httpx.TransportError:
            self._accounts.count(f"{what} broken off")


def _place(request_id: str) -> str:
    return f"/queue/{ENDPOINT}/requests/{request_id}"
