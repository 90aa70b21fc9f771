"""How far the preference for merged LoRA sets goes: no job is overtaken by more later ones than the operator allows."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable

import pytest
from kontextd_server.settings import read_settings
from kontextd_server.store import NewJob, Policy, Priority, Store, Success

SETS = ("", "ink", "wash", "ink+wash")
WORKERS = ("w1", "w2", "w3")


def policy_of(most: int) -> Policy:
    return read_settings({"KONTEXTD_MAX_OVERTAKEN": str(most)}).store_policy()


def enqueue(store: Store, lora_key: str, priority: Priority = Priority.NORMAL) -> str:
    job = NewJob("e", "anna", b"{}", lora_key=lora_key, priority=priority)
    store.jobs.enqueue(job)
    return job.request_id


def overtakers(order: list[str], claimed: list[str]) -> dict[str, int]:
    """For each job, also one that waits still, how many that came later went before it."""
    came = {request_id: place for place, request_id in enumerate(order)}
    before = {request_id: claimed[:turn] for turn, request_id in enumerate(claimed)}
    return {job: sum(came[other] > came[job] for other in before.get(job, claimed)) for job in order}


@pytest.mark.parametrize("most", [0, 1, 5, 15])
def test_a_cold_job_is_overtaken_by_no_more_than_the_setting_says(opened: Callable[[Policy], Store], most: int) -> None:
    """Warm jobs come twice as fast as they are run; exactly so many go before the cold one."""
    store = opened(policy_of(most))
    cold, claimed = enqueue(store, "cold"), []
    order = [cold]
    while cold not in claimed:
        order += [enqueue(store, "warm"), enqueue(store, "warm")]
        claim = store.leases.claim("w1", warm_lora_key="warm")
        claimed.append(claim.request_id)
        store.leases.finish(claim.lease, Success(b"{}"))
        assert len(claimed) <= most + 1
    assert overtakers(order, claimed)[cold] == most


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("most", [2, 15])
def test_the_bound_holds_whatever_comes_and_whichever_worker_asks(
    opened: Callable[[Policy], Store], most: int, seed: int
) -> None:
    """Several workers, each with a set of its own merged, hand jobs back, lose them, and hint as callers do."""
    chance = random.Random(seed)
    store = opened(policy_of(most))
    warm = dict.fromkeys(WORKERS, "")
    order: list[str] = []
    claimed: list[str] = []
    for _ in range(120):
        order += [enqueue(store, chance.choice(SETS)) for _ in range(chance.choice((0, 1, 1, 3)))]
        worker = chance.choice(WORKERS)
        claim = store.leases.claim(worker, warm_lora_key=warm[worker])
        if claim is None:
            continue
        if chance.random() < 0.1:
            assert store.leases.release(claim.lease)
            continue
        claimed.append(claim.request_id)
        warm[worker] = claim.lora_key
        store.leases.finish(claim.lease, Success(b"{}"))
    assert len(claimed) > 80
    passed = overtakers(order, claimed)
    assert max(passed.values()) <= most
    assert any(passed.values())  # the preference was at work


def test_switches_are_fewer_than_in_order(opened: Callable[[Policy], Store]) -> None:
    """What the preference is for."""

    def switches(most: int) -> int:
        store = opened(policy_of(most))
        for lora_key in itertools.islice(itertools.cycle(("ink", "wash")), 32):
            enqueue(store, lora_key)
        merged = []
        while claim := store.leases.claim("w1", warm_lora_key=merged[-1] if merged else ""):
            merged.append(claim.lora_key)
            store.leases.finish(claim.lease, Success(b"{}"))
        return sum(before != after for before, after in itertools.pairwise(merged))

    assert switches(0) == 31
    assert switches(15) <= 4


def test_a_low_job_that_is_warm_never_goes_before_a_normal_one(opened: Callable[[Policy], Store]) -> None:
    store = opened(policy_of(15))
    enqueue(store, "warm", Priority.LOW)
    normal = enqueue(store, "cold")
    assert store.leases.claim("w1", warm_lora_key="warm").request_id == normal
