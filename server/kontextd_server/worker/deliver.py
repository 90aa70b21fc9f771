"""Delivers webhooks: claims what is due, posts it, says how it went. Knows fal's bodies and schedule; knows no network.

The outbox is in the job store, so deliveries survive whatever process does them, and several may do them at once. A
receiver may be told twice (the process ends between his answer and its record), a success is recorded once.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, field

from kontextd_server.fetch.errors import FetchError
from kontextd_server.store import Delivery, Outcome, Store, StoreUnavailable, Subscription, topics
from kontextd_server.wire.addresses import AddressSettings, bases_for, parse_origin
from kontextd_server.wire.error_table import answer, kept_answer
from kontextd_server.wire.errors import ResultGone
from kontextd_server.wire.outputs import StoredOutput
from kontextd_server.wire.webhooks import RETRY_DELAYS_S, WebhookKey, failure_body, success_body
from kontextd_server.worker.policy import Backoff

log = logging.getLogger(__name__)

# Posts a body and returns the status, without following redirects: `partial(fetch.webhooks.post, web)`. Raises
# `FetchError` where there is no answer within 15 s, or none may be asked for.
Post = Callable[[str, bytes, Mapping[str, str]], int]

_LOOK_S = 0.25
_LOST_TRIES = 3  # beyond the schedule, of which nobody recorded how they went; then there is something wrong with them


@dataclass(frozen=True)
class DeliveryPolicy:
    """`retry_delays_s`: waits after the first, second, … failure; after the last there is no further try."""

    retry_delays_s: tuple[float, ...] = RETRY_DELAYS_S
    at_once: int = 4  # one slow receiver does not keep the others waiting
    poll_s: float = 5.0
    retry: Backoff = field(default_factory=Backoff)  # of a store that does not answer
    with_report: bool = True  # the object `kontextd` in outputs


class Deliverer:
    """`run` is a thread's loop, in any process. `address_settings` render the URLs in bodies."""

    def __init__(
        self,
        store: Store,
        post: Post,
        key: WebhookKey,
        address_settings: AddressSettings,
        policy: DeliveryPolicy | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store, self._post, self._key = store, post, key
        self._address_settings, self._policy, self._clock = address_settings, policy or DeliveryPolicy(), clock
        self._free = threading.Semaphore(self._policy.at_once)
        self._is_heard = True

    def run(self, stop: threading.Event) -> None:
        """Until `stop`; deliveries under way are brought to their end."""
        with (
            closing(self._store.watch()) as watcher,
            watcher.subscribe(topics.WEBHOOKS) as due,
            ThreadPoolExecutor(self._policy.at_once, "kontextd-webhook") as threads,
        ):
            while not stop.is_set():
                if not self._free.acquire(timeout=_LOOK_S):
                    continue
                if not self._begin_next(threads, due, stop):
                    self._wait(due, stop)

    def _begin_next(self, threads: ThreadPoolExecutor, due: Subscription, stop: threading.Event) -> bool:
        """True if there was one, which now has the place among those under way that was taken for it."""
        with ExitStack() as place:
            place.callback(self._free.release)
            delivery = self._claimed()
            if delivery is None:
                return False
            threads.submit(self._deliver_and_free, delivery, due, stop)
            place.pop_all()
        return True

    def _claimed(self) -> Delivery | None:
        try:
            delivery = self._store.webhooks.claim()
        except StoreUnavailable as error:
            if self._is_heard:
                log.warning("no webhooks can be claimed, which is tried again: %s", error)
            self._is_heard = False
            return None
        self._is_heard = True
        return delivery

    def _wait(self, due: Subscription, stop: threading.Event) -> None:
        until = time.monotonic() + self._pause_s()
        while not stop.is_set() and time.monotonic() < until:
            if due.wait(min(_LOOK_S, max(0.0, until - time.monotonic()))):
                return

    def _pause_s(self) -> float:
        """Until the next one is due."""
        try:
            due_at = self._store.webhooks.next_due_at()
            now = self._store.clock()
        except StoreUnavailable:  # `_claimed` has said so
            return self._policy.poll_s
        return self._policy.poll_s if due_at is None else min(self._policy.poll_s, max(0.02, due_at - now))

    def _deliver_and_free(self, delivery: Delivery, due: Subscription, stop: threading.Event) -> None:
        try:
            self._deliver(delivery, stop)
        except Exception as error:  # nobody looks at what a thread of the pool raises
            log.error("request %s: how its webhook went is lost", delivery.job.request_id, exc_info=error)
        finally:
            self._free.release()
            due.hint()  # its next try may be due before any other

    def _deliver(self, delivery: Delivery, stop: threading.Event) -> None:
        """Post it and record how that went."""
        request_id, outbox, delays = delivery.job.request_id, self._store.webhooks, self._policy.retry_delays_s
        if delivery.attempt > 1 + len(delays) + _LOST_TRIES:
            log.error("request %s: its webhook is given up: %s", request_id, _NEVER_RECORDED)
            self._record(stop, lambda: outbox.failed(delivery, _NEVER_RECORDED, retry_in_s=None))
            return
        refusal = self._refusal(delivery)
        if refusal is None:
            log.info("request %s: its webhook was delivered", request_id)
            self._record(stop, lambda: outbox.delivered(delivery))
            return
        retry_in_s = delays[delivery.attempt - 1] if delivery.attempt <= len(delays) else None
        then = "given up" if retry_in_s is None else f"tried again in {retry_in_s:g} s"
        log.warning("request %s: its webhook was not taken and is %s: %s", request_id, then, refusal)
        self._record(stop, lambda: outbox.failed(delivery, refusal, retry_in_s=retry_in_s))

    def _refusal(self, delivery: Delivery) -> str | None:
        """Why it was not taken; None if it was."""
        job = delivery.job
        try:
            body = self._body(delivery)
            headers = self._key.headers(job.request_id, job.owner, int(self._clock()), body)
            status = self._post(delivery.url, body, headers)
        except FetchError as error:
            return str(error)
        except Exception as error:  # a bug, or a result that another version wrote: counted, so that it comes to an end
            log.error("request %s: its webhook could not be made", job.request_id, exc_info=error)
            return f"it could not be made: {type(error).__name__}"
        return None if 200 <= status < 300 else f"the receiver answered {status}"

    def _body(self, delivery: Delivery) -> bytes:
        """fal's body. A result that is gone was gone before its time, which the receiver is told."""
        job = delivery.job
        if delivery.body is None:
            return failure_body(job.request_id, answer(ResultGone("the result was removed before it was delivered.")))
        if job.outcome is Outcome.OK:
            output = StoredOutput.from_json(json.loads(delivery.body))
            bases = bases_for(parse_origin(job.base_url or _NOWHERE), self._address_settings)
            return success_body(job.request_id, output.render(bases, with_report=self._policy.with_report))
        status, error_type = job.http_status or 500, job.error_type or "internal_error"
        return failure_body(job.request_id, kept_answer(status, error_type, delivery.body))

    def _record(self, stop: threading.Event, how_it_went: Callable[[], bool]) -> None:
        """Until the store has taken it: otherwise the receiver is told again."""
        failures = 0
        while True:
            try:
                how_it_went()
                return
            except StoreUnavailable as error:
                failures += 1
                if failures == 1:
                    log.warning("how a webhook went cannot be recorded yet: %s", error)
                if stop.wait(self._policy.retry.delay_s(failures)):
                    return


_NEVER_RECORDED = "it was tried beyond its schedule, and how the last tries went was never recorded."
_NOWHERE = "http://localhost"  # of a job that was submitted by other ways than HTTP
