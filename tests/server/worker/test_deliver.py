"""Webhooks from the outbox to a real receiver: signatures, schedule, restarts, and one success each."""

from __future__ import annotations

import hashlib
import itertools
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import until
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from engines import Unwilling
from kontextd_server.fetch import WEBHOOK_RULES, AllowList, FetchConfig, Web
from kontextd_server.fetch.webhooks import post
from kontextd_server.store import (
    CANCELLED,
    Failure,
    Policy,
    Store,
    StoreUnavailable,
    Success,
    WebhookReport,
    WebhookState,
    open_store,
)
from kontextd_server.wire.addresses import AddressSettings
from kontextd_server.wire.outputs import StoredImage, StoredOutput
from kontextd_server.wire.webhooks import WebhookKey
from kontextd_server.worker import Backoff, Deliverer, DeliveryPolicy

QUICK = DeliveryPolicy(retry_delays_s=(0.05, 0.05, 0.05), poll_s=0.5, retry=Backoff(0.01, 0.05))
OUTPUT = StoredOutput(
    images=(StoredImage(8, 8, "image/png", "a.png", 3, file_key="abc-a.png"),),
    timings={"inference": 1.0},
    seed=5,
    has_nsfw_concepts=(False,),
    prompt="make it red",
    report={"version": "1"},
)
Submit, Deliver = Callable[..., str], Callable[..., Deliverer]


@dataclass
class Receiver:
    """Answers with the statuses it is given, then with 200; keeps what came."""

    statuses: list[int] = field(default_factory=list)
    came: list[tuple[Mapping[str, str], bytes]] = field(default_factory=list)
    url: str = ""

    def bodies(self) -> list[dict[str, object]]:
        return [json.loads(body) for _, body in self.came]


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    kept = Receiver()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            kept.came.append((dict(self.headers), self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(kept.statuses.pop(0) if kept.statuses else 200)
            self.send_header("Location", f"{kept.url}/elsewhere")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Silence."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    kept.url = f"http://127.0.0.1:{server.server_port}/hook"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield kept
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def key() -> WebhookKey:
    return WebhookKey(Ed25519PrivateKey.generate())


@pytest.fixture
def web(tmp_path: Path) -> Web:
    """Of an operator who lets webhooks go to this machine."""
    open_here = replace(WEBHOOK_RULES, allow=AllowList.parse(["127.0.0.1"]))
    return Web(FetchConfig(tmp_path / "cache", webhook=open_here))


@pytest.fixture
def deliver(store: Store, web: Web, key: WebhookKey) -> Iterator[Deliver]:
    """Starts a deliverer; `.stop` of what it returns ends it."""
    running: list[tuple[threading.Event, threading.Thread]] = []

    def begin(*, store: Store = store, web: Web = web, policy: DeliveryPolicy = QUICK) -> Callable[[], None]:
        stop = threading.Event()
        deliverer = Deliverer(store, partial(post, web), key, AddressSettings(), policy)
        thread = threading.Thread(target=deliverer.run, args=(stop,))
        thread.start()
        running.append((stop, thread))

        def end() -> None:
            stop.set()
            thread.join(20)
            assert not thread.is_alive()

        return end

    yield begin
    for stop, thread in running:
        stop.set()
        thread.join(20)


@pytest.fixture
def finish(store: Store, submit: Submit, receiver: Receiver) -> Callable[..., str]:
    """A job that has ended, with a webhook."""

    def end(ending: Success | Failure | None = None, **words: object) -> str:
        request_id = submit(webhook_url=receiver.url, base_url="https://box:8443", **words)
        lease = store.leases.claim("w").lease
        store.leases.finish(lease, ending or Success(json.dumps(OUTPUT.to_json()).encode()))
        return request_id

    return end


def pending(store: Store) -> int:
    return store.views.gauges().webhooks_pending


def tried(store: Store, request_id: str) -> WebhookReport:
    report = store.views.report(request_id)
    assert report is not None
    assert report.webhook is not None
    return report.webhook


def test_a_result_is_delivered_signed_and_with_the_urls_of_its_caller(
    store: Store, key: WebhookKey, receiver: Receiver, finish: Callable[..., str], deliver: Deliver
) -> None:
    deliver()
    request_id = finish()
    until(lambda: pending(store) == 0)
    ((headers, body),) = receiver.came
    told = json.loads(body)
    assert (told["request_id"], told["gateway_request_id"], told["status"]) == (request_id, request_id, "OK")
    assert told["payload"]["images"][0]["url"] == "https://box:8443/files/abc-a.png"
    assert told["payload"]["kontextd"] == {"version": "1"}
    signed = "\n".join(
        [
            headers["X-Fal-Webhook-Request-Id"],
            headers["X-Fal-Webhook-User-Id"],
            headers["X-Fal-Webhook-Timestamp"],
            hashlib.sha256(body).hexdigest(),
        ]
    )
    key.private.public_key().verify(bytes.fromhex(headers["X-Fal-Webhook-Signature"]), signed.encode())
    assert headers["X-Fal-Webhook-User-Id"] == "anna"
    assert abs(int(headers["X-Fal-Webhook-Timestamp"]) - time.time()) < 60


@pytest.mark.parametrize("ending", [CANCELLED, Failure("internal_error", 500, b'{"detail": "why"}')])
def test_a_failure_is_delivered_too(
    store: Store, receiver: Receiver, finish: Callable[..., str], deliver: Deliver, ending: Failure
) -> None:
    finish(ending)
    deliver()
    until(lambda: pending(store) == 0)
    (told,) = receiver.bodies()
    assert (told["status"], told["payload"]) == ("ERROR", json.loads(ending.body))
    assert told["error"]


def test_what_is_not_taken_is_sent_again_and_a_redirect_is_not_followed(
    store: Store, receiver: Receiver, finish: Callable[..., str], deliver: Deliver
) -> None:
    receiver.statuses = [500, 302, 404]
    finish()
    deliver()
    until(lambda: pending(store) == 0)
    assert len(receiver.came) == 4
    assert len({body for _, body in receiver.came}) == 1


def test_after_the_last_try_it_is_given_up(
    store: Store, receiver: Receiver, finish: Callable[..., str], deliver: Deliver
) -> None:
    receiver.statuses = [500] * 10
    finish()
    deliver()
    until(lambda: pending(store) == 0)
    assert len(receiver.came) == 4  # one and three more


def test_what_takes_longer_than_a_post_may_is_tried_once_in_its_lease(
    database_url: str, finish: Callable[..., str], deliver: Deliver, web: Web, receiver: Receiver
) -> None:
    """A large result, to a receiver that reads it slowly but steadily."""
    go_on = threading.Event()
    with socket.socket() as slow, closing(open_store(database_url, Policy(webhook_lease_s=8.0))) as store:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**17)
        slow.bind(("127.0.0.1", 0))
        slow.listen()
        receiver.url = f"http://127.0.0.1:{slow.getsockname()[1]}/hook"

        def read() -> None:
            accepted, _ = slow.accept()
            with accepted:
                while accepted.recv(2**16) and not go_on.wait(0.02):
                    pass

        reading = threading.Thread(target=read)
        reading.start()
        large = replace(OUTPUT.images[0], file_key=None, data_uri="data:image/png;base64," + "A" * 40_000_000)
        request_id = finish(Success(json.dumps(replace(OUTPUT, images=(large,)).to_json()).encode()))
        impatient = replace(web.config, webhook=replace(web.config.webhook, total_s=2.0))
        end = deliver(store=store, web=Web(impatient), policy=replace(QUICK, retry_delays_s=(3600.0,)))
        until(lambda: tried(store, request_id).last_error or tried(store, request_id).attempt > 1)
        go_on.set()
        reading.join(20)
        end()
        assert tried(store, request_id).attempt == 1
        assert "longer than the 2 s allowed" in tried(store, request_id).last_error


def test_what_is_never_recorded_comes_to_an_end_as_well(
    store: Store, receiver: Receiver, submit: Submit, finish: Callable[..., str], deliver: Deliver, database_url: str
) -> None:
    """Each try outlasts its lease here, or its process."""
    request_id = finish()
    with closing(open_store(database_url, Policy(webhook_lease_s=0.0))) as forgetful:
        for _ in range(1 + len(QUICK.retry_delays_s) + 3):
            assert forgetful.webhooks.claim() is not None
    deliver()
    until(lambda: pending(store) == 0)
    assert receiver.came == []
    assert tried(store, request_id).state is WebhookState.GIVEN_UP
    assert "never recorded" in tried(store, request_id).last_error


def test_a_try_beyond_the_schedule_is_made_where_the_last_was_lost(
    store: Store, receiver: Receiver, finish: Callable[..., str], deliver: Deliver, database_url: str
) -> None:
    request_id = finish()
    with closing(open_store(database_url, Policy(webhook_lease_s=0.0))) as forgetful:
        assert forgetful.webhooks.claim() is not None
    deliver(policy=replace(QUICK, retry_delays_s=()))
    until(lambda: pending(store) == 0)
    assert tried(store, request_id).state is WebhookState.DELIVERED


def test_a_claim_that_fails_costs_no_place_among_the_deliveries(
    store: Store, receiver: Receiver, finish: Callable[..., str], web: Web, key: WebhookKey
) -> None:
    outbox, stop = Unwilling(store.webhooks), threading.Event()
    outbox.fail_next("claim", RuntimeError("unforeseen"), QUICK.at_once + 1)
    deliverer = Deliverer(replace(store, webhooks=outbox), partial(post, web), key, AddressSettings(), QUICK)
    finish()
    for _ in range(QUICK.at_once + 1):
        with pytest.raises(RuntimeError, match="unforeseen"):
            deliverer.run(stop)
    thread = threading.Thread(target=deliverer.run, args=(stop,))
    thread.start()
    try:
        until(lambda: pending(store) == 0)
    finally:
        stop.set()
        thread.join(20)
    assert len(receiver.came) == 1


def test_a_delivery_whose_record_fails_is_told_in_the_log_and_done_again(
    store: Store, finish: Callable[..., str], deliver: Deliver, database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    finish()
    with closing(open_store(database_url, Policy(webhook_lease_s=0.2))) as forgetful:
        outbox = Unwilling(forgetful.webhooks)
        outbox.fail_next("delivered", RuntimeError("unforeseen"))
        end = deliver(store=replace(forgetful, webhooks=outbox))
        until(lambda: pending(store) == 0)
        end()
    assert "how its webhook went is lost" in caplog.text


def test_deliveries_go_on_after_a_restart(
    store: Store, receiver: Receiver, finish: Callable[..., str], deliver: Deliver
) -> None:
    patient = replace(QUICK, retry_delays_s=(0.5,) * 900)
    receiver.statuses = [503] * 1000
    finish()
    end = deliver(policy=patient)
    until(lambda: receiver.came)
    end()
    assert pending(store) == 1
    came = len(receiver.came)
    receiver.statuses.clear()
    deliver(policy=patient)
    until(lambda: pending(store) == 0)
    assert len(receiver.came) == came + 1


def test_two_deliverers_tell_a_receiver_once(
    store: Store, receiver: Receiver, finish: Callable[..., str], deliver: Deliver
) -> None:
    deliver()
    deliver()
    sent = {finish() for _ in range(12)}
    until(lambda: pending(store) == 0)
    assert sorted(told["request_id"] for told in receiver.bodies()) == sorted(sent)


def test_a_success_is_recorded_however_often_the_store_does_not_answer(
    store: Store, receiver: Receiver, finish: Callable[..., str], deliver: Deliver
) -> None:
    outbox = Unwilling(store.webhooks)
    outbox.fail_next("delivered", StoreUnavailable("away"), 4)
    finish()
    deliver(store=replace(store, webhooks=outbox))
    until(lambda: pending(store) == 0)
    assert len(receiver.came) == 1


def test_one_slow_receiver_does_not_keep_the_others_waiting(
    store: Store, receiver: Receiver, submit: Submit, finish: Callable[..., str], deliver: Deliver, web: Web
) -> None:
    go_on = threading.Event()

    class SlowWeb:
        """Waits for the test at the first delivery."""

        turns = itertools.count()

        def __call__(self, *arguments: object) -> int:
            assert next(self.turns) > 0 or go_on.wait(120)
            return post(web, *arguments)

    stop = threading.Event()
    deliverer = Deliverer(store, SlowWeb(), WebhookKey(Ed25519PrivateKey.generate()), AddressSettings(), QUICK)
    thread = threading.Thread(target=deliverer.run, args=(stop,))
    thread.start()
    finish(), finish()
    until(lambda: len(receiver.came) == 1)
    go_on.set()
    until(lambda: pending(store) == 0)
    stop.set()
    thread.join(20)


def test_a_denied_address_is_given_up_in_the_end_with_its_reason(
    store: Store, receiver: Receiver, finish: Callable[..., str], deliver: Deliver, tmp_path: Path, caplog
) -> None:
    finish()
    deliver(web=Web(FetchConfig(tmp_path / "cache")))
    until(lambda: pending(store) == 0)
    assert receiver.came == []
    assert "KONTEXTD_FETCH_ALLOW_WEBHOOK" in caplog.text


def test_a_result_that_cannot_be_read_comes_to_an_end_as_well(
    store: Store, receiver: Receiver, finish: Callable[..., str], deliver: Deliver
) -> None:
    finish(Success(b"what another version wrote"))
    deliver()
    until(lambda: pending(store) == 0)
    assert receiver.came == []
