"""The register of workers."""

from __future__ import annotations

from dataclasses import replace

from kontextd_server.store import Policy, Store, Worker, WorkerState

WORKER = Worker("w1", "box", "cuda:0", 4711, WorkerState.STARTING, "v1")


def test_a_worker_is_known_by_its_last_word(store: Store, clock) -> None:
    started = clock.now
    store.workers.beat(WORKER)
    clock.pass_s(5)
    store.workers.beat(replace(WORKER, state=WorkerState.BUSY, lora_key="abc"))
    expected = replace(WORKER, state=WorkerState.BUSY, lora_key="abc", started_at=started, seen_at=clock.now)
    assert store.workers.live() == (expected,)


def test_a_silent_worker_does_not_count_as_live(store: Store, clock) -> None:
    store.workers.beat(WORKER)
    clock.pass_s(Policy().worker_silence_s)
    store.workers.beat(replace(WORKER, id="w2", state=WorkerState.READY))
    assert [worker.id for worker in store.workers.live()] == ["w2"]
    assert [worker.id for worker in store.workers.all()] == ["w1", "w2"]
    assert store.views.gauges().workers == {WorkerState.READY: 1}


def test_a_worker_that_ended_in_good_order_is_gone(store: Store) -> None:
    store.workers.beat(WORKER)
    store.workers.leave("w1")
    store.workers.leave("w1")
    assert store.workers.all() == ()
